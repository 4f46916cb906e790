"""Train and evaluate: phases, validation, checkpoints, and a state that resumes bit for bit."""

import contextlib
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparsejax.accounting.density import compute_density, describe_density
from sparsejax.accounting.ledger import FlopsLedger
from sparsejax.checkpoint.save import (
    Checkpointer,
    CheckpointInfo,
    check_free_space,
    count_bytes,
    find_checkpoints,
    restore,
)
from sparsejax.checkpoint.workdir import (
    check_same_run,
    claim_workdir,
    describe_run,
    find_newest_checkpoint,
)
from sparsejax.config import ConfigError, TrainConfig
from sparsejax.recipes import Observation, Phase, get_attention_masks
from sparsejax.report.metrics import DeferredMetrics, MetricsWriter, read_metrics
from sparsejax.report.plots.attention import plot_attention_patterns
from sparsejax.report.plots.flips import has_flip_rates, plot_flip_rates
from sparsejax.report.plots.topology import has_topology, plot_topology
from sparsejax.report.plots.training import plot_training
from sparsejax.report.progress import (
    StepTimer,
    format_progress,
    format_summary,
    say,
    summarise,
)
from sparsejax.strict_json import dump_json
from sparsejax.training.setup import (
    Programs,
    Run,
    compile_phase,
    compute_validation,
    find_phase,
    prepare_run,
)
from sparsejax.training.signals import StopRequest
from sparsejax.training.state import TrainState
from sparsejax.training.step import STEP_METRICS, Batch


class NonFiniteError(FloatingPointError):
    """Loss or gradient was not finite for too many steps in a row."""


def train_and_evaluate(
    config: TrainConfig,
    settings: Mapping[str, Any],
    workdir: str | os.PathLike,
    *,
    resume_command: str,
) -> dict[str, Any] | None:
    """Train to the last step, from where the folder's newest checkpoint stands.

    Args:
      config: TrainConfig.
      settings: the nested mapping that `config` was parsed from, recorded with the checkpoints.
      workdir: folder of the run: checkpoints, metrics, pictures, summary.
      resume_command: str, shown when a signal stops the run.

    Returns:
      dict of scalars, also written to `summary.json`; None if a signal stopped the run.

    Raises:
      ConfigError: if the settings, the data or the folder cannot be used.
      NonFiniteError: if too many steps in a row were skipped.
    """
    with claim_workdir(workdir) as path:
        try:
            return _train(config, settings, path, resume_command)
        except NonFiniteError as error:
            # Asked after the save under way has ended, so that it counts.
            good, _ = find_newest_checkpoint(path / "checkpoints")
            raise NonFiniteError(
                f"{error}; last good checkpoint: {good.path if good else 'none'}"
            ) from error


def _train(
    config: TrainConfig, settings: Mapping[str, Any], workdir: Path, resume_command: str
) -> dict[str, Any] | None:
    checkpoints = workdir / "checkpoints"
    run = prepare_run(config)
    description = describe_run(settings, run.data.fingerprint)
    for line in check_same_run(checkpoints, description):
        say(f"note: the run goes on, but not bit for bit as before, {line}")
    info, problems = find_newest_checkpoint(checkpoints)
    for problem in problems:
        say(f"warning: checkpoint ignored: {problem}")
    if info is not None and info.step >= config.num_steps:
        say(f"{workdir} is finished: {info.step} steps were trained")
        return _finish(run, workdir, info)

    if info is None:
        phase, spent = run.recipe.phases[0], None
        needed = count_bytes(run.make_abstract_state(phase.name))
        try:
            # All that are kept, and the one being written before the oldest goes.
            copies = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
            check_free_space(checkpoints, needed * copies)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        state = run.create_state()
        say(f"training {workdir}: {describe_model(run, state)}")
    else:
        try:
            phase, spent = find_phase(run, info.metadata["phase"]), info.metadata["flops"]
            state, data_state = restore(info, run.make_abstract_state(phase.name))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        run.data.train.set_state(data_state)
        say(f"resuming {workdir} at step {info.step} in phase {phase.name!r} from {info.path}")

    with contextlib.ExitStack() as stack:
        try:
            checkpointer = Checkpointer(
                checkpoints,
                keep_last=config.checkpoint.keep_last,
                keep_best=config.checkpoint.keep_best,
                run_metadata=description,
            )
            writer = MetricsWriter(workdir, resume_step=None if info is None else info.step)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        stack.enter_context(checkpointer)
        stack.enter_context(writer)
        stop = stack.enter_context(StopRequest())
        ledger = FlopsLedger(run.model, batch_size=config.data.batch_size, spent=spent)
        loop = _Loop(run, state, phase, ledger, writer, workdir)
        last = stopping = False
        while not (last or stopping):
            loop.advance()
            # Asked once: a signal that comes later must not end the loop before a save.
            last, stopping = loop.step == config.num_steps, stop.signal_name is not None
            metrics = None
            if last or loop.step % config.eval_every_steps == 0:
                metrics = loop.validate()
            if last or stopping or loop.step % config.checkpoint.every_steps == 0:
                loop.save(checkpointer, metrics, block=last or stopping)
    # Of this step: a newer folder may be a damaged one that this run did not start from.
    saved = find_checkpoints(checkpoints, verify_checksums=False)
    newest = next(info for info in saved if info.step == loop.step)
    if not last:
        say(f"stopped by {stop.signal_name}; step {newest.step} is saved in {newest.path}")
        say(f"resume with: {resume_command}")
        return None
    return _finish(run, workdir, newest)


