"""The attention module by itself: maps, positions, padding, and a place in other models."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
from sparsejax.models import (
    AttentionOptions,
    BlockSparseAttention,
    SparsityMask,
    apply_rotary,
)
from sparsejax.patterns import BlockPattern
from tests.kernels.oracles import softmax_maps
from tests.small_models import make_config

WIDTH, LENGTH = 32, 48
BLOCK = BlockPattern(block_q=16, block_kv=16)

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = draw(1, 1, 2, 8), draw(1, 1, 2, 8, seed=1)
    q_BTNH, k_BTNH = (jax.jit(apply_rotary)(np.tile(x, (1, 20, 1, 1))) for x in (q, k))
    for scores in np.einsum("tnh,snh->nts", q_BTNH[0], k_BTNH[0]):
        for distance in range(-19, 20):
            diagonal = np.diagonal(scores, distance)
            np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
        assert np.ptp(scores[0]) > 0.1
    np.testing.assert_allclose(q_BTNH[:, :1], q, atol=1e-6)
    np.testing.assert_allclose(
        np.linalg.norm(q_BTNH, axis=-1),
        np.broadcast_to(np.linalg.norm(q, axis=-1), (1, 20, 2)),
        rtol=1e-5,
    )


def test_rotary_needs_pairs():
    with pytest.raises(ValueError, match=r"even head dim, got x_BTNH.shape=\(1, 4, 2, 7\)"):
        apply_rotary(jnp.ones((1, 4, 2, 7)))


@functools.cache
def make_attention(**changes):
    return BlockSparseAttention(make_attention_config(**changes), rngs=nnx.Rngs(0))


def make_attention_config(**changes):
    settings = {"model_dim": WIDTH, "num_heads": 4, "num_kv_heads": 4, "causal": False}
    settings |= {"max_length": LENGTH, "block": BLOCK}
    return make_config(**settings | changes)


def attend(attention, x, kv_mask=None, *, options):
    graphdef, state = nnx.split(attention)

    def run(state, x, kv_mask):
        return nnx.merge(graphdef, state)(x, kv_mask_BT=kv_mask, options=options)[0]

    return jit(run)(state, x, kv_mask)


def dense_attention(attention, x_BTD, visible_BTS):
    """The module's output written out in NumPy."""
    B, T, _ = x_BTD.shape
    H, K = attention.head_dim, attention.num_kv_heads
    qkv = x_BTD @ np.asarray(attention.qkv.kernel) + np.asarray(attention.qkv.bias)
    q, k, v = (part.reshape(B, T, -1, H) for part in np.split(qkv, [4 * H, (4 + K) * H], axis=-1))
    if attention.rotary:
        q, k = np.asarray(apply_rotary(q)), np.asarray(apply_rotary(k))
    maps = softmax_maps(q, k, visible_BTS)
    y = np.einsum("bnts,bsnh->btnh", maps, np.repeat(v, 4 // K, axis=2)).reshape(B, T, -1)
    return y @ np.asarray(attention.out.kernel) + np.asarray(attention.out.bias)


@pytest.mark.ci
@pytest.mark.parametrize("sparse", [False, True])
def test_rotated_grouped_queries_at_a_length_between_blocks(sparse):
    # Blocks of two sizes: 20 positions fill neither, 48 are the least that fill both.
    block = BlockPattern(block_q=16, block_kv=24)
    attention = make_attention(num_kv_heads=1, positions="rotary", block=block)
    x = draw(2, 20, WIDTH)
    options = AttentionOptions(sparse=sparse)
    expected = dense_attention(attention, x, np.ones((2, 20, 20), bool))
    np.testing.assert_allclose(attend(attention, x, options=options), expected, atol=1e-5)
    if sparse:
        real = np.arange(20) < np.array([[20], [13]])
        expected = dense_attention(attention, x, np.repeat(real[:, None], 20, axis=1))
        np.testing.assert_allclose(attend(attention, x, real, options=options), expected, atol=1e-5)


def test_attention_goes_to_the_positions_of_a_mask():
    attention, x = make_attention(causal=True), draw(2, 20, WIDTH)
    i, j = np.indices((20, 20))
    kept = (i - j < 3) | ((i - j) % 5 == 0)
    options = AttentionOptions(position_mask=lambda length: jnp.asarray(kept[:length, :length]))
    visible = np.broadcast_to(kept & (i >= j), (2, 20, 20))
    expected = dense_attention(attention, x, visible)
    np.testing.assert_allclose(attend(attention, x, options=options), expected, atol=1e-5)
    real = np.arange(20) >= np.array([[0], [4]])
    expected = dense_attention(attention, x, visible & real[:, None])
    got = attend(attention, x, real, options=options)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(got[1, 4:], expected[1, 4:], atol=1e-5)


def test_a_sequence_beyond_the_mask_is_refused():
    with pytest.raises(ValueError, match=r"at most max_length=48 positions, got x_BTD.shape"):
        make_attention()(jnp.ones((1, 64, WIDTH)))


class MyLayer(nnx.Module):
    """A layer of somebody's own model."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = BlockSparseAttention(make_attention_config(causal=True), rngs=rngs)

    def __call__(self, x):
        y, _ = self.attention(self.norm(x))
        return x + y


def test_assigning_the_mask_of_a_module_prunes():
    layer, x = MyLayer(nnx.Rngs(0)), draw(1, LENGTH, WIDTH)
    run = nnx.jit(MyLayer.__call__)
    before = run(layer, x)
    kept = np.ones((1, 1, 3, 3), bool)
    kept[:, :, 2, 0] = False
    layer.attention.block_mask[...] = jnp.asarray(kept)
    change = np.abs(run(layer, x) - before).reshape(3, 16, WIDTH).max((1, 2))
    assert change[0] == change[1] == 0 < change[2]

    visible = np.tril(np.repeat(np.repeat(kept[0, 0], 16, 0), 16, 1))[None]
    expected = x + dense_attention(layer.attention, np.asarray(layer.norm(x)), visible)
    np.testing.assert_allclose(run(layer, x), expected, atol=1e-5)
    assert isinstance(nnx.state(layer, SparsityMask)["attention"]["block_mask"], SparsityMask)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_probe_runs_on_the_kernel_that_is_named_for_attention(sparse):
    sizes = {"model_dim": 64, "num_heads": 2, "num_kv_heads": 2, "max_length": 128}
    block = BlockPattern(block_q=64, block_kv=64)
    attention = make_attention(**sizes, block=block, causal=True, dtype="bfloat16")
    x = jnp.ones((1, 128, 64), jnp.bfloat16)

    def find_shape(implementation):
        options = AttentionOptions(sparse=sparse, implementation=implementation)
        return jax.eval_shape(lambda x: attention(x, options=options, probe=True)[1], x).shape

    assert [find_shape(name) for name in (None, "xla", "dense", "reference")] == [(128, 128)] * 4
    # There is no Hopper GPU here; dense attention does not need one.
    with pytest.raises(NotImplementedError, match="'mosaic_sm90' needs a Hopper GPU"):
        find_shape("mosaic_sm90")


class MyAttention(nnx.Module):
    """Attention of somebody's own model, on the bare op."""

    def __init__(self, dim, heads, *, rngs):
        self.qkv = nnx.LinearGeneral(dim, (3, heads, dim // heads), rngs=rngs)
        self.out = nnx.LinearGeneral((heads, dim // heads), dim, axis=(-2, -1), rngs=rngs)

    def __call__(self, x, block_mask):
        q, k, v = jnp.moveaxis(self.qkv(x), 2, 0)
        y = pallas_kernels.block_sparse_attention(
            q, k, v, block_mask, block_q=16, block_kv=16, causal=True
        )
        return self.out(y)


@pytest.mark.ci
def test_the_op_in_a_module_of_ones_own():
    attention, x = MyAttention(WIDTH, 4, rngs=nnx.Rngs(0)), draw(1, LENGTH, WIDTH)
    run = nnx.jit(MyAttention.__call__)
    everything = jnp.ones((1, 1, 3, 3), bool)
    q, k, v = np.moveaxis(np.asarray(attention.qkv(x)), 2, 0)
    y = np.einsum("bnts,bsnh->btnh", softmax_maps(q, k, np.tri(LENGTH)[None]), v)
    expected = attention.out(y.astype(np.float32))
    np.testing.assert_allclose(run(attention, x, everything), expected, atol=1e-5)
    pruned = run(attention, x, everything.at[:, :, 2, 0].set(False))
    assert (np.abs(pruned - expected).reshape(3, -1).max(1) > 1e-3).tolist() == [False, False, True]


class LinenLayer(nn.Module):
    """The layer in a Flax Linen model."""

    @nn.compact
    def __call__(self, x):
        config = make_attention_config()
        attention = nnx.bridge.to_linen(BlockSparseAttention, config, name="attention")
        y, _ = attention(nn.LayerNorm()(x))
        return x + y


@pytest.mark.ci
def test_the_module_in_a_linen_model():
    model, x = LinenLayer(), draw(1, LENGTH, WIDTH)
    variables = jit(model.init)(jax.random.key(0), x)
    assert set(variables) == {"params", "SparsityMask"}
    assert jax.tree.map(jnp.shape, variables["params"]["attention"]["qkv"]) == {
        "kernel": (WIDTH, 3 * WIDTH),
        "bias": (3 * WIDTH,),
    }
    masks = variables["SparsityMask"]
    assert masks["attention"]["block_mask"].shape == (1, 1, 3, 3)

    run = jit(model.apply)
    pruned = {"attention": {"block_mask": jnp.eye(3, dtype=bool).at[2].set(True)[None, None]}}
    change = np.abs(run(variables | {"SparsityMask": pruned}, x) - run(variables, x))
    assert (change.reshape(3, -1).max(1) > 1e-3).tolist() == [True, True, False]
    by_params = jax.eval_shape(
        jax.grad(lambda params: model.apply(variables | {"params": params}, x).sum()),
        variables["params"],
    )
    assert jax.tree.structure(by_params) == jax.tree.structure(variables["params"])
