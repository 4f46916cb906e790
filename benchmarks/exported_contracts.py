"""The contract of Triton kernels that were exported on another machine: a part of `make gpu`.

    python -m benchmarks.exported_contracts

Where Triton is installed its own tests prove the kernels, and nothing is run here.
"""

import argparse
import functools
import json
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from benchmarks.exported_calls import FOLDER, MANIFEST, find_missing, hash_package, read_function
from pallas_kernels.aot import TARGETS
from pallas_kernels.doctor import child
from pallas_kernels.doctor.contract import check_contract
from pallas_kernels.doctor.examine import ENVIRONMENT, TRIAL_SECONDS, judge, run_children
from pallas_kernels.doctor.makers import MAKERS
from pallas_kernels.doctor.report import describe_outcome
from pallas_kernels.doctor.trials import Trial, parse_trial
from pallas_kernels.machine import Gpu, find_gpu
from pallas_kernels.triton.device import check_packages
from pallas_kernels.verdicts import describe_call


def run_contracts(
    folder: pathlib.Path,
    gpu: Gpu,
    *,
    say: Callable[[str], None],
    limit_seconds: float,
    environment: Mapping[str, str] = ENVIRONMENT,
) -> int:
    """Prove what a folder holds on the GPU of this machine, in a process of its own.

    Args:
      folder: as `export_calls` left it.
      gpu: of this machine.
      say: called with a line for each problem, or with the reason why none is run.
      limit_seconds: after which nothing is run.
      environment: variables of the process.

    Returns:
      int, exit code: 0 if nothing is wrong, 1 if a kernel is, or if the folder is of no use here.
    """
    try:
        check_packages()
    except NotImplementedError as reason:
        why = str(reason)
    else:
        say("Triton is installed: the tests of its kernels prove them, and exported ones are left")
        return 0
    same = (name for name, t in TARGETS.items() if _write(t.compute_capability) == gpu.capability)
    mend = f"run `make gpu-export TARGET={next(same, 'h200')}` where the extra `triton` is, and"
    mend = f"{mend} copy {folder.name} here"
    path = folder / MANIFEST
    if not path.exists():
        say(f"Triton kernels are not proven: {why}, and none were exported: {mend}")
        return 0
    manifest = json.loads(path.read_text())
    for what, found, expected in (
        ("compute capability", manifest["capability"], gpu.capability),
        ("JAX", manifest["jax"], jax.__version__),
        ("sources of hash", manifest["source"], hash_package()),
    ):
        if found != expected:
            say(f"{folder.name} was exported for {what} {found}, expected {expected}: {mend}")
            return 1
    if missing := find_missing("flatbuffers"):
        say(missing)
        return 1
    trials = [_read_trial(entry) for entry in manifest["calls"]]
    outcomes = _prove(trials, folder, gpu, limit_seconds, environment)
    for trial, outcome in zip(trials, outcomes, strict=True):
        say(f"exported {describe_call(trial.op, trial.facts)}: {describe_outcome(outcome)}")
    is_right = (o.verdicts and not any(v.wrong for v in o.verdicts) for o in outcomes)
    return 0 if all(is_right) else 1


def _write(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _read_trial(entry: Mapping[str, Any]) -> Trial:
    return parse_trial({name: entry[name] for name in Trial._fields})


def _prove(trials, folder, gpu, limit_seconds, environment):
    stop = threading.Event()
    timer = threading.Timer(limit_seconds, stop.set)
    timer.start()
    try:
        answers = run_children(
            "prove",
            list(enumerate(trials)),
            gpu.kind,
            deadline=time.monotonic() + limit_seconds,
            stop=stop,
            trial_seconds=TRIAL_SECONDS,
            child=(sys.executable, "-m", "benchmarks.exported_contracts", "--child", str(folder)),
            environment=environment,
        )
    finally:
        timer.cancel()
    late = {"fault": "time was up"}
    return [judge(trial, answers.get(index, late)) for index, trial in enumerate(trials)]


def prove_exported(
    folder: pathlib.Path, trial: Trial, begin: Callable[[str], None]
) -> dict[str, Any]:
    """Check one exported call, as `doctor.child.prove` checks a backend.

    Args:
      folder: as `export_calls` left it.
      trial: one of its calls.
      begin: called with the tile before anything is compiled.

    Returns:
      JSON values: "findings" by direction, with "refused_gradient" where there is none.
    """
    calls = json.loads((folder / MANIFEST).read_text())["calls"]
    entry = next(entry for entry in calls if _read_trial(entry) == trial)
    begin(entry["tile"])
    problem = MAKERS[trial.op].make(trial.facts)
    function = read_function((folder / entry["file"]).read_bytes())
    findings = check_contract(problem, function, tuple(entry["directions"]))
    answer = {"findings": {name: found._asdict() for name, found in findings.items()}}
    refused = entry["refused_gradient"]
    return answer | ({"refused_gradient": refused} if refused else {})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the contracts of exported calls on the GPU of this machine.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: see `run_contracts`; 2 if there is no GPU.
    """
    parser = argparse.ArgumentParser(description="Prove exported Triton kernels on a GPU.")
    parser.add_argument("--budget-seconds", type=float, default=300.0)
    parser.add_argument("--child", nargs="+", metavar="FOLDER", help="see `doctor.child`")
    options = parser.parse_args(arguments)
    if options.child:
        folder, *rest = options.child
        child.main(rest, {"prove": functools.partial(prove_exported, pathlib.Path(folder))})
        return 0
    gpu = find_gpu()
    if gpu is None:
        print("nvidia-smi finds no NVIDIA GPU here, so no exported call was run", file=sys.stderr)
        return 2
    say = functools.partial(print, flush=True)
    return run_contracts(FOLDER, gpu, say=say, limit_seconds=options.budget_seconds)


if __name__ == "__main__":
    sys.exit(main())
