"""Try kernels in processes of their own, and turn what came back into verdicts.

A child reports numbers; whether they are right is decided here. Where one hangs or dies, the trial
that it had begun is wrong, and another child goes on with the rest.
"""

import concurrent.futures
import dataclasses
import json
import math
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pallas_kernels.backends import find_backend
from pallas_kernels.doctor.isolation import run_isolated
from pallas_kernels.doctor.trials import Trial
from pallas_kernels.source_hash import hash_source
from pallas_kernels.tables import TABLES
from pallas_kernels.verdicts import KernelKey, Timing, Verdict

CHILD = (sys.executable, "-m", "pallas_kernels.doctor.child")
# The CPU stays available for what is drawn on the host.
ENVIRONMENT = {"JAX_PLATFORMS": "cuda,cpu"}
# JAX starts, the kernel, the reference and the baseline compile: 10 to 20 s on a GPU machine.
TRIAL_SECONDS = 60
_SECONDS_TO_START = 60
# Children that prove at a time; timing is done by one alone.
_CHILDREN = 4
# Trials of one child: a later one costs only its own compilation.
_PER_CHILD = 8


class Outcome(NamedTuple):
    """What became of one trial.

    Attributes:
      trial: what was tried.
      verdicts: of each direction, if the kernel is known.
      refusal: why the backend does not take such calls; "" if it does.
      fault: what went wrong before the kernel was known, so that there is no verdict.
      processors: streaming multiprocessors of the device, None if it was not reached.
    """

    trial: Trial
    verdicts: tuple[Verdict, ...]
    refusal: str = ""
    fault: str = ""
    processors: int | None = None

    @property
    def is_right(self) -> bool:
        """Whether every direction of the op is right."""
        return bool(self.verdicts) and not any(v.wrong or v.refused for v in self.verdicts)


def examine(
    trials: Sequence[Trial],
    kind: str,
    *,
    done: Callable[[Outcome], None] = lambda outcome: None,
    limit_seconds: float = math.inf,
    trial_seconds: int = TRIAL_SECONDS,
    child: Sequence[str] = CHILD,
    environment: Mapping[str, str] = ENVIRONMENT,
) -> list[Outcome]:
    """Prove and time trials on the device of this machine.

    Args:
      trials: what to try; an op and backend share children with no other.
      kind: of the device, as the driver names it; nothing is tried on another.
      done: called with each outcome as soon as it is known.
      limit_seconds: after which no child is started; trials that are left have no outcome.
      trial_seconds: after which a trial hangs.
      child: command of a child, to which task and files are added.
      environment: variables of a child.

    Returns:
      list of Outcome, in order of trials.
    """
    deadline, stop = time.monotonic() + limit_seconds, threading.Event()

    def run(task: str, part: list[tuple[int, Trial]]) -> dict[int, dict[str, Any]]:
        return run_children(
            task,
            part,
            kind,
            deadline=deadline,
            stop=stop,
            trial_seconds=trial_seconds,
            child=child,
            environment=environment,
        )

    outcomes: dict[int, Outcome] = {}
    numbered = list(enumerate(trials))
    with concurrent.futures.ThreadPoolExecutor(_CHILDREN) as executor:
        try:
            proofs = [executor.submit(run, "prove", part) for part in _share_out(numbered)]
            for proof in concurrent.futures.as_completed(proofs):
                for index, answer in proof.result().items():
                    outcome = judge(trials[index], answer)
                    outcomes[index] = outcome
                    if not (outcome.is_right and _competes(trials[index])):
                        done(outcome)
        except BaseException:
            # The executor waits for its threads, and those for their children.
            stop.set()
            raise
    # One after the other: two at a time would slow each other down.
    to_time = [(i, t) for i, t in numbered if i in outcomes and outcomes[i].is_right]
    for part in _share_out([(i, t) for i, t in to_time if _competes(t)]):
        for index, answer in run("time", part).items():
            outcomes[index] = add_timings(outcomes[index], answer)
            done(outcomes[index])
    return [outcomes[index] for index, _ in numbered if index in outcomes]


def _competes(trial: Trial) -> bool:
    return find_backend(trial.op, TABLES[trial.op], trial.backend).needs_verdict


def _share_out(numbered: Iterable[tuple[int, Trial]]) -> list[list[tuple[int, Trial]]]:
    """Give each op and backend children of its own, each a few trials."""
    groups: dict[tuple[str, str], list[tuple[int, Trial]]] = {}
    for index, trial in numbered:
        groups.setdefault((trial.op, trial.backend), []).append((index, trial))
    return [
        group[start : start + _PER_CHILD]
        for group in groups.values()
        for start in range(0, len(group), _PER_CHILD)
    ]


