"""The launch of a Triton kernel, through jax-triton or in an interpreter."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from pallas_kernels.triton.interpretation import Interpretation, find_interpretation
from pallas_kernels.triton.tile_tables import Cut

# Triton writes the newest PTX that it knows, which is newer than CUDA 13.0 takes. 8.6 was the first
# that knows compute capability 10.0, 8.8 knows all of 10 and 12.
_PTX_VERSION, _PTX_VERSION_BLACKWELL = 86, 88
# Of 32 bits: of a processor, and the most of a thread.
_REGISTERS, _REGISTERS_OF_THREAD = 65_536, 255


def launch(
    kernel: Any,
    inputs: Mapping[str, jax.Array | None],
    outputs: Mapping[str, jax.ShapeDtypeStruct | None],
    constants: Mapping[str, Any],
    *,
    programs: int,
    tile: Cut,
    capability: tuple[int, int],
    fuses: bool = True,
    takes_all_registers: bool = False,
) -> dict[str, jax.Array]:
    """Launch a kernel on a grid of one axis.

    Args:
      kernel: function decorated with `triton.jit`.
      inputs: parameter -> array; None where the kernel reads none.
      outputs: parameter -> shape and dtype; None where the kernel writes none.
      constants: parameter annotated with `tl.constexpr` -> value.
      programs: of the grid.
      tile: warps and stages of a program.
      capability: (major, minor), compute capability to compile for.
      fuses: whether a product and a sum may become one instruction, which rounds once.
      takes_all_registers: whether a thread may hold as many as one program leaves it. Otherwise
        ptxas may spill a few, so that another program fits on a processor.

    Returns:
      parameter -> array, of the outputs that are not None.
    """
    written = {name: out for name, out in outputs.items() if out is not None}
    absent = dict.fromkeys(
        [*(n for n, x in inputs.items() if x is None), *(outputs.keys() - written)]
    )
    given = {name: x for name, x in inputs.items() if x is not None}
    interpretation = find_interpretation()
    if interpretation is not None:
        constants = {**constants, **absent}
        results = _interpret(interpretation, kernel, programs, given, written, constants)
        return dict(zip(written, results, strict=True))
    # Imported here: it is an extra, and importing it takes seconds.
    import jax_triton

    options: dict[str, Any] = {"enable_fp_fusion": fuses}
    if takes_all_registers:
        options["maxnreg"] = min(_REGISTERS_OF_THREAD, _REGISTERS // (32 * tile.warps))
    # Triton warns where a PTX version is given and the fusion of products and sums is not.
    options["ptx_version"] = _PTX_VERSION if capability < (10, 0) else _PTX_VERSION_BLACKWELL
    results = jax_triton.triton_call(
        kernel=kernel,
        out_type=tuple(written.values()),
        grid=(programs,),
        num_warps=tile.warps,
        num_stages=tile.stages,
        # jax-triton would ask the GPU, which need not be there, or guess by its name.
        compute_capability=10 * capability[0] + capability[1],
        backend_options=options,
        **given,
        **absent,
        **constants,
    )
    return dict(zip(written, results, strict=True))


def _interpret(
    interpretation: Interpretation,
    kernel: Any,
    programs: int,
    inputs: Mapping[str, jax.Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    constants: Mapping[str, Any],
) -> tuple[jax.Array, ...]:
    run = functools.partial(interpretation.run, kernel, programs)

    def run_on_host(*arrays: Any) -> tuple[np.ndarray, ...]:
        host = {name: np.asarray(x) for name, x in zip(inputs, arrays, strict=True)}
        return run(host, outputs, constants)

    return jax.pure_callback(run_on_host, tuple(outputs.values()), *inputs.values())
