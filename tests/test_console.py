"""The command `sparsejax`: what it lists, what it hands on, and what it refuses."""

import pathlib
import shlex
import subprocess
import sys
import tomllib

import pytest
from absl import flags
from packaging.requirements import Requirement

from pallas_kernels.doctor import __main__ as doctor
from sparsejax import __main__ as console
from sparsejax import command
from sparsejax.config import command_line
from sparsejax.config.parse import list_settings
from sparsejax.version import __version__

_ROOT = pathlib.Path(__file__).parents[1]
_MODES = {
    "train": "train",
    "eval": "eval",
    "generate": "generate",
    "plan": "plan",
    "find-decay": "find_decay",
}


def _run(program, *arguments):
    return subprocess.run(
        [sys.executable, *program, *arguments], cwd=_ROOT, capture_output=True, text=True
    )


@pytest.fixture
def handed_on(monkeypatch):
    """Return what the command hands to the shared command line, which does not run here."""
    calls = []

    def run(argv, *, resume_command):
        calls.append((argv, resume_command))
        raise SystemExit(0)

    monkeypatch.setattr(command, "run", run)
    return calls


def test_help_lists_every_command_in_a_line_and_imports_nothing_slow():
    program = (
        "import sys; from sparsejax.__main__ import main; code = main(['--help'])\n"
        "print(code, sorted({'jax', 'numpy', 'absl', 'ml_collections'} & sys.modules.keys()))"
    )
    lines = _run(["-c", program]).stdout.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "]
    assert listed == [*_MODES, "settings", "doctor", "sparsejax"]
    assert lines[-1] == "0 []"


def test_version_is_that_of_the_package(capsys):
    assert console.main(["--version"]) == 0
    assert capsys.readouterr().out == f"sparsejax {__version__}\n"


@pytest.mark.parametrize("name", _MODES)
def test_a_mode_gets_its_arguments_and_a_command_that_resumes(name, handed_on):
    arguments = ["--config=quickstart", "--config.seed=1"]
    if name == "generate":
        arguments = ["--workdir=runs/mine", "--prompt=a b"]
    with pytest.raises(SystemExit):
        console.main([name, *arguments])
    ((argv, resume),) = handed_on
    assert argv == [f"sparsejax {name}", f"--mode={_MODES[name]}", *arguments]
    assert shlex.split(resume) == [sys.executable, "-m", "sparsejax", name, *arguments]


def test_commands_and_their_options_are_all_modes_and_flags():
    defined = {flag.name for flag in flags.FLAGS.flags_by_module_dict()["sparsejax.command"]}
    modes = {name: entry for name, entry in console._COMMANDS.items() if entry.options}
    assert {name.replace("-", "_") for name in modes} == {*flags.FLAGS["mode"].parser.enum_values}
    assert {"mode", *(option for entry in modes.values() for option in entry.options)} == defined


