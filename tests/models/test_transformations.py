"""Layers and masks through what users do to modules: copies, scans, recomputation, export."""

import copy
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from pallas_kernels import block_sparse_attention
from pallas_kernels.doctor.oracles import make_normal
from sparsejax.models import BlockSparseAttention, SparseLinear, SparsityMask, Transformer
from tests.small_models import LENGTH, make_config

pytestmark = pytest.mark.ci

_LOWER = jnp.tril(jnp.ones((2, 2), bool))[None, None]


def _make_linear():
    layer = SparseLinear(8, 8, rngs=nnx.Rngs(0))
    layer.kernel_mask[...] = jnp.arange(8)[:, None] % 4 < jnp.full(8, 2)
    return layer


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_mask_is_a_mask_of_its_own(duplicate):
    layer = _make_linear()
    mask, other = layer.kernel_mask, duplicate(layer).kernel_mask
    assert type(other) is SparsityMask
    np.testing.assert_array_equal(other[...], mask[...])
    other[...] = jnp.zeros_like(other[...])
    assert mask[...].any()


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_have_masks_of_their_own(remat):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def create(rngs):
        return SparseLinear(8, 8, rngs=rngs)

    stack = create(nnx.Rngs(0))
    keeps = jnp.arange(8)[:, None] % 4 < jnp.arange(3)[:, None, None]
    stack.kernel_mask[...] = jnp.broadcast_to(keeps, (3, 8, 8))

    def call(layer, x):
        return layer(x)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def apply(x, layer):
        return (nnx.remat(call) if remat else call)(layer, x)

    (x,) = make_normal(((4, 8),))
    expected = x
    for weights in zip(stack.kernel[...], stack.kernel_mask[...], stack.bias[...], strict=True):
        kernel, kept, bias = weights
        expected = expected @ jnp.where(kept, kernel, 0) + bias
    np.testing.assert_allclose(apply(x, stack), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("remat", [False, True])
def test_linen_scans_over_the_layer(remat):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            attention = nnx.bridge.to_linen(BlockSparseAttention, make_config(), name="attention")
            return x + attention(x)[0], None

    layer = nn.remat(Layer) if remat else Layer
    axes = {"params": 0, "SparsityMask": 0}
    stack = nn.scan(layer, variable_axes=axes, split_rngs={"params": True}, length=3)()
    (x,) = make_normal(((2, LENGTH, 16),))
    variables = stack.init(jax.random.key(0), x, None)
    (expected, _) = stack.apply(variables, x, None)
    assert jax.tree.leaves(variables["SparsityMask"])[0].shape[0] == 3
    pruned = variables | {
        "SparsityMask": jax.tree.map(
            lambda m: m & jnp.eye(2, dtype=bool), variables["SparsityMask"]
        )
    }
    (got, _) = stack.apply(pruned, x, None)
    # Causal: the first block of positions sees itself alone in either.
    half = LENGTH // 2
    np.testing.assert_allclose(got[:, :half], expected[:, :half], rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(got - expected)[:, half:].max()) > 1e-3


def test_an_exported_model_takes_masks_as_inputs():
    model = Transformer(make_config(), rngs=nnx.Rngs(0))
    graphdef, params, masks = nnx.split(model, nnx.Param, SparsityMask)
    params, masks = nnx.to_pure_dict(params), nnx.to_pure_dict(masks)

    @jax.jit
    def apply(params, masks, tokens):
        return nnx.merge(graphdef, params, masks)(tokens).logits

    tokens = jnp.zeros((2, LENGTH), jnp.int32)
    stored = export.export(apply)(params, masks, tokens).serialize()
    restored = export.deserialize(stored)
    pruned = jax.tree.map(lambda mask: mask & jnp.eye(2, dtype=bool), masks)
    for each in (masks, pruned):
        np.testing.assert_allclose(
            restored.call(params, each, tokens), apply(params, each, tokens), rtol=1e-6
        )
    assert (apply(params, masks, tokens) != apply(params, pruned, tokens)).any()


def test_masks_per_head_under_an_auto_mesh():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    q, k, v = make_normal(((2, 8, 4, 4),) * 3)
    mask = jnp.concatenate([_LOWER, ~_LOWER] * 2, axis=1)

    def attend(q, k, v, implementation):
        return block_sparse_attention(
            q, k, v, mask, block_q=4, block_kv=4, implementation=implementation
        )

    spec = jax.sharding.PartitionSpec("data")
    with jax.set_mesh(mesh):
        shared = [jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for x in (q, k, v)]
        got = jax.jit(attend, static_argnums=3)(*shared, "xla")
    np.testing.assert_allclose(got, attend(q, k, v, "reference"), rtol=1e-5, atol=1e-6)
