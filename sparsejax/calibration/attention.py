"""What each head of attention needs, and how many blocks each layer gets, by a few texts.

Legend: L layers, B batch, T query position, S key position, N query heads, K key/value heads,
H head dim, I query blocks, J key blocks, R positions of a block, F parts of a score.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from flax import nnx

from sparsejax.masks import DynamicBlocks
from sparsejax.masks.attention.habits import Habits, classify_distances, predict_scores, remember
from sparsejax.models import HeadStates, Transformer, measure_heads

# Of the sum of squares of a part, so that parts that say the same have one solution.
_RIDGE = 1e-3
# What is left of a head's attention counts as at least this share.
_LEAST_REST = 0.1


def read_heads(model: Transformer, tokens_BT: np.ndarray, *, gradients: bool = False) -> HeadStates:
    """Read what the heads of every layer attend with, compiled; see `measure_heads`.

    Args:
      tokens_BT: i32[B, T], T = `max_length`.
      gradients: bool, also differentiate the loss.

    Returns:
      HeadStates of all layers, with a gradient where it was asked for.
    """
    return _make_reader(model, gradients=gradients)(tokens_BT)


def calibrate_blocks(
    model: Transformer, tokens_BT: np.ndarray, blocks: DynamicBlocks
) -> DynamicBlocks:
    """Learn from a few texts what dropping a block costs each head, and share out the blocks.

    What a loss loses to second order when query block i no longer sees key block j, from the
    gradient g of the loss with respect to a head's output y, and the empirical Fisher information
    in place of the second derivative:

      cost_ij = mean_(t in i) (g_t (y_t - y_t without j))^2

    where what is left without j counts as a tenth of the attention at least.

    Each head's costs are fitted by the parts of its score (`Habits`), with factors that are not
    negative. The layers share the budget as the highest scores of all their heads would have it.

    Args:
      tokens_BT: i32[B, T], texts that nothing is measured on later; T = `max_length`.
      blocks: DynamicBlocks of a causal model, whose heads share their budget.

    Returns:
      DynamicBlocks with `habits` and `layer_shares`.

    Raises:
      ValueError: if the blocks are not causal, look ahead or are not shared by heads, are not those
        of the model, there are no texts, or a gradient is not finite.

    References:
      The second-order cost is that of LeCun et al., Optimal Brain Damage, 1989.
    """
    if blocks.lookahead or not (blocks.causal and blocks.share_heads):
        raise ValueError(
            "blocks must be causal, without lookahead and with share_heads to be calibrated, got "
            f"{blocks}"
        )
    pattern, length = model.config.block, blocks.num_blocks * blocks.block_size
    sides = (pattern.block_q, pattern.block_kv, model.config.max_length)
    if sides != (blocks.block_size, blocks.block_size, length):
        raise ValueError(
            f"blocks must have the model's block sizes and length {sides}, got "
            f"block_size={blocks.block_size} and num_blocks={blocks.num_blocks}"
        )
    if not len(tokens_BT):
        raise ValueError("tokens_BT must hold at least one text to calibrate by, got 0")
    even = dataclasses.replace(blocks, layer_shares=(), habits=())
    observe = jax.jit(functools.partial(_observe, even))
    read = _make_reader(model, gradients=True)
    sums, shares = [], []
    for tokens_T in tokens_BT:
        states = read(tokens_T[None])
        layers = [jax.device_get(observe(*layer)) for layer in zip(*states, strict=True)]
        gram, moment, shares_LNIJ = (np.stack(x) for x in zip(*layers, strict=True))
        if not np.isfinite(moment).all():
            raise ValueError("attention and its gradient must be finite to calibrate, got others")
        sums.append((gram, moment))
        shares.append(shares_LNIJ)
    gram_LNFF, moment_LNF = (np.sum(x, axis=0) for x in zip(*sums, strict=True))
    habits = [_fit_habits(*layer) for layer in zip(gram_LNFF, moment_LNF, strict=True)]
    return dataclasses.replace(
        blocks,
        layer_shares=_share_out(even, habits, shares),
        habits=tuple(Habits(*(_freeze(x) for x in layer)) for layer in habits),
    )


def measure_costs(
    q_TNH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    y_TNH: jax.Array,
    gradient_TNH: jax.Array,
    *,
    block_size: int,
) -> jax.Array:
    """Measure what each query block of a head would lose without each key block.

    Args:
      q_TNH: float[T, N, H] of a causal model.
      k_TKH: float[T, K, H].
      v_TKH: float[T, K, H].
      y_TNH: float[T, N, H], what heads return.
      gradient_TNH: float[T, N, H], of the loss with respect to y.
      block_size: int, R.

    Returns:
      f32[N, I, J], squares of the loss's unit.
    """
    T, N, H = q_TNH.shape
    K = k_TKH.shape[1]
    rows_IR = jnp.arange(T).reshape(-1, block_size)

    def by_block(x_NRS):
        return x_NRS.reshape(N, block_size, -1, block_size).sum(-1)

    def multiply(x_RNH, y_SKH):
        x = x_RNH.reshape(block_size, K, N // K, H).astype(jnp.float32)
        y = y_SKH.astype(jnp.float32)
        products = jnp.einsum("rkgh,skh->kgrs", x, y, precision="highest")
        return products.reshape(N, block_size, T)

    def measure(rows_R):
        seen_RS = jnp.arange(T)[None] <= rows_R[:, None]
        scores_NRS = multiply(q_TNH[rows_R], k_TKH) / np.sqrt(H)
        shares_NRS = jax.nn.softmax(jnp.where(seen_RS[None], scores_NRS, -jnp.inf), axis=-1)
        # Without block j the output is (y - sum_(s in j) share_s v_s) / (1 - share_j).
        asked_NR1 = (gradient_TNH[rows_R] * y_TNH[rows_R]).sum(-1).T[..., None]
        given_NRJ = by_block(shares_NRS * multiply(gradient_TNH[rows_R], v_TKH))
        shares_NRJ = by_block(shares_NRS)
        changes = (shares_NRJ * asked_NR1 - given_NRJ) / jnp.maximum(1 - shares_NRJ, _LEAST_REST)
        return (changes**2).mean(1)

    return jax.lax.map(measure, rows_IR).swapaxes(0, 1)


def _make_reader(model, *, gradients):
    """Return the function of tokens to HeadStates, which is compiled once."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def read(state, tokens_BT):
        return measure_heads(nnx.merge(graphdef, state), tokens_BT, gradients=gradients)

    return lambda tokens_BT: read(state, jnp.asarray(tokens_BT))


