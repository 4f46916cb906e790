"""Before a run on a GPU: prove the kernels that its steps could take and that have no verdict."""

import jax

from pallas_kernels.dispatch import make_abstract_gpu
from pallas_kernels.doctor.trials import list_trials
from pallas_kernels.doctor.visit import drop_known, keep_outcomes
from pallas_kernels.machine import find_gpu
from pallas_kernels.tables import TABLES
from pallas_kernels.verdict_files import cache_folder, file_name
from sparsejax.config.parse import ConfigError
from sparsejax.config.schema import TrainConfig
from sparsejax.report.progress import say
from sparsejax.tools.programs import list_kernel_calls


def prove_kernels(config: TrainConfig) -> None:
    """Run the doctor for what a run needs; nothing on a machine without a GPU or for JAX on a CPU.

    This process does not take hold of the GPU meanwhile. If verdicts cannot be kept, the run goes
    on without: its ops take "xla".

    Args:
      config: settings of the run.

    Raises:
      ConfigError: if the data cannot be described, or settings contradict each other.
    """
    platforms = jax.config.jax_platforms
    gpu = find_gpu() if platforms in (None, "") or "cuda" in platforms else None
    if gpu is None:
        return
    path = cache_folder() / file_name(gpu.kind, gpu.driver)
    try:
        # For any GPU: what is called does not depend on its size, and JAX must not look for one.
        with jax.sharding.use_abstract_mesh(make_abstract_gpu(gpu.kind, 1)):
            calls = list_kernel_calls(config)
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
            keep_outcomes(trials, path, say=say)
    except (OSError, ValueError) as error:
        say(f"note: kernels are not proven, verdicts cannot be kept: {error}")


def _needs_verdict(trial) -> bool:
    return any(row.name == trial.backend and row.needs_verdict for row in TABLES[trial.op])
