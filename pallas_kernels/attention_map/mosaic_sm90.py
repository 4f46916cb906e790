"""The mean softmax map on Hopper tensor cores.

A program owns a tile of the result, [128 queries, 128 keys], and keeps its sum in registers while
it goes through all examples and heads. Who computes and who copies is told in
`pallas_kernels.hopper`: the two that compute take 64 queries each, and a step copies the queries,
keys and lse of one head, or of 128 of its features. Nothing of a single head's map is written.

*Overlap.* While a head is multiplied, each warpgroup takes the exponentials of the head before and
adds them up. Their arguments wait in registers of their own, beside the sum and the product.

*Clusters.* Two programs own tiles of queries below one another, and share the keys. Where the upper
tile lies above the diagonal and the lower one does not, both take all steps.

Letters: B T S N K H as everywhere (`sparsejax.types`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention_map.call import MapArrays, MapFacts
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.block_sparse_attention.mosaic_sm90.tiles import LOG2_E, load_vector, zeros
from pallas_kernels.dispatch import check_hopper
from pallas_kernels.hopper.budget import NUM_COMPUTE, ROWS
from pallas_kernels.hopper.launch import CLUSTER, launch_kernel
from pallas_kernels.hopper.layouts import BY_COLUMN, BY_ROW, LAYOUT
from pallas_kernels.hopper.ring import Ring, describe_ring
from pallas_kernels.hopper.shared_memory import matrix_smem
from pallas_kernels.mosaic_fences import fence_products

HEAD_DIMS = (32, 64, 128, 256)
TILE = NUM_COMPUTE * ROWS
# Features that a step copies at most: queries and keys take 64 KB, and three steps are in flight.
_MOST_FEATURES = 128
_STAGES = 3
# Programs of a cluster.
_CLUSTER = 2
# Tiles of queries that are taken together before the next tile of keys, for the cache.
_GROUP = 8


def check(facts: MapFacts) -> None:
    """Refuse what the kernel does not do.

    Raises:
      NotImplementedError: with the reason.
    """
    check_hopper()
    if facts.dtype not in ("bfloat16", "float16"):
        raise NotImplementedError(
            f"the Hopper kernel takes bfloat16 and float16, got {facts.dtype}"
        )
    if facts.head_dim not in HEAD_DIMS:
        raise NotImplementedError(
            f"the Hopper kernel takes head dims {HEAD_DIMS}, got H={facts.head_dim}"
        )
    if facts.num_queries % TILE or facts.num_keys % TILE:
        raise NotImplementedError(
            f"the Hopper kernel takes lengths that are multiples of {TILE}, "
            f"got T={facts.num_queries}, S={facts.num_keys}"
        )


def run(arrays: MapArrays, facts: MapFacts) -> jax.Array:
    """Average the maps of all heads, tile by tile of the result.

    A = 1/(B N) sum_bn exp(q_bn k_bn^T / sqrt(H) - lse_bn)

    Without `lse` the forward kernel of block-sparse attention computes it first: one more product
    of queries and keys, one with keys in place of values, and an output like q that is dropped.

    Returns:
      f32[T, S].

    Numerics:
      Products accumulate in f32; scores, exponentials and sums are f32, in one order: a repeated
      call agrees to the bit.
    """
    q_BTNH, k_BSKH, kv_mask_BS, lse = arrays
    if lse is None:
        _, lse = block_sparse_attention(
            q_BTNH,
            k_BSKH,
            k_BSKH,
            None,
            block_q=TILE,
            block_kv=TILE,
            causal=facts.causal,
            kv_mask=kv_mask_BS,
            # A NaN of theirs can reach the output alone, for logits are masked first.
            removed_keys_finite=True,
            return_lse=True,
            implementation="mosaic_sm90",
        )
    # A row that sees nothing has no probabilities: exp(s - inf) = 0.
    lse2_BNT = jnp.where(lse > -jnp.inf, lse * LOG2_E, jnp.inf).swapaxes(1, 2)
    present_BS = None if kv_mask_BS is None else kv_mask_BS.astype(jnp.int32)
    return _launch(_Operands(q_BTNH, k_BSKH, lse2_BNT, present_BS), causal=facts.causal)


class _Operands(NamedTuple):
    """What the kernel reads: arrays, and in it references to global memory.

    Attributes:
      q: bf16 or f16[B, T, N, H].
      k: [B, S, K, H].
      lse: f32[B, N, T], log-sum-exp in base 2, +inf for rows that see nothing.
      kv_mask: int32[B, S] or None, 0 removes a key.
    """

    q: Any
    k: Any
    lse: Any
    kv_mask: Any


class _Program(NamedTuple):
    """What the warpgroups of a program share: a tile of the result.

    Attributes:
      operands: _Operands in global memory.
      out: reference to the result in global memory.
      parts: int, steps of a head.
      query: int32, first query of the tile.
      key: int32, first key of the tile.
      num_heads: int32, of all examples, to add up; 0 if all tiles of the cluster are above the
        diagonal.
    """

    operands: _Operands
    out: Any
    ring: Ring
    causal: bool
    parts: int
    query: Any
    key: Any
    num_heads: Any

    def wait_ahead(self, head: Any, slot: Any) -> None:
        """Wait for the first part of a head, if there is such a head, in its slot."""

        @pl.when(head < self.num_heads)
        def _():
            self.ring.wait(slot)


def _launch(operands: _Operands, *, causal: bool) -> jax.Array:
    B, T, N, H = operands.q.shape
    S = operands.k.shape[1]
    parts = pl.cdiv(H, _MOST_FEATURES)
    cluster = _CLUSTER if T // TILE % _CLUSTER == 0 else 1
    grid = T // TILE // cluster, S // TILE
    shared = ("k", "kv_mask") if cluster > 1 else ()

    def make_program(operands, out, ring):
        row, column = plgpu.planar_snake(lax.axis_index("program"), grid, 0, _GROUP // cluster)
        rank = lax.axis_index(CLUSTER) if cluster > 1 else 0
        last_row = row * cluster + cluster - 1
        tile = row * cluster + rank, column
        query, key = (pl.multiple_of(x * TILE, TILE) for x in tile)
        # A tile above the diagonal is zeros, but must go along with one that is not.
        num_heads = jnp.where(last_row >= column, B * N, 0) if causal else jnp.int32(B * N)
        ring = Ring(*ring, stages=_STAGES, shared=shared)
        program = _Program(operands, out, ring, causal, parts, query, key, num_heads)
        return lambda: _copy(program), lambda warpgroup: _compute(program, warpgroup)

    return launch_kernel(
        make_program,
        operands,
        out_type=jax.ShapeDtypeStruct((T, S), jnp.float32),
        scratch=_describe_ring(operands, H // parts, cluster),
        num_programs=grid[0] * grid[1],
        name="mean_attention_map",
        cluster=cluster,
        approx_math=True,
    )


def _describe_ring(operands: _Operands, features: int, cluster: int) -> Any:
    dtype = operands.q.dtype
    smem = {
        "q": matrix_smem((_STAGES, TILE, features), dtype),
        "k": matrix_smem((_STAGES, TILE, features), dtype),
        "lse": plgpu.SMEM((_STAGES, TILE), jnp.float32),
    }
    if operands.kv_mask is not None:
        smem["kv_mask"] = plgpu.SMEM((_STAGES, TILE), jnp.int32)
    return describe_ring(smem, copies=len(smem), readers=NUM_COMPUTE, cluster=cluster)


def _copy(program: _Program) -> None:
    """Copy the queries, keys and lse of all examples and heads, part by part."""
    operands, ring, parts = program.operands, program.ring, program.parts
    _, _, N, H = operands.q.shape
    K = operands.k.shape[2]
    queries, keys = pl.ds(program.query, TILE), pl.ds(program.key, TILE)
    num_steps = program.num_heads * parts

    def copy_step(step, _):
        slot = ring.claim(step)
        place, part = lax.div(step, jnp.int32(parts)), lax.rem(step, jnp.int32(parts))
        example, head = lax.div(place, jnp.int32(N)), lax.rem(place, jnp.int32(N))
        kv_head = lax.div(head, jnp.int32(N // K))
        width = H // parts
        features = pl.ds(pl.multiple_of(part * width, width), width)
        ring.copy(operands.q.at[example, queries, head, features], "q", slot)
        ring.copy(operands.k.at[example, keys, kv_head, features], "k", slot)
        ring.copy(operands.lse.at[example, head, queries], "lse", slot)
        if operands.kv_mask is not None:
            ring.copy(operands.kv_mask.at[example, keys], "kv_mask", slot)

    lax.fori_loop(0, num_steps, copy_step, None)
    ring.drain(num_steps)


def _compute(program: _Program, warpgroup: Any) -> None:
    """Add up a warpgroup's queries over all examples and heads, and write their mean."""
    B, _, N, H = program.operands.q.shape
    first = pl.multiple_of(warpgroup * ROWS, ROWS)
    add = functools.partial(
        _add_head, program=program, rows=pl.ds(first, ROWS), scale=H**-0.5 * LOG2_E
    )
    shape = ROWS, TILE
    slot = program.ring.find_slot(jnp.int32(0))
    state = _State(zeros(shape), zeros(shape, value=-jnp.inf), slot)
    program.wait_ahead(0, slot)
    state = lax.fori_loop(0, program.num_heads, add, state)
    acc = state.add_last()
    if program.causal:
        # Once for all heads: what stands above the diagonal, infinity too, is dropped.
        q_at, k_at = (
            plgpu.broadcasted_iota(jnp.int32, acc.shape, axis, layout=LAYOUT) + start
            for axis, start in ((0, program.query + first), (1, program.key))
        )
        acc = jnp.where(q_at >= k_at, acc, 0.0)
    program.out[pl.ds(program.query + first, ROWS), pl.ds(program.key, TILE)] = acc * (1 / (B * N))


