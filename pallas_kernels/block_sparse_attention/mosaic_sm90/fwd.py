"""Block-sparse attention forward on Hopper tensor cores.

One list of key blocks for each block of queries. The softmax is online and in base 2; see
`program` for what lies where.

Letters: B T S N K H I J as everywhere (`sparsejax.types`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.mosaic_sm90.program import launch
from pallas_kernels.block_sparse_attention.mosaic_sm90.share import (
    Place,
    Share,
    mask_by_query,
    write,
)
from pallas_kernels.block_sparse_attention.mosaic_sm90.tile_lists import TileLists
from pallas_kernels.block_sparse_attention.mosaic_sm90.tiles import (
    LOG2_E,
    load_vector,
    multiply,
    multiply_add,
    multiply_and_add,
    zeros,
)
from pallas_kernels.block_sparse_attention.mosaic_sm90.walk import Problem, Walk, make_walk
from pallas_kernels.hopper.budget import NUM_COMPUTE, ROWS
from pallas_kernels.hopper.layouts import BY_ROW, LAYOUT

# A finite start keeps a row that never sees a key clear of inf - inf.
_LOWEST = -1e30


def make_forward_walk(problem: Problem) -> Walk:
    """Choose the tiles of the forward kernel.

    Raises:
      NotImplementedError: if the head dim is too large.
    """
    head_bytes = 2 * problem.head_dim
    return make_walk(
        problem,
        over_queries=True,
        resident_bytes=head_bytes + 4 * 3,
        streamed_bytes=2 * head_bytes + 4 * (problem.has_kv_mask + problem.has_segments),
        # Logits and output of 64 rows share the registers of a warpgroup.
        max_tile=128 if problem.head_dim <= 128 else 64,
    )


def attention_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: TileLists,
    kv_mask: jax.Array | None,
    segment_ids: jax.Array | None,
    num_visible: jax.Array | None,
    problem: Problem,
) -> tuple[jax.Array, jax.Array]:
    """Launch the forward kernel.

    Args:
      q: bf16 or f16[B, T, N, H].
      k: [B, S, K, H]; finite everywhere, as are the values.
      v: [B, S, K, H].
      lists: TileLists of the query blocks.
      kv_mask: int32[B, S] or None, 0 removes a key.
      segment_ids: int32[B, T] or None.
      num_visible: f32[B, T], keys that each query sees; given if `problem.zero_logits`.

    Returns:
      tuple of out, shaped and typed like q, and lse f32[B, N, T], -inf where nothing counted.
    """
    lse_shape = (problem.batch, problem.num_heads, problem.num_queries)
    return launch(
        _compute,
        {
            "q": q,
            "k": k,
            "v": v,
            "kv_mask": kv_mask,
            "segments": segment_ids,
            "visible": num_visible,
        },
        lists,
        problem=problem,
        walk=make_forward_walk(problem),
        resident=("q", "segments", "visible"),
        streamed=(("k", "kv_mask", "segments"), ("v",)),
        scratch={"lse": plgpu.SMEM((NUM_COMPUTE, ROWS), jnp.float32)},
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(lse_shape, jnp.float32),
        ],
        in_turns=True,
        name="block_sparse_attention_forward",
    )


class _State(NamedTuple):
    """The online softmax of 64 queries. Values are added a step later than probabilities.

    Attributes:
      top: f32[64], the greatest logit so far, in base 2.
      total: f32[64], sum of exponentials, relative to `top`.
      kept: f32[64], visible keys so far; only counted if `problem.zero_logits`.
      p: bf16 or f16[64, tile], exponentials of the last tile.
      acc: f32[64, H], sum of values, relative to `top`, without those of the last tile.
    """

    top: Any
    total: Any
    kept: Any
    p: Any
    acc: Any


def _compute(share: Share, out_gmem: Any, lse_gmem: Any) -> None:
    """Attend from a warpgroup's queries to the keys on their list."""
    problem = share.problem
    queries = _load_queries(share)
    state = _State(
        top=zeros((ROWS,), BY_ROW, _LOWEST),
        total=zeros((ROWS,), BY_ROW),
        kept=zeros((ROWS,), BY_ROW),
        p=zeros((ROWS, share.walk.tile)).astype(problem.dtype),
        acc=zeros((ROWS, problem.head_dim)),
    )
    share.wait_ahead(share.first, share.rings[0])
    top, total, kept, p, acc = share.walk_list(
        functools.partial(_attend_tile, share, queries),
        state,
        first_step=functools.partial(_attend_first_tile, share, queries),
    )
    acc = _add_last_values(share, p, acc)
    if problem.zero_logits:
        top, total, acc = _add_zero_logits(share, top, total, acc, kept)
    some = total > 0
    inverse = jnp.where(some, 1 / total, 0.0)
    out = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
    lse = jnp.where(some, top / LOG2_E + jnp.log(total), -jnp.inf)
    # The queries are not read again: the output takes their place.
    write(share, [(out, share.smem["q"], out_gmem), (lse, share.smem["lse"], lse_gmem)])


def _load_queries(share: Share) -> Any:
    """Return the queries as products read them.

    A product with 64 keys reads as much of its queries as of its keys. From shared memory that
    takes as long as the product: there registers hold the queries. Wider tiles have none to spare.
    """
    q_smem, problem = share.smem["q"], share.problem
    if problem.in_registers and share.walk.tile == ROWS and problem.head_dim <= 128:
        return plgpu.load(q_smem, layout=LAYOUT)
    return q_smem


