"""Arithmetic on tiles in the Hopper attention kernels: masks, and products of tensor cores.

Letters: B T S N K H I J as everywhere (`sparsejax.types`).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.mosaic_sm90.walk import Problem
from pallas_kernels.hopper.layouts import LAYOUT

LOG2_E = math.log2(math.e)
"""Softmax is computed in base 2: 2^(x log2 e) = e^x."""


def make_mask(
    problem: Problem,
    shape: tuple[int, ...],
    *,
    query_axis: int,
    query_start: Any,
    key_start: Any,
    bits: Any,
    kv_mask: Any = None,
    query_segments: Any = None,
    key_segments: Any = None,
) -> tuple[Any, Any]:
    """Make the mask of one tile of logits.

    Args:
      shape: of the tile.
      query_axis: int, the axis of the tile that queries lie on; keys lie on the other.
      query_start: int32, position of the tile's first query.
      key_start: int32, position of the tile's first key.
      bits: int32, kept blocks of the tile block, used where a tile has several.
      kv_mask: int32[keys] or None, 0 removes a key.
      query_segments: int32[queries] or None.
      key_segments: int32[keys] or None.

    Returns:
      tuple of bool arrays of the shape, or None for all True: the positions that are kept and
      visible, and those of them that `kv_mask` leaves.
    """

    def spread(vector, axis):
        return lax.broadcast_in_dim(vector, shape, [axis])

    key_axis = 1 - query_axis
    conditions = []
    grain = problem.grain
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=LAYOUT) for axis in range(2)
    )
    if problem.causal:
        # Bits 1 and 2 of a column are a thread's own, the others are constants: so a comparison
        # takes one instruction. Behind the barrier it is made when it is needed, and not before
        # the products, where its results would take registers.
        own, constant = column & 6, column & ~6
        ahead = lax.optimization_barrier(query_start - key_start)
        if query_axis == 0:
            conditions.append(row + ahead - own >= constant)
        else:
            conditions.append(constant >= row - ahead - own)
    if grain.rows * grain.columns > 1:
        query, key = (row, column) if query_axis == 0 else (column, row)
        places = []
        if grain.rows > 1:
            places.append(jnp.where((query & 32) != 0, 2, 0))
        if grain.columns > 1:
            places.append(jnp.where((key & 32) != 0, 1, 0))
        conditions.append((functools.reduce(jnp.right_shift, places, bits) & 1) != 0)
    if query_segments is not None:
        conditions.append(spread(query_segments, query_axis) == spread(key_segments, key_axis))
    seen = functools.reduce(jnp.logical_and, conditions) if conditions else None
    attended = seen
    if kv_mask is not None:
        present = spread(kv_mask, key_axis) != 0
        attended = present if seen is None else seen & present
    return seen, attended


def zeros(shape: tuple[int, ...], layout: Any = LAYOUT, value: float = 0.0) -> jax.Array:
    """Return an f32 array in registers.

    Args:
      layout: how it lies in registers.
      value: float, of all elements.

    Returns:
      f32 array.
    """
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def load_vector(smem: dict[str, Any], name: str, layout: Any) -> Any:
    """Load a vector from shared memory, if it is there.

    Args:
      smem: name -> reference.
      layout: BY_ROW or BY_COLUMN.

    Returns:
      array in registers, or None if there is no such name.
    """
    return plgpu.load(smem[name], layout=layout) if name in smem else None


class Start(NamedTuple):
    """What a product is added to.

    Attributes:
      value: f32[64, Y].
      is_added_last: bool, and not summed up from there, as the interpreter needs it.
    """

    value: jax.Array
    is_added_last: bool

    def put(self, acc: Any) -> None:
        """Put the value where a product that is still to be started is summed up.

        Args:
          acc: reference to an accumulator.
        """
        if not self.is_added_last:
            acc[...] = self.value

    def add(self, product: jax.Array) -> jax.Array:
        """Add the value if it is not in the accumulator.

        Args:
          product: f32[64, Y], what the accumulator holds in the end.

        Returns:
          f32[64, Y], the sum.
        """
        return product + self.value if self.is_added_last else product


def multiply(
    lhs: Any,
    rhs_smem: Any,
    *,
    start: Start | None = None,
    hand_over: Callable[[], None] | None = None,
) -> jax.Array:
    """Multiply two matrices on the tensor cores, and wait.

    Args:
      lhs: [64, X], a reference to shared memory, or in registers.
      rhs_smem: reference, [X, Y].
      start: what the product is added to; None for 0.
      hand_over: is called when the product is started.

    Returns:
      f32[64, Y].
    """

    def run(acc):
        if start is not None:
            start.put(acc)
        plgpu.wgmma(acc, lhs, rhs_smem)
        if hand_over is not None:
            hand_over()
        return acc[...] if start is None else start.add(acc[...])

    return pl.run_scoped(
        run, plgpu.WGMMAAccumulatorRef((lhs.shape[0], rhs_smem.shape[1]), jnp.float32)
    )


def multiply_both(
    first: tuple[Any, Any],
    second: tuple[Any, Any],
    start: Start,
    use_first: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Multiply two pairs of matrices, and use the first product while the second is computed.

    Args:
      first: pair of references, [64, X] and [X, Y].
      second: pair of references, [64, Z] and [Z, Y].
      start: what the second product is added to.
      use_first: function of the first product.

    Returns:
      tuple of what `use_first` returned, and the second sum, f32[64, Y].
    """
    shapes = [(lhs.shape[0], rhs.shape[1]) for lhs, rhs in (first, second)]

    def run(acc, other_acc):
        start.put(other_acc)
        plgpu.wgmma(acc, *first)
        plgpu.wgmma(other_acc, *second)
        used = use_first(plgpu.wgmma_accumulator_load(acc, wait_n=1))
        return used, start.add(other_acc[...])

    return pl.run_scoped(run, *(plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for shape in shapes))


