"""Train and evaluate: phases, validation, checkpoints, and a state that resumes bit for bit."""

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsejax.accounting.density import compute_density
from sparsejax.accounting.ledger import FlopsLedger, check_totals
from sparsejax.checkpoint.save import Checkpointer
from sparsejax.checkpoint.workdir import (
    claim_workdir,
    describe_run,
    find_last_good,
    find_saved,
    keep_schedule,
    require_same,
)
from sparsejax.config.parse import ConfigError
from sparsejax.config.schema import TrainConfig
from sparsejax.data import keep_tokenizer
from sparsejax.processes import decide, fetch, is_first, share
from sparsejax.recipes import Observation, Phase
from sparsejax.report.live import TrainingPicture
from sparsejax.report.metrics import DeferredMetrics, Fetched, fetch_metrics, open_metrics
from sparsejax.report.progress import StepTimer, format_metrics, format_progress, say
from sparsejax.report.tensorboard import TensorBoardWriter
from sparsejax.report.writers import RowWriter
from sparsejax.training.describe import describe_costs, describe_model, make_title
from sparsejax.training.finish import finish_run
from sparsejax.training.initial import check_initial
from sparsejax.training.profile import StepProfiler, StepRange
from sparsejax.training.setup import Programs, Run, compile_phase, prepare_run
from sparsejax.training.signals import StopRequest
from sparsejax.training.start import Start, open_or_resume
from sparsejax.training.step import Batch, explain_skip
from sparsejax.training.validation import compute_validation


class NonFiniteError(FloatingPointError):
    """Too many steps in a row were skipped, or the last validation is not finite.

    Attributes:
      after_step: int, the state after this step is the first that does not train.
    """

    def __init__(self, message: str, after_step: int):
        super().__init__(message)
        self.after_step = after_step


def train_and_evaluate(
    config: TrainConfig,
    workdir: str | os.PathLike,
    *,
    resume_command: str,
    writers: Sequence[RowWriter] = (),
    profile_steps: StepRange | None = None,
) -> dict[str, Any] | None:
    """Train to the last step, from where the folder's newest checkpoint stands.

    Args:
      config: settings, recorded with the checkpoints.
      workdir: folder of the run: checkpoints, metrics, pictures, summary.
      resume_command: shown when a signal stops the run.
      writers: told of every row of metrics, and closed after the last; those that are told of none
        are the caller's to close.
      profile_steps: what JAX's profiler traces, None for nothing.

    Returns:
      Scalars by name, also written to `summary.json`; None if a signal stopped the run.

    Raises:
      ConfigError: if the settings, the data or the folder cannot be used.
      NonFiniteError: if too many steps in a row were skipped, or the last validation is not finite.
    """
    with claim_workdir(workdir) as path:
        config = keep_schedule(config, path / "checkpoints")
        check_initial(config, path / "checkpoints")
        run = prepare_run(config)
        description = describe_run(config, run.data.fingerprint, run.data.spec)
        start = open_or_resume(run, path, description)
        # With it, a model can be loaded where its data is not.
        decide(lambda: keep_tokenizer(run.data.tokenizer, path))
        if start.state is None:
            say(f"{path} is finished: {start.step} steps were trained")
            if profile_steps is not None:
                say("warning: no trace of steps: a finished run trains none")
            with _open_checkpoints(run, path, description):
                pass  # which deletes what a kill after the last save has left
            return finish_run(run, path, start.checkpoint)
        if profile_steps is not None:
            profile_steps.check_within(start.step + 1, config.num_steps)
        if start.checkpoint is None:
            say(f"training {path}: {describe_model(run, start.state)}")
        else:
            where = f"at step {start.step} in phase {start.phase.name!r}"
            say(f"resuming {path} {where} from {start.checkpoint.path}")
        with StopRequest() as stop:
            try:
                loop = _run_steps(run, start, path, description, writers, profile_steps, stop)
            except NonFiniteError as error:
                # Asked after the save under way has ended, so that it counts.
                good = find_last_good(path / "checkpoints", before_step=error.after_step)
                message = f"{error}; last good checkpoint: {good.path if good else 'none'}"
                raise share(NonFiniteError(message, error.after_step)) from error
            # A newer one may be damaged, so that this run did not start from it.
            newest = find_saved(path / "checkpoints", loop.step)
            if loop.stopped_by is None:
                return finish_run(run, path, newest)
            say(f"stopped by {loop.stopped_by}; step {newest.step} is saved in {newest.path}")
            say(f"resume with: {resume_command}")
            return None


