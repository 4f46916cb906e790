"""The products of `block_sparse_matmul` on Hopper tensor cores.

  y = x w     for each column block of the weight, the list of its kept row blocks
  dx = dy w^T for each row block, the list of its kept column blocks
  dw = x^T dy for each block, all tokens, or none where the mask of the gradient is False

All are one kernel with three plans; see `kernel` for how it works. What it does not do
raises NotImplementedError with the reason.

Letters: M rows (tokens)   K contracted axis   N columns   I x J blocks of the weight   U lists.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_lists import list_kept
from pallas_kernels.block_sparse_attention.block_schedule import make_block_schedule
from pallas_kernels.block_sparse_matmul.call import BlockArrays, BlockFacts
from pallas_kernels.block_sparse_matmul.mosaic_sm90.kernel import multiply_lists
from pallas_kernels.block_sparse_matmul.mosaic_sm90.plan import (
    TILE,
    Lists,
    Plan,
    Tile,
    count_stages,
)
from pallas_kernels.block_sparse_matmul.products import BlockProducts, multiply_blocks
from pallas_kernels.dispatch import check_hopper, count_processors
from pallas_kernels.hopper.budget import NUM_COMPUTE
from pallas_kernels.padding import pad_rows

BLOCKS = (64, 128)
# Row tiles of x that are taken together: they stay in the cache while all columns read them.
_GROUP = 8
# Steps that the ring of a tile with two blocks must hold.
_LEAST_STAGES = 3


def check(facts: BlockFacts) -> None:
    """Refuse what the kernels do not do.

    Raises:
      NotImplementedError: with the reason.
    """
    if facts.dtype not in ("bfloat16", "float16"):
        raise NotImplementedError(
            f"the Hopper kernels take bfloat16 and float16, got {facts.dtype}"
        )
    sides = tuple(size // count for size, count in zip(facts.shape, facts.grid, strict=True))
    if not all(side in BLOCKS for side in sides):
        raise NotImplementedError(
            f"the Hopper kernels take blocks whose sides are one of {BLOCKS}, got {sides} from "
            f"w_KN.shape={facts.shape}, mask_IJ.shape={facts.grid}"
        )
    check_hopper()


def tile(facts: BlockFacts) -> str:
    """Say how many rows a warpgroup takes of y and of dx: "128 rows, 64 rows"."""
    rows = (
        make_row_plan(
            facts.rows,
            facts.shape,
            facts.grid,
            transposed=transposed,
            num_programs=count_processors(),
        ).shape[0]
        for transposed in (False, True)
    )
    return ", ".join(f"{count} rows" for count in rows)


def run(arrays: BlockArrays, facts: BlockFacts) -> jax.Array:
    """Multiply by the kept blocks, and differentiate likewise.

    Returns:
      float[M, N], typed like x.
    """
    del facts
    return multiply_blocks(arrays, BlockProducts(multiply, multiply_transposed, multiply_gradient))


def multiply(
    x_MK: jax.Array, w_KN: jax.Array, mask_IJ: jax.Array, bias_N: jax.Array | None
) -> jax.Array:
    """Multiply by the kept blocks, and add the bias before rounding.

    Args:
      x_MK: bf16 or f16[M, K].
      w_KN: [K, N].
      mask_IJ: bool[I, J].
      bias_N: [N] or None.

    Returns:
      [M, N], dtype of x.
    """
    schedule = make_block_schedule(mask_IJ)
    lists = _start_longest_first(schedule.q_counts, schedule.q_indices)
    return _multiply_rows(x_MK, w_KN, lists, bias_N, mask_IJ.shape, transposed=False)


def multiply_transposed(dy_MN: jax.Array, w_KN: jax.Array, mask_IJ: jax.Array) -> jax.Array:
    """Multiply by the transpose of the kept blocks.

    Args:
      dy_MN: bf16 or f16[M, N].
      w_KN: [K, N].
      mask_IJ: bool[I, J].

    Returns:
      [M, K], dtype of dy.
    """
    schedule = make_block_schedule(mask_IJ)
    lists = _start_longest_first(schedule.kv_counts, schedule.kv_indices)
    return _multiply_rows(dy_MN, w_KN, lists, None, mask_IJ.shape, transposed=True)


def multiply_gradient(x_MK: jax.Array, dy_MN: jax.Array, mask_IJ: jax.Array) -> jax.Array:
    """Compute the kept blocks of x^T dy.

    Args:
      x_MK: bf16 or f16[M, K].
      dy_MN: [M, N].
      mask_IJ: bool[I, J].

    Returns:
      [K, N], dtype of x, 0 elsewhere.
    """
    shape = (x_MK.shape[1], dy_MN.shape[1])
    plan = make_gradient_plan(shape, mask_IJ.shape)
    tokens = TILE * (NUM_COMPUTE if plan.is_split else 1)
    x_MK, dy_MN = (pad_rows(array, tokens) for array in (x_MK, dy_MN))
    num_steps, num_programs = x_MK.shape[0] // tokens, count_processors()
    if plan.blocks == 1:
        lists = _start_longest_first(jnp.where(mask_IJ.ravel(), num_steps, 0), None)
    else:
        lists = pair_blocks(mask_IJ, num_steps, num_programs=num_programs)
    return multiply_lists(x_MK, dy_MN, lists, None, shape, plan, num_programs=num_programs)


def pair_blocks(mask_IJ: jax.Array, num_steps: int, *, num_programs: int) -> Lists:
    """List the blocks of the gradient, two kept ones of a row together where that is faster.

    A tile of two takes about half as long again as one of one block, and half as many are needed,
    so that it depends on the rounds in which processors take them.

    Args:
      mask_IJ: bool[I, J], True = kept.
      num_steps: int, of a kept block.
      num_programs: int, processors of the GPU.

    Returns:
      Lists, one for each block; its owner is -1 if the block is the second of another list.
    """
    counts_I, columns_IJ = list_kept(mask_IJ)
    blocks_IJ = jnp.arange(mask_IJ.shape[0])[:, None] * mask_IJ.shape[1] + columns_IJ
    place_1J, counts_I1 = jnp.arange(mask_IJ.shape[1])[None], counts_I[:, None]
    rounds_of_one, rounds_of_two = (
        -(-jnp.sum(tiles_I) // num_programs) for tiles_I in (counts_I, (counts_I + 1) // 2)
    )
    pays = 3 * rounds_of_two < 2 * rounds_of_one
    is_first_IJ = pays & (place_1J % 2 == 0) & (place_1J + 1 < counts_I1)
    is_second_IJ = pays & (place_1J % 2 == 1) & (place_1J < counts_I1)
    others_IJ = jnp.where(is_first_IJ, jnp.roll(blocks_IJ, -1, axis=1), -1)
    owners_IJ = jnp.where(is_second_IJ, -1, blocks_IJ)
    steps_IJ = jnp.where((place_1J < counts_I1) & ~is_second_IJ, num_steps, 0)
    order_U = jnp.argsort(-(steps_IJ * (1 + is_first_IJ)).ravel(), stable=True)
    owners_U, others_U, steps_U = (
        array_IJ.ravel()[order_U].astype(jnp.int32) for array_IJ in (owners_IJ, others_IJ, steps_IJ)
    )
    return Lists(owners_U, steps_U, None, others_U)


def make_row_plan(
    num_rows: int,
    shape: tuple[int, ...],
    grid: tuple[int, ...],
    *,
    transposed: bool,
    num_programs: int,
) -> Plan:
    """Plan y = x w, or dx = dy w^T.

    Args:
      num_rows: int, M.
      shape: (K, N).
      grid: (I, J).
      transposed: bool, dx.
      num_programs: int, processors of the GPU.

    Returns:
      Plan; M is to be filled up to whole row tiles.
    """
    sides = shape[0] // grid[0], shape[1] // grid[1]
    inner, columns = sides[::-1] if transposed else sides
    num_lists = grid[0] if transposed else grid[1]
    # Tall tiles read the weight less often, if there are enough of them.
    tall = 2 * TILE * NUM_COMPUTE
    rows = 2 * TILE if num_rows // tall * num_lists >= num_programs else TILE
    num_row_tiles = -(-num_rows // (NUM_COMPUTE * rows))
    cluster = 2 if num_row_tiles % 2 == 0 == num_programs % 2 else 1

    def find_out(row_tile, owner, part):
        return (row_tile * NUM_COMPUTE + part) * rows, owner * columns

    def find_lhs(row_tile, owner, entry, piece, part):
        return find_out(row_tile, owner, part)[0], entry * inner + piece * TILE

    def find_weight(row_tile, owner, entry, piece, part):
        start = entry * inner + piece * TILE, owner * columns
        return start[::-1] if transposed else start

    weight_shape = (columns, TILE) if transposed else (TILE, columns)
    return Plan(
        name="transposed" if transposed else "forward",
        lhs=Tile((rows, TILE), NUM_COMPUTE, is_transposed=False, find=find_lhs),
        rhs=Tile(weight_shape, 1, is_transposed=transposed, find=find_weight),
        shape=(rows, columns),
        is_split=False,
        find=find_out,
        steps_per_entry=inner // TILE,
        num_row_tiles=num_row_tiles,
        group=min(_GROUP, num_row_tiles),
        cluster=cluster,
    )


def make_gradient_plan(shape: tuple[int, ...], grid: tuple[int, ...]) -> Plan:
    """Plan dw = x^T dy. The warpgroups share rows of a block, or its tokens where it has 64 rows.

    A tile may have two blocks of a row, where there are two and shared memory holds them.

    Args:
      shape: (K, N).
      grid: (I, J).

    Returns:
      Plan; M is to be filled up to multiples of 64, or 128 if split.
    """
    rows, columns = shape[0] // grid[0], shape[1] // grid[1]
    is_split = rows == TILE

    def find_block(owner):
        return lax.div(owner, grid[1]) * rows, lax.rem(owner, grid[1]) * columns

    def find_out(row_tile, owner, part):
        row, column = find_block(owner)
        return row + (0 if is_split else part * TILE), column

    def find_tokens(step, part):
        return (step * NUM_COMPUTE + part if is_split else step) * TILE

    def find_lhs(row_tile, owner, entry, piece, part):
        return find_tokens(entry, part), find_out(row_tile, owner, part)[0]

    def find_rhs(row_tile, owner, entry, piece, part):
        return find_tokens(entry, part), find_block(owner)[1]

    plan = Plan(
        name="gradient",
        lhs=Tile((TILE, TILE), NUM_COMPUTE, is_transposed=True, find=find_lhs),
        rhs=Tile((TILE, columns), NUM_COMPUTE if is_split else 1, False, find=find_rhs),
        shape=(TILE, columns),
        is_split=is_split,
        find=find_out,
        blocks=min(grid[1], 2),
    )
    return plan if count_stages(plan) >= _LEAST_STAGES else plan._replace(blocks=1)


def _multiply_rows(lhs, w_KN, lists, bias, grid, *, transposed):
    num_rows, num_programs = lhs.shape[0], count_processors()
    plan = make_row_plan(
        num_rows, w_KN.shape, grid, transposed=transposed, num_programs=num_programs
    )
    lhs = pad_rows(lhs, NUM_COMPUTE * plan.shape[0])
    out_shape = (lhs.shape[0], w_KN.shape[0 if transposed else 1])
    out = multiply_lists(lhs, w_KN, lists, bias, out_shape, plan, num_programs=num_programs)
    return out[:num_rows]


def _start_longest_first(counts_U: jax.Array, entries_UP: jax.Array | None) -> Lists:
    order_U = jnp.argsort(-counts_U, stable=True).astype(jnp.int32)
    counts_U = counts_U[order_U].astype(jnp.int32)
    return Lists(order_U, counts_U, None if entries_UP is None else entries_UP[order_U])
