"""The products of `nm_matmul` on Hopper's sparse tensor cores.

  y = x w        A = w^T, packed along K       y[M, N]  = (A x^T)^T
  dx = dz w^T    A = w, packed along N         dx[M, K] = (A dz^T)^T    if the mask is transposable
  dw = x^T S(dz) A = S(dz)^T, packed along M   dw[K, N] = (A x)^T       if dz is pruned

Other products are XLA's dense ones. What the kernel does not do raises NotImplementedError with the
reason. See `kernel` for how it works.

Letters: M rows (tokens)   K contracted axis   N columns of the weight.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import check_hopper, count_processors, is_interpreted
from pallas_kernels.nm_matmul.activations import GATED
from pallas_kernels.nm_matmul.call import NMArrays, NMFacts, PackArrays, PackFacts
from pallas_kernels.nm_matmul.mask_check import check_known_mask
from pallas_kernels.nm_matmul.mosaic_sm90.kernel import Problem, multiply_sparse
from pallas_kernels.nm_matmul.mosaic_sm90.pack import pack_weight, prune_on_gpu
from pallas_kernels.nm_matmul.mosaic_sm90.tile_config import default_config
from pallas_kernels.nm_matmul.mvue import GROUP
from pallas_kernels.nm_matmul.packing import TILE, Compressed, PackedNM
from pallas_kernels.nm_matmul.straight_through import NMProducts, multiply_straight_through
from pallas_kernels.nm_matmul.xla import XLA_PRODUCTS


def check(facts: NMFacts) -> None:
    """Refuse what the kernels do not do.

    Raises:
      NotImplementedError: with the reason.
    """
    check_hopper()
    if facts.pattern != (2, 4):
        raise NotImplementedError(
            f"implementation='mosaic_sm90' takes pattern (2, 4), got {facts.pattern}; 'xla' takes "
            "all"
        )
    if facts.dtype not in ("bfloat16", "float16"):
        raise NotImplementedError(
            f"the Hopper kernel takes bfloat16 and float16, got {facts.dtype}"
        )
    halves = 2 if facts.activation in GATED else 1
    if facts.inner % TILE or facts.columns % (halves * TILE):
        raise NotImplementedError(
            f"the Hopper kernel takes weights [K, N] of multiples of {TILE}, and of "
            f"{2 * TILE} columns with a gate, got w.shape={(facts.inner, facts.columns)}, "
            f"activation={facts.activation!r}; pad them"
        )


def tile(facts: NMFacts) -> str:
    """Say how the products of a call are cut: y, then dx and dw where they are sparse.

    Example: "2x128x64 in 5 stages; 2x128x64 in 5 stages" of a transposable mask.
    """
    rows, inner, columns = facts.rows, facts.inner, facts.columns
    is_gated = facts.activation in GATED
    cuts = [_choose_tiles(columns, inner, rows, facts.dtype, is_gated=is_gated)]
    if facts.transposable:
        cuts.append(_choose_tiles(inner, columns, rows, facts.dtype))
    if facts.grad_pruning != "none":
        tokens = rows + -rows % TILE
        cuts.append(_choose_tiles(columns, tokens, inner, facts.dtype, pads_columns=False))
    return "; ".join(f"{c.blocks}x{c.columns}x{c.contraction} in {c.stages} stages" for c in cuts)


def run(arrays: NMArrays, facts: NMFacts) -> jax.Array:
    """Multiply on sparse tensor cores, after packing the weight if that is not done.

    Returns:
      float[M, N], or [M, N / 2] for a gated activation, typed like x.

    Raises:
      ValueError: if the weight is packed here, and the values of its mask are known while tracing
        and keep too many of a group.
    """
    if arrays.packed is None:
        check_known_mask(arrays.mask, pattern=facts.pattern, transposable=facts.transposable)
        packed = pack_weight(
            PackArrays(jax.lax.stop_gradient(arrays.w), arrays.mask),
            PackFacts(
                along_k=True,
                along_n=facts.transposable,
                shape=arrays.w.shape,
                dtype=facts.dtype,
            ),
        )
        arrays = arrays._replace(packed=packed)
    is_dense = facts.grad_pruning == "none"
    products = NMProducts(
        forward=_forward,
        input_gradient=_input_gradient if facts.transposable else XLA_PRODUCTS.input_gradient,
        weight_gradient=XLA_PRODUCTS.weight_gradient if is_dense else _weight_gradient,
    )
    return multiply_straight_through(arrays, facts, products)


def _forward(x, w, mask, packed: PackedNM, bias, activation, keeps_z):
    assert packed.along_k is not None, "checked by the op"
    out, *z = _multiply(packed.along_k, x, bias=bias, activation=activation, keeps_inputs=keeps_z)
    return out, z[0] if keeps_z else None


def _input_gradient(dz, w, mask, packed: PackedNM):
    assert packed.along_n is not None, "checked by the op"
    return _multiply(packed.along_n, dz)[0]


def _weight_gradient(x, dz, key, grad_pruning):
    # Padding does not change the random bits that a token gets.
    dz, x = (_pad_rows(array, TILE) for array in (dz, x))
    bits = jax.random.bits(key, (dz.shape[0] // GROUP, dz.shape[1]), jnp.uint32)
    exact = grad_pruning == "mvue_exact"
    sparse = prune_on_gpu(dz, bits, exact=exact, interpreted=is_interpreted())
    return _multiply(sparse, x, dense_is_transposed=False)[0]


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
        is_gated=activation in GATED,
        pads_columns=dense_is_transposed,
    )
    if dense_is_transposed:
        dense = _pad_rows(dense, tiles.columns)
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


def _choose_tiles(rows, contraction, columns, dtype, *, is_gated=False, pads_columns=True):
    return default_config(
        rows,
        contraction,
        columns,
        dtype,
        num_programs=count_processors(),
        is_gated=is_gated,
        pads_columns=pads_columns,
    )


def _pad_rows(array: jax.Array, multiple: int) -> jax.Array:
    missing = -array.shape[0] % multiple
    return jnp.pad(array, ((0, missing), (0, 0))) if missing else array
