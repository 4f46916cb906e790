"""2:4 sparse matrices as sparse tensor cores read them: kept values and where they were.

The sparse operand has rows R and a contraction C, and keeps two of every four consecutive values of
a row. Values are stored row by row. Metadata are four bits a group, two positions of two bits, in
words of 32 bits that lie as the threads of four warps hold them, each with a strip of 16 rows:

  metadata[R/64, C/64, t], t = 32 warp + 4 row + quarter, bits 16 half + 4 group + 2 which

is the position of kept value `which` of group `group` among the 16 columns 16 `quarter`, in row
16 warp + 8 half + row of a tile of 64 rows and 64 columns. Every thread reads one word for two
instructions of 32 columns: lanes with an even quarter pair supply the first, the others the second
(selector 0 and 1 of the instruction), so that a warp reads 128 consecutive bytes and none is idle.

One layout serves two instructions: `wgmma.mma_async.sp` of Hopper, whose 64 rows are those of a
warpgroup, and `mma.sp`, m16n8k32, since Ampere, whose 16 rows are those of one warp. Within a strip
both read the same word of each lane.

A weight [K, N] is packed along K for y = x w, whose sparse operand is w^T, and along N for
dx = dy w^T, whose sparse operand is w.

Letters: K N as in `nm_matmul`; R rows, C columns of the sparse operand.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

TILE = 64
"""Rows, and columns, that 128 words describe: those of four warps."""


class Compressed(NamedTuple):
    """A 2:4 sparse matrix [R, C].

    Attributes:
      values: bf16 or f16[R, C/2], kept values of each row in order.
      metadata: uint32[R/64, C/64, 128], see the module.
    """

    values: jax.Array
    metadata: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        return self.values.shape[-2], 2 * self.values.shape[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedNM:
    """2:4 sparse weights [..., K, N], packed for one product or for both. Made by `pack_nm`.

    Attributes:
      along_k: Compressed [N, K] for y = x w, or None.
      along_n: Compressed [K, N] for dx = dy w^T, or None.
    """

    along_k: Compressed | None
    along_n: Compressed | None

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., K, N)."""
        if self.along_n is not None:
            rows, columns = self.along_n.shape
        else:
            columns, rows = self._either().shape
        return *self._either().values.shape[:-2], rows, columns

    @property
    def dtype(self) -> jnp.dtype:
        """Of the values."""
        return self._either().values.dtype

    def _either(self) -> Compressed:
        compressed = self.along_k if self.along_n is None else self.along_n
        assert compressed is not None, "at least one axis is packed"
        return compressed


def describe_compressed(
    rows: int, columns: int, dtype: jnp.dtype
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Return shapes and dtypes of values and metadata of a compressed matrix [R, C].

    Args:
      rows: R, a multiple of 64.
      columns: C, likewise.
      dtype: of the values.
    """
    metadata = (rows // TILE, columns // TILE, 2 * TILE)
    return (
        jax.ShapeDtypeStruct((rows, columns // 2), dtype),
        jax.ShapeDtypeStruct(metadata, jnp.uint32),
    )


def compress(w_RC: jax.Array, mask_RC: jax.Array) -> Compressed:
    """Compress a matrix along its rows.

    A group with fewer than two kept values stores zeros in their place, at positions that keep the
    order strict; of more than two, the first two are kept. Kept zeros of either sign stay.

    Args:
      w_RC: bf16 or f16[R, C], R and C multiples of 64.
      mask_RC: bool[R, C], True = kept.
    """
    rows, columns = w_RC.shape
    w = [w_RC[:, i::4] for i in range(4)]
    kept = [mask_RC[:, i::4].astype(jnp.uint32) for i in range(4)]
    first, second, nibble = select_two(w, kept)
    values = jnp.stack([first, second], axis=-1).reshape(rows, columns // 2)
    nibble = nibble.reshape(rows // TILE, 4, 2, 8, columns // TILE, 4, 4)
    halves = (nibble << _first_bits(nibble.shape)).sum(axis=-1, dtype=jnp.uint32)
    words = halves[:, :, 0] | (halves[:, :, 1] << 16)  # [R/64, warp, row, C/64, quarter]
    metadata = words.transpose(0, 3, 1, 2, 4).reshape(rows // TILE, columns // TILE, 2 * TILE)
    return Compressed(values, metadata)


def select_two(
    w: Sequence[jax.Array], kept: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Select the two kept values of groups of four, elementwise.

    Args:
      w: four arrays, the members of each group.
      kept: four arrays of uint32, 1 where kept, else 0; kernels have no arithmetic of bool.

    Returns:
      tuple of the first and second kept value, and uint32 of their positions, the first in bits
      0 and 1, the second in bits 2 and 3.
    """
    zero = jnp.zeros_like(w[0])
    left_out = [1 - flag for flag in kept[:2]]
    # The first is 0, 1 or 2, and 0 where none of them is kept; the second is 3 where none is left.
    first_is_1, first_is_2 = left_out[0] & kept[1], left_out[0] & left_out[1] & kept[2]
    second_is_1, second_is_2 = kept[0] & kept[1], kept[2] & (kept[0] ^ kept[1])
    first = jnp.where(first_is_2 != 0, w[2], jnp.where(kept[0] != 0, w[0], zero))
    first = jnp.where(first_is_1 != 0, w[1], first)
    second = jnp.where(second_is_2 != 0, w[2], jnp.where(kept[3] != 0, w[3], zero))
    second = jnp.where(second_is_1 != 0, w[1], second)
    low = first_is_1 | (first_is_2 << 1)
    high = 3 - second_is_2 - (second_is_1 << 1)
    return first, second, low | (high << 2)


def decompress(compressed: Compressed) -> jax.Array:
    """Put kept values back where they were.

    Args:
      compressed: Compressed [R, C].

    Returns:
      array[R, C], +0 where nothing was kept.
    """
    values, metadata = compressed
    rows, columns = compressed.shape
    words = metadata.reshape(rows // TILE, columns // TILE, 4, 8, 4).transpose(0, 2, 3, 1, 4)
    halves = jnp.stack([words & 0xFFFF, words >> 16], axis=2)  # [R/64, warp, half, row, C/64, q]
    nibbles = (halves[..., None] >> _first_bits((*halves.shape, 4))) & 15
    nibbles = nibbles.reshape(rows, columns // 4, 1)
    first, second = (values[:, i::2, None] for i in range(2))
    position = jnp.arange(4, dtype=jnp.uint32)[None, None]
    dense = jnp.where((nibbles & 3) == position, first, jnp.zeros_like(first))
    dense = jnp.where((nibbles >> 2) == position, second, dense)
    return dense.reshape(rows, columns)


def _first_bits(shape: tuple[int, ...]) -> jax.Array:
    """uint32, the first bit of each of the four nibbles of a half word, the last axis."""
    return 4 * jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
