"""How heads attend, and which layers need more attention blocks than others, by a few texts.

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
from sparsejax.masks.attention.habits import Habits, list_far
from sparsejax.models import AttentionOptions, Transformer

# Of a layer, in parts of the mean.
_BUDGETS = (
    *(0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1),
    *(1.2, 1.3, 1.4, 1.6, 1.8, 2.1, 2.5, 3.0),
)


@dataclasses.dataclass(frozen=True)
class _KeepAll:
    """A chooser that keeps every block, so that the cache of a prompt holds its queries."""

    lookahead = False

    def budget(self, num_blocks, num_heads):
        return np.full((1, num_blocks), num_heads, np.int32)

    def measure_density(self, num_blocks, num_heads):
        return np.ones(1)

    def __call__(self, q_BTNH, k_BSKH, kv_mask_BS, budget):
        num_blocks = len(budget)
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


def calibrate_blocks(
    model: Transformer, tokens_BT: np.ndarray, blocks: DynamicBlocks
) -> DynamicBlocks:
    """Learn from a few texts how heads attend, and which layers need more blocks than others.

    A layer's cost at a budget is the mean over heads and positions of the cube of the largest share
    of attention that goes to one dropped block; over patterns, the loss of a language model grows
    with it. Layers get the budgets, out of a grid, whose costs add up to least at the same total.

    Args:
      tokens_BT: i32[B, T], texts that nothing is measured on later; T = `max_length`.
      blocks: DynamicBlocks of a causal model, whose heads share their budget.

    Returns:
      DynamicBlocks with `habits` and `layer_shares`.

    Raises:
      ValueError: if the blocks are not causal, look ahead or are not shared by heads.
    """
    if blocks.lookahead or not (blocks.causal and blocks.share_heads):
        raise ValueError(
            "blocks must be causal, without lookahead and with share_heads to be calibrated, got "
            f"{blocks}"
        )
    num_blocks, num_heads = tokens_BT.shape[1] // blocks.block_size, model.config.num_heads
    even = dataclasses.replace(blocks, layer_shares=(), habits=())
    counts_I, least_I = even.count(num_blocks, num_heads)[0], np.arange(1, num_blocks + 1)
    most_I = num_heads * least_I
    least_I = num_heads * np.minimum(least_I, 1 + blocks.num_sinks)
    counts_CI = np.stack(
        [np.clip(np.rint(part * counts_I).astype(int), least_I, most_I) for part in _BUDGETS]
    )
    observe = jax.jit(functools.partial(_observe_habits, even))
    measure = jax.jit(functools.partial(_measure_costs, even))
    heads = [read_heads(model, tokens_T[None]) for tokens_T in tokens_BT]
    habits, costs_LC = [], []
    for layer in zip(*(zip(*each, strict=True) for each in heads), strict=True):
        seen = [observe(q, k) for q, k in layer]
        mean = jax.tree.map(lambda *x: sum(x) / len(x), *seen)
        habits.append(tuple(tuple(np.asarray(x).tolist()) for x in mean))
        costs_LC.append(np.mean([measure(q, k, mean, counts_CI) for q, k in layer], axis=0))
    chosen_L = _share_out(np.stack(costs_LC), counts_CI.sum(1), len(costs_LC) * int(counts_I.sum()))
    return dataclasses.replace(
        blocks, layer_shares=tuple(_BUDGETS[i] for i in chosen_L), habits=tuple(habits)
    )


def _map_rows(function, blocks, q_BTNH, k_BSKH, *of_blocks):
    """Apply a function of f32[N, R, J], the shares of a query block, and more of it; average."""
    positions_IR = jnp.arange(q_BTNH.shape[1]).reshape(-1, blocks.block_size)

    def apply(of_block):
        q_RNH, positions_R, *more = of_block
        shares = compute_shares(
            q_RNH[None, None],
            k_BSKH,
            positions_R[None],
            None,
            block_size=blocks.block_size,
            causal=True,
        )
        return function(shares[0, :, 0], *more)

    found = jax.lax.map(apply, (q_BTNH[0][positions_IR], positions_IR, *of_blocks))
    return jax.tree.map(lambda x: x.mean(0), found)


def _observe_habits(blocks, q_BTNH, k_BSKH):
    num_blocks = q_BTNH.shape[1] // blocks.block_size
    far_IJ = list_far(num_blocks, num_sinks=blocks.num_sinks)
    near_IJ = np.eye(num_blocks, k=-1, dtype=bool)

    def look(shares_NRJ, far_J, near_J):
        far = (jnp.where(far_J, shares_NRJ, 0).max(-1) ** 2).mean(-1)
        return Habits(far, (jnp.where(near_J, shares_NRJ, 0).sum(-1) ** 2).mean(-1))

    return _map_rows(look, blocks, q_BTNH, k_BSKH, jnp.asarray(far_IJ), jnp.asarray(near_IJ))


def _measure_costs(blocks, q_BTNH, k_BSKH, habits, counts_CI):
    """Return f32[C], the cost of a layer at each budget."""
    scores_BNIJ = blocks.score(q_BTNH, k_BSKH, None, habits)
    _, N, I, _ = scores_BNIJ.shape  # noqa: E741
    kept_CNIJ = jax.lax.map(
        lambda counts_I: blocks.keep(scores_BNIJ, counts_I, most=N * I)[0], counts_CI
    )

    def cost_all(shares_NRJ, kept_CNJ):
        def cost(kept_NJ):
            return (jnp.where(kept_NJ[:, None], 0, shares_NRJ).max(-1) ** 3).mean()

        return jax.lax.map(cost, kept_CNJ)

    return _map_rows(cost_all, blocks, q_BTNH, k_BSKH, jnp.moveaxis(kept_CNIJ, 2, 0))


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
