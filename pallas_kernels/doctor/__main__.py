"""Prove the kernels on the GPU of this machine, and keep the verdicts.

  python -m pallas_kernels.doctor                                what the published recipes need
  python -m pallas_kernels.doctor --config=configs/x.py          what a run of this config needs
  python -m pallas_kernels.doctor --all                          the whole grid; again to go on
  python -m pallas_kernels.doctor --op=nm_matmul                 one op only

Exit code 0: nothing is wrong, or there is no GPU and nothing to prove; 1: a kernel is wrong; 2: an
argument has to be changed, or the verdicts could not be kept.
"""

import argparse
import collections
import math
import pathlib
import sys
import time
from collections.abc import Sequence

import jax

from pallas_kernels.doctor.report import format_outcomes
from pallas_kernels.doctor.trials import Trial, list_all_calls, list_default_calls, list_trials
from pallas_kernels.doctor.visit import drop_known, keep_outcomes, read_calls
from pallas_kernels.machine import Gpu, find_gpu
from pallas_kernels.tables import TABLES
from pallas_kernels.verdict_files import cache_folder, file_name

# JAX for CUDA 13 begins with Turing.
_LEAST_CAPABILITY = (7, 5)
_DEFAULT_SECONDS = 90.0
_PROGRAM = "python -m pallas_kernels.doctor"


def main(arguments: Sequence[str] | None = None, *, program: str = _PROGRAM) -> int:
    """Run the doctor.

    Args:
      arguments: `sys.argv[1:]` if None.
      program: how the user calls it.

    Returns:
      Exit code.
    """
    parser = _make_parser(program)
    options, rest = parser.parse_known_args(arguments)
    config = [argument for argument in rest if argument.startswith("--config")]
    unknown = [argument for argument in rest if argument not in config]
    if unknown:
        return _fail(f"unknown argument {unknown[0]!r}; see --help")
    if options.op is not None and options.op not in TABLES:
        return _fail(f"--op must be one of {', '.join(TABLES)}, got {options.op!r}")
    if config and options.all:
        return _fail("--all and --config cannot both be given")
    try:
        calls = read_calls(config) if config else None
    except ValueError as error:
        return _fail(str(error))
    if calls is None:
        calls = list_all_calls() if options.all else list_default_calls()
    trials = list_trials([call for call in calls if options.op in (None, call[0])])
    gpu = find_gpu()
    if gpu is None:
        print(_describe_absence(trials))
        return 0
    capability = tuple(map(int, gpu.capability.split(".")))
    if capability < _LEAST_CAPABILITY:
        return _fail(
            f"{gpu.kind} has compute capability {gpu.capability}, and JAX for CUDA 13 needs "
            f"{'.'.join(map(str, _LEAST_CAPABILITY))} or more"
        )
    folder = pathlib.Path(options.output) if options.output else cache_folder()
    path = folder / file_name(gpu.kind, gpu.driver)
    goes_on = options.all or options.missing
    limit = math.inf if goes_on or config else _DEFAULT_SECONDS
    return _visit(gpu, trials, path, only_missing=goes_on, limit_seconds=limit)


def _make_parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Prove the kernels on the GPU of this machine, and keep the verdicts.",
        epilog="--config=FILE, with --config.KEY=VALUE, tries what a run of that config needs.",
        allow_abbrev=False,
    )
    parser.add_argument("--all", action="store_true", help="the whole grid; resumes")
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--missing", action="store_true", help="only what has no verdict yet")
    parser.add_argument(
        "--output", metavar="FOLDER", help="where verdicts are kept, instead of the user's cache"
    )
    return parser


def _visit(
    gpu: Gpu, trials: list[Trial], path: pathlib.Path, *, only_missing: bool, limit_seconds: float
) -> int:
    several = f", the first of {gpu.count}" if gpu.count > 1 else ""
    print(
        f"{gpu.kind}{several}, compute capability {gpu.capability}, driver {gpu.driver}, "
        f"JAX {jax.__version__}"
    )
    began = time.monotonic()
    try:
        if only_missing:
            trials = drop_known(trials, gpu, path)
        print(f"trying {len(trials)} kernels and programs, each op and backend by itself")
        outcomes = keep_outcomes(trials, gpu, path, say=_say, limit_seconds=limit_seconds)
    except (OSError, ValueError) as error:
        return _fail(f"verdicts cannot be kept: {error}")
    print("\n" + format_outcomes(outcomes))
    left = len(trials) - len(outcomes)
    if left:
        print(f"{left} were not begun within {limit_seconds:.0f} s; --missing tries them")
    print(f"{time.monotonic() - began:.0f} s; verdicts: {path}")
    wrong = [o for o in outcomes if o.fault or any(v.wrong for v in o.verdicts)]
    return 1 if wrong else 0


def _say(line: str) -> None:
    print(line, flush=True)


def _describe_absence(trials: Sequence[Trial]) -> str:
    counts = collections.Counter((trial.op, trial.backend) for trial in trials)
    lines = [f"  {op} {backend}: {count} calls" for (op, backend), count in counts.items()]
    return "\n".join(
        [
            "nvidia-smi finds no NVIDIA GPU here, so there is nothing to prove: calls that name no",
            "backend run on 'xla'. On a GPU this would try, each op and backend by itself:",
            *lines,
            f"and keep the verdicts in {cache_folder()}",
        ]
    )


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
