"""Configs are found by name, and their settings changed, as by the path of their file."""

import pathlib
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from sparsejax.config import shipped
from sparsejax.config.command_line import name_files, read_settings

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def read(monkeypatch):
    """Return a function from arguments to settings, read with flags of its own."""

    def read(*arguments):
        # Where ml_collections looks for settings that are changed.
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        values = flags.FlagValues()
        options = {"lock_config": True, "flag_values": values}
        config = config_flags.DEFINE_config_file("config", None, **options)
        flags.DEFINE_string("target", "h200", "GPU to plan for.", flag_values=values)
        read_settings(sys.argv, values, config)
        return config.value.to_dict()

    return read


def test_every_config_that_is_a_run_has_a_name():
    files = {path.stem for path in (_ROOT / "configs").glob("*.py")}
    assert set(shipped.list_configs()) == files - {"__init__", "base", "lra"}


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    "by_name, by_file",
    [
        (["--config=quickstart"], "--config=configs/quickstart.py"),
        (["--config", "spion:image"], "--config=configs/spion.py:image"),
        (["-config=spion:image"], "--config=configs/spion.py:image"),
    ],
)
def test_a_name_gives_the_settings_of_its_file(by_name, by_file, read):
    by_file = by_file.replace("configs/", f"{_ROOT}/configs/")
    changes = ["--config.optimizer.learning_rate=0.5", "--config.optimizer.clip_norm=None"]
    settings = read(*by_name, *changes)
    assert settings == read(by_file, *changes)
    assert settings["optimizer"]["learning_rate"] == 0.5
    assert settings["optimizer"]["clip_norm"] is None


@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        ([], "none$"),
        (["--config.num_steps=3"], "none$"),
        (["--confg=quickstart", "--workdir=x"], "none; --confg is no flag$"),
    ],
    ids=["nothing", "only a setting", "misspelt"],
)
def test_a_missing_config_is_asked_for(arguments, got, read):
    message = f"^--config must be the name of a config or a .py file, got {got}"
    with pytest.raises(ValueError, match=message):
        read(*arguments)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_flags_in_a_file_are_as_those_of_the_command_line(read, tmp_path):
    file = tmp_path / "flags"
    file.write_text("--config=quickstart\n--config.num_steps=30\n")
    assert read(f"--flagfile={file}")["num_steps"] == 30
    file.write_text("--config=quickstart\n--config.recipe.sat.density=0.3\n")
    with pytest.raises(ValueError, match=r"recipe\.sat\.density must not be set in recipe 'spion'"):
        read(f"--flagfile={file}")


@pytest.mark.parametrize("value", ["configs/quickstart", "lra", "base", "", "zzz"])
def test_an_unknown_name_is_refused_with_those_there_are(value):
    with pytest.raises(ValueError, match=rf"one of copying, dense_small, .*, got '{value}'"):
        name_files(["train.py", f"--config={value}"])


def test_an_installed_package_looks_for_configs_inside_itself(tmp_path, monkeypatch):
    inside = tmp_path / "sparsejax" / "shipped" / "configs"
    inside.mkdir(parents=True)
    (inside / "mine.py").write_text('"""Ours.\n\nCommand:   sparsejax train --config=mine\n"""')
    (inside / "shared.py").write_text('"""Not a run."""')
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "sparsejax")
    assert shipped.list_configs() == ["mine"]
    assert shipped.find_config("mine:x") == f"{inside / 'mine.py'}:x"


def test_configs_come_first_and_the_current_folder_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = str(shipped.find_root())
    # Not first: another project's `configs` may be in the way.
    for before in (["elsewhere"], ["elsewhere", root]):
        monkeypatch.setattr(sys, "path", [*before])
        shipped.extend_path()
        shipped.extend_path()
        assert sys.path == [root, *before, str(tmp_path)]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.num_steps=1e3", "^num_steps must be a whole number, got '1e3'$"),
        ("--config.optimizer.learning_rate=fast", "learning_rate must be a number, got 'fast'$"),
        ("--config.model.scan_layers=maybe", "scan_layers must be True or False, got 'maybe'$"),
        ("--config.recipe=fst", "^recipe must be set by one of its keys, .*, got 'fst'$"),
        ("--num_steps=10", "no flag --num_steps; .*=VALUE; did you mean '--config.num_steps'"),
        ("--clip_norm=10", "did you mean '--config.optimizer.clip_norm'"),
        (
            "--config.recipe.spion.densty=0.1",
            "^there is no setting 'recipe.spion.densty'; did you mean 'recipe.spion.dens",
        ),
        ("--config.zzz.zzz=1", "^there is no setting 'zzz.zzz'; `sparsejax settings` lists them"),
        ("--config=quickstart:long", "no variants, .* got --config=quickstart:long$"),
        (
            "--config.recipe.sat.density=0.3",
            "^config.recipe.sat.density must not be set in recipe 'spion', which has no use for",
        ),
        (
            "--config.recipe.sat.latest_switch_fraction=None",
            "^config.recipe.sat.latest_switch_fraction must not be set in recipe 'spion'",
        ),
        (
            "--noconfig.recipe.sat.continue_schedule",
            "^noconfig.recipe.sat.continue_schedule must not be set in recipe 'spion'",
        ),
        ("--taget=h100", "no flag --taget; .*; did you mean '--target'"),
        ("--config=nowhere.py", "an existing .py file, got 'nowhere.py'$"),
    ],
)
def test_a_mistyped_argument_is_named_with_what_was_expected(argument, message, read):
    with pytest.raises(ValueError, match=message):
        read("--config=quickstart", argument)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_settings_of_each_method_that_trains_may_be_set(read):
    flags = ["--config.recipe.sat.density=0.3", "--config.recipe.fst.decay_rate=1e-4"]
    settings = read("--config=sat_quickstart", "--config.recipe.name=sat+fst", *flags)
    assert settings["recipe"]["sat"]["density"] == 0.3
