"""Lists much longer than the others, of a column or row that is full, in the form for a CPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import make_block_schedule
from pallas_kernels.block_lists import Tile, find_listed, make_tiles, part_lists, walk_lists
from pallas_kernels.block_sparse_attention.xla import backward, forward
from pallas_kernels.doctor.oracles import error
from tests.kernels.contract import NAMES, Case, call_implementation, compile_case
from tests.kernels.portable_forms import in_cpu_form

_XLA = in_cpu_form(call_implementation("xla"))
# A full list of 12 blocks takes six steps beside others, and a tile holds four or three lists.
_LONG = Case(
    num_queries=768,
    num_keys=768,
    block_q=64,
    block_kv=64,
    batch=1,
    num_heads=2,
    num_kv_heads=1,
)
_CASES = {
    "shared": dataclasses.replace(_LONG, num_keys=576),
    "causal_zero_heads": dataclasses.replace(
        _LONG, causal=True, pruned_logits="zero", mask_heads=2
    ),
    "examples_heads_positions": dataclasses.replace(
        _LONG, batch=2, mask_batch=2, mask_heads=2, has_kv_mask=True, has_segments=True
    ),
}


def _masks(case):
    rows, columns = case.num_queries // case.block_q, case.num_keys // case.block_kv
    shape = (case.mask_batch, case.mask_heads, rows, columns)
    row, column = np.indices((rows, columns))
    diagonal = np.abs(row - column) < 1
    drawn = np.random.default_rng(0).random(shape) < 0.2
    masks = {
        "a full column": diagonal | (column == 0),
        "a full row": diagonal | (row == rows - 1),
        "nothing but a column": column == 3,
        "both, some rows empty": ((row == 2) | (column == 1) | drawn) & (row % 3 > 0),
        "every length": column >= row,
        "everything": row >= 0,
        "nothing": row < 0,
    }
    return {name: jnp.asarray(np.broadcast_to(mask, shape)) for name, mask in masks.items()}


def _check(case):
    runs = [
        compile_case(case, attention, optimise=False)
        for attention in (_XLA, call_implementation("reference"))
    ]
    for mask_name, mask in _masks(case).items():
        actual, expected = (run(case.inputs(), mask) for run in runs)
        for name, x, y in zip(NAMES, actual, expected, strict=True):
            assert error(x, y) < 1e-5, f"mask {mask_name}: {name} off by {error(x, y)}"


@pytest.mark.ci
@pytest.mark.parametrize("case", _CASES.values(), ids=_CASES.keys())
def test_long_lists_agree_with_the_reference(case):
    _check(case)


def _rests_forgotten(advance, carry, start, tile):
    return advance(carry, start, tile)


def _rests_from_the_start(advance, carry, start, tile):
    def from_the_start(carry, lists, tile):
        return advance(carry, lists, dataclasses.replace(tile, first=0 * tile.first))

    return walk_lists(from_the_start, carry, start, tile)


@pytest.mark.ci
@pytest.mark.parametrize("broken", [_rests_forgotten, _rests_from_the_start])
def test_broken_walks_are_rejected(monkeypatch, broken):
    for module in (backward, forward):
        monkeypatch.setattr(module, "walk_lists", broken)
    with pytest.raises(AssertionError, match="off by"):
        _check(_CASES["shared"])


@functools.partial(jax.jit, static_argnames="block")
def _count_steps(mask, block):
    """Steps of all tiles along the lists of columns, and of each list."""
    schedule = make_block_schedule(mask)
    tiles = make_tiles(schedule.q_counts, schedule.q_indices, block=block, parallel=False)
    assert isinstance(tiles, Tile) and tiles.num_alone_steps is not None
    steps = tiles.num_steps.sum() + tiles.num_alone_steps.sum()
    return steps, (-(-tiles.counts // tiles.width)).sum()


@pytest.mark.parametrize(
    ("num_blocks", "block"),
    [(32, 64), *(pytest.param(n, b, marks=pytest.mark.ci) for n, b in ((64, 64), (128, 32)))],
)
def test_work_is_dealt_evenly_however_long_a_list_is(num_blocks, block):
    rows, columns = np.indices((num_blocks, num_blocks))
    distance = np.abs(rows - columns)
    for kept in (1, 2, 5):
        window = distance < kept
        for sinks in (0, 1, 2, 7):
            steps, own = _count_steps(window | (columns < sinks), block)
            # Eight lists a step; a full column must not make seven others wait for it.
            assert steps <= own / 8 + 6, f"{kept=}, {sinks=}: {steps} steps for {own}"


def test_lists_are_walked_to_their_ends_in_few_steps():
    # Every tile of four lists of up to 16 steps that are sorted, by a sample.
    steps = -np.sort(-np.random.default_rng(0).integers(0, 17, (500, 4)), axis=1)
    together, alone = map(np.asarray, part_lists(jnp.asarray(steps, jnp.int32)))
    walked = together[:, None] + 4 * alone
    assert (walked >= steps).all()
    assert (together + alone.sum(axis=1) <= steps[:, 0]).all()
    # One step of padding for each list but the shortest.
    assert (4 * (together + alone.sum(axis=1)) <= steps.sum(axis=1) + 3 * 3).all()
    # Those with a rest stand in front, where the walk looks for them.
    assert (np.diff((alone > 0).astype(int), axis=1) <= 0).all()


def test_the_rest_of_a_list_begins_where_the_lists_part():
    counts = jnp.array([23, 2, 1, 1])
    visited = jnp.tile(jnp.arange(24), (4, 1))
    tiles = make_tiles(counts, visited, block=64, parallel=False)
    assert isinstance(tiles, Tile)
    tile = jax.tree.map(lambda x: x[0], tiles)
    rest = tile.take_rest(jnp.int32(0))
    together, seen = int(tile.num_steps), []
    for part, steps in ((tile, together), (rest, int(rest.num_steps))):
        for step in range(steps):
            blocks, listed = part.walk(jnp.int32(step), 1)
            seen += blocks[0][listed[0]].tolist()
    assert seen == list(range(23))
    assert find_listed(rest.counts, 23).all()
