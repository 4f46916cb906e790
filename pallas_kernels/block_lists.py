"""Lists of kept blocks, sorted by length and cut into tiles whose lists are walked together.

A tile's trip count is the length of the longest of its own lists, a traced value: no capacity is
fixed, and a new mask needs no compilation. Sorting puts lists of like length together.

Tiles come in two forms. For a CPU they are many, of a few lists each, and are scanned over: the
work is the sum of the lengths, plus at most one tile's width of the longest list, however uneven
the lengths are. For a GPU they are at most four, written out one after another: all lists of a
tile are one batch of each product, and no loop runs over tiles.

Letters: U lists, R lists of a tile, P list positions, W list positions walked at once, X what
shares the lists.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Measured on CPU over blocks of 32 and 64: with fewer lists or narrower steps the overhead of
# small products tells, with more of them the padding where lengths are uneven. The backward pass
# of attention writes out one addition per list and block of a step, hence the bound on blocks.
_LISTS_PER_TILE = 4
_POSITIONS_PER_STEP = 128
_BLOCKS_PER_STEP = 4
# Where the sorted lists are cut for a GPU, as shares of all. The longest stand in the smallest
# tile: a global token makes a sixteenth of the lists walk to the end of its full one, not a quarter
# of them as in equal tiles.
_PARALLEL_CUTS = (1 / 16, 1 / 4, 1 / 2)
MOST_PARALLEL_TILES = len(_PARALLEL_CUTS) + 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """Lists that are walked together. Stacked along a first axis, tiles are scanned over.

    Attributes:
      owner: int32[R], which list stands in each place, counted before sorting.
      counts: int32[R], length of each list.
      visited: int32[R, P], blocks on each list; P is a multiple of `width`.
      num_steps: int32[], steps of `width` positions to the end of the longest list.
      width: int, list positions walked at once.
    """

    owner: jax.Array
    counts: jax.Array
    visited: jax.Array
    num_steps: jax.Array
    width: int = dataclasses.field(metadata={"static": True})

    def walk(self, step: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
        """Return what the tile visits in one step.

        Args:
          step: int32[], at most `num_steps` - 1.
          block: int, positions in a visited block.

        Returns:
          tuple of int32[R, W], the blocks, and bool[R, W * block], which of their positions
          belong to the list rather than to its padding.
        """
        start = step * self.width
        visited_RW = jax.lax.dynamic_slice_in_dim(self.visited, start, self.width, axis=1)
        listed_RW = find_listed(self.counts - start, self.width)
        return visited_RW, jnp.repeat(listed_RW, block, axis=1)


def find_listed(counts: jax.Array, length: int) -> jax.Array:
    """Find which positions belong to lists rather than to their padding.

    Args:
      counts: int[...], length of each list.
      length: int, P, positions with the padding.

    Returns:
      bool[..., P].

    Example:
      >>> find_listed(jnp.array([1, 2]), 2).tolist()
      [[True, False], [True, True]]
    """
    positions = jax.lax.broadcasted_iota(counts.dtype, (*counts.shape, length), counts.ndim)
    return positions < counts[..., None]


def number_entries(x: jax.Array, *, axis: int) -> jax.Array:
    """Number the entries of an array along an axis.

    Args:
      x: int[...].
      axis: negative.

    Returns:
      array typed and shaped like `x`.
    """
    return jax.lax.broadcasted_iota(x.dtype, x.shape, x.ndim + axis)


def list_kept(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """List the kept blocks of each row.

    Args:
      mask: bool[..., U, P], True where a block is kept.

    Returns:
      tuple of int32[..., U], how many are kept, and int32[..., U, P], a permutation of the blocks
      of each row: the kept ones in ascending order, then the others.
    """
    indices = jnp.argsort(~mask, axis=-1, stable=True)
    return mask.sum(axis=-1, dtype=jnp.int32), indices.astype(jnp.int32)


def make_tiles(
    counts_U: jax.Array, visited_UP: jax.Array, *, block: int, parallel: bool
) -> Tile | tuple[Tile, ...]:
    """Sort lists by length, longest first, and cut them into tiles.

    Args:
      counts_U: int32[U], length of each list.
      visited_UP: int32[U, P], blocks on each list, its own first.
      block: int, positions in a visited block.
      parallel: bool, few large tiles instead of many small ones.

    Returns:
      a stack of tiles, each array with a first axis of their number; or, if parallel, a tuple of
      at most MOST_PARALLEL_TILES single ones.
    """
    num_lists, num_blocks = visited_UP.shape
    width = max(1, min(_POSITIONS_PER_STEP // block, _BLOCKS_PER_STEP, num_blocks))
    visited_UP = jnp.pad(visited_UP, ((0, 0), (0, -num_blocks % width)))
    owner = jnp.argsort(-counts_U, stable=True).astype(jnp.int32)
    counts, visited = counts_U[owner], visited_UP[owner]

    def make_tile(cut):
        return Tile(
            owner=cut(owner),
            counts=cut(counts),
            visited=cut(visited),
            num_steps=-(-cut(counts).max(axis=-1) // width),
            width=width,
        )

    if not parallel:
        lists = max(r for r in range(1, _LISTS_PER_TILE + 1) if num_lists % r == 0)
        return make_tile(lambda x: x.reshape(-1, lists, *x.shape[1:]))
    ends = sorted({round(share * num_lists) for share in (0, *_PARALLEL_CUTS, 1)})
    parts = [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]
    return tuple(make_tile(lambda x, part=part: x[part]) for part in parts)


def walk_tiles(
    walk: Callable[[Any, Tile], tuple[Any, tuple[jax.Array, ...]]],
    carry: Any,
    tiles: Tile | tuple[Tile, ...],
) -> tuple[Any, tuple[jax.Array, ...]]:
    """Walk one tile after another and put what they give in the order of the lists.

    Args:
      walk: (carry, Tile) -> (carry, results), each result [X, R, ...].
      carry: pytree of arrays, or None.
      tiles: of `make_tiles`.

    Returns:
      tuple of the last carry and the results, each [X, U, ...].
    """
    if isinstance(tiles, Tile):
        carry, tiled = jax.lax.scan(walk, carry, tiles)
        ordered = tuple(_merge_tiles(x) for x in tiled)
        owner = tiles.owner.reshape(-1)
    else:
        parts = []
        for tile in tiles:
            carry, part = walk(carry, tile)
            parts.append(part)
        ordered = tuple(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
        owner = jnp.concatenate([tile.owner for tile in tiles])
    place = jnp.argsort(owner)
    return carry, tuple(x[:, place] for x in ordered)


def _merge_tiles(tiled: jax.Array) -> jax.Array:
    """[tiles, X, R, ...] -> [X, tiles * R, ...]."""
    flat = jnp.moveaxis(tiled, 0, 1)
    return flat.reshape(flat.shape[0], -1, *flat.shape[3:])


def gather_blocks(x_XY_: jax.Array, blocks_RW: jax.Array) -> jax.Array:
    """Gather blocks of each list and join them along their positions.

    Args:
      x_XY_: [X, Y, block, ...].
      blocks_RW: int32[R, W], indices into Y.

    Returns:
      [X, R, W * block, ...].
    """
    x = x_XY_[:, blocks_RW]
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])
