"""Before a run on a GPU: prove the kernels that its steps could take and that have no verdict."""

import importlib.util
import json

import jax

from pallas_kernels.doctor.trials import list_trials
from pallas_kernels.doctor.visit import drop_known, keep_outcomes, read_calls
from pallas_kernels.machine import find_gpu
from pallas_kernels.tables import TABLES
from pallas_kernels.verdict_files import VerdictsError, cache_folder, file_name
from sparsejax.config.parse import ConfigError
from sparsejax.config.schema import TrainConfig
from sparsejax.report.progress import say


def prove_kernels(config: TrainConfig) -> None:
    """Run the doctor for what a run needs; nothing on a machine without a GPU or for JAX on a CPU.

    This process does not take hold of the GPU meanwhile. If verdicts cannot be kept, the run goes
    on without: its ops take "xla".

    Args:
      config: settings of the run.

    Raises:
      ConfigError: if the data cannot be described, settings contradict each other, or a file of
        verdicts cannot be read.
    """
    gpu = find_gpu() if _jax_may_use_cuda() else None
    if gpu is None:
        return
    path = cache_folder() / file_name(gpu.kind, gpu.driver)
    try:
        sizes = config.mesh.fit(gpu.count)
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
