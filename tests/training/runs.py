"""A run small enough to be trained many times in a test, on text that the test writes itself."""

import dataclasses
import pathlib
import re
import shutil
from typing import Any

import jax
import pytest

from configs import base
from sparsejax.checkpoint.save import find_checkpoints, restore
from sparsejax.config.parse import parse_config
from sparsejax.report.metrics import read_metrics
from sparsejax.strict_json import load_json
from sparsejax.training.loop import train_and_evaluate
from sparsejax.training.setup import prepare_run
from sparsejax.training.state import TrainState

NUM_STEPS = 10


def write_corpus(folder: pathlib.Path) -> pathlib.Path:
    """Write a text file whose next byte can be guessed from the ones before."""
    path = folder / "corpus.txt"
    path.write_text("".join(f"{i} plus {i % 7} is {i + i % 7}.\n" for i in range(400)))
    return path


def make_settings(folder: pathlib.Path, **changes: Any) -> dict[str, Any]:
    """Return settings that switch from dense to sparse attention after step 6 of 10.

    `changes` are dotted keys with double underscores for dots: model__num_layers=3.
    """
    config = base.get_config()
    config.num_steps = NUM_STEPS
    config.eval_every_steps = 5
    config.num_eval_batches = 2
    config.log_every_steps = 1
    config.model.num_layers = 2
    config.model.model_dim = 32
    config.model.num_heads = 2
    config.model.mlp_dim = 64
    config.model.dropout_rate = 0.1
    config.model.use_bias = False
    config.model.block_size = 16
    config.data.source = f"text:{write_corpus(folder)}"
    config.data.data_dir = str(folder / "data")
    config.data.sequence_length = 64
    config.data.batch_size = 4
    config.optimizer.warmup_fraction = 0.2
    config.recipe.name = "spion"
    config.recipe.spion.quantile = 0.5
    config.recipe.spion.filter_size = 3
    config.recipe.spion.probe_interval_fraction = 0.2
    config.recipe.spion.latest_switch_fraction = 0.6
    config.recipe.spion.max_change_percent = 1
    config.checkpoint.every_steps = 1
    for key, value in changes.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return config.to_dict()


def train(settings: dict[str, Any], workdir: pathlib.Path) -> dict[str, Any] | None:
    """Train in this process."""
    return train_and_evaluate(parse_config(settings), workdir, resume_command="the same command")


def train_and_listen(
    settings: dict[str, Any], workdir: pathlib.Path
) -> tuple[dict[str, Any] | None, list[str]]:
    """Train; return the summary, and in order what the run said and when JAX compiled."""
    events: list[str] = []

    def note_compilation(event, _seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append("compiled")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsejax.training.loop.say", events.append)
        jax.monitoring.register_event_duration_secs_listener(note_compilation)
        try:
            return train(settings, workdir), events
        finally:
            jax.monitoring.unregister_event_duration_listener(note_compilation)


def assert_documented(workdir: pathlib.Path) -> None:
    """Find the names of a run's rows, summary and FLOPs in docs/metrics.md, for their kind."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    rows, rest = page.split("## Summary")
    kinds = dict(re.findall(r"^\| `(.*?)` \| (.*?) \|", rows, re.MULTILINE))
    for row in read_metrics(workdir / "metrics.jsonl"):
        for name in row:
            found = kinds[re.sub(r"/.*", "/NAME", name)]
            assert found == "all" or row["kind"] in found.split(", "), (name, row["kind"])
    book = load_json((workdir / "flops.json").read_text())
    for name in load_json((workdir / "summary.json").read_text()):
        phase = next((phase for phase in book if name.startswith(f"{phase}_")), None)
        own = "PHASE" + name.removeprefix(phase) if phase else name
        assert f"`{name}`" in rest or f"`{own}`" in rest, name
    for entry in book.values():
        assert all(f"`{name}`" in rest for name in entry)


def load_end(settings: dict[str, Any], workdir: pathlib.Path) -> tuple[TrainState, Any]:
    """Return the last state of a finished run, its key as plain data, and the data's position."""
    info = find_checkpoints(workdir / "checkpoints")[0]
    assert info.step == settings["num_steps"]
    run = prepare_run(parse_config(settings))
    state, data_state = restore(info, run.make_abstract_state(info.metadata["phase"]))
    return dataclasses.replace(state, key=jax.random.key_data(state.key)), data_state


def copy_until(workdir: pathlib.Path, step: int, target: pathlib.Path) -> pathlib.Path:
    """Copy a run as it stood after a step."""
    shutil.copytree(workdir, target)
    for info in find_checkpoints(target / "checkpoints"):
        if info.step > step:
            shutil.rmtree(info.path)
    return target