def _observe(blocks, q_BTNH, k_BTKH, v_BTKH, y_BTNH, gradient_BTNH):
    """Return sums f32[N, F, F] and f32[N, F] of a least-squares fit, and shares f32[N, I, J]."""
    shares_BNIJ = blocks.look(q_BTNH, k_BTKH, None)
    costs_NIJ = measure_costs(
        *(x[0] for x in (q_BTNH, k_BTKH, v_BTKH, y_BTNH, gradient_BTNH)),
        block_size=blocks.block_size,
    )
    N, num_blocks, _ = costs_NIJ.shape
    classes_CIJ = classify_distances(num_blocks, num_sinks=blocks.num_sinks)
    # What is kept anyway, and what nobody sees, has no distance.
    open_IJ = classes_CIJ.any(0).astype(np.float32)[None]
    squares = shares_BNIJ**2
    parts_NFIJ = jnp.concatenate(
        [
            jnp.broadcast_to(classes_CIJ[None], (N, *classes_CIJ.shape)),
            (squares[0] * open_IJ)[:, None],
            (remember(squares)[0] * open_IJ)[:, None],
        ],
        axis=1,
    )
    multiply = functools.partial(jnp.einsum, precision="highest")
    gram_NFF = multiply("nfij,ngij->nfg", parts_NFIJ, parts_NFIJ)
    return gram_NFF, multiply("nfij,nij->nf", parts_NFIJ, costs_NIJ), shares_BNIJ[0]


def _fit_habits(gram_NFF: np.ndarray, moment_NF: np.ndarray) -> Habits:
    """Solve the least-squares problem of each head, with factors that are not negative."""
    factors_NF = []
    for gram_FF, moment_F in zip(gram_NFF.astype(float), moment_NF.astype(float), strict=True):
        size_F = np.sqrt(gram_FF.diagonal())
        scale_F = np.where(size_F > 0, size_F, 1)
        scaled_FF = gram_FF / scale_F / scale_F[:, None] + _RIDGE * np.eye(len(scale_F))
        root_FF = np.linalg.cholesky(scaled_FF)
        found_F, _ = scipy.optimize.nnls(root_FF.T, np.linalg.solve(root_FF, moment_F / scale_F))
        factors_NF.append(found_F / scale_F)
    factors_NF = np.asarray(factors_NF, np.float32)
    return Habits(factors_NF[:, :-2], factors_NF[:, -2], factors_NF[:, -1])


def _share_out(
    blocks: DynamicBlocks, habits: Sequence[Habits], shares: Sequence[np.ndarray]
) -> tuple[float, ...]:
    """Count how many of the highest scores of all layers together are of each; mean of texts 1."""
    together = Habits(*(np.concatenate(x) for x in zip(*habits, strict=True)))
    counts_L = np.zeros(len(habits))
    for shares_LNIJ in shares:
        L, N, num_blocks, _ = shares_LNIJ.shape
        scores = predict_scores(
            jnp.asarray(shares_LNIJ.reshape(1, L * N, num_blocks, num_blocks)),
            together,
            num_sinks=blocks.num_sinks,
        )
        (counts_I,) = blocks.count(num_blocks, L * N)
        kept = np.asarray(blocks.keep(scores, counts_I, most=int(counts_I.max())))
        counts_L += kept.reshape(L, -1).sum(1)
    return tuple((counts_L / counts_L.mean()).tolist())


def _freeze(x: np.ndarray) -> tuple:
    return tuple(x.tolist()) if x.ndim == 1 else tuple(map(tuple, x.tolist()))