def run_children(
    task: str,
    part: list[tuple[int, Trial]],
    kind: str,
    *,
    deadline: float,
    stop: threading.Event,
    trial_seconds: int,
    child: Sequence[str],
    environment: Mapping[str, str],
) -> dict[int, dict[str, Any]]:
    """Run a task on trials, in as many children as it takes.

    Args:
      task: "prove" or "time".
      part: trials by number.
      kind: of the device.
      deadline: of the monotonic clock; no child is started after it.
      stop: set to end the child under way, after which none is started.
      trial_seconds: that a child has for each trial.
      child: command, to which task and files are added.
      environment: variables of a child.

    Returns:
      number -> what the child wrote of the trial, or {"fault": how the child ended}.
    """
    answers: dict[int, dict[str, Any]] = {}
    while part and time.monotonic() < deadline and not stop.is_set():
        with tempfile.TemporaryDirectory() as folder:
            trials, results = (pathlib.Path(folder, name) for name in ("trials", "results"))
            trials.write_text(json.dumps([trial.to_json() for _, trial in part]))
            results.touch()
            ended = run_isolated(
                [*child, task, str(trial_seconds), kind, str(trials), str(results)],
                # A trial ends itself before, unless the driver holds it.
                limit_seconds=trial_seconds * len(part) + _SECONDS_TO_START,
                environment=environment,
                stop=stop,
            )
            begun, answered = read_results(results.read_text(errors="replace"), len(part))
        found = {place: begun.get(place, {}) | answer for place, answer in answered.items()}
        broken = [place for place in begun if place not in found]
        if ended.fault and broken:
            found[broken[-1]] = begun[broken[-1]] | {"fault": ended.fault}
        elif not found:
            # It ended before its first trial, and would again.
            found = dict.fromkeys(range(len(part)), {"fault": ended.fault or "no result"})
        answers |= {part[place][0]: answer for place, answer in found.items()}
        part = [item for place, item in enumerate(part) if place not in found]
    return answers


def read_results(
    text: str, count: int
) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
    """Read what a child wrote, as far as it can be read.

    Args:
      text: lines of JSON.
      count: trials that the child was given.

    Returns:
      place -> "tile" and "processors" of trials whose kernel was about to be compiled, in that
      order; and place -> answer of those that are done.
    """
    begun: dict[int, dict[str, Any]] = {}
    answered: dict[int, dict[str, Any]] = {}
    for line in text.splitlines():
        try:
            values = json.loads(line)
            place = values.get("began", values.get("index"))
        except (json.JSONDecodeError, AttributeError):
            continue
        if not isinstance(place, int) or not 0 <= place < count:
            continue
        if "began" in values:
            begun[place] = {name: values.get(name) for name in ("tile", "processors")}
        else:
            answered[place] = values
    return begun, answered


def judge(trial: Trial, answer: Mapping[str, Any]) -> Outcome:
    """Turn what a child wrote about a trial into verdicts.

    Args:
      trial: what was tried.
      answer: see `pallas_kernels.doctor.child.prove`, with "tile" if the kernel was known; or with
        "fault", how the child ended.
    """
    if "refused" in answer:
        return Outcome(trial, (), str(answer["refused"]))
    wrong, tile = str(answer.get("fault") or answer.get("failed") or ""), answer.get("tile")
    if "no_memory" in answer or not isinstance(tile, str):
        return Outcome(trial, (), fault=str(answer.get("no_memory") or wrong or "no result"))
    # Named here: a child may speak of its own kernels only.
    source = hash_source(find_backend(trial.op, TABLES[trial.op], trial.backend).run)
    options = tuple(sorted(trial.facts.kernel_options.items()))
    verdicts = []
    for direction in trial.facts.DIRECTIONS:
        refused = str(answer.get("refused_gradient", "")) if direction == "gradient" else ""
        fault = "" if refused else wrong or _find_fault(direction, answer)
        key = KernelKey(trial.op, trial.backend, source, direction, tile, options)
        verdicts.append(Verdict(key=key, sizes=trial.facts.sizes, wrong=fault, refused=refused))
    processors = answer.get("processors")
    count = processors if isinstance(processors, int) else None
    return Outcome(trial, tuple(verdicts), processors=count)


def _find_fault(direction: str, answer: Mapping[str, Any]) -> str:
    """Return what is wrong with the numbers of a direction; "" if nothing is."""
    try:
        finding = answer["findings"][direction]
        error, allowed = float(finding["error"]), float(finding["allowed"])
        off, mask, differs = finding["off"], finding["mask"], finding["differs"]
    except (KeyError, TypeError, ValueError):
        return "no result"
    if not error <= allowed:
        return f"{off} off by {error:.3g}, allowed {allowed:.3g}, mask {mask}"
    return f"{differs} differs when repeated" if differs else ""


def add_timings(outcome: Outcome, answer: Mapping[str, Any]) -> Outcome:
    """Add times to right verdicts; a kernel that fails at full size is wrong.

    One that did not fit in memory beside the dense program has no times.

    Args:
      outcome: of a trial that was found right.
      answer: see `pallas_kernels.doctor.child.measure`, or {"fault": ...}.
    """
    if "no_memory" in answer:
        return outcome
    wrong = str(answer.get("fault") or answer.get("failed") or "")
    timings = ()
    if not wrong:
        try:
            timings = tuple(map(_read_timing, answer["timings"]))
        except (KeyError, TypeError, ValueError):
            wrong = "no result"
    verdicts = (
        dataclasses.replace(v, wrong=wrong and f"{wrong}, at full size", timings=timings)
        for v in outcome.verdicts
    )
    return outcome._replace(verdicts=tuple(verdicts))


def _read_timing(values: Mapping[str, Any]) -> Timing:
    seconds = {str(name): float(value) for name, value in values["seconds"].items()}
    if not all(0 < value < math.inf for value in seconds.values()):
        raise ValueError(f"seconds must be positive, got {seconds}")
    return Timing(tuple(values["sizes"]), float(values["density"]), seconds)