def _attend_first_tile(
    share: Share, queries: Any, index: Any, state: _State, *, masked: bool
) -> _State:
    """Attend to the keys of the first tile; its values are still to be added."""
    keys, _ = share.rings
    slot = keys.find_slot(index)
    place = share.locate(index) if masked else None
    tile = keys.look(slot)
    share.turns.take(index)
    keys_smem = tile["k"].transpose((1, 0))
    s = multiply(queries, keys_smem, hand_over=lambda: share.turns.hand_over(index))
    s, num_seen = _mask_logits(share, tile, place, s)
    keys.give_back(slot)
    state, _, p = _add_logits(share, state, s, num_seen)
    share.wait_ahead(index + 1, keys)
    return state._replace(p=p.astype(state.p.dtype))


def _attend_tile(share: Share, queries: Any, index: Any, state: _State, *, masked: bool) -> _State:
    """Attend to the keys of one tile, and add the values of the tile before."""
    keys, values = share.rings
    slot, last_slot = keys.find_slot(index), values.find_slot(index - 1)
    place = share.locate(index) if masked else None
    tile, v_smem = keys.look(slot), values.wait(last_slot)["v"]
    share.turns.take(index)

    def use_logits(s):
        s, num_seen = _mask_logits(share, tile, place, s)
        keys.give_back(slot)
        results = _add_logits(share, state, s, num_seen)
        share.wait_ahead(index + 1, keys)
        return results

    (new, shrink, p), acc = multiply_and_add(
        (queries, tile["k"].transpose((1, 0))),
        (state.acc, state.p, v_smem),
        share.smem.get("staging"),
        use_logits,
        lambda: share.turns.hand_over(index),
    )
    values.give_back(last_slot)
    # Only now the registers of the last probabilities are free for these.
    acc, p = lax.optimization_barrier((acc, p))
    acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
    return new._replace(acc=acc, p=p.astype(state.p.dtype))


def _add_last_values(share: Share, p: jax.Array, acc: jax.Array) -> jax.Array:
    """Add the values of the last tile, if there is one."""
    _, values = share.rings

    def add(index, acc):
        slot = values.find_slot(index)
        v_smem = values.wait(slot)["v"]
        (acc,) = multiply_add([(acc, p, v_smem)], share.smem.get("staging"))
        values.give_back(slot)
        return acc

    return lax.fori_loop(jnp.maximum(share.end - 1, share.first), share.end, add, acc)


def _mask_logits(
    share: Share,
    tile: dict[str, Any],
    place: Place | None,
    s: jax.Array,
) -> tuple[jax.Array, Any]:
    """Mask a tile of logits if its place is given.

    Returns:
      tuple of the logits, and how many keys are kept and visible: f32[64], an int where it is all,
      None if it is not asked for.
    """
    if place is None:
        return s, share.walk.tile
    # Loaded for each tile: a loop with a mask is short of registers.
    segments = load_vector(share.smem, "segments", BY_ROW)
    seen, attended = mask_by_query(share, s.shape, place, tile, segments)
    return jnp.where(attended, s, -jnp.inf), _count_seen(share, place, seen)


def _count_seen(share: Share, place: Place, seen: jax.Array | None) -> Any:
    """Count the keys of a tile that are kept and visible, if zeros take the place of others."""
    problem, tile = share.problem, share.walk.tile
    if not problem.zero_logits:
        return None
    if seen is None:
        return tile
    if problem.has_segments or problem.grain.rows * problem.grain.columns > 1:
        return seen.astype(jnp.float32).sum(axis=1)
    # Where causality alone hides keys, no register need hold which.
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=BY_ROW)
    visible = row + (place.rows_start - place.tile_start + 1)
    return jnp.minimum(jnp.maximum(visible, 0), tile).astype(jnp.float32)


def _add_logits(
    share: Share, state: _State, s: jax.Array, num_seen: Any
) -> tuple[_State, jax.Array, jax.Array]:
    """Take a tile of logits into the softmax; `num_seen` is what `_mask_logits` returned.

    Returns:
      tuple of the state, `p` and `acc` as they were; f32[64], the factor that `acc` is to be
      multiplied by; and f32[64, tile], the exponentials.
    """
    scale = share.problem.scale * LOG2_E
    kept = state.kept
    if share.problem.zero_logits:
        kept += num_seen
    # The maximum is taken before scaling: one multiply-add per logit is left.
    top = jnp.maximum(state.top, s.max(axis=1) * scale)
    shrink = jnp.exp2(state.top - top)
    p = jnp.exp2(s * scale - lax.broadcast_in_dim(top, s.shape, [0]))
    total = state.total * shrink + p.sum(axis=1)
    return state._replace(top=top, total=total, kept=kept), shrink, p


def _add_zero_logits(
    share: Share, top: jax.Array, total: jax.Array, acc: jax.Array, kept: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Count the visible keys that are not on the list with logits of 0, and values of 0."""
    num_zeros = load_vector(share.smem, "visible", BY_ROW) - kept
    raised = jnp.where(num_zeros > 0, jnp.maximum(top, 0.0), top)
    shrink = jnp.exp2(top - raised)
    added = jnp.where(num_zeros > 0, num_zeros * jnp.exp2(-raised), 0.0)
    total = total * shrink + added
    acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
    return raised, total, acc
