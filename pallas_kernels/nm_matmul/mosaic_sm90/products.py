"""The products of `nm_matmul` on Hopper's sparse tensor cores.

Which products there are is told in `nm_matmul.sparse_products`, how the kernel works in `kernel`.
"""

import functools

import jax

from pallas_kernels.dispatch import check_hopper, count_processors, is_interpreted
from pallas_kernels.nm_matmul.call import NMArrays, NMFacts
from pallas_kernels.nm_matmul.mosaic_sm90.cut import Problem
from pallas_kernels.nm_matmul.mosaic_sm90.kernel import multiply_sparse
from pallas_kernels.nm_matmul.mosaic_sm90.pack import pack_weight, prune_on_gpu
from pallas_kernels.nm_matmul.mosaic_sm90.tile_config import default_config
from pallas_kernels.nm_matmul.packing import Compressed
from pallas_kernels.nm_matmul.sparse_products import (
    SparseKernels,
    check_packable,
    list_products,
    multiply_packed,
)
from pallas_kernels.padding import pad_rows

_COPIED_ROWS = 8


def check(facts: NMFacts) -> None:
    """Refuse what the kernels do not do.

    Raises:
      NotImplementedError: with the reason.
    """
    check_hopper()
    check_packable(facts, "mosaic_sm90")


def tile(facts: NMFacts) -> str:
    """Say how the products of a call are cut: y, then dx and dw where they are sparse.

    Example: "2x192x64 in 4 stages, clusters of 2; 1x256x64 in 4 stages" of a transposable mask.
    """
    cuts = [
        _choose_tiles(
            *sizes,
            facts.dtype,
            activation=facts.activation if name == "y" else None,
        )
        for name, sizes in list_products(facts).items()
    ]
    return "; ".join(
        f"{c.blocks}x{c.columns}x{c.contraction} in {c.stages} stages"
        + (f", clusters of {c.cluster}" if c.cluster > 1 else "")
        for c in cuts
    )


def run(arrays: NMArrays, facts: NMFacts) -> jax.Array:
    """Multiply on Hopper's sparse tensor cores, see `sparse_products.multiply_packed`.

    Returns:
      float[M, N], or [M, N / 2] for a gated activation, typed like x.

    Raises:
      ValueError: if the mask is known while tracing and keeps too many of a group.
    """
    prune = functools.partial(prune_on_gpu, interpreted=is_interpreted())
    return multiply_packed(arrays, facts, SparseKernels(pack_weight, prune, _multiply))


def _multiply(
    sparse: Compressed,
    dense: jax.Array,
    *,
    dense_is_transposed: bool = True,
    bias: jax.Array | None = None,
    activation: str | None = None,
    keeps_inputs: bool = False,
) -> list[jax.Array]:
    """Return (A B)^T, with bias and activation, and what the activation was applied to."""
    rows, contraction = sparse.shape
    num_columns = dense.shape[0 if dense_is_transposed else 1]
    tiles = _choose_tiles(
        rows,
        contraction,
        num_columns,
        dense.dtype.name,
        activation=activation,
    )
    if dense_is_transposed:
        # Copies take eight rows at a time, and a whole tile.
        dense = pad_rows(dense, tiles.columns if num_columns < tiles.columns else _COPIED_ROWS)
    problem = Problem(
        rows=rows,
        contraction=contraction,
        columns=dense.shape[0 if dense_is_transposed else 1],
        dtype=dense.dtype.name,
        dense_is_transposed=dense_is_transposed,
        has_bias=bias is not None,
        activation=activation,
        keeps_inputs=keeps_inputs,
    )
    results = multiply_sparse(sparse, dense, bias, problem, tiles, num_programs=count_processors())
    return [result[:num_columns] for result in results]


def _choose_tiles(rows, contraction, columns, dtype, *, activation=None):
    return default_config(
        rows,
        contraction,
        columns,
        dtype,
        num_programs=count_processors(),
        activation=activation,
    )