class _State(NamedTuple):
    """The sum of a warpgroup. Probabilities are added while the next head is multiplied.

    Attributes:
      acc: f32[64, 128], probabilities so far, without those of the last head.
      log_p: f32[64, 128], their logarithms in base 2; -inf before the first head.
      slot: int32, of the next head's first part.
    """

    acc: Any
    log_p: Any
    slot: Any

    def add_last(self) -> jax.Array:
        """Return the sum with the probabilities of the last head."""
        return self.acc + jnp.exp2(self.log_p)


def _add_head(head: Any, state: _State, *, program: _Program, rows: Any, scale: float) -> _State:
    """Multiply queries and keys of a head, of whose parts the first has been waited for.

    Meanwhile the probabilities of the head before are added.
    """
    ring = program.ring
    slots = [state.slot]
    for _ in range(1, program.parts):
        slots.append(ring.next_slot(slots[-1]))
    next_slot = ring.next_slot(slots[-1])

    def multiply(s_ref):
        tile = ring.look(slots[0])
        plgpu.wgmma(s_ref, tile["q"].at[rows], tile["k"].transpose((1, 0)))
        for slot in slots[1:]:
            tile = ring.wait(slot)
            fence_products()
            plgpu.wgmma(s_ref, tile["q"].at[rows], tile["k"].transpose((1, 0)))
        acc = state.add_last()
        lse = plgpu.load(tile["lse"].at[rows], layout=BY_ROW)
        present = load_vector(tile, "kv_mask", BY_COLUMN)
        for number, slot in enumerate(slots[:-1]):
            plgpu.wgmma_wait(len(slots) - 1 - number)
            ring.give_back(slot)
        # Products still run.
        program.wait_ahead(head + 1, next_slot)
        s = s_ref[...]
        ring.give_back(slots[-1])
        return acc, s, lse, present

    acc, s, lse, present = pl.run_scoped(
        multiply, plgpu.WGMMAAccumulatorRef((ROWS, TILE), jnp.float32)
    )
    log_p = s * scale - lax.broadcast_in_dim(lse, s.shape, [0])
    if present is not None:
        log_p = jnp.where(lax.broadcast_in_dim(present, s.shape, [1]) != 0, log_p, -jnp.inf)
    return _State(acc, log_p, next_slot)
