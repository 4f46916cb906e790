"""Which device traced code is for, and what it has; fences for JAX versions live here."""

import jax
from jax._src import config as _jax_config

# The platforms that CUDA devices go by.
_CUDA = ("gpu", "cuda")


def target_platform() -> str:
    """Return the platform that traced code will be compiled for.

    The abstract mesh in force comes first, so that a step can be compiled for a device this
    machine does not have; then JAX's default device.

    Returns:
      str, a JAX platform name such as "cpu" or "gpu".
    """
    abstract_device = jax.sharding.get_abstract_mesh().abstract_device
    if abstract_device is not None:
        return abstract_device.platform
    default = jax.config.jax_default_device
    if default is None:
        return jax.devices()[0].platform
    return default if isinstance(default, str) else default.platform


def targets_gpu() -> bool:
    """Return whether traced code will be compiled for a GPU.

    Returns:
      bool, True for the platforms that CUDA devices go by.
    """
    return target_platform() in _CUDA


def runs_on_own_gpu() -> bool:
    """Return whether traced code will run on a GPU of this machine, or on one of that kind.

    Returns:
      bool, False for a GPU that is only compiled for.
    """
    if not targets_gpu():
        return False
    # That of the mesh in force, be it of devices or abstract.
    meant = jax.sharding.get_abstract_mesh().abstract_device
    own = jax.devices()[0]
    return meant is None or (own.platform in _CUDA and own.device_kind == meant.device_kind)


def is_interpreted() -> bool:
    """Return whether Pallas GPU kernels are interpreted on the CPU.

    Returns:
      bool, True inside `plgpu.force_gpu_interpret_mode()`.
    """
    # JAX 0.11 and 0.12 keep the mode in one private variable and have no public reader of it; its
    # parameters are of another class for TPUs.
    params = _jax_config.pallas_tpu_interpret_mode_context_manager.value
    return type(params).__name__ == "InterpretGPUParams"


def check_hopper() -> None:
    """Raise unless kernels for Hopper can run where traced code will.

    That is a GPU of compute capability 9, the one of the abstract mesh in force before the
    default one; or a CPU that interprets kernels.

    Raises:
      NotImplementedError: with the device that was found.
    """
    if is_interpreted():
        return
    found = target_platform()
    if targets_gpu():
        abstract_device = jax.sharding.get_abstract_mesh().abstract_device
        if abstract_device is not None:
            found = abstract_device.device_kind
            if any(name in found for name in ("H100", "H200", "H800", "H20", "GH200")):
                return
        else:
            device = jax.devices("gpu")[0]
            if device.compute_capability.startswith("9."):
                return
            found = f"{device.device_kind} of compute capability {device.compute_capability}"
    raise NotImplementedError(
        "implementation='mosaic_sm90' needs a Hopper GPU (compute capability 9), found "
        f"{found!r}; 'xla' runs on every device"
    )


def make_abstract_gpu(kind: str, processors: int) -> jax.sharding.AbstractMesh:
    """Make a mesh of one GPU to trace for, without asking JAX for a device.

    Args:
      kind: as the driver names it.
      processors: streaming multiprocessors.

    Returns:
      AbstractMesh, for `jax.sharding.use_abstract_mesh`.
    """
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=processors, platform="cuda")
    return jax.sharding.AbstractMesh((1,), ("device",), abstract_device=device)


def count_processors() -> int:
    """Return how many streaming multiprocessors traced code will run on.

    Returns:
      int, of the GPU of the abstract mesh in force before the default one; 2 while kernels are
      interpreted.
    """
    if is_interpreted():
        return 2
    abstract_device = jax.sharding.get_abstract_mesh().abstract_device
    if abstract_device is not None:
        return abstract_device.num_cores
    return jax.devices("gpu")[0].core_count
