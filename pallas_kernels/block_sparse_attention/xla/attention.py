"""Portable block-sparse attention in plain JAX, with work in proportion to the kept blocks.

Lists of blocks that one query block or one key block visits are sorted by length and cut into
tiles, each of which walks its lists a few blocks at a time (`pallas_kernels.block_lists`). So a row
that keeps every block costs only its own tile, no capacity is fixed, and a new mask needs no
compilation. Softmax is online (running maximum and sum); the backward pass computes the logits
again from the saved log-sum-exp, so memory grows with the length and not with its square.

Heads and examples that share one mask are one batch axis of every product. When masks differ,
the lists of all heads and examples are sorted and tiled together.

There are two forms, with the same steps. On a CPU many small tiles are scanned over. On a GPU a
few large ones are written out, so that the lists of a tile run at the same time; and dQ is a walk
of its own.
"""

import jax

from pallas_kernels.block_sparse_attention.block_schedule import BlockSchedule
from pallas_kernels.block_sparse_attention.call import (
    AttentionArrays,
    AttentionFacts,
    make_schedule,
)
from pallas_kernels.block_sparse_attention.xla.backward import differentiate
from pallas_kernels.block_sparse_attention.xla.forward import attend
from pallas_kernels.block_sparse_attention.xla.joining import join_blocks
from pallas_kernels.choosing import choose_cheaper
from pallas_kernels.dispatch import targets_gpu


def run(arrays: AttentionArrays, facts: AttentionFacts) -> tuple[jax.Array, jax.Array]:
    """Run block-sparse attention over the lists of a schedule.

    Returns:
      tuple of out, shaped and typed like q, and lse f32[B, T, N]; both differentiable.

    Numerics:
      Products accumulate in f32; softmax is f32; probabilities are rounded to the dtype of the
      inputs before they meet the values.

    References:
      FlashAttention-2, arXiv:2307.08691, for the online softmax and the backward pass.
    """
    schedule = make_schedule(arrays, facts)
    return _attention(arrays._replace(blocks=None), schedule, facts, targets_gpu())


def _attend(
    arrays: AttentionArrays, schedule: BlockSchedule, facts: AttentionFacts, parallel: bool
) -> tuple[jax.Array, jax.Array]:
    def by_blocks(arrays, schedule, _):
        return attend(arrays, schedule, facts, parallel=parallel)

    def by_tiles(arrays, _, joined):
        tiles, kept_YJqc = joined
        return attend(arrays, tiles, joined_facts, parallel=False, kept_YJqc=kept_YJqc)

    joined = None if parallel else join_blocks(schedule, facts)
    if joined is None:
        return by_blocks(arrays, schedule, None)
    joined_facts, *tiles, costs = joined
    return choose_cheaper(costs, by_blocks, by_tiles, arrays, schedule, tiles)


_attention = jax.custom_vjp(_attend, nondiff_argnames=("facts", "parallel"))


def _attention_fwd(arrays, schedule, facts, parallel):
    # The plain function, which forward mode passes through: derivatives of gradients need it.
    results = _attend(arrays, schedule, facts, parallel)
    return results, (arrays, schedule, results)


def _attention_bwd(facts, parallel, residuals, cotangents):
    arrays, schedule, results = residuals

    def by_blocks(arrays, schedule, results, cotangents, _):
        return differentiate(arrays, schedule, results, cotangents, facts, parallel=parallel)

    def by_tiles(arrays, _, results, cotangents, joined):
        tiles, kept_YJqc = joined
        return differentiate(
            arrays, tiles, results, cotangents, joined_facts, parallel=False, kept_YJqc=kept_YJqc
        )

    joined = None if parallel else join_blocks(schedule, facts)
    operands = arrays, schedule, results, cotangents
    if joined is None:
        dq, dk, dv = by_blocks(*operands, None)
    else:
        joined_facts, *tiles, costs = joined
        dq, dk, dv = choose_cheaper(costs, by_blocks, by_tiles, *operands, tiles)
    gradients = AttentionArrays(dq, dk, dv, blocks=None, kv_mask=None, segment_ids=None)
    return gradients, None


_attention.defvjp(_attention_fwd, _attention_bwd)
