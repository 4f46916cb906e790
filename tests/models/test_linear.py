"""Linear layers with masks: nnx.Linear until pruned, masked products after, in any model."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.doctor.oracles import make_nm_masks, make_normal
from sparsejax.models import (
    DENSE_LINEAR,
    MLP,
    BlockSparseAttention,
    LinearOptions,
    SparseLinear,
    SparsityMask,
)
from sparsejax.patterns import NMPattern
from tests.kernels.interpreter import hopper
from tests.small_models import make_config

K, N = 16, 12
PLAIN, SQUARE = NMPattern(2, 4), NMPattern(2, 4, transposable=True)
MVUE = LinearOptions(grad_pruning="mvue")


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def make_mask(shape, pattern=PLAIN, name="underfull"):
    options = {"transposable": pattern.transposable}
    return jnp.asarray(make_nm_masks(shape, (pattern.n, pattern.m), **options)[name])


def make_layer(*, sizes=(K, N), **options):
    """A layer whose bias is not zero, so that it shows."""
    options = {"bias_init": nnx.initializers.normal(1.0)} | options
    return SparseLinear(*sizes, **options, rngs=nnx.Rngs(0))


def split(module):
    graphdef, params, masks = nnx.split(module, nnx.Param, SparsityMask)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(masks)


@pytest.mark.parametrize("use_bias", [True, pytest.param(False, marks=pytest.mark.ci)])
@pytest.mark.parametrize("dtype", [pytest.param(None, marks=pytest.mark.ci), jnp.bfloat16])
def test_a_dense_layer_is_a_linear_layer_bit_for_bit(dtype, use_bias):
    layer = make_layer(dtype=dtype, use_bias=use_bias)
    layer.kernel_mask[...] = jnp.zeros((K, N), bool)  # which dense options ignore
    options = {"dtype": dtype, "use_bias": use_bias, "bias_init": nnx.initializers.normal(1.0)}
    plain = nnx.Linear(K, N, **options, rngs=nnx.Rngs(0))
    jax.tree.map(np.testing.assert_array_equal, split(layer)[1], split(plain)[1])
    x = draw(3, 2, K)
    got, expected = layer(x, options=DENSE_LINEAR), plain(x)
    assert got.dtype == expected.dtype == (dtype or jnp.float32)
    np.testing.assert_array_equal(got, expected)
    activated = layer(x, options=DENSE_LINEAR, activation="gelu")
    np.testing.assert_array_equal(activated, nnx.gelu(expected))


@pytest.mark.parametrize(
    "pattern",
    [
        SQUARE,
        pytest.param(PLAIN, marks=pytest.mark.ci),
        pytest.param(NMPattern(1, 2), marks=pytest.mark.ci),
    ],
    ids=str,
)
def test_a_layer_that_nothing_has_pruned_is_dense(pattern):
    layer, x = make_layer(pattern=pattern), draw(3, 2, K)
    assert layer.kernel_mask[...].all() and layer.kernel_mask[...].dtype == bool
    np.testing.assert_allclose(layer(x), layer(x, options=DENSE_LINEAR), rtol=1e-5, atol=1e-6)


def test_a_product_is_computed_in_the_type_of_the_layer():
    x = draw(3, K)
    exact, rounded = make_layer()(x), make_layer(dtype=jnp.bfloat16)(x)
    assert exact.dtype == jnp.float32 and rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), exact, rtol=0.03, atol=0.03)
    assert make_layer()(x.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(
    "implementation",
    [
        None,
        pytest.param("xla", marks=pytest.mark.ci),
        pytest.param("reference", marks=pytest.mark.ci),
    ],
)
def test_a_pruned_layer_multiplies_what_is_kept_and_trains_everything(implementation):
    layer, x, dy = make_layer(), draw(3, 2, K), draw(3, 2, N, seed=1)
    mask = make_mask((K, N))
    layer.kernel_mask[...] = mask
    graphdef, params, masks = split(layer)
    assert set(params) == {"kernel", "bias"} and set(masks) == {"kernel_mask"}

    def apply(params, x):
        options = LinearOptions(implementation=implementation)
        return nnx.merge(graphdef, params, masks)(x, options=options)

    kept = np.where(mask, params["kernel"], 0)
    y, pull_back = jax.vjp(apply, params, x)
    np.testing.assert_allclose(y, x @ kept + params["bias"], rtol=1e-5, atol=1e-5)
    d_params, dx = pull_back(dy)
    np.testing.assert_allclose(dx, dy @ kept.T, rtol=1e-5, atol=1e-5)
    dense_gradient = jnp.einsum("abk,abn->kn", x, dy)
    np.testing.assert_allclose(d_params["kernel"], dense_gradient, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_params["bias"], dy.sum((0, 1)), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(layer.kernel_mask[...], mask)


def test_any_mask_is_honoured_where_the_hardware_does_not_decide():
    layer, x = make_layer(), draw(3, K)
    mask = jnp.asarray(np.random.default_rng(2).random((K, N)) < 0.9)
    layer.kernel_mask[...] = mask
    expected = x @ jnp.where(mask, layer.kernel[...], 0) + layer.bias[...]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_sparse", [True, pytest.param(False, marks=pytest.mark.ci)])
@pytest.mark.parametrize(
    "activation",
    [
        "gelu_exact",
        "swiglu",
        *(pytest.param(a, marks=pytest.mark.ci) for a in ("gelu", "relu", "geglu")),
    ],
)
def test_activations(activation, is_sparse):
    layer, x, mask = make_layer(), draw(3, K), make_mask((K, N))
    layer.kernel_mask[...] = mask
    z = x @ jnp.where(mask | (not is_sparse), layer.kernel[...], 0) + layer.bias[...]
    value, gate = z[:, : N // 2], z[:, N // 2 :]
    expected = {
        "gelu": jax.nn.gelu(z),
        "gelu_exact": z / 2 * (1 + np.vectorize(math.erf)(z / math.sqrt(2))),
        "relu": jnp.maximum(z, 0),
        "geglu": value * jax.nn.gelu(gate),
        "swiglu": value * jax.nn.silu(gate),
    }
    got = layer(x, options=LinearOptions(sparse=is_sparse), activation=activation)
    # The two forms of GELU differ by up to 5e-4.
    np.testing.assert_allclose(got, expected[activation], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [LinearOptions(), DENSE_LINEAR], ids=["sparse", "dense"])
def test_activations_that_are_none_are_refused(options):
    with pytest.raises(ValueError, match="activation must be .* got 'tanh'"):
        make_layer()(draw(3, K), options=options, activation="tanh")
    with pytest.raises(ValueError, match="needs an even"):
        make_layer(sizes=(K, 3))(draw(3, K), options=options, activation="geglu")


class TheirModel(nnx.Module):
    """A model that knows nothing of sparsity."""

    def __init__(self, linear, rngs):
        self.first = linear(K, N, rngs=rngs)
        self.last = nnx.Linear(N, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


@pytest.mark.ci
def test_a_layer_stands_in_for_another_in_any_model():
    theirs, ours = (TheirModel(linear, nnx.Rngs(1)) for linear in (nnx.Linear, SparseLinear))
    ours.first.kernel_mask[...] = mask = make_mask((K, N), name="whole")
    x = draw(32, K)

    def train(model, num_steps):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        @jax.jit
        def step(params):
            def loss(params):
                return ((nnx.merge(graphdef, params, rest)(x) - x[:, :1]) ** 2).mean()

            value, grads = jax.value_and_grad(loss)(params)
            return value, jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)

        losses = []
        for _ in range(num_steps):
            value, params = step(params)
            losses.append(float(value))
        return losses, nnx.merge(graphdef, params, rest)

    losses, trained = train(ours, 20)
    assert losses[-1] < 0.5 * losses[0]
    np.testing.assert_array_equal(trained.first.kernel_mask[...], mask)
    # It is the model whose first weights have zeros.
    theirs.first.kernel[...] = jnp.where(mask, theirs.first.kernel[...], 0)
    np.testing.assert_allclose(train(theirs, 1)[0], losses[:1], rtol=1e-5)


@pytest.mark.ci
def test_pruned_gradients_follow_a_key_and_results_do_not():
    layer, x = make_layer(), draw(8, K)
    layer.kernel_mask[...] = make_mask((K, N))
    graphdef, params, masks = split(layer)

    @functools.partial(jax.jit, static_argnums=0)
    def look(options, key):
        def loss(params, x):
            y = nnx.merge(graphdef, params, masks)(x, options=options, key=key)
            return (y**2).sum(), y

        (d_params, dx), y = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return d_params["kernel"], (dx, d_params["bias"], y)

    dense, others = look(LinearOptions(), None)
    same, one, two = (look(MVUE, jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one[0], same[0])
    assert np.abs(one[0] - two[0]).max() > 0.1 < np.abs(one[0] - dense).max()
    jax.tree.map(np.testing.assert_array_equal, one[1], others)


def test_a_key_is_asked_for_where_something_is_drawn():
    layer, x, key = make_layer(), draw(3, K), jax.random.key(0)
    with pytest.raises(
        ValueError, match="one of key and bits must be given where grad_pruning='mvue', got neither"
    ):
        layer(x, options=MVUE)
    np.testing.assert_array_equal(layer(x, key=key), layer(x))
    layer(x, options=MVUE._replace(sparse=False))


@pytest.mark.parametrize(
    ("sizes", "pattern", "message"),
    [
        ((6, 8), PLAIN, "in_features must be a multiple of 4 for the pattern '2:4', got 6"),
        ((8, 6), SQUARE, "out_features must be .* 4 for the pattern '2:4 transposable', got 6"),
    ],
)
def test_sizes_that_groups_do_not_fill_are_refused(sizes, pattern, message):
    with pytest.raises(ValueError, match=message):
        make_layer(sizes=sizes, pattern=pattern)
    assert make_layer(sizes=(8, 6)).kernel.shape == (8, 6)


@pytest.mark.ci
def test_the_hopper_kernel_runs_where_it_is_named():
    layer = make_layer(sizes=(64, 64), pattern=SQUARE, dtype=jnp.bfloat16)
    layer.kernel_mask[...] = make_mask((64, 64), SQUARE, "whole")
    graphdef, params, masks = split(layer)
    x, dy = make_normal(((2, 32, 64), (2, 32, 64)), jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=0)
    def look(implementation, params, x):
        def apply(params, x):
            options = LinearOptions(implementation=implementation)
            return nnx.merge(graphdef, params, masks)(x, options=options, activation="gelu")

        y, pull_back = jax.vjp(apply, params, x)
        return y, pull_back(dy)

    expected = look("xla", params, x)
    with hopper():
        programs = {name: str(look.trace(name, params, x).jaxpr) for name in ("xla", "mosaic_sm90")}
        assert "gmem" in programs["mosaic_sm90"] and "gmem" not in programs["xla"]
        got = look("mosaic_sm90", params, x)
        with pytest.raises(ValueError, match="^mask must keep at most 2 of every 4"):
            unpruned = make_layer(sizes=(64, 64), dtype=jnp.bfloat16)
            unpruned(x, options=LinearOptions(implementation="mosaic_sm90"))
        with pytest.raises(ValueError, match="transposable=True, but mask must keep at most 2"):
            layer.kernel_mask[...] = make_mask((64, 64), PLAIN, "whole")
            layer(x, options=LinearOptions(implementation="mosaic_sm90"))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(leaf, np.float32) for leaf in (a, b))
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())


def make_mlp(activation, *sparse_weights, **options):
    config = make_config(
        model_dim=K, mlp_dim=N, mlp_activation=activation, sparse_weights=sparse_weights, **options
    )
    return MLP(config, rngs=nnx.Rngs(0))


@pytest.mark.ci
@pytest.mark.parametrize(
    "activation",
    ["geglu", *(pytest.param(a, marks=pytest.mark.ci) for a in ("gelu", "relu", "swiglu"))],
)
def test_a_feed_forward_layer_multiplies_values_with_activated_gates(activation):
    x, mlp = draw(2, 3, K), make_mlp(activation)
    sparse = make_mlp(activation, ("mlp/up", PLAIN), ("mlp/down", SQUARE))
    up, down = (layer.kernel[...] for layer in (mlp.up, mlp.down))
    assert up.shape == (K, 2 * N if "glu" in activation else N) and down.shape == (N, K)
    jax.tree.map(np.testing.assert_array_equal, split(sparse)[1], split(mlp)[1])
    np.testing.assert_array_equal(sparse(x, options=DENSE_LINEAR), mlp(x))
    for layer in (sparse.up, sparse.down):
        layer.kernel_mask[...] = make_mask(layer.kernel.shape)

    def feed_forward(up, down):
        z = x @ up
        if activation in ("gelu", "relu"):
            return getattr(jax.nn, activation)(z) @ down
        act = {"geglu": jax.nn.gelu, "swiglu": jax.nn.silu}[activation]
        return (z[..., :N] * act(z[..., N:])) @ down

    np.testing.assert_allclose(mlp(x), feed_forward(up, down), rtol=1e-4, atol=1e-5)
    up, down = (layer.kernel[...] * layer.kernel_mask[...] for layer in (sparse.up, sparse.down))
    np.testing.assert_allclose(sparse(x), feed_forward(up, down), rtol=1e-4, atol=1e-5)


@pytest.mark.ci
def test_a_plain_feed_forward_layer_is_gelu_between_two_linear_layers():
    mlp, x = make_mlp("gelu"), draw(2, 3, K)
    assert type(mlp.up) is type(mlp.down) is nnx.Linear
    np.testing.assert_array_equal(mlp(x), mlp.down(nnx.gelu(mlp.up(x))))


def test_dropout_follows_the_activation_of_a_feed_forward_layer():
    mlp, x, key = make_mlp("gelu_exact", mlp_dropout_rate=0.25), draw(2, 50, K), jax.random.key(3)
    hidden = nnx.gelu(mlp.up(x), approximate=False)
    # The identity shows what the second product is given.
    mlp.down.kernel[...] = jnp.eye(N, K)
    shown = np.asarray(mlp(x, dropout_key=key))[..., :N]
    kept = shown != 0
    np.testing.assert_allclose(shown[kept], np.asarray(hidden)[kept] / 0.75, rtol=1e-5)
    assert abs(kept.mean() - 0.75) < 0.03
    np.testing.assert_array_equal(mlp(x)[..., :N], hidden)


@pytest.mark.ci
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64])
def test_layers_that_name_no_type_agree_on_it(dtype):
    config, rngs = make_config(), nnx.Rngs(0)
    layers = (
        nnx.Linear(16, 16, rngs=rngs),
        SparseLinear(16, 16, rngs=rngs),
        MLP(config, rngs=rngs),
        BlockSparseAttention(config, rngs=rngs),
    )

    def find_type(layer, x):
        try:
            return jax.tree.leaves(layer(x))[0].dtype
        except ValueError as error:
            # Ops take no float64, and layers do not narrow it for them.
            assert "got" in str(error) and "float64" in str(error)
            return jnp.float64

    with jax.enable_x64(True):
        x = jnp.ones((2, 16, 16), dtype)
        found = [jax.eval_shape(lambda x, f=f: jnp.zeros((), find_type(f, x)), x) for f in layers]
    assert {jnp.dtype(x.dtype) for x in found} == {jnp.promote_types(dtype, jnp.float32)}