def multiply_and_add(
    product: tuple[Any, Any],
    addition: tuple[jax.Array, jax.Array, Any],
    staging_smem: Any,
    use_product: Callable[[jax.Array], Any],
    hand_over: Callable[[], None],
) -> tuple[Any, jax.Array]:
    """Multiply, then add another product, and use the first while the second is computed.

    Args:
      product: pair of a reference [64, X], or that in registers, and a reference [X, Y].
      addition: an accumulator f32[64, Z], a left operand [64, W], and a reference [W, Z].
      staging_smem: reference [64, W] to put the left operand in, or None to leave it in registers.
      use_product: function of the first product.
      hand_over: is called when both are started.

    Returns:
      tuple of what `use_product` returned, and the new accumulator, f32[64, Z].
    """
    acc, lhs, rhs_smem = addition
    if staging_smem is not None:
        staging_smem[...] = lhs
        plgpu.commit_smem()

    def run(product_ref, acc_ref):
        plgpu.wgmma(product_ref, *product)
        if staging_smem is None:
            acc_ref[...] = acc
            plgpu.wgmma(acc_ref, lhs, rhs_smem)
        else:
            plgpu.wgmma(acc_ref, staging_smem, rhs_smem)
        hand_over()
        used = use_product(plgpu.wgmma_accumulator_load(product_ref, wait_n=1))
        return used, acc_ref[...]

    shapes: Any = (product[0].shape[0], product[1].shape[1]), acc.shape
    used, added = pl.run_scoped(
        run, *(plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for shape in shapes)
    )
    return used, added if staging_smem is None else acc + added


def multiply_add(
    products: Sequence[tuple[jax.Array, jax.Array, Any]], staging_smem: Any
) -> tuple[jax.Array, ...]:
    """Add products of matrices in registers and in shared memory, and wait for all of them.

    Args:
      products: for each, the accumulator f32[64, Y], the left operand [64, X], and a reference
        [X, Y] to the right one.
      staging_smem: reference [64, X] to put left operands in, or None to leave them in registers.

    Returns:
      tuple of the new accumulators, f32[64, Y].
    """
    if staging_smem is None:

        def run(accs):
            for acc, (_, lhs, rhs_smem) in zip(accs, products, strict=True):
                plgpu.wgmma(acc, lhs, rhs_smem)

        refs = tuple(plgpu.WGMMAAccumulatorRef.init(acc) for acc, _, _ in products)
        sums: Any = pl.run_state(run)(refs)
        return tuple(sums)
    results = []
    for acc, lhs, rhs_smem in products:
        staging_smem[...] = lhs
        plgpu.commit_smem()
        results.append(acc + multiply(staging_smem, rhs_smem))
    return tuple(results)