@pytest.mark.parametrize("name", _MODES)
def test_help_of_a_mode_lists_its_options_alone(name, handed_on, capsys):
    assert console.main([name, "--help"]) == 0
    said = capsys.readouterr().out
    first = {"eval": "[--config=CONFIG ", "generate": "--workdir=FOLDER "}
    assert said.startswith(f"usage: sparsejax {name} {first.get(name, '--config=CONFIG ')}")
    listed = {line.split()[0] for line in said.splitlines() if line.startswith("  --")}
    assert listed == {f"--{option}" for option in console._COMMANDS[name].options}
    assert ("sparsejax settings" in said) == (name != "generate") and not handed_on
    assert ("GPU to plan for. Default: h200.\n" in said) == (name == "plan")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], "got 'trian'; did you mean 'train'?"),
        (
            ["--config=quickstart"],
            "must be one of train, eval, generate, plan, find-decay, settings, doctor",
        ),
        ([], "got none; see sparsejax --help"),
        (
            ["eval", "--target=h100"],
            "--num_processes, --process_id, got '--target=h100'",
        ),
        (
            ["eval", "--mode=train"],
            "--num_processes, --process_id, got '--mode=train'",
        ),
        (["settings", "optimiser"], "such as optimizer, got 'optimiser'"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(arguments, message, handed_on, capsys):
    assert console.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said
    assert not handed_on


def test_settings_are_listed_by_section(capsys):
    assert console.main(["settings", "recipe.sat", "num_steps"]) == 0
    keys = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[0] != " "]
    names = [setting.name for setting in list_settings()]
    assert keys == [key for key in names if key.startswith("recipe.sat.") or key == "num_steps"]
    assert console.main(["settings", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: sparsejax settings")


def test_the_doctor_is_the_one_of_the_kernels(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "list_trials", lambda calls: [])
    monkeypatch.setattr(doctor, "find_gpu", lambda: None)
    assert console.main(["doctor", "--op=nm_matmul"]) == 0
    assert "nvidia-smi finds no NVIDIA GPU here" in capsys.readouterr().out
    assert console.main(["doctor", "--opp=nm_matmul"]) == 2
    assert "unknown argument '--opp=nm_matmul'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        console.main(["doctor", "--help"])
    assert capsys.readouterr().out.startswith("usage: sparsejax doctor ")


_WRONG_FLAGS = [
    ("--mode=generate --workdir=a", "--prompt or --prompt_file must be given, got neither"),
    ("--mode=generate --workdir=a --prompt=b --prompt_file=c", "must be given, got both"),
    ("--mode=generate --prompt=b", "--workdir must be a folder, got none"),
    ("--mode=generate --pretrained=a --workdir=b", "--workdir must not be given with --pretrained"),
    ("--mode=generate --workdir=a --split=all", "--split must not be given with --mode=generate"),
    ("--workdir=a --temperature=1", "--temperature must not be given with --mode=train"),
    ("--mode=eval --pretrained=a", "--choices must be given to evaluate a model of --pretrained"),
    ("--mode=eval --workdir=a --choices=b --eval_source=c", "--eval_source must not be given with"),
    ("--mode=eval --choices=b --distributed", "--choices must have one process"),
    ("--mode=generate --config=a", "--config must not be given with --mode=generate"),
]


def test_flags_that_do_not_go_together_are_refused_in_one_line():
    program = f"""
from absl import flags
from sparsejax import command
for text in {[text for text, _ in _WRONG_FLAGS]!r}:
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    arguments = [each for each in text.split() if not each.startswith("--config")]
    flags.FLAGS(["train.py", *arguments])
    flags.FLAGS["config"].present = int("--config" in text)
    print(command._find_wrong_process_flag() or command._find_wrong_flag(["train.py"]))
"""
    lines = _run(["-c", program]).stdout.splitlines()
    for line, (_, message) in zip(lines, _WRONG_FLAGS, strict=True):
        assert message in line


@pytest.mark.parametrize("arguments", [["--mode=eval", "--config.seed=1"], ["--mode=train"]])
def test_without_a_config_settings_cannot_be_changed_and_nothing_trains(arguments):
    with pytest.raises(ValueError, match="--config must be the name of a config"):
        command_line.read_settings(["train.py", *arguments], flags.FLAGS, None)


@pytest.mark.parametrize("program", [("-m", "sparsejax", "train"), ("train.py",)])
def test_both_programs_refuse_an_unknown_config_alike(program):
    result = _run(program, "--config=quickstrat")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(
        "error: --config must be a .py file or one of copying, dense_small, "
    )
    assert result.stderr.endswith("got 'quickstrat'; did you mean 'quickstart'?\n")


def test_packages_of_the_extra_data_are_known_by_the_names_that_are_imported():
    extras = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    listed = {Requirement(line).name for line in extras["optional-dependencies"]["data"]}
    imported = {name.replace("-", "_") for name in listed - {"pillow"}} | {"PIL"}
    assert imported == command.DATA_PACKAGES


@pytest.mark.ci
def test_a_source_whose_package_is_not_installed_says_what_to_install(tmp_path):
    arguments = ["train", "--config=spion:listops", f"--workdir={tmp_path}"]
    arguments.append(f"--config.data.data_dir={tmp_path}")
    program = (
        "import sys; sys.modules['tensorflow_datasets'] = None\n"
        "from sparsejax.__main__ import main; main()"
    )
    result = _run(["-c", program], *arguments)
    message = "error: data.source='listops' needs tensorflow_datasets: install sparsejax[data]\n"
    assert result.returncode == 2 and result.stderr == message
