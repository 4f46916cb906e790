"""Who may go on in the folder of a run."""

import dataclasses

import jax
import pytest

from configs import base
from sparsejax.checkpoint.workdir import (
    check_same_run,
    claim_workdir,
    describe_run,
    keep_schedule,
    read_choices,
    read_run,
)
from sparsejax.config.parse import ConfigError, parse_config
from sparsejax.data import DataSpec
from sparsejax.strict_json import dump_json

_CONFIG = parse_config(base.get_config().to_dict())


def _describe(config=_CONFIG, tokens=3):
    spec = DataSpec("language_model", vocab_size=256, num_classes=0)
    return describe_run(config, {"tokens": tokens, "tokenizer": "bytes"}, spec)


@pytest.fixture(name="checkpoints")
def _checkpoints(tmp_path, monkeypatch):
    """The folder of a run that has saved something."""
    monkeypatch.setattr("sparsejax.checkpoint.workdir.find_checkpoints", lambda *_, **__: ["one"])
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "run.json").write_text(dump_json(_describe()))
    return folder


def test_what_defines_a_run_is_compared(checkpoints):
    assert check_same_run(checkpoints, _describe()) == []
    other = dataclasses.replace(_CONFIG, seed=1)
    with pytest.raises(ConfigError, match=r"other settings.*\n  seed: 0 -> 1$"):
        check_same_run(checkpoints, _describe(other))
    with pytest.raises(ConfigError, match=r"other data.*\n  tokens: 3 -> 4$"):
        check_same_run(checkpoints, _describe(tokens=4))


def test_a_setting_that_came_later_has_its_default(checkpoints):
    config = base.get_config()
    config.recipe.name = "spion"
    config.recipe.spion.quantile = 0.5
    config = parse_config(config.to_dict())
    record = _describe(config)
    del record["config"]["recipe"]["spion"]["per_head"]
    (checkpoints / "run.json").write_text(dump_json(record))
    assert check_same_run(checkpoints, _describe(config)) == []
    assert read_run(checkpoints.parent).config == config
    sections = {"spion": {**config.recipe.settings, "per_head": True}}
    recipe = dataclasses.replace(config.recipe, sections=sections)
    with pytest.raises(ConfigError, match=r"recipe.spion.per_head: False -> True$"):
        check_same_run(checkpoints, _describe(dataclasses.replace(config, recipe=recipe)))


