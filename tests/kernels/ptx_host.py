"""Runs Mosaic kernels on `ptx_machine`: host program, descriptors and launch included.

Where a kernel would be launched, it is compiled for an H200, its host program is run on what the
compiler wrote of it (which arguments the kernel gets, how the descriptors of copies are built), and
its PTX runs block by block.
"""

import contextlib
import functools
import re
import sys
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np

from pallas_kernels import aot
from tests.kernels import ptx_machine, ptx_program
from tests.kernels.ptx_cluster import Cluster
from tests.kernels.ptx_hopper import HopperUnits, TensorMap

_ITEM_BYTES = {1: 1, 2: 2, 3: 4, 5: 2, 6: 4, 7: 2}


def run_host(text, arguments):
    """Run a host program up to the launch.

    Args:
      text: str, what the compiler wrote of its passes.
      arguments: addresses of operands and results.

    Returns:
      tuple of the grid, and of the kernel's arguments: addresses, or {offset: TensorMap}.
    """
    marker = "IR Dump Before GpuLaunchLoweringPass"
    host = text[text.index(marker) :]
    host = host[host.index("  func.func @") :]
    operands = re.match(r"  func.func @\S+\((%\w+): !llvm.ptr.*?(%\w+): !llvm.ptr", host)
    cells = {"arguments": dict(enumerate(arguments))}
    values = {operands[2]: ("arguments", 0)}
    maps = {}

    def read_array(pointer, count):
        place, first = pointer
        return tuple(cells[place][first + i] for i in range(count))

    def add(address, offset):
        # Offsets count bytes or elements by where they stand, and cells count neither.
        if offset:
            raise ptx_program.PtxError(f"a host program adds {offset} to {address}")
        return address

    for line in host.splitlines()[1:]:
        line = line.strip()
        found = re.match(r"(?:(%\w+) = )?([\w.]+) ?(.*)", line)
        if not found:
            raise ptx_program.PtxError(f"unknown line of a host program: {line!r}")
        name, op, rest = found.groups()
        used = re.findall(r"%\w+", rest.split(" loc(")[0])
        if op == "llvm.mlir.constant":
            values[name] = int(re.match(r"\((-?\d+)", rest)[1])
        elif op == "llvm.mlir.undef":
            values[name] = {}
        elif op == "llvm.load":
            place, at = values[used[0]]
            values[name] = (place, at) if "!llvm.array" in rest else cells[place][at]
        elif op == "llvm.store":
            place, at = values[used[1]]
            cells[place][at] = values[used[0]]
        elif op in ("llvm.alloca", "memref.alloca"):
            cells[name], values[name] = {}, (name, 0)
        elif op == "llvm.getelementptr":
            place, at = values[used[0]]
            values[name] = place, at + int(re.match(r"%\w+\[(\d+)\]", rest)[1])
        elif op == "llvm.insertvalue":
            path = re.search(r"\[([\d, ]+)\]", rest)[1]
            values[name] = values[used[1]] | {path: values[used[0]]}
        elif op == "llvm.extractvalue":
            values[name] = values[used[0]][re.search(r"\[([\d, ]+)\]", rest)[1]]
        elif op == "builtin.unrealized_conversion_cast":
            # A memref is its address here; as a struct its second field, before an offset.
            values[name], kind = values[used[0]], rest.partition(" to ")[2]
            if kind.startswith("!llvm.struct"):
                values[name] = {"1": values[name], "2": 0}
            elif kind.startswith("memref"):
                values[name] = add(values[name]["1"], values[name]["2"])
        elif op == "memref.store":
            place, at = values[used[1]]
            cells[place][at + values[used[2]]] = values[used[0]]
        elif op == "llvm.mul":
            values[name] = values[used[0]] * values[used[1]]
        elif op == "llvm.add":
            values[name] = add(values[used[0]], values[used[1]])
        elif (
            op in ("llvm.inttoptr", "llvm.ptrtoint")
            or op in ("memref.transpose", "memref.extract_aligned_pointer_as_index")
            or op == "memref.reinterpret_cast"
            and "to offset: [0]" in rest
        ):
            values[name] = values[used[0]]
        elif op == "call" and rest.startswith("@mosaic_gpu_init_tma_desc"):
            target, base, kind, rank, sizes, strides, swizzle, box = (values[x] for x in used)
            sizes, strides, box = (read_array(x, rank) for x in (sizes, strides, box))
            maps[target] = TensorMap(base, _ITEM_BYTES[kind], sizes, strides, swizzle, box)
        elif op == "gpu.launch_func":
            grid, args = re.search(r"blocks in \((.*?)\).* args\((.*?)\) ", rest + " ").groups()
            grid = tuple(values[x] for x in re.findall(r"%\w+", grid))
            params = [values[x] for x in re.findall(r"%\w+", args)]
            for i, value in enumerate(params):
                if isinstance(value, tuple):
                    params[i] = {at: m for (place, at), m in maps.items() if place == value[0]}
            return grid, params
        else:
            raise ptx_program.PtxError(f"unknown operation of a host program: {line!r}")
    raise ptx_program.PtxError("a host program launches nothing")


