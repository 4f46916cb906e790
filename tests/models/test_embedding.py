"""Embeddings with masks: nnx.Embed until pruned, one masked weight at both ends after."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.models import DENSE_LINEAR, SparseEmbed, SparsityMask, Transformer
from sparsejax.patterns import BlockPattern, NMPattern, Unstructured, WeightBlocks
from tests.small_models import make_config

V, D = 12, 8
PATTERNS = [Unstructured(), WeightBlocks(3, 4)]
TOKENS = jnp.array([[0, 4, 11], [4, 7, 0]])


def make(pattern, **options):
    return SparseEmbed(V, D, pattern=pattern, dtype=None, **options, rngs=nnx.Rngs(0))


def prune(embed, seed=0):
    """Return the mask of every weight."""
    mask = embed.embedding_mask
    mask[...] = jnp.asarray(np.random.default_rng(seed).random(mask[...].shape) < 0.5)
    rows, columns = V // mask[...].shape[0], D // mask[...].shape[1]
    return np.kron(np.asarray(mask[...]), np.ones((rows, columns), bool))


@pytest.mark.ci
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_an_embedding_is_that_of_nnx_until_something_is_pruned(pattern):
    plain = nnx.Embed(V, D, embedding_init=nnx.initializers.normal(0.02), rngs=nnx.Rngs(0))
    sparse = make(pattern)
    np.testing.assert_array_equal(sparse.embedding[...], plain.embedding[...])
    x = plain(TOKENS)
    np.testing.assert_array_equal(sparse(TOKENS), x)
    # Logits are sums of terms of 1e-3 that may cancel.
    np.testing.assert_allclose(sparse.attend(x), plain.attend(x), rtol=1e-6, atol=1e-9)
    prune(sparse)
    np.testing.assert_array_equal(sparse(TOKENS, options=DENSE_LINEAR), x)
    np.testing.assert_array_equal(sparse.attend(x, options=DENSE_LINEAR), plain.attend(x))


@pytest.mark.parametrize(
    "pattern", [PATTERNS[0], pytest.param(PATTERNS[1], marks=pytest.mark.ci)], ids=str
)
def test_both_ends_use_the_masked_weight_and_pass_gradients_straight_through(pattern):
    embed = make(pattern)
    kept = prune(embed)
    # Nothing that is pruned may show, whatever it is.
    embed.embedding[...] = jnp.where(kept, embed.embedding[...], jnp.nan)
    masked = np.where(kept, embed.embedding[...], 0)
    x = embed(TOKENS)
    np.testing.assert_array_equal(x, masked[TOKENS])
    np.testing.assert_allclose(embed.attend(x), x @ masked.T, rtol=1e-5, atol=1e-8)

    graphdef, params, masks = nnx.split(embed, nnx.Param, SparsityMask)
    weight = np.random.default_rng(1).normal(size=(2, 3, V)).astype(np.float32)

    def loss(params):
        embed = nnx.merge(graphdef, params, masks)
        return (embed.attend(embed(TOKENS)) * weight).sum()

    def dense_loss(table):
        return (table[TOKENS] @ table.T * weight).sum()

    got = jax.grad(loss)(params)["embedding"][...]
    np.testing.assert_allclose(got, jax.grad(dense_loss)(jnp.asarray(masked)), rtol=1e-4, atol=1e-6)


def test_of_blocks_the_head_computes_the_gradients_that_are_asked_for():
    embed = make(WeightBlocks(3, 4))
    embed.gradient_mask[...] = jnp.zeros((4, 2), bool).at[1, 0].set(True)
    graphdef, params, masks = nnx.split(embed, nnx.Param, SparsityMask)

    def loss(params):
        return nnx.merge(graphdef, params, masks).attend(jnp.ones((2, D))).sum()

    grad = np.asarray(jax.grad(loss)(params)["embedding"][...])
    expected = np.zeros((V, D))
    expected[3:6, :4] = 2
    np.testing.assert_array_equal(grad, expected)


def make_masked_config(pattern):
    return make_config(
        vocab_size=V,
        num_layers=1,
        model_dim=D,
        mlp_dim=16,
        max_length=4,
        block=BlockPattern(block_q=4, block_kv=4),
        sparse_weights=((".*", pattern),),
    )


@pytest.mark.ci
def test_a_language_model_has_one_mask_for_embedding_and_head():
    model = Transformer(make_masked_config(Unstructured()), rngs=nnx.Rngs(0))
    run = jax.jit(functools.partial(lambda graphdef, *state: nnx.merge(graphdef, *state)(TOKENS)))
    graphdef, params, masks = nnx.split(model, nnx.Param, SparsityMask)
    before = run(graphdef, params, masks).logits
    model.embedding.embedding_mask[...] = jnp.ones((V, D), bool).at[7].set(False)
    masks = nnx.state(model, SparsityMask)
    after = run(graphdef, params, masks).logits
    assert not np.asarray(after)[..., 7].any(), "token 7 has no logit"
    np.testing.assert_array_equal(after[0], np.asarray(before[0]) * (np.arange(V) != 7))
    assert (np.asarray(after)[1, 1:, 0] != np.asarray(before)[1, 1:, 0]).all(), "nor an input"


def test_patterns_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="'unstructured' or blocks such as '64x64', got '2:4'"):
        make(NMPattern())
    with pytest.raises(ValueError, match=r"blocks of 5x4 must divide the weight, got .*\[12, 8\]"):
        make(WeightBlocks(5, 4))
    with pytest.raises(ValueError, match="blocks such as '64x64' for 'embedding', got '2:4'"):
        make_masked_config(NMPattern())