def describe_model(run: Run, state: TrainState) -> str:
    """Return one line about what is trained on what.

    Args:
      run: Run.
      state: TrainState.

    Returns:
      str.
    """
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return (
        f"{run.recipe.name}, {num_params / 1e6:.2f}M parameters, {run.model.num_layers} layers, "
        f"{run.model.max_length} positions, {run.config.data.source} on "
        f"{run.replicated.num_devices} x {jax.devices()[0].device_kind}"
    )


class _Loop:
    """The moving parts of a run: state, phase, compiled programs and what was measured."""

    def __init__(
        self,
        run: Run,
        state: TrainState,
        phase: Phase,
        ledger: FlopsLedger,
        writer: MetricsWriter,
        workdir: Path,
    ):
        self.run, self.state, self.phase = run, state, phase
        self.ledger, self.writer, self.workdir = ledger, writer, workdir
        self.step = int(state.step)
        self.metrics, self.timer = DeferredMetrics(), StepTimer()
        self.programs: Programs | None = None
        self.step_seconds: float | None = None
        self.num_skipped = 0
        self.flip_rate: float | None = None
        self.tokens_per_step = _count_step_tokens(run)

    def advance(self) -> None:
        """Train one step, and enter the next phase if it is time."""
        batch = self.run.put(next(self.run.data.train))
        if self.programs is None:
            # A resumed run has recorded the beginning of its phase before.
            self.programs = self._begin_phase(batch, record=self.step == 0)
        phase, step = self.phase, self.step + 1
        settled = False
        every_steps = phase.probe_every_steps
        if self.programs.probing_step and every_steps and step % every_steps == 0:
            if every_steps > 1:
                self.flush()
            began = time.perf_counter()
            self.state, metrics, observation = self.programs.probing_step(self.state, batch)
            settled = self._report(observation, step, began)
            self.metrics.push(step, metrics)
            # The report has waited for the step: its end is now.
            self._record(self.metrics.flush())
        else:
            self.state, metrics = self.programs.train_step(self.state, batch)
            self._record(self.metrics.push(step, metrics))
        self.step = step
        phases = self.run.recipe.phases
        expired = phase.last_step is not None and step >= phase.last_step
        if (settled or expired) and phase is not phases[-1]:
            self.flush()
            reason = phase.ends_when if settled else "its last step is reached"
            self.writer.write(step, {"kind": "switch", "phase": phase.name, "reason": reason})
            say(f"       | step {step} | phase {phase.name!r} ends: {reason}")
            self.phase = phases[phases.index(phase) + 1]
            self.state = self.run.enter_phase(self.state, self.phase)
            self.programs = self._begin_phase(batch, record=True)
        elif phase is not phases[-1] and phase.last_step is None:
            self._warn_of_waiting()

    def validate(self) -> dict[str, float]:
        """Evaluate and record.

        Returns:
          dict of floats by name.
        """
        assert self.programs is not None, "advance comes first"
        self.flush()
        values = compute_validation(self.run, self.programs.eval_step, self.state)
        row = {"kind": "validation", "phase": self.phase.name, **values}
        self.writer.write(self.step, row)
        say(f"       | step {self.step} | validation loss {values['validation_loss']:.4f}")
        return values

    def save(
        self, checkpointer: Checkpointer, metrics: dict[str, float] | None, *, block: bool
    ) -> None:
        """Save a checkpoint of the state as it is now."""
        self.flush()
        checkpointer.save(
            self.step,
            self.state,
            self.run.data.train.get_state(),
            metadata={"phase": self.phase.name, "flops": self.ledger.spent},
            metrics=metrics,
            block=block,
        )

    def flush(self) -> None:
        """Record what is still on its way, and do not time what follows as a step."""
        self._record(self.metrics.flush())
        self.timer.interrupt()

    def _warn_of_waiting(self) -> None:
        num_steps = self.run.config.num_steps
        for percent in (50, 90):
            if self.step == num_steps * percent // 100:
                say(
                    f"warning: after {percent} % of the run phase {self.phase.name!r} goes on: it "
                    f"waits until {self.phase.ends_when}"
                )

    def _begin_phase(self, batch: Batch, *, record: bool) -> Programs:
        self.flip_rate = None
        programs = compile_phase(self.run, self.phase, batch)
        density = compute_density(self.run.model, self.state.sparsity.masks, self.phase)
        self.ledger.begin_phase(self.phase, density)
        flops, dense_flops = self.ledger.step_flops, self.ledger.dense_step_flops
        row = {
            "kind": "phase",
            "phase": self.phase.name,
            **self.ledger.describe_step(),
            "layer_density": density.attention.tolist(),
            "layer_weight_density": {n: x.tolist() for n, x in density.weights.items()},
            "step_memory_bytes": programs.step_memory_bytes,
            "dense_step_flops": dense_flops,
            "compile_seconds": programs.compile_seconds,
        }
        if record:
            self.writer.write(self.step, row)
        say(
            f"phase {self.phase.name!r} from step {self.step}: {describe_density(density)}, "
            f"{flops / 1e9:,.1f} GFLOPs per step ({flops / dense_flops:.0%} of dense), "
            f"{programs.step_memory_bytes / 1e6:,.0f} MB per step, compiled once in "
            f"{programs.compile_seconds:.1f} s"
        )
        if record and self.phase.sparse_attention:
            self._plot_patterns()
        self.timer.interrupt()
        return programs

    def _plot_patterns(self) -> None:
        statistics = self.state.sparsity.statistics
        plot_attention_patterns(
            np.asarray(get_attention_masks(self.state.sparsity.masks)),
            np.asarray(statistics["pooled"]) if "pooled" in statistics else None,
            path=self.workdir / "attention_patterns.png",
            causal=self.run.model.causal,
            title=f"{self.run.recipe.name}: attention blocks from step {self.step}",
        )

    def _report(self, observation: Observation, step: int, began: float) -> bool:
        change, metrics = jax.device_get((observation.change_phase, observation.metrics))
        values = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        row = {"kind": "probe", "phase": self.phase.name, **values}
        self.writer.write(step, row | {"probing_step_seconds": time.perf_counter() - began})
        every_steps = max(self.phase.probe_every_steps or 1, self.run.config.log_every_steps)
        if step % every_steps and not change:
            return False
        # A metric that does not exist yet is NaN throughout.
        known = {name: value for name, value in values.items() if not np.isnan(value).all()}
        shown = ", ".join(f"{name} {_format(value)}" for name, value in known.items())
        say(f"       | step {step} | attention probe: {shown}")
        return bool(change)

    def _record(self, fetched) -> None:
        if fetched is None:
            return
        step, values = fetched
        values = {
            name: value
            for name, value in values.items()
            if name in STEP_METRICS or not np.isnan(value).all()
        }
        seconds = self.timer.lap()
        row = {"kind": "train", "phase": self.phase.name, **values, **self.ledger.book(values)}
        if seconds is not None:
            self.step_seconds = row["step_seconds"] = seconds
        self.writer.write(step, row)
        self.flip_rate = row.get("flip_rate", self.flip_rate)
        self.num_skipped = self.num_skipped + 1 if values["skipped"] else 0
        if values["skipped"]:
            say(
                f"warning: step {step} skipped, loss {values['loss']} is not finite or its gradient"
            )
        if self.num_skipped > self.run.config.max_consecutive_skips:
            raise NonFiniteError(
                f"step {step}: loss or gradient was not finite for {self.num_skipped} steps in a "
                f"row (max_consecutive_skips={self.run.config.max_consecutive_skips})"
            )
        if step == 1 or step % self.run.config.log_every_steps == 0:
            row |= {"step": step, "tokens_per_step": self.tokens_per_step}
            if self.flip_rate is not None:
                row["flip_rate"] = self.flip_rate
            say(
                format_progress(
                    row, num_steps=self.run.config.num_steps, step_seconds=self.step_seconds
                )
            )