def run_kernel(ptx, host_log, operands, out_types, **options):
    """Run a kernel.

    Args:
      ptx: str.
      host_log: str, see `run_host`.
      operands: arrays.
      out_types: of what the kernel writes, shapes and dtypes.
      **options: `reads`, `copies` and `seed` of `HopperUnits`.

    Returns:
      list of arrays.
    """
    memory = ptx_machine.GlobalMemory()
    results = [
        np.full(max(1, int(np.prod(t.shape))) * np.dtype(t.dtype).itemsize, 0xFF, np.uint8)
        for t in out_types
    ]
    addresses = [memory.add(np.asarray(x)) for x in (*operands, *results)]
    grid, params = run_host(host_log, addresses)
    program = ptx_program.parse(ptx)
    maps = {}
    for i, param in enumerate(params):
        if isinstance(param, dict):
            maps |= {ptx_machine.PARAM_BASE + 4096 * i + at: m for at, m in param.items()}
    for z, y, x in np.ndindex(grid[2], grid[1], grid[0] // program.cluster):
        units = functools.partial(HopperUnits, maps=maps, cluster=Cluster(), **options)
        ptx_machine.run_together(
            [
                ptx_machine.Machine(
                    program, memory, params, (program.cluster * x + rank, y, z), grid, units
                )
                for rank in range(program.cluster)
            ]
        )
    return [
        memory.read(address, t.shape, t.dtype)
        for address, t in zip(addresses[len(operands) :], out_types, strict=True)
    ]


_compiled = {}


def compile_kernel(launch, operands, key=None):
    """Compile one kernel for an H200.

    Args:
      launch: function that launches it.
      operands: arrays or their shapes.
      key: hashable, under which the result is kept for the next call, or None.

    Returns:
      tuple of its PTX and the log of its host program.
    """
    if key is not None and key in _compiled:
        return _compiled[key]
    logs = []
    read = aot.read_kernel

    def keep_log(ptxas):
        logs.append(ptxas.with_suffix(".mlir-passes.log").read_text())
        return read(ptxas)

    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
    with mock.patch.object(aot, "read_kernel", keep_log):
        (kernel,) = aot.compile_for(launch, *structs).kernels
    if key is not None:
        _compiled[key] = kernel.ptx, logs[0]
    return kernel.ptx, logs[0]


@contextlib.contextmanager
def ptx_machine_runs_kernels(*, num_processors=2, **options):
    """Run the PTX of every kernel that is launched inside, in place of a GPU.

    Args:
      num_processors: int, of the GPU that kernels find.
      **options: `reads`, `copies` and `seed` of `HopperUnits`.
    """
    real = plgpu.kernel

    def kernel(body, out_type=None, **settings):
        def launch(*operands):
            leaves, tree = jax.tree.flatten(operands)
            out_leaves, out_tree = jax.tree.flatten(out_type)
            with mock.patch.object(plgpu, "kernel", real):
                ptx, log = compile_kernel(
                    lambda *xs: real(body, out_type=out_type, **settings)(*tree.unflatten(xs)),
                    leaves,
                )
            outs = jax.pure_callback(
                lambda *xs: run_kernel(ptx, log, xs, out_leaves, **options), out_leaves, *leaves
            )
            return out_tree.unflatten(outs)

        return launch

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(plgpu, "kernel", kernel))
        # What asks for the GPU does so by names that modules have imported.
        answers = {"check_hopper": lambda: None, "count_processors": lambda: num_processors}
        for module in [m for n, m in sys.modules.items() if n.startswith("pallas_kernels.")]:
            for name, answer in answers.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, answer))
        yield
