"""What a few texts say of heads and layers before blocks of attention are chosen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.calibration import calibrate_blocks
from sparsejax.calibration.attention import measure_costs
from sparsejax.masks.attention.habits import Habits
from sparsejax.models import AttentionOptions, SparsityMask, measure_heads
from tests.models.test_dynamic_attention import (
    GRAPHDEF,
    LENGTH,
    MASKS,
    OPTIONS,
    PARAMS,
    SIZE,
    TOKENS,
)

BLOCKS, NUM, HEADS = OPTIONS.choose_blocks, LENGTH // SIZE, 4


def make_model():
    return nnx.merge(GRAPHDEF, PARAMS, MASKS)


measure_in_blocks = jax.jit(functools.partial(measure_costs, block_size=SIZE))


@pytest.mark.ci
def test_a_block_costs_the_square_of_what_the_loss_moves_by_without_it():
    states = jax.jit(measure_heads)(make_model(), TOKENS[:1])
    layer, head, row, block = 0, 2, 5, 3
    costs = measure_in_blocks(*(x[layer, 0] for x in states))
    assert costs.shape == (HEADS, NUM, NUM) and (np.triu(costs[0], 1) == 0).all()
    q, k, v, y, gradient = (np.asarray(x[layer, 0], np.float64) for x in states)
    moves = []
    for query in range(row * SIZE, (row + 1) * SIZE):
        seen = slice(query + 1)
        scores = k[seen, head // 2] @ q[query, head] / np.sqrt(q.shape[-1])
        shares = np.exp(scores - scores.max())
        shares[block * SIZE : (block + 1) * SIZE] = 0
        without = shares / shares.sum() @ v[seen, head // 2]
        moves.append(gradient[query, head] @ (without - y[query, head]))
    np.testing.assert_allclose(costs[head, row, block], np.mean(np.square(moves)), rtol=1e-3)


@pytest.mark.ci
def test_the_gradient_of_a_heads_output_is_that_of_the_loss():
    model, tokens = make_model(), TOKENS[:1]
    states = jax.jit(measure_heads)(model, tokens)
    plain = jax.jit(lambda m, t: measure_heads(m, t, gradients=False))(model, tokens)
    assert plain.gradient_LBTNH is None
    for x, y in zip(plain[:-1], states[:-1], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)

    graphdef, params, masks = nnx.split(model, nnx.Param, SparsityMask)
    params = nnx.to_pure_dict(params)

    def compute_loss(scale_LN):
        # A head's rows of the projection as many times are as its output so many times.
        attention = params["blocks"]["attention"]
        kernel = attention["out"]["kernel"] * jnp.repeat(scale_LN, 8, axis=1)[..., None]
        attention = attention | {"out": attention["out"] | {"kernel": kernel}}
        changed = params | {"blocks": params["blocks"] | {"attention": attention}}
        merged = nnx.merge(graphdef, changed, masks)
        logits = merged(tokens, attention_options=AttentionOptions(sparse=False)).logits[0, :-1]
        chosen = logits[jnp.arange(LENGTH - 1), tokens[0, 1:]]
        return (jax.nn.logsumexp(logits, axis=-1) - chosen).sum()

    expected = jax.jit(jax.grad(compute_loss))(jnp.ones((2, HEADS)))
    got = (states.gradient_LBTNH * states.y_LBTNH).sum((1, 2, 4))
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.ci
def test_heads_that_nothing_reads_give_their_blocks_to_the_others():
    model = make_model()
    # Of the first layer the last head but one, of the second all heads but the last.
    out = model.blocks.attention.out.kernel
    out[...] = out[...].at[0, 16:24].set(0).at[1, :24].set(0)
    found = calibrate_blocks(model, TOKENS, BLOCKS)
    static = calibrate_blocks(model, TOKENS, dataclasses.replace(BLOCKS, num_queries=0))
    for blocks in (found, static):
        assert blocks.count(NUM, HEADS).sum() == 2 * BLOCKS.count(NUM, HEADS).sum()
        assert all(np.min(part) >= 0 for layer in blocks.habits for part in layer)
        assert blocks.layer_shares[0] > 1.1 * blocks.layer_shares[1]
        options = AttentionOptions(choose_blocks=blocks)
        _, cache = model.prefill(TOKENS, attention_options=options)
        kept_LBN = np.asarray(cache.chosen.kept_BNIJ).sum((3, 4))
        assert (kept_LBN[0, :, 2] < kept_LBN[0][:, [0, 1, 3]].min(-1)).all()
        assert (kept_LBN[1, :, :3].max(-1) < kept_LBN[1, :, 3]).all()
    assert any(np.any(layer.seen_N) for layer in found.habits)
    assert not np.any([[layer.seen_N, layer.before_N] for layer in static.habits])


def make_habits(num_heads):
    return Habits(((0.1,) * 9,) * num_heads, (1.0,) * num_heads, (0.0,) * num_heads)


def test_habits_of_another_model_are_refused():
    blocks = dataclasses.replace(BLOCKS, habits=(make_habits(3),) * 2)
    with pytest.raises(ValueError, match=r"habits must be of 4 heads and 9 classes.*\(3, 9\)"):
        blocks.budget(NUM, HEADS)
    options = AttentionOptions(
        choose_blocks=dataclasses.replace(BLOCKS, habits=(make_habits(4),) * 3)
    )
    with pytest.raises(ValueError, match="must know of 2 layers, or of all alike, got 3"):
        make_model()(TOKENS, attention_options=options)


@pytest.mark.parametrize(
    ("blocks", "texts", "message"),
    [
        *(
            (dataclasses.replace(BLOCKS, **{name: value}), TOKENS, "causal, without lookahead and")
            for name, value in (("lookahead", True), ("share_heads", False), ("causal", False))
        ),
        (BLOCKS, TOKENS[:0], "tokens_BT must hold at least one text"),
        (dataclasses.replace(BLOCKS, num_blocks=7), TOKENS, r"got block_size=8 and num_blocks=7"),
        (
            dataclasses.replace(BLOCKS, block_size=16),
            TOKENS,
            r"block sizes and length \(8, 8, 64\)",
        ),
    ],
)
def test_what_cannot_calibrate_is_refused(blocks, texts, message):
    with pytest.raises(ValueError, match=message):
        calibrate_blocks(make_model(), texts, blocks)


@pytest.mark.ci
def test_a_gradient_that_is_not_finite_calibrates_nothing():
    model = make_model()
    model.final_norm.scale[...] = model.final_norm.scale[...].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match="its gradient must be finite"):
        calibrate_blocks(model, TOKENS, BLOCKS)