def _count_step_tokens(run: Run) -> int:
    return run.config.data.batch_size * run.config.data.sequence_length * run.model.num_towers


def _finish(run: Run, workdir: Path, last: CheckpointInfo) -> dict[str, Any]:
    spent = last.metadata["flops"]
    rows = read_metrics(workdir / "metrics.jsonl")
    phases = [phase.name for phase in run.recipe.phases]
    summary = {
        "recipe": run.recipe.name,
        "seed": run.config.seed,
        "num_steps": run.config.num_steps,
        **summarise(rows, spent, phases=phases, tokens_per_step=_count_step_tokens(run)),
        "workdir": str(workdir),
        "checkpoint": str(last.path),
        "device": jax.devices()[0].device_kind,
    }
    phase = find_phase(run, last.metadata["phase"])
    if phase is not run.recipe.phases[-1]:
        summary["waited_until"] = phase.ends_when
    (workdir / "summary.json").write_text(dump_json(summary) + "\n")
    (workdir / "flops.json").write_text(dump_json(spent) + "\n")
    switches = {row["phase"]: row["step"] for row in rows if row["kind"] == "phase" and row["step"]}
    plot_training(rows, switch_steps=switches, path=workdir / "training.png")
    if has_flip_rates(rows):
        plot_flip_rates(rows, path=workdir / "flip_rates.png")
    if has_topology(rows):
        plot_topology(rows, path=workdir / "topology.png")
    say(format_summary(summary, spent, phases=phases))
    return summary


def _format(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_format(item) for item in value) + "]"
    return f"{value:.3g}" if isinstance(value, float) and math.isfinite(value) else str(value)