@pytest.mark.parametrize(
    "change",
    [
        {"num_steps": 2000},
        {"eval_every_steps": 7},
        {"num_eval_batches": 1},
        {"log_every_steps": 3},
        {"max_consecutive_skips": 9},
        {"checkpoint": dataclasses.replace(_CONFIG.checkpoint, keep_last=5)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_how_a_run_is_watched_may_change_and_is_told(change, checkpoints):
    (line,) = check_same_run(checkpoints, _describe(dataclasses.replace(_CONFIG, **change)))
    assert line.startswith(f"changed from here: {next(iter(change))}")


def test_a_resumed_run_keeps_the_schedule_that_it_was_started_with(checkpoints):
    started = dataclasses.replace(_CONFIG, schedule_steps=1000)
    (checkpoints / "run.json").write_text(dump_json(_describe(started)))
    longer = dataclasses.replace(_CONFIG, num_steps=1500)
    assert keep_schedule(longer, checkpoints).schedule_steps == 1000
    other = keep_schedule(dataclasses.replace(longer, schedule_steps=1500), checkpoints)
    with pytest.raises(ConfigError, match=r"\n  schedule_steps: 1000 -> 1500$"):
        check_same_run(checkpoints, _describe(other))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("jax_threefry_partitionable", False),
        ("jax_default_matmul_precision", "highest"),
        ("jax_default_prng_impl", "rbg"),
        ("jax_enable_x64", True),
        ("jax_random_seed_offset", 7),
    ],
)
def test_flags_that_change_bits_are_named(flag, value, checkpoints):
    before = jax.config.values[flag]
    jax.config.update(flag, value)
    try:
        (line,) = check_same_run(checkpoints, _describe())
    finally:
        jax.config.update(flag, before)
    assert (
        line == f"the run goes on, but not bit for bit as before, {flag}: '{before}' -> '{value}'"
    )


@pytest.mark.parametrize("name", ["XLA_FLAGS", "NVIDIA_TF32_OVERRIDE"])
def test_what_compilers_read_from_the_environment_is_named(name, checkpoints, monkeypatch):
    monkeypatch.setenv(name, "0")
    (line,) = check_same_run(checkpoints, _describe())
    assert f"{name}: " in line and line.endswith("-> '0'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"run.json must describe a run by config, data, spec, versions, got '\[\]'"),
        ("{}", "run.json must describe a run"),
        ("null", "must hold a run.json that describes the run"),
        ('{"config": 1, "data": {}, "spec": {}, "versions": {}}', "run.json must describe a run"),
        ("{", "run.json must be JSON, but is garbled"),
        (None, "must hold a run.json that describes the run"),
    ],
)
def test_a_run_that_says_nothing_of_itself_is_refused(text, message, checkpoints):
    (checkpoints / "run.json").unlink()
    if text is not None:
        (checkpoints / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        check_same_run(checkpoints, _describe())
    with pytest.raises(ConfigError, match=message):
        read_run(checkpoints.parent)


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "checkpoints", "summary.json"])
def test_a_link_in_the_folder_is_refused_and_left_as_it_is(name, tmp_path):
    victim, workdir = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    workdir.mkdir()
    (workdir / name).symlink_to(victim)
    refusal = pytest.raises(ConfigError, match=rf"and no links, got \['{name}'\]")
    with refusal, claim_workdir(workdir):
        pass
    assert victim.read_text() == "precious"
    (tmp_path / "linked").symlink_to(tmp_path / "target")
    (tmp_path / "target").mkdir()
    with claim_workdir(tmp_path / "linked") as path:
        assert path.is_dir()


@pytest.mark.parametrize("name", ["training.png", "summary.json", "metrics.jsonl"])
def test_a_folder_in_the_place_of_a_file_is_refused_at_the_start(name, tmp_path):
    (tmp_path / name).mkdir()
    message = rf"no folders named like files of a run, got \['{name}'\]"
    with pytest.raises(ConfigError, match=message), claim_workdir(tmp_path):
        pass


def test_two_runs_do_not_share_a_folder(tmp_path):
    with claim_workdir(tmp_path):
        refusal = pytest.raises(ConfigError, match="--workdir=.* is in use by another process$")
        with refusal, claim_workdir(tmp_path):
            pass
    with claim_workdir(tmp_path):
        pass


@pytest.mark.parametrize("value", ["12", None, -3, 0, True, 1000.0, [12]])
def test_a_recorded_schedule_that_is_none_is_refused(value, checkpoints):
    record = _describe()
    record["config"]["schedule_steps"] = value
    (checkpoints / "run.json").write_text(dump_json(record))
    with pytest.raises(ConfigError, match=r"config.schedule_steps in .*run.json must be a whole"):
        keep_schedule(_CONFIG, checkpoints)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("spec", {}, "spec in .*run.json must be made of task, vocab_size"),
        ("spec", {"task": "nope"}, "spec in .*run.json must be made of"),
        ("data", {}, "data.tokenizer in .*run.json must be the name of a tokenizer, got None"),
        ("implementations", "abc", "implementations in .*run.json must be names of backends"),
        ("implementations", [1], "implementations in .*run.json must be names of backends"),
    ],
)
def test_a_damaged_record_is_named(part, value, message, checkpoints):
    (checkpoints / "run.json").write_text(dump_json(_describe() | {part: value}))
    with pytest.raises(ConfigError, match=message):
        (read_choices if part == "implementations" else _read_workdir)(checkpoints)


def _read_workdir(checkpoints):
    return read_run(checkpoints.parent)
