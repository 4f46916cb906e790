"""The doctor's work on the device, in a process that may hang or die.

  python -m pallas_kernels.doctor.child prove SECONDS DEVICE TRIALS RESULTS
  python -m pallas_kernels.doctor.child time SECONDS DEVICE TRIALS RESULTS

DEVICE is the kind that JAX has to run on: without CUDA's plugin it would take the CPU. An alarm
ends the process if a trial takes more than SECONDS. TRIALS is a JSON file with a list of trials. Of
each, one line of JSON is added to RESULTS before its kernel is compiled and one when it is done:
the end of the process shows which one it was.
"""

import dataclasses
import functools
import json
import pathlib
import signal
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.backends import Backend, find_backend
from pallas_kernels.dispatch import count_processors
from pallas_kernels.doctor.contract import check_contract
from pallas_kernels.doctor.makers import MAKERS
from pallas_kernels.doctor.timing import time_interleaved
from pallas_kernels.doctor.trials import Trial, parse_trial
from pallas_kernels.tables import TABLES

# Two, so that a straight line through them says at which density the dense model is as fast.
DENSITIES = (0.1, 0.5)
# What dense attention of a timed call may take: its logits, their gradients, and both once more.
_DENSE_BYTES = 6_000_000_000


def prove(trial: Trial, begin: Callable[[str], None]) -> dict[str, Any]:
    """Check one backend on one call.

    Args:
      trial: what to check.
      begin: called with the tile before anything is compiled.

    Returns:
      JSON values: "refused", why the backend does not take such calls; or "findings" by direction,
      with "refused_gradient" where it has none.
    """
    backend = find_backend(trial.op, TABLES[trial.op], trial.backend)
    try:
        backend.check(trial.facts)
    except NotImplementedError as error:
        return {"refused": str(error)}
    begin(backend.tile(trial.facts))
    problem = MAKERS[trial.op].make(shrink(trial, backend))
    answer: dict[str, Any] = {}
    try:
        findings = check_contract(problem, trial.backend, tuple(problem.names))
    except NotImplementedError as error:
        answer["refused_gradient"] = str(error)
        findings = check_contract(problem, trial.backend, tuple(problem.names)[:1])
    return answer | {"findings": {name: found._asdict() for name, found in findings.items()}}


def shrink(trial: Trial, backend: Backend[Any, Any]) -> Any:
    """Return the facts of the smallest call that runs the same kernel as that of a trial.

    Args:
      trial: what to check.
      backend: its backend.
    """
    for facts in MAKERS[trial.op].shrink(trial.facts):
        try:
            backend.check(facts)
        except NotImplementedError:
            continue
        if backend.tile(facts) == backend.tile(trial.facts):
            return facts
    return trial.facts


def measure(trial: Trial, begin: Callable[[str], None]) -> dict[str, Any]:
    """Time a backend, the portable one that it competes with, and the dense model, in turns.

    Args:
      trial: what to time, at the call's own sizes but for a batch that the dense model can hold.
      begin: called before anything is compiled.

    Returns:
      JSON values: "timings", one for each density.
    """
    begin("")
    maker, table = MAKERS[trial.op], TABLES[trial.op]
    facts = _fit(trial.facts)
    portable = next(row.name for row in table if row.suits(facts))
    problem, directions = maker.make(facts), facts.DIRECTIONS
    functions = {
        name: problem.call(name, directions) for name in dict.fromkeys((trial.backend, portable))
    }
    if maker.dense is not None:
        functions.setdefault("dense", maker.dense(facts))
    compiled = {name: jax.jit(function) for name, function in functions.items()}
    timings = []
    densities = DENSITIES if maker.dense is not None else (0.5,)
    for density in densities:
        mask = None if maker.draw_mask is None else maker.draw_mask(facts, density)
        seconds = time_interleaved(
            {name: _call(function, problem.inputs, mask) for name, function in compiled.items()},
            repeats=7,
            limit_seconds=2.0,
        )
        medians = {name: statistics.median(samples) for name, samples in seconds.items()}
        timings.append({"sizes": facts.sizes, "density": density, "seconds": medians})
    return {"timings": timings}


def _call(function: Callable[..., Any], inputs: Any, mask: Any) -> Callable[[], Any]:
    return lambda: function(inputs, mask)


def _fit(facts: Any) -> Any:
    """Make the batch of an attention call so small that dense attention fits."""
    while getattr(facts, "batch", 1) > 1:
        heads, queries, keys = facts.sizes
        if 16 * heads * queries * keys <= _DENSE_BYTES:
            break
        half = facts.batch // 2
        mask_shape = facts.mask_shape and (min(facts.mask_shape[0], half), facts.mask_shape[1])
        facts = dataclasses.replace(facts, batch=half, mask_shape=mask_shape)
    return facts


type Task = Callable[[Trial, Callable[[str], None]], dict[str, Any]]
TASKS: Mapping[str, Task] = {"prove": prove, "time": measure}


def main(arguments: list[str], tasks: Mapping[str, Task] = TASKS) -> None:
    """Do a task on all trials of a file.

    Args:
      arguments: name of the task, seconds of a trial, kind of the device, file of trials, file
        of results.
      tasks: name -> what is done on each trial.
    """
    task, seconds, kind = tasks[arguments[0]], int(arguments[1]), arguments[2]
    trials, results = map(pathlib.Path, arguments[3:])
    # The system ends the process, whatever Python waits for.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    found = jax.devices()[0].device_kind
    if found != kind:
        sys.exit(f"JAX runs on {found!r} and not on {kind!r}; is jax[cuda13] installed?")
    with results.open("a") as file:
        for index, values in enumerate(json.loads(trials.read_text())):
            signal.alarm(seconds)
            begin = functools.partial(_begin, file, index)
            try:
                answer = task(parse_trial(values), begin)
            except Exception as error:
                # What does not fit, with the reference beside it, is no fault of the kernel.
                kind_of_answer = "no_memory" if "RESOURCE_EXHAUSTED" in str(error) else "failed"
                text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                answer = {kind_of_answer: text}
            _write(file, {"index": index, **answer})


def _begin(file: Any, index: int, tile: str) -> None:
    processors = count_processors() if jax.default_backend() == "gpu" else None
    _write(file, {"began": index, "tile": tile, "processors": processors})


def _write(file: Any, values: dict[str, Any]) -> None:
    file.write(json.dumps(values) + "\n")
    file.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
