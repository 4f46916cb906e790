"""The products of `nm_matmul` by a kernel that multiplies a packed matrix by a dense one.

  y = x w        A = w^T, packed along K       y[M, N]  = (A x^T)^T
  dx = dz w^T    A = w, packed along N         dx[M, K] = (A dz^T)^T    if the mask is transposable
  dw = x^T S(dz) A = S(dz)^T, packed along M   dw[K, N] = (A x)^T       if dz is pruned

Only the left operand of sparse tensor cores may be sparse: products are computed transposed, and
turned while they are written. Other products are XLA's dense ones.

Letters: M rows (tokens)   K contracted axis   N columns of the weight.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from pallas_kernels.nm_matmul.activations import GATED
from pallas_kernels.nm_matmul.call import NMArrays, NMFacts, PackArrays, PackFacts
from pallas_kernels.nm_matmul.mask_check import check_known_mask
from pallas_kernels.nm_matmul.mvue import take_bits
from pallas_kernels.nm_matmul.packing import TILE, Compressed, PackedNM
from pallas_kernels.nm_matmul.straight_through import NMProducts, multiply_straight_through
from pallas_kernels.nm_matmul.xla import XLA_PRODUCTS
from pallas_kernels.padding import pad_rows

# Kernels count what a row of a tile is away from the first in 32 bits.
_MOST = 2**25


class SparseKernels(NamedTuple):
    """The kernels of one backend, as pure functions of arrays.

    Attributes:
      pack_weight: (arrays PackArrays, facts PackFacts) -> PackedNM, as `packing.compress` packs.
      prune: (dz[M, N], bits uint32[M/4, N], exact) -> Compressed [N, M], of what `mvue.prune_drawn`
        keeps of dz; M and N are multiples of 64.
      multiply: (sparse Compressed [R, C], dense[P, C]) -> list of the result, (A B)^T [P, R]. By
        keyword, with the defaults of a plain product: `dense_is_transposed`, False for dense[C, P];
        `bias`[R]; `activation`, of which a gated one leaves R/2 columns; `keeps_inputs`, for a
        second result, what the activation was applied to.
    """

    pack_weight: Callable[[PackArrays, PackFacts], PackedNM]
    prune: Callable[..., Compressed]
    multiply: Callable[..., list[jax.Array]]


def check_packable(facts: NMFacts, name: str) -> None:
    """Refuse calls whose products cannot be packed.

    Args:
      facts: static facts of the call.
      name: of the backend, for the message.

    Raises:
      NotImplementedError: with the reason.
    """
    if facts.pattern != (2, 4):
        raise NotImplementedError(
            f"implementation={name!r} takes pattern (2, 4), got {facts.pattern}; 'xla' takes all"
        )
    if facts.dtype not in ("bfloat16", "float16"):
        raise NotImplementedError(
            f"implementation={name!r} takes bfloat16 and float16, got {facts.dtype}"
        )
    halves = 2 if facts.activation in GATED else 1
    if facts.inner % TILE or facts.columns % (halves * TILE):
        raise NotImplementedError(
            f"implementation={name!r} takes weights [K, N] of multiples of {TILE}, and of "
            f"{2 * TILE} columns with a gate, got w.shape={(facts.inner, facts.columns)}, "
            f"activation={facts.activation!r}; pad them"
        )
    if max(facts.sizes) >= _MOST:
        raise NotImplementedError(
            f"implementation={name!r} takes fewer than {_MOST} tokens, rows and columns, got "
            f"(M, K, N)={facts.sizes}"
        )


def list_products(facts: NMFacts) -> dict[str, tuple[int, int, int]]:
    """List the sparse products of a call: name -> (R, C, P).

    Args:
      facts: static facts of the call.
    """
    rows, inner, columns = facts.rows, facts.inner, facts.columns
    products = {"y": (columns, inner, rows)}
    if facts.transposable:
        products["dx"] = (inner, columns, rows)
    if facts.grad_pruning != "none":
        products["dw"] = (columns, rows + -rows % TILE, inner)
    return products


def multiply_packed(arrays: NMArrays, facts: NMFacts, kernels: SparseKernels) -> jax.Array:
    """Multiply on sparse tensor cores, after packing the weight if that is not done.

    Args:
      arrays: NMArrays, whose weight is packed here if `packed` is None.
      facts: NMFacts, static.
      kernels: SparseKernels, static.

    Returns:
      float[M, N], or [M, N / 2] for a gated activation, typed like x.

    Raises:
      ValueError: if the weight is packed here, and the values of its mask are known while tracing
        and keep too many of a group.
    """
    if arrays.packed is None:
        check_known_mask(arrays.mask, pattern=facts.pattern, transposable=facts.transposable)
        packed = kernels.pack_weight(
            PackArrays(jax.lax.stop_gradient(arrays.w), arrays.mask),
            PackFacts(
                along_k=True,
                along_n=facts.transposable,
                shape=arrays.w.shape,
                dtype=facts.dtype,
            ),
        )
        arrays = arrays._replace(packed=packed)

    def forward(x, w, mask, packed: PackedNM, bias, activation, keeps_z):
        packed = _take_packed(packed, w)
        assert packed.along_k is not None, "checked by the op"
        out, *z = kernels.multiply(
            packed.along_k, x, bias=bias, activation=activation, keeps_inputs=keeps_z
        )
        return out, z[0] if keeps_z else None

    def input_gradient(dz, w, mask, packed: PackedNM):
        packed = _take_packed(packed, w)
        assert packed.along_n is not None, "checked by the op"
        return kernels.multiply(packed.along_n, dz)[0]

    def weight_gradient(x, dz, draws, grad_pruning):
        # Padding does not change the random bits that a token gets.
        dz, x = (pad_rows(array, TILE) for array in (dz, x))
        bits = take_bits(draws, *dz.shape)
        sparse = kernels.prune(dz, bits, exact=grad_pruning == "mvue_exact")
        return kernels.multiply(sparse, x, dense_is_transposed=False)[0]

    is_dense = facts.grad_pruning == "none"
    products = NMProducts(
        forward=forward,
        input_gradient=input_gradient if facts.transposable else XLA_PRODUCTS.input_gradient,
        weight_gradient=XLA_PRODUCTS.weight_gradient if is_dense else weight_gradient,
    )
    return multiply_straight_through(arrays, facts, products)


@jax.custom_jvp
def _take_packed(packed: PackedNM, w: jax.Array) -> PackedNM:
    """Return a packed weight, for products that are not differentiated with respect to it."""
    del w
    return packed


@_take_packed.defjvp
def _refuse_derivative(primals, tangents):
    # The packed weight says nothing of how it came from w: the derivative would be left out.
    raise NotImplementedError(
        "the kernels of nm_matmul have gradients and no derivatives of gradients with respect to "
        "the weight; implementation='xla' has Hessian products"
    )
