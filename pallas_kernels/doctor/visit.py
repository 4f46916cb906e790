"""A visit of the doctor: what has no verdict yet is tried, and every verdict is kept at once."""

import json
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pallas_kernels.backends import find_backend
from pallas_kernels.dispatch import make_abstract_gpu
from pallas_kernels.doctor.examine import Outcome, examine
from pallas_kernels.doctor.report import describe_outcome
from pallas_kernels.doctor.trials import Trial, parse_trial
from pallas_kernels.machine import Gpu
from pallas_kernels.tables import TABLES
from pallas_kernels.verdict_files import SHIPPED, read_processors, read_verdicts, write_verdicts
from pallas_kernels.verdicts import Verdicts, describe_call

# Traces the steps of a config and prints the ops they call; it knows of configs, this package not.
_LIST_CALLS = (sys.executable, "-m", "sparsejax.tools.kernel_calls")


def keep_outcomes(
    trials: Sequence[Trial],
    gpu: Gpu,
    path: pathlib.Path,
    *,
    say: Callable[[str], None],
    only_faults: bool = False,
    limit_seconds: float = math.inf,
    **options: Any,
) -> list[Outcome]:
    """Try kernels and write each verdict as soon as it is known.

    Args:
      trials: what to try.
      gpu: of this machine.
      path: file of the verdicts.
      say: called with a line for each trial.
      only_faults: say nothing of kernels that are right, or that refuse such calls.
      limit_seconds: after which nothing is begun.
      **options: of `examine`.

    Returns:
      list of Outcome; shorter than `trials` if time was up.

    Raises:
      OSError: if the file cannot be written; nothing was tried then.
      ValueError: if there is one and it is no file of verdicts; nothing was tried then.
    """
    write_verdicts(path, [])
    began = time.monotonic()

    def keep(outcome: Outcome) -> None:
        write_verdicts(path, outcome.verdicts, processors=outcome.processors)
        if only_faults and not (outcome.fault or any(v.wrong for v in outcome.verdicts)):
            return
        call = describe_call(outcome.trial.op, outcome.trial.facts)
        found = f"{outcome.trial.backend} of {call}: {describe_outcome(outcome)}"
        say(f"{time.monotonic() - began:5.1f} s  {found}")

    return examine(trials, gpu.kind, done=keep, limit_seconds=limit_seconds, **options)


def drop_known(trials: Sequence[Trial], gpu: Gpu, path: pathlib.Path) -> list[Trial]:
    """Drop trials whose kernels have a verdict in every direction, or cannot run on the device.

    Args:
      trials: what is to be tried.
      gpu: of this machine.
      path: file of the verdicts; those shipped under the same name count as well.

    Raises:
      ValueError: if a file cannot be read.
    """
    paths = (SHIPPED / path.name, path)
    processors = next((n for n in map(read_processors, reversed(paths)) if n), None)
    if processors is None:
        return list(trials)
    verdicts = Verdicts(verdict for each in paths for verdict in read_verdicts(each))
    with jax.sharding.use_abstract_mesh(make_abstract_gpu(gpu.kind, processors)):
        return [trial for trial in trials if not _is_known(trial, verdicts)]


def _is_known(trial: Trial, verdicts: Verdicts) -> bool:
    op, name, facts = trial
    backend = find_backend(op, TABLES[op], name)
    try:
        backend.check(facts)
    except NotImplementedError:
        return True
    state = verdicts.judge(op, backend, facts).state
    if state == "right" and backend.needs_verdict:
        return verdicts.compare(op, backend, facts) is not None
    return state != "unproven"


def read_calls(config: Sequence[str], *, settings: str | None = None) -> list[tuple[str, Any]]:
    """List the ops that a run of a config calls, found by tracing its steps on the CPU.

    A process of its own traces: this one would take hold of the GPU.

    Args:
      config: arguments "--config=FILE" and "--config.KEY=VALUE", as of `train.py`; or "-".
      settings: all settings of the run as JSON, if `config` is "-".

    Returns:
      list of (op, facts).

    Raises:
      ValueError: if the config cannot be read; the message is that of `train.py`.
    """
    asked = subprocess.run(
        [*_LIST_CALLS, *config],
        input=settings,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if asked.returncode != 0:
        lines = asked.stderr.strip().splitlines() or ["no message"]
        raise ValueError(lines[-1].removeprefix("error: "))
    calls = json.loads(asked.stdout.strip().splitlines()[-1])
    return [(trial.op, trial.facts) for trial in map(parse_trial, calls)]
