"""Evaluate a run: its newest checkpoint, masks included."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.accounting.density import compute_density
from sparsejax.checkpoint.save import restore
from sparsejax.checkpoint.workdir import (
    check_same_run,
    describe_run,
    find_newest_checkpoint,
    keep_schedule,
    read_run,
)
from sparsejax.config.mesh import MeshConfig
from sparsejax.config.parse import ConfigError, naming_data, parse_config
from sparsejax.config.schema import TrainConfig
from sparsejax.data import EvaluatedSplit, change_source, describe_data, load_tokenizer
from sparsejax.report.progress import say
from sparsejax.training.setup import (
    Run,
    compile_evaluation,
    find_phase,
    prepare_run,
)
from sparsejax.training.validation import sum_over_batches

SPLITS: tuple[EvaluatedSplit, ...] = ("train", "validation", "all")


def evaluate(
    config: TrainConfig,
    workdir: str | os.PathLike,
    *,
    split: str | None = None,
    source: str | None = None,
) -> dict[str, Any]:
    """Restore the newest checkpoint and evaluate it.

    Args:
      config: settings of the run.
      workdir: folder of the run.
      split: "train", "validation" or "all" of both, without random changes; None = "validation" of
        the run's data, "all" of another source. `num_eval_batches` limits it.
      source: other data, as `data.source`, read with the run's tokenizer; None = the run's data.

    Returns:
      step, phase, and of the split its loss and accuracy, such as validation_loss, those of "all"
      without a word before them; of a language model also tokens, perplexity and, if its ids stand
      for bytes, bytes and bits_per_byte; attention_density and, if the phase has sparse weights,
      weight_density.

    Raises:
      ConfigError: if the folder holds no checkpoint of a run with these settings, or the data does
        not fit its model.
    """
    if split not in (None, *SPLITS):
        raise ConfigError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    checkpoints = Path(workdir) / "checkpoints"
    if not checkpoints.is_dir():
        raise ConfigError(f"--workdir={workdir} must hold a run's checkpoints, found none")
    config = keep_schedule(config, checkpoints)
    if source is None:
        run = prepare_run(config)
        check_same_run(checkpoints, describe_run(config, run.data.fingerprint, run.data.spec))
    else:
        run = _prepare_on_source(config, Path(workdir), source)
    if split is None:
        split = "validation" if source is None else "all"
    info, problems = find_newest_checkpoint(checkpoints)
    for problem in problems:
        say(f"warning: checkpoint ignored: {problem}")
    if info is None:
        raise ConfigError(f"--workdir={workdir} must hold a whole checkpoint, found none")
    try:
        phase = find_phase(run.recipe, info.metadata["phase"])
        state, _ = restore(info, run.make_abstract_state(phase.name))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    batches = run.data.passes[split]  # of a split without examples, none
    first = next(run.data.passes["all"](1))
    eval_step = compile_evaluation(run, phase, run.put_batch(first))
    block_lists = run.make_block_lists(state, phase)
    count_bytes = _make_byte_counter(run)
    totals = sum_over_batches(
        run,
        lambda batch: eval_step(state, batch, block_lists) | count_bytes(batch),
        batches(config.num_eval_batches or None),
    )
    if not totals:
        raise ConfigError(f"split={split!r} of {run.config.data.source} must have an example")
    density = compute_density(run.model_config, state.sparsity.masks, phase)
    result = {"step": info.step, "phase": phase.name, **_summarise(run, split, totals)}
    result["attention_density"] = float(density.attention.mean())
    if (mean := density.mean_weights) is not None:
        result["weight_density"] = mean
    return result


def evaluate_run(
    workdir: str | os.PathLike,
    *,
    split: str | None = None,
    source: str | None = None,
    mesh: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Evaluate a run with the settings that it has recorded.

    Args:
      workdir: folder of the run.
      split: as of `evaluate`.
      source: as of `evaluate`.
      mesh: sizes of `config.mesh`; None = those of the run, or, if the devices are not as many,
        each with a whole state.

    Returns:
      What `evaluate` returns.

    Raises:
      ConfigError: as `evaluate` does, or if the mesh does not fit the devices.
    """
    config = read_run(workdir).config
    if mesh is None and not config.mesh.fits(jax.device_count()):
        mesh = {}
        say(f"note: devices here: {jax.device_count()}, which the run's mesh does not fit; data=-1")
    if mesh is not None:
        sizes = dataclasses.asdict(MeshConfig()) | dict(mesh)
        config = parse_config(config.to_dict() | {"mesh": sizes})
    return evaluate(config, workdir, split=split, source=source)


def _prepare_on_source(config: TrainConfig, workdir: Path, source: str) -> Run:
    """Open other data than the run's, which need not be there."""
    recorded = read_run(workdir)
    described = describe_run(config, recorded.fingerprint, recorded.spec)
    check_same_run(workdir / "checkpoints", described)
    with naming_data():
        data = change_source(config.data, source)
        spec = describe_data(data)
    if spec != recorded.spec:
        raise ConfigError(
            f"eval_source={source!r} must be data like the run's, {recorded.spec}, got {spec}"
        )
    try:
        tokenizer = load_tokenizer(recorded.fingerprint["tokenizer"], workdir)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return prepare_run(dataclasses.replace(config, data=data), tokenizer=tokenizer)


def _make_byte_counter(run: Run) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    """Return the function that counts the bytes which the targets of a batch stand for."""
    byte_lengths = run.data.tokenizer.byte_lengths
    if run.data.spec.task != "language_model" or byte_lengths is None:
        return lambda batch: {}
    lengths_V = byte_lengths().astype(np.int32)

    def count(batch):
        asked_B1 = batch["loss_weights"][:, None] > 0
        return {"bytes": jnp.where(asked_B1, jnp.asarray(lengths_V)[batch["targets"]], 0).sum()}

    return jax.jit(count, out_shardings=run.replicated)


def _summarise(run: Run, split: EvaluatedSplit, totals: dict[str, float]) -> dict[str, Any]:
    prefix = "" if split == "all" else f"{split}_"
    loss = totals["loss"] / totals["count"]
    result: dict[str, Any] = {
        f"{prefix}loss": loss,
        f"{prefix}accuracy": totals["correct"] / totals["count"],
    }
    if run.data.spec.task != "language_model":
        return result
    result |= {"tokens": round(totals["count"]), "perplexity": float(np.exp(loss))}
    if "bytes" in totals:
        result["bytes"] = round(totals["bytes"])
        result["bits_per_byte"] = totals["loss"] / totals["bytes"] / math.log(2)
    return result
