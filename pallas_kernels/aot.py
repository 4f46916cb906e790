"""Compile a function for a named GPU on a machine without one, and report what came out.

XLA and, for kernels in Mosaic or Triton, NVIDIA's ptxas run as they would before a launch, so
memory, registers, spills, shared memory and collectives are those of the real program. Only what a
GPU is timed for, XLA's autotuning, is left out: matrix products of XLA's own take default tiles.

Needs the packages of the `compile` extra. On a machine without a GPU set `JAX_PLATFORMS=cpu`, or
JAX looks for one when it starts.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import math
import os
import pathlib
import re
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from pallas_kernels.kernel_dumps import every_kernel_is_dumped, read_kernel
from pallas_kernels.kernel_report import KernelReport as KernelReport
from pallas_kernels.kernel_report import make_kernel_report
from pallas_kernels.triton_programs import TritonProgram, assemble, find_triton_programs

_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTarget:
    """What XLA must know of a GPU in order to compile for it.

    Attributes:
      name: str, as the driver reports it.
      compute_capability: (major, minor).
      cores: int, streaming multiprocessors.
      threads_per_core: int, the most that one multiprocessor holds at a time.
      fpus_per_core: int, float32 operations that one multiprocessor starts per clock.
      memory_bytes: int, device memory that the driver leaves to programs.
      memory_bytes_per_second: int, bandwidth of the device memory.
      l2_bytes: int, second-level cache.
      clock_ghz: float, boost clock.
      shared_memory_per_core_bytes: int, of one multiprocessor.
      shared_memory_per_block_bytes: int, the most that one block may ask for.
    """

    name: str
    compute_capability: tuple[int, int]
    cores: int
    threads_per_core: int
    fpus_per_core: int
    memory_bytes: int
    memory_bytes_per_second: int
    l2_bytes: int
    clock_ghz: float
    shared_memory_per_core_bytes: int
    shared_memory_per_block_bytes: int

    def config(self) -> str:
        """Write the target as the text proto `GpuTargetConfigProto` that XLA reads.

        Returns:
          str, with the limits that all GPUs since compute capability 7.0 share filled in.
        """
        major, minor = self.compute_capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024
              threads_per_warp: 32
              threads_per_core_limit: {self.threads_per_core}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              fpus_per_core: {self.fpus_per_core}
              shared_memory_per_block: 49152
              shared_memory_per_core: {self.shared_memory_per_core_bytes}
              shared_memory_per_block_optin: {self.shared_memory_per_block_bytes}
              core_count: {self.cores}
              l2_cache_size: {self.l2_bytes}
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory_bytes}
              memory_bandwidth: {self.memory_bytes_per_second}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 13 }}
            device_description_str: "{self.name}"
        """


def _read_targets() -> dict[str, GpuTarget]:
    tables = tomllib.loads(pathlib.Path(__file__).with_name("gpu_targets.toml").read_text())
    for figures in tables.values():
        figures["compute_capability"] = tuple(figures["compute_capability"])
    return {key: GpuTarget(**figures) for key, figures in tables.items()}


# By the names of `train.py --target=`.
TARGETS = _read_targets()
H200, H100 = TARGETS["h200"], TARGETS["h100"]

# There is nothing to time candidates on. XLA's Triton products have no default configuration, so
# that a program with one would not compile; cuBLAS ones have. The GPU's program is optimised,
# whatever this process asks for its own.
_COMPILER_OPTIONS = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
    "xla_backend_optimization_level": 3,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AotReport:
    """A program compiled for a GPU that need not be there. Bytes are those of one device.

    Attributes:
      alias_bytes: int, outputs that live in the buffer of a donated argument.
      temp_bytes: int, what the program allocates besides.
      kernels: tuple of KernelReport, one per Mosaic kernel, then one per Triton kernel.
      hlo: str, the optimized program.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    kernels: tuple[KernelReport, ...]
    hlo: str = dataclasses.field(repr=False)

    @property
    def peak_bytes(self) -> int:
        """Device memory that one call needs: arguments, outputs of their own, temporaries."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes

    def count_collectives(self) -> dict[str, int]:
        """Count the collective operations of the optimized program.

        Returns:
          dict from XLA's name ("all-reduce", ...) to how often the program text has it; a
          collective inside a loop counts once.
        """
        names = "|".join(_COLLECTIVES)
        return dict(collections.Counter(re.findall(rf" ({names})(?:-start)?\(", self.hlo)))


