"""Lists of kept blocks, sorted by length and cut into tiles whose lists are walked together.

Trip counts follow from the lengths of a tile's own lists and are traced values: no capacity is
fixed, and a new mask needs no compilation. Sorting puts lists of like length together.

Tiles come in two forms. For a CPU they are many, of a few lists each, and are scanned over. Where
a list is much longer than the others of its tile (a column that every query keeps), the tile walks
them side by side part of the way and the rest of each list alone, more of its blocks at once: the
work is the sum of the lengths and a little padding, however uneven the lengths are. For a GPU
tiles are at most four, written out one after another: all lists of a tile are one batch of each
product, walked to the end of the longest, and no loop runs over tiles.

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
_LISTS_PER_TILE = 8
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
      visited: int32[R, P], blocks on each list, padded to whole steps.
      first: int32[], list position at which the walk begins.
      num_steps: int32[], steps of `width` positions that the lists take side by side.
      num_alone_steps: int32[R], steps of R * `width` positions that each list takes alone after
        that; None: `num_steps` reach the end of the longest.
      width: int, list positions walked at once.
    """

    owner: jax.Array
    counts: jax.Array
    visited: jax.Array
    first: jax.Array
    num_steps: jax.Array
    num_alone_steps: jax.Array | None
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
        start = self.first + step * self.width
        visited_RW = jax.lax.dynamic_slice_in_dim(self.visited, start, self.width, axis=1)
        listed_RW = find_listed(self.counts - start, self.width)
        return visited_RW, jnp.repeat(listed_RW, block, axis=1)

    def take_rest(self, place: jax.Array) -> "Tile":
        """Return one list by itself, from where the lists part.

        Args:
          place: int32[], place of the list in this tile, which has `num_alone_steps`.

        Returns:
          Tile of that list, as many positions wide as a step of all lists.
        """
        assert self.num_alone_steps is not None
        owner, counts, visited, steps = (
            jax.lax.dynamic_slice_in_dim(x, place, 1)
            for x in (self.owner, self.counts, self.visited, self.num_alone_steps)
        )
        return Tile(
            owner=owner,
            counts=counts,
            visited=visited,
            first=self.num_steps * self.width,
            num_steps=steps[0],
            num_alone_steps=None,
            width=self.owner.shape[0] * self.width,
        )


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
    num_blocks = mask.shape[-1]
    blocks = jax.lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
    # One array of keys that all differ: on a CPU thrice as fast as `argsort` of the mask.
    keys = jnp.sort(jnp.where(mask, blocks, blocks + num_blocks), axis=-1)
    indices = jnp.where(keys < num_blocks, keys, keys - num_blocks)
    return mask.sum(axis=-1, dtype=jnp.int32), indices


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
    lists = max(r for r in range(1, _LISTS_PER_TILE + 1) if num_lists % r == 0)
    # Where a full list takes no more steps than there are lists in a tile, little is to be won, and
    # a program without a second loop is compiled sooner.
    parted = not parallel and num_blocks > lists * width
    # The last step of a list that is walked alone may end where the next one would.
    overhang = (lists - 1) * width if parted else 0
    visited_UP = jnp.pad(visited_UP, ((0, 0), (0, -num_blocks % width + overhang)))
    owner = jnp.argsort(-counts_U, stable=True).astype(jnp.int32)
    counts, visited = counts_U[owner], visited_UP[owner]

    def make_tile(cut):
        steps = -(-cut(counts) // width)
        num_steps, num_alone_steps = part_lists(steps) if parted else (steps.max(axis=-1), None)
        return Tile(
            owner=cut(owner),
            counts=cut(counts),
            visited=cut(visited),
            first=jnp.zeros_like(num_steps),
            num_steps=num_steps,
            num_alone_steps=num_alone_steps,
            width=width,
        )

    if not parallel:
        return make_tile(lambda x: x.reshape(-1, lists, *x.shape[1:]))
    ends = sorted({round(share * num_lists) for share in (0, *_PARALLEL_CUTS, 1)})
    parts = [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]
    return tuple(make_tile(lambda x, part=part: x[part]) for part in parts)


def part_lists(steps_TR: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Decide how far the lists of each tile are walked side by side, for the fewest steps.

    A step of one list alone is as wide as one of all R lists together. The fewest are found where
    one of the lists ends.

    Args:
      steps_TR: int32[tiles, R], steps that each list takes to its end beside the others, longest
        first.

    Returns:
      tuple of int32[tiles], steps side by side, and int32[tiles, R], steps of each list alone after
      them.

    Example:
      >>> together, alone = part_lists(jnp.array([[16, 1, 1, 1], [3, 3, 2, 2]]))
      >>> together.tolist(), alone.tolist()
      ([1, 3], [[4, 0, 0, 0], [0, 0, 0, 0]])
    """
    # For each list: what the others take alone if all part where it ends.
    rest_TRR = jnp.maximum(steps_TR[:, None, :] - steps_TR[:, :, None], 0)
    alone_TRR = -(-rest_TRR // steps_TR.shape[1])
    # Of equally good ends the first, where the most is done together.
    best_T = jnp.argmin(steps_TR + alone_TRR.sum(axis=-1), axis=-1)
    tiles = jnp.arange(steps_TR.shape[0])
    return steps_TR[tiles, best_T], alone_TRR[tiles, best_T]


def walk_lists(
    advance: Callable[[Any, Any, Tile], tuple[Any, Any]], carry: Any, start: Any, tile: Tile
) -> tuple[Any, Any]:
    """Walk the lists of a tile to their ends: side by side, then what is left of each alone.

    Args:
      advance: (carry, lists, Tile) -> (carry, lists), takes the `num_steps` of a tile.
      carry: pytree of arrays that all lists share, or None.
      start: pytree of arrays [X, R, ...], where each list begins.
      tile: Tile of R lists.

    Returns:
      tuple of the last carry and lists.
    """
    carry, lists = advance(carry, start, tile)
    num_alone_steps = tile.num_alone_steps
    if num_alone_steps is None:
        return carry, lists

    def finish(place, state):
        carry, lists = state
        own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, place, 1, axis=1), lists)
        carry, own = advance(carry, own, tile.take_rest(place))
        lists = jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, place, axis=1), lists, own
        )
        return carry, lists

    # Lists stand in order of length: those that have a rest come first.
    return jax.lax.fori_loop(0, (num_alone_steps > 0).sum(), finish, (carry, lists))


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
