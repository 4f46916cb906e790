"""A model that chooses its attention blocks: it is causal, it decodes, and it trains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.masks import DynamicBlocks
from sparsejax.masks.attention.habits import Habits
from sparsejax.models import AttentionOptions, SparsityMask, Transformer
from sparsejax.patterns import BlockPattern
from tests.small_models import VOCAB, make_config

LENGTH, SIZE = 64, 8
CONFIG = make_config(
    norm="rms",
    positions="rotary",
    model_dim=32,
    num_heads=4,
    mlp_activation="swiglu",
    use_bias=False,
    max_length=LENGTH,
    block=BlockPattern(block_q=SIZE, block_kv=SIZE),
)
OPTIONS = AttentionOptions(
    choose_blocks=DynamicBlocks(density=0.5, block_size=SIZE, num_blocks=8, causal=True)
)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH))


def draw_calibrated():
    """Return options as calibration leaves them: habits, shares of layers, fewer samples."""
    rng = np.random.default_rng(2)

    def draw(*shape):
        return rng.gamma(0.3, size=shape).tolist()

    habits = tuple(
        Habits(tuple(map(tuple, draw(4, 9))), tuple(draw(4)), tuple(draw(4))) for _ in range(2)
    )
    return AttentionOptions(
        choose_blocks=DynamicBlocks(
            density=0.5,
            block_size=SIZE,
            num_blocks=8,
            causal=True,
            query_spacing=2 * SIZE,
            layer_shares=(1.3, 0.7),
            habits=habits,
        )
    )


BOTH = pytest.mark.parametrize("options", [OPTIONS, draw_calibrated()], ids=["plain", "calibrated"])


def draw_model(config=CONFIG):
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graphdef, params, masks = nnx.split(model, nnx.Param, SparsityMask)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.3, 0.3, x.shape), x.dtype), params)
    return graphdef, params, jax.tree.map(lambda x: jnp.ones(x.shape, bool), masks)


GRAPHDEF, PARAMS, MASKS = draw_model()


@functools.partial(jax.jit, static_argnums=1)
def compute_logits(tokens, options=OPTIONS):
    return nnx.merge(GRAPHDEF, PARAMS, MASKS)(tokens, attention_options=options).logits


@BOTH
def test_a_token_changes_no_logits_before_it(options):
    expected = np.asarray(compute_logits(TOKENS, options))
    for position in (8, 21, 40, 63):
        tokens = TOKENS.copy()
        tokens[:, position] = (tokens[:, position] + 1) % VOCAB
        changed = np.asarray(compute_logits(tokens, options))
        np.testing.assert_array_equal(changed[:, :position], expected[:, :position])
        assert (changed[:, position] != expected[:, position]).any()


def test_blocks_that_are_not_chosen_are_not_attended_to():
    model = nnx.merge(GRAPHDEF, PARAMS, MASKS)
    dense = model(TOKENS, attention_options=AttentionOptions(sparse=False)).logits
    assert np.abs(compute_logits(TOKENS) - dense).max() > 1e-3


@pytest.mark.ci
@BOTH
def test_decoding_is_the_forward_pass_token_by_token(options):
    """From prompts that end within a block, of two lengths, across blocks that begin later."""
    expected = np.asarray(compute_logits(TOKENS, options))
    starts = np.array([21, 11])

    @jax.jit
    def prefill(tokens):
        return nnx.merge(GRAPHDEF, PARAMS, MASKS).prefill(tokens, attention_options=options)[1]

    @jax.jit
    def decode(tokens, cache, positions):
        model = nnx.merge(GRAPHDEF, PARAMS, MASKS)
        return model.decode(tokens, cache, positions, attention_options=options)

    # What stands behind the shorter prompt is another text.
    prompt = np.where(np.arange(21) < starts[:, None], TOKENS[:, :21], 3)
    cache, rows = prefill(prompt), np.arange(2)
    for step in range(LENGTH - starts.max()):
        positions = starts + step
        logits, cache = decode(TOKENS[rows, positions], cache, positions)
        np.testing.assert_allclose(logits, expected[rows, positions], atol=2e-5)


@pytest.mark.ci
def test_gradients_are_those_of_the_blocks_that_were_chosen():
    tokens = TOKENS[:1]

    def compute_loss(params, masks, options):
        model = nnx.merge(GRAPHDEF, params, masks)
        return (model(tokens, attention_options=options).logits ** 2).mean()

    model = nnx.merge(GRAPHDEF, PARAMS, MASKS)
    _, cache = model.prefill(tokens, attention_options=OPTIONS)
    masks = nnx.to_pure_dict(MASKS)
    # By layer and head, in place of one mask for all heads.
    masks["blocks"]["attention"]["block_mask"] = cache.chosen.kept_BNIJ
    got = jax.jit(jax.value_and_grad(compute_loss), static_argnums=2)(PARAMS, MASKS, OPTIONS)
    expected = jax.jit(jax.value_and_grad(compute_loss), static_argnums=2)(
        PARAMS, masks, AttentionOptions()
    )
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.ci
def test_lookahead_reads_a_prompt_and_decodes_nothing():
    ahead = DynamicBlocks(density=0.5, block_size=SIZE, num_blocks=8, causal=True, lookahead=True)
    options = AttentionOptions(choose_blocks=ahead)
    model = nnx.merge(GRAPHDEF, PARAMS, MASKS)
    _, cache = model.prefill(TOKENS, attention_options=options)
    with pytest.raises(ValueError, match="choose_blocks must have lookahead=False to decode"):
        model.decode(TOKENS[:, 0], cache, np.zeros(2, int), attention_options=options)
