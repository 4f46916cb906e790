"""Block-sparse attention on Hopper GPUs: Pallas kernels, forward and backward.

What the kernels do not do raises NotImplementedError with the reason; `None` as implementation
then takes another. `pallas_kernels.hopper` and `program` tell how the kernels work.

Letters: B T S N K H I J as everywhere (`sparsejax.types`).
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.call import (
    AttentionArrays,
    AttentionFacts,
    make_schedule,
)
from pallas_kernels.block_sparse_attention.mosaic_sm90.bwd import (
    Operands,
    attention_backward_keys,
    attention_backward_queries,
    make_key_walk,
    make_query_walk,
)
from pallas_kernels.block_sparse_attention.mosaic_sm90.fwd import (
    attention_forward,
    make_forward_walk,
)
from pallas_kernels.block_sparse_attention.mosaic_sm90.tile_lists import (
    make_grain,
    make_key_lists,
    make_query_lists,
)
from pallas_kernels.block_sparse_attention.mosaic_sm90.tiles import LOG2_E
from pallas_kernels.block_sparse_attention.mosaic_sm90.walk import (
    Problem,
    choose_parts,
    count_copies,
)
from pallas_kernels.block_sparse_attention.softmax_rules import count_visible
from pallas_kernels.dispatch import check_hopper, count_processors, is_interpreted

HEAD_DIMS = (32, 64, 128, 256)
BLOCKS = (32, 64, 128)


def check(facts: AttentionFacts) -> None:
    """Refuse what the kernels do not do.

    Raises:
      NotImplementedError: with the reason.
    """
    check_hopper()
    make_problem(facts)


def tile(facts: AttentionFacts) -> str:
    """Say into how many parts dK and dV split a group of query heads; "" where there is none."""
    if facts.num_heads == facts.num_kv_heads:
        return ""
    try:
        return f"{_choose_key_walk(make_problem(facts)).parts} parts"
    except NotImplementedError:
        return "without gradients"


def make_problem(facts: AttentionFacts) -> Problem:
    """Collect what the kernels need to know, and refuse what they do not do on any device.

    Raises:
      NotImplementedError: with the reason.
    """
    if facts.dtype not in ("bfloat16", "float16"):
        raise NotImplementedError(
            f"the Hopper kernels take bfloat16 and float16, got {facts.dtype}"
        )
    if facts.head_dim not in HEAD_DIMS:
        raise NotImplementedError(
            f"the Hopper kernels take head dims {HEAD_DIMS}, got H={facts.head_dim}"
        )
    block_q, block_kv = facts.block_q, facts.block_kv
    if block_q not in BLOCKS or block_kv not in BLOCKS:
        raise NotImplementedError(
            f"the Hopper kernels take blocks of {BLOCKS} positions, got {block_q=}, {block_kv=}"
        )
    grain = make_grain(block_q, block_kv)
    if facts.num_queries % grain.block_q or facts.num_keys % grain.block_kv:
        raise NotImplementedError(
            "the Hopper kernels pair blocks of 32 positions and take lengths that are multiples of "
            f"64 there, got T={facts.num_queries}, S={facts.num_keys} with {block_q=}, {block_kv=}"
        )
    scale = facts.scale
    if scale <= 0:
        raise NotImplementedError(f"the Hopper kernels take a positive scale, got {scale=}")
    mask_batch, mask_heads = facts.mask_shape or (1, 1)
    problem = Problem(
        batch=facts.batch,
        num_queries=facts.num_queries,
        num_keys=facts.num_keys,
        num_heads=facts.num_heads,
        num_kv_heads=facts.num_kv_heads,
        head_dim=facts.head_dim,
        dtype=facts.dtype,
        grain=grain,
        mask_batch=mask_batch,
        mask_heads=mask_heads,
        causal=facts.causal,
        has_kv_mask=facts.has_kv_mask,
        has_segments=facts.has_segments,
        scale=scale,
        zero_logits=facts.pruned_logits == "zero",
        in_registers=not is_interpreted(),
    )
    make_forward_walk(problem)
    return problem


def run(arrays: AttentionArrays, facts: AttentionFacts) -> tuple[jax.Array, jax.Array]:
    """Run block-sparse attention over the lists of a schedule.

    Returns:
      tuple of out, shaped and typed like q, and lse f32[B, T, N]; both differentiable, if the
      head dim is at most 128.

    Raises:
      NotImplementedError: while differentiating, if the head dim is larger.

    Numerics:
      Products accumulate in f32; softmax is f32; probabilities and their gradients are rounded to
      the dtype of q before they are multiplied. float16 holds nothing above 65504: cotangents that
      are scaled up to save small gradients can overflow there. A repeated call agrees to the bit.

    References:
      FlashAttention-2, arXiv:2307.08691, for the online softmax and the backward pass;
      FlashAttention-3, arXiv:2407.08608, for the division of labour between warpgroups.
    """
    problem = make_problem(facts)
    schedule = make_schedule(arrays, facts)
    q, k, v, _, kv_mask, segment_ids = arrays
    if kv_mask is not None:
        kv_mask = kv_mask.astype(jnp.int32)
    if segment_ids is not None:
        segment_ids = segment_ids.astype(jnp.int32)
    return _attention(q, k, v, schedule, kv_mask, segment_ids, problem)


@functools.partial(jax.custom_vjp, nondiff_argnames=("problem",))
def _attention(q, k, v, schedule, kv_mask, segment_ids, problem):
    out, lse_BNT, _ = _forward(q, k, v, schedule, kv_mask, segment_ids, problem)
    return out, lse_BNT.swapaxes(1, 2)


def _forward(q, k, v, schedule, kv_mask, segment_ids, problem):
    num_visible = None
    if problem.zero_logits:
        num_visible = count_visible(
            problem.num_queries, problem.num_keys, causal=problem.causal, segment_ids=segment_ids
        ).astype(jnp.float32)
        num_visible = jnp.broadcast_to(num_visible, (problem.batch, problem.num_queries))
    query_lists = make_query_lists(
        schedule,
        problem.grain,
        causal=problem.causal,
        all_masked=problem.all_masked,
        copies=count_copies(problem, make_forward_walk(problem)),
    )
    out, lse_BNT = attention_forward(
        q, k, v, query_lists, kv_mask, segment_ids, num_visible, problem
    )
    return out, lse_BNT, query_lists


def _attention_fwd(q, k, v, schedule, kv_mask, segment_ids, problem):
    # Refused here rather than after the forward pass was compiled.
    make_key_walk(problem)
    make_query_walk(problem)
    out, lse_BNT, query_lists = _forward(q, k, v, schedule, kv_mask, segment_ids, problem)
    residuals = (q, k, v, schedule, query_lists, kv_mask, segment_ids, out, lse_BNT)
    return (out, lse_BNT.swapaxes(1, 2)), residuals


def _attention_bwd(problem, residuals, cotangents):
    q, k, v, schedule, query_lists, kv_mask, segment_ids, out, lse_BNT = residuals
    d_out, d_lse = cotangents
    minus_delta = d_lse - jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    # A row that counted nothing has no probabilities, exp(s - inf) = 0, and takes no gradient,
    # whatever came back along its lse of -inf.
    counted = lse_BNT > -jnp.inf
    operands = Operands(
        q=q,
        k=k,
        v=v,
        d_out=d_out,
        lse=jnp.where(counted, lse_BNT * LOG2_E, jnp.inf),
        minus_delta=jnp.where(counted, minus_delta.swapaxes(1, 2), 0.0),
        kv_mask=kv_mask,
        segments=segment_ids,
    )
    dq = attention_backward_queries(operands, query_lists, problem)
    key_walk = _choose_key_walk(problem)
    key_lists = make_key_lists(
        schedule,
        problem.grain,
        causal=problem.causal,
        all_masked=problem.all_masked,
        group=key_walk.members if problem.mask_heads > 1 else 1,
        copies=count_copies(problem, key_walk),
    )
    dk, dv = attention_backward_keys(operands, key_lists, problem, key_walk)
    return dq, dk, dv, None, None, None


def _choose_key_walk(problem):
    walk = make_key_walk(problem)
    if problem.group == 1:
        return walk
    num_items = problem.batch * walk.heads * walk.num_blocks
    parts = choose_parts(num_items, walk.rings, problem.group, count_processors())
    return make_key_walk(problem, parts=parts)


_attention.defvjp(_attention_fwd, _attention_bwd)
