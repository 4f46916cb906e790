"""The products of `nm_matmul` on sparse tensor cores since Ampere: what runs, and what is refused.

Which products there are is told in `nm_matmul.sparse_products`, how the kernel works in
`product_kernel`. Weights are packed as for Hopper's own instruction: a lane of a warp holds the
same words for either.

Letters: R rows, C columns of the sparse operand, P columns of the dense one; B  examples
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.nm_matmul.activations import GATED
from pallas_kernels.nm_matmul.call import NMArrays, NMFacts
from pallas_kernels.nm_matmul.packing import Compressed
from pallas_kernels.nm_matmul.sparse_products import (
    SparseKernels,
    check_packable,
    list_products,
    multiply_packed,
)
from pallas_kernels.nm_matmul.triton.pack import pack_weight, prune_and_pack
from pallas_kernels.nm_matmul.triton.tiles import SparseTile, count_splits, find_product_tile
from pallas_kernels.triton.batching import fold_vmap, repeat_shared
from pallas_kernels.triton.device import check_device
from pallas_kernels.triton.launch import launch

# Tiles along P that are taken together: they stay in the cache while all rows of A read them.
_GROUP = 8


def check(facts: NMFacts) -> None:
    """Refuse what the kernels do not do.

    Raises:
      NotImplementedError: with the reason.
    """
    check_device()
    check_packable(facts, "triton")


def tile(facts: NMFacts) -> str:
    """Name the tiles of a call's sparse products; "" where they cannot run."""
    try:
        check(facts)
    except NotImplementedError:
        return ""
    named = []
    for name, sizes in list_products(facts).items():
        is_plain = name != "y" or not (facts.activation or facts.has_bias)
        cut, splits = _choose_cut(*sizes, divides_columns=name == "dw", is_plain=is_plain)
        named.append(f"{name} {cut}" + (f" {splits} parts" if splits > 1 else ""))
    return ", ".join(named)


def run(arrays: NMArrays, facts: NMFacts) -> jax.Array:
    """Multiply on sparse tensor cores, see `sparse_products.multiply_packed`.

    Returns:
      float[M, N], or [M, N / 2] for a gated activation, typed like x.

    Raises:
      ValueError: if the mask is known while tracing and keeps too many of a group.
      NotImplementedError: if the device or the call is not one that the kernels take.

    Numerics:
      Products accumulate in f32. A repeated call agrees to the bit.
    """
    check(facts)
    return multiply_packed(arrays, facts, SparseKernels(pack_weight, prune_and_pack, multiply))


def multiply(
    sparse: Compressed,
    dense: jax.Array,
    *,
    dense_is_transposed: bool = True,
    bias: jax.Array | None = None,
    activation: str | None = None,
    keeps_inputs: bool = False,
    cut: SparseTile | None = None,
) -> list[jax.Array]:
    """Multiply a packed matrix by a dense one, and turn the result.

    Args:
      sparse: Compressed [R, C].
      dense: bf16 or f16[P, C]; [C, P], P a multiple of 64, if not `dense_is_transposed`.
      dense_is_transposed: bool, see `dense`.
      bias: [R] or None.
      activation: None, "gelu", "geglu" or "swiglu".
      keeps_inputs: bool, what the activation is applied to is returned as well.
      cut: tile to take, None for that of the table.

    Returns:
      list of the result, [P, R], or [P, R / 2] for a gated activation, and what the activation was
      applied to, [P, R], if `keeps_inputs`.
    """
    chosen, splits = _choose_cut(
        *sparse.shape,
        dense.shape[0 if dense_is_transposed else 1],
        divides_columns=not dense_is_transposed,
        is_plain=bias is None and activation is None and not keeps_inputs,
        cut=cut,
    )
    launched = functools.partial(
        _multiply,
        is_turned=not dense_is_transposed,
        activation=activation,
        keeps_inputs=keeps_inputs,
        splits=splits,
        tile=chosen,
        capability=check_device(),
    )
    operands = jax.tree.map(lambda x: x[None], (*sparse, dense, bias))
    return [out[0] for out in fold_vmap(launched)(*operands)]


def multiply_dense(a: jax.Array, b: jax.Array, *, cut: SparseTile) -> jax.Array:
    """Multiply two dense matrices by the same kernel, for comparison with sparse ones.

    Args:
      a: bf16 or f16[R, C], C a multiple of 64.
      b: [P, C].
      cut: tile, whose rows divide R; with dense values its ring takes more memory.

    Returns:
      [P, R], dtype of b: (A B^T)^T.
    """
    (out,) = _multiply(
        a[None],
        None,
        b[None],
        None,
        is_turned=False,
        activation=None,
        keeps_inputs=False,
        splits=1,
        tile=cut,
        capability=check_device(),
    )
    return out[0]


def _choose_cut(
    rows: int,
    contraction: int,
    columns: int,
    *,
    divides_columns: bool,
    is_plain: bool,
    cut: SparseTile | None = None,
) -> tuple[SparseTile, int]:
    """Return the tile of a product, or a given one, and in how many parts it is summed."""
    capability = check_device()
    if cut is None:
        cut = find_product_tile(
            capability, rows=rows, columns=columns, divides_columns=divides_columns
        )
    # Only sums of parts can be added; bias and activation come after the last.
    splits = count_splits(capability, cut, rows, contraction, columns) if is_plain else 1
    return cut, splits


def _multiply(
    values: jax.Array,
    metadata: jax.Array | None,
    dense: jax.Array,
    bias: jax.Array | None,
    *,
    is_turned: bool,
    activation: str | None,
    keeps_inputs: bool,
    splits: int,
    tile: SparseTile,
    capability: tuple[int, int],
) -> list[jax.Array]:
    # Imported where it is launched: kernels need the extra.
    from pallas_kernels.nm_matmul.triton import product_kernel

    if metadata is not None and len(values) != len(metadata):
        values, metadata = repeat_shared((values, metadata))
    B = max(len(x) for x in (values, dense, bias) if x is not None)
    rows, (contraction, columns) = values.shape[1], dense.shape[1:][:: 1 if is_turned else -1]
    parts = 2 if activation in GATED else 1
    dtype = dense.dtype if splits == 1 else jnp.float32
    results = launch(
        product_kernel.multiply_sparse,
        {"values": values, "metadata": metadata, "dense": dense, "bias": bias},
        {
            "out": jax.ShapeDtypeStruct((B * splits, columns, rows // parts), dtype),
            "inputs": jax.ShapeDtypeStruct((B, columns, rows), dtype) if keeps_inputs else None,
        },
        {
            "R": rows,
            "C": contraction,
            "P": columns,
            "VALUES": values.shape[0],
            "DENSE": dense.shape[0],
            "BIAS": 1 if bias is None else bias.shape[0],
            "BR": tile.rows,
            "BP": tile.columns,
            "WARPS_R": tile.warps_along_rows,
            "WARPS_P": tile.warps_along_columns,
            "STAGES": tile.stages,
            "GROUP": _GROUP,
            "SPLITS": splits,
            "PARTS": parts,
            "TURNED": is_turned,
            "ACTIVATION": activation,
        },
        programs=B * splits * (rows // tile.rows) * -(-columns // tile.columns),
        tile=tile,
        capability=capability,
        takes_all_registers=True,
    )
    if splits > 1:
        out = results["out"].reshape(B, splits, *results["out"].shape[1:])
        return [out.sum(axis=1).astype(dense.dtype)]
    return list(results.values())
