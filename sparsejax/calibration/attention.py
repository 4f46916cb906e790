"""Which layers need more attention blocks than others, by a few texts.

Legend: L layers, B batch, T query position, S key position, N query heads, K key/value heads,
H head dim, I query blocks, J key blocks, R positions of a block, C budgets that are tried.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.masks import DynamicBlocks
from sparsejax.masks.attention.dynamic import compute_shares
from sparsejax.models import AttentionOptions, Transformer

_BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.7, 2.1, 2.6, 3.2)


@dataclasses.dataclass(frozen=True)
class _KeepAll:
    """A chooser that keeps every block, so that the cache of a prompt holds its queries."""

    lookahead = False

    def count(self, num_blocks, num_heads):
        return np.full((1, num_blocks), num_heads, np.int32)

    def measure_density(self, num_blocks, num_heads):
        return np.ones(1)

    def __call__(self, q_BTNH, k_BSKH, kv_mask_BS, counts_I):
        num_blocks = len(counts_I)
        return jnp.ones((q_BTNH.shape[0], q_BTNH.shape[2], num_blocks, num_blocks), bool)


def read_heads(model: Transformer, tokens_BT: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Return the queries and keys of every layer of a causal model that attends everywhere.

    Args:
      tokens_BT: i32[B, T], T = `max_length`.

    Returns:
      float[L, B, T, N, H] and float[L, B, T, K, H].
    """
    graphdef, state = nnx.split(model)
    options = AttentionOptions(choose_blocks=_KeepAll())

    @jax.jit
    def read(state, tokens_BT):
        _, cache = nnx.merge(graphdef, state).prefill(tokens_BT, attention_options=options)
        assert cache.chosen is not None
        return cache.chosen.q_BSNH, cache.k_BSKH

    return read(state, tokens_BT)


def calibrate_layers(
    model: Transformer, tokens_BT: np.ndarray, blocks: DynamicBlocks
) -> DynamicBlocks:
    """Give layers shares of the budget, so that what they drop costs least.

    A layer's cost at a budget is the mean over heads and positions of the cube of the largest share
    of attention that goes to one dropped block; over patterns, the loss of a language model grows
    with it. Budgets are chosen from a grid, so that the sum of costs is least at the same total.

    Args:
      tokens_BT: i32[B, T], texts that nothing is measured on later; T = `max_length`.
      blocks: DynamicBlocks of a causal model, whose heads share their budget.

    Returns:
      DynamicBlocks with `layer_shares`.
    """
    num_blocks, num_heads = tokens_BT.shape[1] // blocks.block_size, model.config.num_heads
    even = dataclasses.replace(blocks, layer_shares=())
    counts_I, least_I = even.count(num_blocks, num_heads)[0], np.arange(1, num_blocks + 1)
    most_I = num_heads * least_I
    least_I = num_heads * np.minimum(least_I, 1 + blocks.num_sinks)
    counts_CI = np.stack(
        [np.clip(np.rint(budget * counts_I).astype(int), least_I, most_I) for budget in _BUDGETS]
    )
    measure = jax.jit(functools.partial(_measure_costs, even))
    costs_LC = np.zeros((model.config.num_layers, len(_BUDGETS)))
    for tokens_T in tokens_BT:
        heads = read_heads(model, tokens_T[None])
        costs_LC += [measure(q, k, counts_CI) for q, k in zip(*heads, strict=True)]
    chosen_L = _share_out(costs_LC, counts_CI.sum(1), len(costs_LC) * int(counts_I.sum()))
    return dataclasses.replace(blocks, layer_shares=tuple(_BUDGETS[i] for i in chosen_L))


def _measure_costs(blocks, q_BTNH, k_BSKH, counts_CI):
    """Return f32[C], the cost of a layer at each budget."""
    scores_BNIJ = blocks.score(q_BTNH, k_BSKH, None)
    _, N, I, _ = scores_BNIJ.shape  # noqa: E741
    kept_CNIJ = jax.lax.map(
        lambda counts_I: blocks.keep(scores_BNIJ, counts_I, most=N * I)[0], counts_CI
    )
    positions_IR = jnp.arange(q_BTNH.shape[1]).reshape(-1, blocks.block_size)

    def measure(of_block):
        q_RNH, positions_R, kept_CNJ = of_block
        shares = compute_shares(
            q_RNH[None, None],
            k_BSKH,
            positions_R[None],
            None,
            block_size=blocks.block_size,
            causal=True,
        )
        shares_NRJ = shares[0, :, 0]

        def cost(kept_NJ):
            return (jnp.where(kept_NJ[:, None], 0, shares_NRJ).max(-1) ** 3).mean()

        return jax.lax.map(cost, kept_CNJ)

    parts = (q_BTNH[0][positions_IR], positions_IR, jnp.moveaxis(kept_CNIJ, 2, 0))
    return jax.lax.map(measure, parts).mean(0)


def _share_out(costs_LC, totals_C, total):
    """Choose a budget for each layer, of the least sum of costs within a total."""

    def choose(price):
        return (costs_LC + price * totals_C).argmin(1)

    low, high = 0.0, 2 * costs_LC.max()
    for _ in range(60):
        price = (low + high) / 2
        if totals_C[choose(price)].sum() > total:
            low = price
        else:
            high = price
    return choose(high)
