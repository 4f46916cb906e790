"""Before a run on a GPU: prove the kernels that its steps could take and that have no verdict."""

import contextlib
import fcntl
import importlib.util
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator

import jax

from pallas_kernels.doctor.trials import list_trials
from pallas_kernels.doctor.visit import drop_known, keep_outcomes, read_calls
from pallas_kernels.machine import Gpu, find_gpu
from pallas_kernels.tables import TABLES
from pallas_kernels.verdict_files import VerdictsError, cache_folder, file_name
from sparsejax.config.parse import ConfigError
from sparsejax.config.schema import TrainConfig
from sparsejax.processes import collect, decide
from sparsejax.report.progress import say


def prove_kernels(config: TrainConfig) -> None:
    """Run the doctor for what a run needs; nothing on a machine without a GPU or for JAX on a CPU.

    This process does not take hold of the GPU meanwhile. Processes of one machine take turns. If
    verdicts cannot be kept, the run goes on without: its ops take "xla". All processes call it.

    Args:
      config: settings of the run.

    Raises:
      ConfigError: if the data cannot be described, settings contradict each other, or a file of
        verdicts cannot be read.
    """
    gpu = find_gpu() if _jax_may_use_cuda() else None
    counts = collect("GPUs", 0 if gpu is None else _count_own(gpu))
    num_gpus = decide(lambda: sum(counts), "GPUs")
    if gpu is not None:
        with _taking_turns():
            _prove(config, gpu, num_gpus)


def _count_own(gpu: Gpu) -> int:
    """Return how many GPUs this process will use."""
    named = jax.config.values["jax_cuda_visible_devices"]
    return gpu.count if named == "all" else len(str(named).split(","))


@contextlib.contextmanager
def _taking_turns() -> Iterator[None]:
    """Wait for other processes of this machine: two at a time would spoil each other's timings."""
    path = pathlib.Path(tempfile.gettempdir()) / f"sparsejax-doctor-{os.getuid()}.lock"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock = stack.enter_context(path.open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _prove(config: TrainConfig, gpu: Gpu, num_gpus: int) -> None:
    path = cache_folder() / file_name(gpu.kind, gpu.driver)
    try:
        sizes = config.mesh.fit(num_gpus)
        settings = config.to_dict() | {"mesh": sizes}
        calls = read_calls(["-"], settings=json.dumps(settings))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        trials = [trial for trial in list_trials(calls) if _needs_verdict(trial)]
        trials = drop_known(trials, gpu, path)
        if trials:
            say(
                f"proving {len(trials)} kernels on {gpu.kind} first, once for this driver and JAX "
                "(--doctor=off skips it)"
            )
            keep_outcomes(trials, gpu, path, say=say, only_faults=True)
    except VerdictsError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        say(f"note: kernels are not proven, verdicts cannot be kept: {error}")


def _jax_may_use_cuda() -> bool:
    platforms = jax.config.jax_platforms
    is_allowed = not platforms or "cuda" in platforms or "gpu" in platforms
    return is_allowed and importlib.util.find_spec("jax_cuda13_plugin") is not None


def _needs_verdict(trial) -> bool:
    return any(row.name == trial.backend and row.needs_verdict for row in TABLES[trial.op])