def _open_checkpoints(run: Run, workdir: Path, description: dict[str, Any]) -> Checkpointer:
    kept = run.config.checkpoint
    try:
        return Checkpointer(
            workdir / "checkpoints",
            keep_last=kept.keep_last,
            keep_best=kept.keep_best,
            run_metadata=description | {"implementations": run.choices},
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _run_steps(
    run: Run,
    start: Start,
    workdir: Path,
    description: dict[str, Any],
    writers: Sequence[RowWriter],
    profile_steps: StepRange | None,
    stop: StopRequest,
) -> "_Loop":
    """Train to the last step or to a signal, and save there."""
    resume_step = None if start.checkpoint is None else start.step
    own_writers = (
        TensorBoardWriter(workdir, resume_step=resume_step, settings=run.config.to_dict()),
        TrainingPicture(workdir, make_title(run, workdir)),
    )
    with contextlib.ExitStack() as stack:
        try:
            check_totals(start.totals or {})
            checkpointer = stack.enter_context(_open_checkpoints(run, workdir, description))
            writer = stack.enter_context(
                open_metrics(
                    workdir, resume_step=resume_step, writers=[*own_writers, *writers], warn=say
                )
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        # Of all processes the first is traced.
        traced = profile_steps if is_first() else None
        profiler = stack.enter_context(StepProfiler(workdir, traced, warn=say))

        def record_choices() -> None:
            require_same("backends of sparse ops", run.choices)
            checkpointer.describe_run(description | {"implementations": run.choices})

        loop = _Loop(run, start, writer, workdir, record_choices)
        while loop.stopped_by is None and loop.step < run.config.num_steps:
            profiler.begin_step(loop.step + 1)
            loop.advance()
            profiler.end_step(loop.step, loop.state)
            # Asked once: a signal that comes later must not end the loop before a save.
            last, loop.stopped_by = loop.step == run.config.num_steps, stop.find_cause(loop.step)
            validates = last or loop.step % run.config.eval_every_steps == 0
            metrics = loop.validate() if validates else None
            loop.save(checkpointer, metrics, ends=last or loop.stopped_by is not None)
    if loop.step == run.config.num_steps:
        loop.stopped_by = None
    return loop


class _Loop:
    """The moving parts of a run: state, phase, compiled programs and what was measured."""

    def __init__(
        self,
        run: Run,
        start: Start,
        writer: RowWriter,
        workdir: Path,
        record_choices: Callable[[], None],
    ):
        assert start.state is not None, "a finished run has nothing to do"
        self.run, self.state, self.phase, self.step = run, start.state, start.phase, start.step
        self.writer, self.workdir, self.record_choices = writer, workdir, record_choices
        self.ledger = FlopsLedger(
            run.model_config, batch_size=run.config.data.batch_size, totals=start.totals
        )
        self.metrics, self.timer = DeferredMetrics(), StepTimer()
        self.programs: Programs | None = None
        self.block_lists = run.make_block_lists(self.state, self.phase)
        self.stopped_by: str | None = None
        self.num_skipped = int(start.state.num_skipped)
        self.last_known: dict[str, float] = {}

    def advance(self) -> None:
        """Train one step, and enter the next phase if it is time."""
        batch = self.run.put_batch(next(self.run.data.train))
        if self.programs is None:
            # A resumed run has recorded the beginning of its phase before.
            self.programs = self._begin_phase(batch, record=self.step == 0)
        every_steps = self.phase.probe_every_steps
        probes = every_steps is not None and (self.step + 1) % every_steps == 0
        settled = self._probe(batch) if probes else self._train(batch)
        self.step += 1
        following = self.run.recipe.find_next(self.phase, step=self.step, settled=settled)
        if following is not None:
            reason = self.phase.ends_when if settled else "its last step is reached"
            self._enter_phase(following, batch, reason)
        elif self.phase != self.run.recipe.phases[-1] and self.phase.last_step is None:
            self._warn_of_waiting()

    def validate(self) -> dict[str, float]:
        """Evaluate and record."""
        assert self.programs is not None, "advance comes first"
        self.flush()
        values = compute_validation(self.run, self.programs.eval_step, self.state, self.block_lists)
        row = {"kind": "validation", "phase": self.phase.name, **values}
        self.writer.write(self.step, row)
        say(f"       | step {self.step} | validation loss {values['validation_loss']:.4f}")
        if self.step == self.run.config.num_steps and not _is_finite(values):
            raise NonFiniteError(
                f"step {self.step}: the last validation is not finite", self.step - self.num_skipped
            )
        return values

    def save(
        self, checkpointer: Checkpointer, metrics: dict[str, float] | None, *, ends: bool
    ) -> None:
        """Save a checkpoint if it is time, or if its validation is among the best.

        One that is not good is saved at the end alone.
        """
        periodic = ends or self.step % self.run.config.checkpoint.every_steps == 0
        if not periodic and (metrics is None or not checkpointer.ranks_among_best(metrics)):
            return
        self.flush()
        good = not self.num_skipped and (metrics is None or _is_finite(metrics))
        if not (good or ends):
            return
        checkpointer.save(
            self.step,
            self.state,
            self.run.data.train.get_state(),
            metadata={"phase": self.phase.name, "flops": self.ledger.totals},
            metrics=metrics,
            good=good,
            periodic=periodic,
            block=ends,
        )

    def flush(self) -> None:
        """Record what is still on its way, and do not time what follows as a step."""
        self._record(self.metrics.flush())
        self.timer.interrupt()

    def _train(self, batch: Batch) -> bool:
        assert self.programs is not None
        self.state, metrics = self.programs.train_step(self.state, batch, self.block_lists)
        self._record(self.metrics.push(self.step + 1, metrics))
        return False

    def _probe(self, batch: Batch) -> bool:
        """Train one step that shows the recipe its attention; return whether the phase ends."""
        assert self.programs is not None and self.programs.probing_step is not None
        if self.phase.probe_every_steps != 1:
            self.flush()
        began = time.perf_counter()
        self.state, metrics, observation = self.programs.probing_step(
            self.state, batch, self.block_lists
        )
        settled = self._report(observation, self.step + 1, began)
        self.metrics.push(self.step + 1, metrics)
        # The report has waited for the step: its end is now.
        self._record(self.metrics.flush())
        return settled

    def _enter_phase(self, following: Phase, batch: Batch, reason: str) -> None:
        self.flush()
        self.writer.write(self.step, {"kind": "switch", "phase": self.phase.name, "reason": reason})
        say(f"       | step {self.step} | phase {self.phase.name!r} ends: {reason}")
        self.state = self.run.enter_phase(self.state, following, previous=self.phase)
        self.phase = following
        self.block_lists = self.run.make_block_lists(self.state, self.phase)
        self.programs = self._begin_phase(batch, record=True)

    def _warn_of_waiting(self) -> None:
        num_steps = self.run.config.num_steps
        for percent in (50, 90):
            if self.step == num_steps * percent // 100:
                say(
                    f"warning: after {percent} % of the run phase {self.phase.name!r} goes on: it "
                    f"waits until {self.phase.ends_when}"
                )

    def _begin_phase(self, batch: Batch, *, record: bool) -> Programs:
        self.last_known, self.timer = {}, StepTimer()
        say(f"compiling phase {self.phase.name!r} ...")
        programs = compile_phase(self.run, self.phase, batch)
        self.record_choices()
        density = compute_density(self.run.model_config, self.state.sparsity.masks, self.phase)
        self.ledger.begin_phase(self.phase, density)
        row = {
            "kind": "phase",
            "phase": self.phase.name,
            **self.ledger.describe_step(),
            "layer_attention_density": density.attention.tolist(),
            "layer_weight_density": {n: x.tolist() for n, x in density.weights.items()},
            "step_memory_bytes": programs.step_memory_bytes,
            "dense_step_flops": self.ledger.dense_step_flops,
            "compile_seconds": programs.compile_seconds,
        }
        if begun := self.run.recipe.phase_metrics(self.state.sparsity, self.phase):
            row["phase_metrics"] = fetch_metrics(fetch(begun))
            for warning in self.run.recipe.phase_warnings(row["phase_metrics"]):
                say(f"warning: {warning}")
        if record:
            # Drawn first: TensorBoard shows the pictures beside the row.
            self._draw_phase()
            self.writer.write(self.step, row)
        costs = describe_costs(self.ledger, density, programs)
        say(f"phase {self.phase.name!r} from step {self.step}: {costs}")
        return programs

    def _draw_phase(self) -> None:
        """Draw on all processes, as each may hold a part, and keep the picture of the first."""
        with contextlib.ExitStack() as stack:
            elsewhere = tempfile.TemporaryDirectory
            folder = self.workdir if is_first() else Path(stack.enter_context(elsewhere()))
            state, draw = self.state, self.run.recipe.draw_phase
            draw(state.sparsity, self.phase, step=self.step, folder=folder)

    def _report(self, observation: Observation, step: int, began: float) -> bool:
        values, change = fetch_metrics(observation.metrics), bool(observation.change_phase)
        row = {"kind": "probe", "phase": self.phase.name, **values}
        self.writer.write(step, row | {"probing_step_seconds": time.perf_counter() - began})
        every_steps = max(self.phase.probe_every_steps or 1, self.run.config.log_every_steps)
        # Nothing is known of a step that was skipped.
        if values and (change or step % every_steps == 0):
            say(f"       | step {step} | attention probe: {format_metrics(values)}")
        return change

    def _record(self, fetched: Fetched | None) -> None:
        if fetched is None:
            return
        step, values = fetched
        seconds, recipe = self.timer.lap(), self.run.recipe
        flops = self.ledger.record_step(recipe.account(values))
        row = {"kind": "train", "phase": self.phase.name, **values, **flops}
        if seconds is not None:
            row["step_seconds"] = seconds
            row["tokens_per_second"] = self.run.tokens_per_step / seconds
        self.writer.write(step, row)
        self.last_known |= {
            label: row[name] for name, label in recipe.progress_metrics if name in row
        }
        self.num_skipped = self.num_skipped + 1 if values["skipped"] else 0
        if values["skipped"]:
            say(f"warning: step {step} skipped: {explain_skip(values)}")
        # A run that trains nothing fails, however short it is.
        most, num_steps = self.run.config.max_consecutive_skips, self.run.config.num_steps
        if self.num_skipped > min(most, num_steps - 1):
            few = self.num_skipped <= most
            reached = f"num_steps={num_steps}" if few else f"max_consecutive_skips={most}"
            raise NonFiniteError(
                f"step {step} skipped, as were {self.num_skipped} in a row: {explain_skip(values)} "
                f"({reached})",
                step - self.num_skipped,
            )
        if step == 1 or step % self.run.config.log_every_steps == 0:
            line = format_progress(
                row | {"step": step},
                num_steps=self.run.config.num_steps,
                tokens_per_step=self.run.tokens_per_step,
                step_seconds=self.timer.typical_seconds,
                shown=self.last_known,
            )
            say(line)


def _is_finite(metrics: dict[str, float]) -> bool:
    return all(math.isfinite(value) for value in metrics.values())
