"""What JAX and ptxas write of each Mosaic kernel they compile: seen to, and read."""

import contextlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from jax.experimental.mosaic.gpu import constraints, core

from pallas_kernels.kernel_report import KernelReport, find_numbers, make_kernel_report


@contextlib.contextmanager
def every_kernel_is_dumped() -> Iterator[None]:
    """Have each kernel compiled, whatever was compiled before, under the name its dumps go by.

    The compiler keeps a kernel for the rest of the process, and dumps nothing for one it has. In
    JAX 0.11 the name of the dumps, which has a number of its own, is in the program it is given;
    0.12 takes it out, so that equal kernels are compiled once and the compiler names its files
    after the module. So the module takes that name.

    The constraints of Mosaic's layouts are left out of the dumps: nothing reads them here, and
    writing them takes longer than compiling a kernel.
    """
    finish, write = core._run_serde_pass, constraints.ConstraintSystem.__str__

    def finish_and_name(module: Any, **options: Any) -> Any:
        finished = finish(module, **options)
        name = module.operation.attributes["mosaic_gpu.dump_basename"]
        finished.operation.attributes["sym_name"] = name
        return finished

    core._run_serde_pass = finish_and_name
    constraints.ConstraintSystem.__str__ = lambda self: ""
    try:
        yield
    finally:
        core._run_serde_pass, constraints.ConstraintSystem.__str__ = finish, write


def read_kernel(ptxas: pathlib.Path) -> KernelReport:
    """Read a kernel's report.

    Args:
      ptxas: what ptxas said of it; the other dumps lie beside it.
    """
    # JAX 0.12 puts a number of the compiler behind the name of the module; what JAX itself writes
    # goes by the name alone.
    with ptxas.with_suffix(".mlir-passes.log").open() as log:
        name = next(found[1] for line in log if (found := re.match(r'module @"?([^"\s]+)', line)))
    resources = ptxas.with_name(f"{name}.resources.txt").read_text()
    (scratch,) = find_numbers(r"smem_scratch_bytes=(\d+)", resources)
    barriers = re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", resources)
    return make_kernel_report(
        name,
        ptxas.read_text(),
        shared_memory_bytes=scratch + sum(8 * int(size) * int(count) for size, count in barriers),
        ptx=ptxas.with_suffix(".ptx").read_text(),
        sass=ptxas.with_suffix(".sass_ctrl").read_text(),
    )