def make_gpu_mesh(
    target: GpuTarget = H200, *, axes: Mapping[str, int] | None = None, hosts: int = 1
) -> jax.sharding.Mesh:
    """Make a mesh of devices that can be compiled for, but hold and run nothing.

    Args:
      target: the GPU.
      axes: axis name -> size, in order; one axis `"device"` of size 1 if None.
      hosts: int, machines the devices are spread over evenly.

    Returns:
      Mesh of prod(axes) devices.

    Raises:
      ValueError: if `hosts` does not divide the number of devices.
      RuntimeError: if the packages of the `compile` extra are missing.

    Example:
      `make_gpu_mesh(H200, axes={"data": 16}, hosts=2)`: two machines with eight GPUs each.
    """
    axes = {"device": 1} if axes is None else dict(axes)
    count = math.prod(axes.values())
    if hosts < 1 or count < 1 or count % hosts:
        raise ValueError(
            f"hosts must be positive and divide the number of devices, got {hosts=} and {axes=}"
        )
    _find_cuda()
    with _environment(JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1"):
        try:
            topology = topologies.get_topology_desc(
                platform="cuda",
                target_config=target.config(),
                topology=f"1x{hosts}x{count // hosts}",
            )
        except NotImplementedError as error:
            raise RuntimeError(
                "JAX started without its CUDA plugin, so nothing can be compiled for "
                f"{target.name}: install the `compile` extra, set JAX_PLATFORMS=cpu if this "
                "machine has no GPU, and start Python again"
            ) from error
    devices = np.asarray(topology.devices).reshape(tuple(axes.values()))
    return jax.sharding.Mesh(devices, tuple(axes))


def compile_for(
    function: Callable[..., Any],
    *args: Any,
    mesh: jax.sharding.Mesh | None = None,
    **jit_options: Any,
) -> AotReport:
    """Compile `jax.jit(function)(*args)` for a GPU and report memory, kernels and program.

    Nothing is computed and no GPU is needed. While the function is traced, the mesh is the
    abstract mesh in force, so code that asks which device it is compiled for finds the GPU.

    Args:
      function: what `jax.jit` takes; bind static arguments with `functools.partial`.
      *args: pytrees of arrays or of `jax.ShapeDtypeStruct`. A leaf whose `NamedSharding` is on
        `mesh` keeps it; every other leaf is replicated.
      mesh: from `make_gpu_mesh`; one H200 if None.
      **jit_options: of `jax.jit`, such as `donate_argnums`.

    Raises:
      RuntimeError: if the packages of the `compile` extra are missing, or if a Mosaic kernel of
        the program left no report.

    Example:
      `compile_for(jnp.dot, x_struct, w_struct).temp_bytes`
    """
    mesh = make_gpu_mesh() if mesh is None else mesh
    with tempfile.TemporaryDirectory() as folder:
        path = f"{os.environ.get('PATH', '')}{os.pathsep}{_find_cuda() / 'bin'}"
        with (
            _environment(MOSAIC_GPU_DUMP_TO=folder, PATH=path),
            _no_persistent_cache(),
            every_kernel_is_dumped(),
        ):
            lowered = _lower(function, args, mesh, jit_options)
            compiled = lowered.compile(compiler_options=_COMPILER_OPTIONS)
        reports = sorted(pathlib.Path(folder).glob("*.ptxas"), key=lambda p: p.stat().st_mtime_ns)
        kernels = tuple(read_kernel(report) for report in reports)
    triton_kernels = _assemble_kernels(lowered)
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    assert hlo is not None and memory is not None, "XLA for GPUs reports both"
    called = len(set(re.findall(r'kernel_hash = "((?:[^"\\]|\\.)*)"', hlo)))
    if called != len(kernels):
        raise RuntimeError(
            f"the program calls {called} Mosaic kernels but {len(kernels)} were reported: "
            f"{[kernel.name for kernel in kernels]}"
        )
    return AotReport(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        kernels=kernels + triton_kernels,
        hlo=hlo,
    )


def compile_triton_kernels(
    function: Callable[..., Any], *args: Any, mesh: jax.sharding.Mesh
) -> tuple[KernelReport, ...]:
    """Compile the Triton kernels that `jax.jit(function)(*args)` calls, and nothing else of it.

    Args:
      function: what `jax.jit` takes.
      *args: as for `compile_for`.
      mesh: from `make_gpu_mesh`.

    Returns:
      tuple of KernelReport, one per kernel, in the order of their first calls.

    Raises:
      RuntimeError: if the packages of the `compile` extra are missing.
    """
    return _assemble_kernels(_lower(function, args, mesh, {}))


def _find_cuda() -> pathlib.Path:
    """Return the folder of the pip-installed CUDA compiler, whose `bin` holds ptxas."""
    for name in ("jax_plugins.xla_cuda13", "nvidia.cu13"):
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            spec = None
        if spec is None:
            raise RuntimeError(
                f"compiling for a GPU needs {name}, which is not installed: "
                "pip install 'sparsejax[compile]'"
            )
    folders = [pathlib.Path(folder) for folder in spec.submodule_search_locations or ()]
    for folder in folders:
        if all((folder / "bin" / tool).exists() for tool in ("ptxas", "nvdisasm")):
            return folder
    raise RuntimeError(
        f"compiling for a GPU needs ptxas and nvdisasm, which are not in {folders}: "
        "pip install 'sparsejax[compile]'"
    )


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables, which is how JAX's plugin and Mosaic take these settings."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _no_persistent_cache() -> Iterator[None]:
    """Compile even if a kept program exists, which could not be loaded without the GPU.

    JAX decides once whether it keeps programs; resetting its cache makes it look again.
    """
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _place(leaf: Any, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if not (isinstance(sharding, jax.sharding.NamedSharding) and sharding.mesh == mesh):
        sharding = jax.sharding.NamedSharding(mesh, jax.P())
    return jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.result_type(leaf), sharding=sharding)


def _lower(
    function: Callable[..., Any], args: Any, mesh: jax.sharding.Mesh, jit_options: Mapping[str, Any]
) -> jax.stages.Lowered:
    args = jax.tree.map(lambda leaf: _place(leaf, mesh), args)
    # JAX reuses the lowering of a function it has seen, and Mosaic reports a kernel only when it
    # is compiled: a new function object makes both happen again.
    fresh = jax.jit(lambda *inner: function(*inner), **jit_options)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return fresh.lower(*args)


def _assemble_kernels(lowered: jax.stages.Lowered) -> tuple[KernelReport, ...]:
    programs = find_triton_programs(lowered.compiler_ir())
    return tuple(_assemble_kernel(program) for program in programs)


def _assemble_kernel(program: TritonProgram) -> KernelReport:
    report, sass = assemble(program, _find_cuda() / "bin")
    return make_kernel_report(
        program.name,
        report,
        shared_memory_bytes=program.shared_memory_bytes,
        ptx=program.ptx,
        sass=sass,
    )
