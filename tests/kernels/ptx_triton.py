"""Runs Triton kernels on `ptx_machine`: the PTX that Triton writes for a GPU that is not there."""

import contextlib
import contextvars
import functools
import re
from unittest import mock

import jax
import numpy as np

from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.tile_tables import Tile
from pallas_kernels.triton_programs import find_triton_programs
from tests.kernels import ptx_machine, ptx_program
from tests.kernels.ptx_ampere import AmpereUnits

# Behind the pointers of a kernel Triton has two of its own, of scratch memory; both are null.
_SCRATCH_POINTERS = 2
# How kernels of a call are run, see `run_program`.
_conditions = {}
_compiled = {}


def compile_program(function, *args, capability=(8, 0)):
    """Compile the Triton kernel that a function launches, on the CPU.

    Args:
      function: what `jax.jit` takes; launches one kernel, for `capability`.
      *args: arrays or `jax.ShapeDtypeStruct`s.
      capability: (major, minor), compute capability that the PTX must name.

    Returns:
      TritonProgram.
    """
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    traced = jax.jit(lambda *inner: function(*inner)).trace(*structs)
    lowered = traced.lower(lowering_platforms=("cuda",))
    (program,) = find_triton_programs(lowered.compiler_ir())
    target = "sm_{}{}".format(*capability)
    assert re.search(rf"^\.target {target}a?$", program.ptx, re.MULTILINE), (
        f"it is not for {target}"
    )
    return program


def run_program(
    ptx, programs, inputs, outputs, *, copies="late", order="first", seed=0,
    shared_memory_bytes=ptx_machine.SHARED_SIZE,
):  # fmt: skip
    """Run a kernel on a grid of one axis.

    Args:
      ptx: str, as `TritonProgram.ptx`.
      programs: int, of the grid.
      inputs: arrays, in the order of the kernel's parameters.
      outputs: shapes and dtypes of what follows them, filled with 0xFF before.
      copies: when asynchronous copies happen, "early", "late" or "random".
      order: of the warps, see `Machine`.
      seed: int, of what is random.
      shared_memory_bytes: int, what a block may use.

    Returns:
      list of arrays.

    Raises:
      PtxError: if the program does what it may not do, such as writing to an input.
    """
    program = ptx_program.parse(ptx)
    declared = re.findall(r"\.param \.(\w+) [^,)]*_param_(\d+)", ptx)
    count = len(inputs) + len(outputs) + _SCRATCH_POINTERS
    if declared != [("u64", str(i)) for i in range(count)]:
        raise ptx_program.PtxError(f"{count} pointers are wanted, there are {declared}")
    memory = ptx_machine.GlobalMemory()
    arrays = [np.asarray(x) for x in inputs]
    empty = [np.full(t.size * np.dtype(t.dtype).itemsize, 0xFF, np.uint8) for t in outputs]
    addresses = [memory.add(x) for x in (*arrays, *empty)]
    params = [*addresses, *[0] * _SCRATCH_POINTERS]
    for i in range(programs):
        machine = ptx_machine.Machine(
            program, memory, params, (i, 0, 0), (programs, 1, 1),
            functools.partial(AmpereUnits, copies=copies, seed=seed + i),
            pool=ptx_machine.WARP, order=order, seed=seed + i, shared_size=shared_memory_bytes,
        )  # fmt: skip
        machine.run()
    for x, address in zip(arrays, addresses[: len(arrays)], strict=True):
        if memory.read(address, x.shape, x.dtype).tobytes() != x.tobytes():
            raise ptx_program.PtxError("a program writes to an input")
    return [
        memory.read(address, t.shape, t.dtype)
        for address, t in zip(addresses[len(arrays) :], outputs, strict=True)
    ]


@contextlib.contextmanager
def conditions(**options):
    """Run kernels that are launched inside as `run_program` is told by keyword.

    Args:
      **options: of `run_program`, and `change`, a function that changes the PTX.
    """
    with mock.patch.dict(_conditions, options):
        yield


def run_gluon(kernel, programs, inputs, outputs, constants, capability):
    """Run a kernel in Gluon, see `pallas_kernels.triton.interpretation.Interpretation`.

    Its constants name its warps and stages as those of `nm_matmul` do.

    Args:
      capability: (major, minor), to compile for.
    """
    names = [name for name in kernel.arg_names if name in inputs or name in outputs]
    assert names == [*inputs, *outputs], "pointers come in the order of the kernel's parameters"
    structs = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in inputs.items()}
    key = repr((kernel.cache_key, structs, outputs, sorted(constants.items()), capability))
    if key not in _compiled:
        warps = constants["WARPS_R"] * constants["WARPS_P"]

        def call(*arrays):
            return launch(
                kernel, dict(zip(inputs, arrays, strict=True)), outputs, constants,
                programs=programs, tile=Tile(0, 0, warps, constants["STAGES"]),
                capability=capability, takes_all_registers=True,
            )  # fmt: skip

        # In a context of its own, in which kernels are compiled.
        compiling = functools.partial(compile_program, call, *structs.values())
        _compiled[key] = contextvars.Context().run(compiling, capability=capability)
    program = _compiled[key]
    options = {"shared_memory_bytes": program.shared_memory_bytes} | _conditions
    ptx = options.pop("change", str)(program.ptx)
    results = run_program(ptx, programs, [*inputs.values()], [*outputs.values()], **options)
    return tuple(results)
