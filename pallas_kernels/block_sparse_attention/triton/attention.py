"""Block-sparse attention in Triton: what runs, and its gradient.

What the kernels do not do raises NotImplementedError with the reason; `None` as implementation
then takes another. See `kernel_parts` for how they work.

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
from pallas_kernels.block_sparse_attention.softmax_rules import add_zero_logits, count_visible
from pallas_kernels.block_sparse_attention.triton.launches import (
    LOG2_E,
    Operands,
    Problem,
    attend,
    differentiate_keys,
    differentiate_queries,
    pad_head_dim,
)
from pallas_kernels.block_sparse_attention.triton.lists import make_key_lists, make_query_lists
from pallas_kernels.block_sparse_attention.triton.tiles import find_tiles
from pallas_kernels.triton.device import check_device

DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (16, 256)
BLOCKS = (16, 32, 64, 128)


def check(facts: AttentionFacts) -> None:
    """Refuse what the kernels do not do.

    Raises:
      NotImplementedError: with the reason.
    """
    make_problem(facts)


def tile(facts: AttentionFacts) -> str:
    """Name the tiles of the three kernels; "" where they cannot run."""
    try:
        tiles = make_problem(facts).tiles
    except NotImplementedError:
        return ""
    return ", ".join(f"{name} {cut}" for name, cut in tiles._asdict().items())


def make_problem(facts: AttentionFacts) -> Problem:
    """Collect what the kernels are compiled for, and refuse what they do not do.

    Raises:
      NotImplementedError: with the reason.
    """
    capability = check_device()
    if facts.dtype not in DTYPES:
        raise NotImplementedError(f"the Triton kernels take {DTYPES}, got {facts.dtype}")
    least, most = HEAD_DIMS
    if not least <= facts.head_dim <= most:
        raise NotImplementedError(
            f"the Triton kernels take head dims from {least} to {most}, got H={facts.head_dim}"
        )
    block_q, block_kv = facts.block_q, facts.block_kv
    if block_q not in BLOCKS or block_kv not in BLOCKS:
        raise NotImplementedError(
            f"the Triton kernels take blocks of {BLOCKS} positions, got {block_q=}, {block_kv=}"
        )
    for name, length, heads in (
        ("queries", facts.num_queries, facts.num_heads),
        ("keys", facts.num_keys, facts.num_kv_heads),
    ):
        if length * heads * facts.head_dim >= 2**31:
            raise NotImplementedError(
                "the Triton kernels count the elements of one example in 32 bits, got "
                f"{length} x {heads} x {facts.head_dim} of {name}"
            )
    return Problem(
        block_q=block_q,
        block_kv=block_kv,
        causal=facts.causal,
        scale=facts.scale,
        zero_logits=facts.pruned_logits == "zero",
        capability=capability,
        tiles=find_tiles(
            capability,
            jnp.dtype(facts.dtype).itemsize,
            pad_head_dim(facts.head_dim),
            block_q=block_q,
            block_kv=block_kv,
            all_masked=facts.has_kv_mask or facts.has_segments,
        ),
    )


def run(arrays: AttentionArrays, facts: AttentionFacts) -> tuple[jax.Array, jax.Array]:
    """Run block-sparse attention over the lists of a schedule.

    Returns:
      tuple of out, shaped and typed like q, and lse f32[B, T, N]; both differentiable.

    Raises:
      NotImplementedError: if the device or the call is not one that the kernels take.

    Numerics:
      Products accumulate in f32, and those of f32 are not rounded to TF32; softmax is f32;
      probabilities and their gradients are rounded to the dtype of q before they are multiplied.
      A repeated call agrees to the bit.

    References:
      FlashAttention-2, arXiv:2307.08691, for the online softmax and the backward pass.
    """
    problem = make_problem(facts)
    schedule = make_schedule(arrays, facts)
    q, k, v, _, kv_mask, segment_ids = arrays
    if kv_mask is not None:
        kv_mask = kv_mask.astype(jnp.int8)
    if segment_ids is not None:
        segment_ids = segment_ids.astype(jnp.int32)
    return _attention(q, k, v, schedule, kv_mask, segment_ids, problem)


@functools.partial(jax.custom_vjp, nondiff_argnames=("problem",))
def _attention(q, k, v, schedule, kv_mask, segments, problem):
    return _forward(q, k, v, schedule, kv_mask, segments, problem)


def _forward(q, k, v, schedule, kv_mask, segments, problem):
    operands = Operands(q, k, v, kv_mask, segments)
    query_lists = _make_lists(make_query_lists, schedule, operands, problem)
    out, lse_BNT, kept_BNT = attend(operands, query_lists, problem)
    lse = lse_BNT.swapaxes(1, 2) / LOG2_E
    if kept_BNT is not None:
        visible_BT = count_visible(
            q.shape[1], k.shape[1], causal=problem.causal, segment_ids=segments
        )
        out, lse = add_zero_logits(out, lse, visible_BT[..., None] - kept_BNT.swapaxes(1, 2))
    return out.astype(q.dtype), lse


def _attention_fwd(q, k, v, schedule, kv_mask, segments, problem):
    out, lse = _forward(q, k, v, schedule, kv_mask, segments, problem)
    return (out, lse), (q, k, v, schedule, kv_mask, segments, out, lse)


def _attention_bwd(problem, residuals, cotangents):
    q, k, v, schedule, kv_mask, segments, out, lse = residuals
    d_out, d_lse = cotangents
    # Logits of 0 that were counted besides have no gradient; the rest is that of any softmax whose
    # denominator is the saved one.
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    # A row that counted nothing has no probabilities, exp(s - inf) = 0, and takes no gradient,
    # whatever came back along its lse of -inf.
    counted = lse > -jnp.inf
    operands = Operands(
        q,
        k,
        v,
        kv_mask,
        segments,
        d_out=d_out,
        lse=jnp.where(counted, lse * LOG2_E, jnp.inf).swapaxes(1, 2),
        delta=jnp.where(counted, delta, 0.0).swapaxes(1, 2),
    )
    query_lists = _make_lists(make_query_lists, schedule, operands, problem)
    dq = differentiate_queries(operands, query_lists, problem)
    key_lists = _make_lists(make_key_lists, schedule, operands, problem)
    dk, dv = differentiate_keys(operands, key_lists, problem)
    return dq, dk, dv, None, None, None


def _make_lists(make, schedule, operands, problem):
    return make(
        schedule,
        block_q=problem.block_q,
        block_kv=problem.block_kv,
        causal=problem.causal,
        all_masked=operands.kv_mask is not None or operands.segments is not None,
    )


_attention.defvjp(_attention_fwd, _attention_bwd)
