"""What an encoder-decoder promises: who sees what, and that it is its textbook's model."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.doctor.oracles import make_nm_masks
from sparsejax.models import (
    DENSE_LINEAR,
    LinearOptions,
    SparsityMask,
    Transformer,
    block,
    decoder,
    products,
    sparse_weight_patterns,
    transformer,
)
from sparsejax.patterns import NMPattern
from tests.small_models import LENGTH
from tests.small_models import make_config as make_small_config

SQUARE = NMPattern(2, 4, transposable=True)
SOURCE, TARGET = LENGTH, 12
PLAIN = make_small_config(
    vocab_size=11,
    num_decoder_layers=3,
    num_heads=4,
    num_kv_heads=4,
    mlp_dim=24,
    mlp_activation="relu",
    causal=False,
)
_GROUPED = {"positions": "rotary", "num_kv_heads": 2, "mlp_activation": "geglu"}
_GROUPED |= {"num_decoder_layers": 1, "use_bias": False, "embedding_norm": True}
GROUPED = dataclasses.replace(PLAIN, **_GROUPED)
SPARSE = dataclasses.replace(
    PLAIN, sparse_weights=(("(decoder/)?mlp/.*", SQUARE),), dropout_rate=0.1
)
ALONE = dataclasses.replace(PLAIN, num_decoder_layers=0, num_classes=2)
MVUE = LinearOptions(grad_pruning="mvue")

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def split_abstract(config):
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graphdef, params, masks = nnx.split(model, nnx.Param, SparsityMask)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(masks)


def make_weights(config, *, prunes=False):
    """Random parameters, and masks that keep everything or differ between layers."""
    _, params, masks = split_abstract(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.3, x.shape)), params)

    def make_mask(path, mask):
        if not prunes or path[-1].key != "kernel_mask":
            return np.ones(mask.shape, bool)
        make = functools.partial(make_nm_masks, mask.shape[1:], (2, 4), transposable=True)
        return np.stack([make(seed=i)["whole"] for i in range(len(mask))])

    return params, jax.tree.map_with_path(make_mask, masks)


def make_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, PLAIN.vocab_size, shape)


SOURCES, TARGETS = make_tokens(2, SOURCE), make_tokens(2, TARGET, seed=1)


def apply(config, params, masks, sources=SOURCES, targets=TARGETS, real=None, **options):
    model = nnx.merge(split_abstract(config)[0], params, masks)
    return model(sources, decoder_tokens=targets, mask=real, **options).logits


@functools.cache
def forward(config, linear_options=DENSE_LINEAR):
    """The compiled map (params, masks, sources, targets[, real]) -> logits."""
    return jit(functools.partial(apply, config, linear_options=linear_options))


@functools.cache
def gradient(config):
    """The compiled gradient of a sum of squares, with dropout and pruned gradients."""

    def compute(params, masks, key):
        logits = apply(config, params, masks, linear_options=MVUE, pruning_key=key, dropout_key=key)
        return (logits**2).sum()

    return jit(jax.grad(compute))


def change(tokens, position):
    """Another token at one position of every example."""
    changed = tokens.copy()
    changed[:, position] = (changed[:, position] + 1) % PLAIN.vocab_size
    return changed


def plain_norm(weights, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * weights["scale"] + weights["bias"]


def plain_linear(weights, x):
    return x @ weights["kernel"] + weights.get("bias", 0)


def plain_rotation(x_TH):
    half = x_TH.shape[1] // 2
    angle = np.arange(len(x_TH))[:, None] * 10_000.0 ** (-np.arange(half) / half)
    turned = (x_TH[:, :half] + 1j * x_TH[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], 1)


def plain_attention(config, queries, keys_and_values, *, real=None, causal=False, rotates=False):
    """Attend head by head; projections are given."""
    H, group = config.head_dim, config.num_heads // config.num_kv_heads
    keys, values = np.split(keys_and_values, 2, -1)
    heads = []
    for n in range(config.num_heads):
        q, k = queries[:, n * H :][:, :H], keys[:, n // group * H :][:, :H]
        if rotates:
            q, k = plain_rotation(q), plain_rotation(k)
        scores = np.exp(q @ k.T / np.sqrt(H))
        if causal:
            scores = np.tril(scores)
        if real is not None:
            scores = scores * real
        heads.append(scores / scores.sum(1, keepdims=True) @ values[:, n // group * H :][:, :H])
    return np.concatenate(heads, 1)


def plain_mlp(config, weights, x):
    z = plain_linear(weights["up"], x)
    if config.mlp_activation == "relu":
        return plain_linear(weights["down"], np.maximum(z, 0))
    value, gate = np.split(z, 2, -1)
    return plain_linear(weights["down"], value * np.asarray(jax.nn.gelu(gate)))


def plain_model(config, params, source, target, real):
    """The logits of one example in NumPy, block by block."""
    table, rotates = params["embedding"]["embedding"], config.positions == "rotary"
    x, y = table[source], table[target]
    if not rotates:
        x = x + params["position"][: len(source)]
        y = y + params["decoder"]["position"][: len(target)]
    if config.embedding_norm:
        x = plain_norm(params["embedding_norm"], x)
        y = plain_norm(params["decoder"]["embedding_norm"], y)
    for i in range(config.num_layers):
        block = jax.tree.map(lambda leaf, i=i: np.float64(leaf[i]), params["blocks"])
        h = plain_linear(block["attention"]["qkv"], plain_norm(block["attention_norm"], x))
        q, kv = np.split(h, [config.model_dim], 1)
        h = plain_attention(config, q, kv, real=real, rotates=rotates)
        x = x + plain_linear(block["attention"]["out"], h)
        x = x + plain_mlp(config, block["mlp"], plain_norm(block["mlp_norm"], x))
    x = plain_norm(params["final_norm"], x)
    for i in range(config.num_decoder_layers):
        block = jax.tree.map(lambda leaf, i=i: np.float64(leaf[i]), params["decoder"]["blocks"])
        h, own = plain_norm(block["attention_norm"], y), block["attention"]
        q, kv = plain_linear(own["query"], h), plain_linear(own["key_value"], h)
        h = plain_attention(config, q, kv, causal=True, rotates=rotates)
        y = y + plain_linear(own["out"], h)
        h, cross = plain_norm(block["cross_attention_norm"], y), block["cross_attention"]
        q, kv = plain_linear(cross["query"], h), plain_linear(cross["key_value"], x)
        y = y + plain_linear(cross["out"], plain_attention(config, q, kv, real=real))
        y = y + plain_mlp(config, block["mlp"], plain_norm(block["mlp_norm"], y))
    return plain_norm(params["decoder"]["final_norm"], y) @ table.T


@pytest.mark.parametrize(
    "config", [PLAIN, pytest.param(GROUPED, marks=pytest.mark.ci)], ids=["plain", "grouped"]
)
def test_the_model_is_that_of_the_textbook(config):
    params, masks = make_weights(config)
    real = np.arange(SOURCE) < np.array([[SOURCE], [9]])
    logits = forward(config)(params, masks, SOURCES, TARGETS, real)
    assert logits.shape == (2, TARGET, config.vocab_size) and logits.dtype == jnp.float32
    for example in zip(logits, SOURCES, TARGETS, real, strict=True):
        expected = plain_model(config, params, *example[1:])
        np.testing.assert_allclose(example[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.ci
def test_a_target_token_changes_its_own_logits_and_later_ones():
    params, masks = make_weights(PLAIN)
    run = functools.partial(forward(PLAIN), params, masks, SOURCES)
    before = run(TARGETS)
    for position in range(TARGET):
        moved = np.abs(run(change(TARGETS, position)) - before).max((0, 2))
        assert (moved[:position] < 1e-5).all() and (moved[position:] > 1e-3).all(), position


@pytest.mark.ci
def test_every_source_token_changes_every_logit():
    params, masks = make_weights(PLAIN)
    run = functools.partial(forward(PLAIN), params, masks)
    before = run(SOURCES, TARGETS)
    for position in range(SOURCE):
        moved = np.abs(run(change(SOURCES, position), TARGETS) - before).max(2)
        assert (moved > 1e-4).all(), position


@pytest.mark.ci
def test_what_padding_of_the_source_holds_changes_nothing():
    params, masks = make_weights(PLAIN)
    run = functools.partial(forward(PLAIN), params, masks)
    real = np.arange(SOURCE) < np.array([[11], [16]])
    other = make_tokens(2, SOURCE, seed=2)
    logits = run(SOURCES, TARGETS, real)
    padded = run(np.where(real, SOURCES, other), TARGETS, real)
    np.testing.assert_allclose(padded, logits, atol=1e-5)
    assert np.abs(run(np.where(real, other, SOURCES), TARGETS, real) - logits).max() > 1e-2
    assert np.abs(run(SOURCES, TARGETS, np.ones_like(real)) - logits)[0].max() > 1e-2
    # The padding may as well be absent.
    shorter = apply(PLAIN, params, masks, SOURCES[:1, :11], TARGETS[:1])
    np.testing.assert_allclose(shorter, logits[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.ci
def test_every_parameter_has_a_gradient():
    params, masks = make_weights(SPARSE)
    grads = gradient(SPARSE)(params, masks, jax.random.key(0))
    for path, grad in jax.tree.leaves_with_path(grads):
        per_layer = grad if "blocks" in jax.tree_util.keystr(path) else grad[None]
        for part in per_layer:
            assert np.isfinite(part).all() and np.abs(part).max() > 0, path


@pytest.mark.slow
def test_unrolled_and_recomputed_layers_are_the_same():
    params, masks = make_weights(SPARSE, prunes=True)
    other = dataclasses.replace(SPARSE, scan_layers=False, remat=True)
    expected, got = (
        gradient(config)(params, masks, jax.random.key(0)) for config in (SPARSE, other)
    )
    programs = [
        str(jax.make_jaxpr(functools.partial(apply, config))(params, masks))
        for config in (SPARSE, other)
    ]
    for pattern, counts in ((r"remat\w*\[", [0, 2]), ("unroll=[23]", [0, 2])):
        assert [len(re.findall(pattern, program)) for program in programs] == counts, pattern
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()), got, expected
    )


@pytest.mark.ci
def test_every_draw_has_a_key_of_its_own(monkeypatch):
    seen = collections.defaultdict(set)

    def watch(module, name, find_key):
        function = getattr(module, name)

        def record(*arguments, **options):
            key_data = jax.random.key_data(find_key(arguments, options))
            jax.debug.callback(lambda data: seen[name].add(tuple(data.tolist())), key_data)
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, record)

    watch(products, "nm_matmul", lambda arguments, options: options["key"])
    for module in (transformer, block, decoder):
        watch(module, "dropout", lambda arguments, options: arguments[2])
    key, weights = jax.random.key(0), make_weights(SPARSE)
    logits = apply(SPARSE, *weights, linear_options=MVUE, pruning_key=key, dropout_key=key)
    jax.block_until_ready(logits)
    jax.effects_barrier()
    # Two weights in each of 2 + 3 layers; both embeddings, 2 branches of 2 layers, 3 of 3.
    assert {name: len(keys) for name, keys in seen.items()} == {
        "nm_matmul": 10,
        "dropout": 2 + 2 * 2 + 3 * 3,
    }


@pytest.mark.ci
def test_masks_of_both_stacks_prune_their_own_weights():
    params, masks = make_weights(SPARSE, prunes=True)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): mask.shape
        for path, mask in jax.tree.leaves_with_path(masks)
    }
    assert flat == {
        "blocks/attention/block_mask": (2, 1, 1, 2, 2),
        "blocks/mlp/up/kernel_mask": (2, 16, 24),
        "blocks/mlp/down/kernel_mask": (2, 24, 16),
        "decoder/blocks/mlp/up/kernel_mask": (3, 16, 24),
        "decoder/blocks/mlp/down/kernel_mask": (3, 24, 16),
    }
    run = forward(SPARSE, LinearOptions())
    logits, pruned = run(params, masks, SOURCES, TARGETS), params
    for path, mask in jax.tree.leaves_with_path(masks):
        if path[-1].key == "kernel_mask":
            *parents, layer = (entry.key for entry in path[:-1])
            branch = functools.reduce(lambda tree, part: tree[part], parents, masks)
            whole = {"kernel_mask": np.ones_like(mask)}
            kept = _replace(masks, parents, branch | {layer: whole})
            moved = np.abs(run(params, kept, SOURCES, TARGETS) - logits).max()
            assert moved > 1e-2, f"the mask of {path} does nothing"
            weights = functools.reduce(lambda tree, part: tree[part], parents, pruned)
            kernel = {**weights[layer], "kernel": weights[layer]["kernel"] * mask}
            pruned = _replace(pruned, parents, weights | {layer: kernel})
    expected = forward(SPARSE)(pruned, masks, SOURCES, TARGETS)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def _replace(tree, path, value):
    if not path:
        return value
    return tree | {path[0]: _replace(tree[path[0]], path[1:], value)}


def test_names_of_the_decoder_are_its_own():
    def make_config(regex, config=PLAIN):
        return dataclasses.replace(config, sparse_weights=((regex, SQUARE),))

    def find(regex):
        return list(sparse_weight_patterns(make_config(regex)))

    def find_built(regex):
        masks = jax.tree.leaves_with_path(split_abstract(make_config(regex))[2])
        names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in masks)
        return [n.removesuffix("/kernel_mask") for n in names if n.endswith("kernel_mask")]

    for layer in ("mlp/up", "mlp/down"):
        assert find_built(layer) == [f"blocks/{layer}"]
        assert find_built(f"decoder/{layer}") == [f"decoder/blocks/{layer}"]
    assert find("mlp/.*") == ["mlp/up", "mlp/down"]
    assert find("decoder/mlp/down") == ["decoder/mlp/down"]
    assert find(".*mlp/up") == ["mlp/up", "decoder/mlp/up"]
    with pytest.raises(ValueError, match=r"'embedding'\), but 'decoder/attention/qkv' m"):
        find("decoder/attention/qkv")
    with pytest.raises(ValueError, match=r"'mlp/down'\), but 'decoder/mlp/.*' matches none"):
        make_config("decoder/mlp/.*", ALONE)


@pytest.mark.ci
def test_initialisation_scales_what_a_branch_adds():
    config = dataclasses.replace(PLAIN, init_std=0.03, model_dim=64, mlp_dim=128)

    @jit
    def init(key):
        params = nnx.split(Transformer(config, rngs=nnx.Rngs(params=key)), nnx.Param, ...)[1]
        return nnx.to_pure_dict(params)["decoder"]["blocks"]

    blocks = init(jax.random.key(0))
    for layer in range(3):
        for branch in ("attention", "cross_attention"):
            for name, std in (("query", 0.03), ("key_value", 0.03), ("out", 0.01)):
                kernel = blocks[branch][name]["kernel"][layer]
                assert abs(kernel.std() / std - 1) < 0.05, (branch, name)
        for name, std in (("up", 0.03), ("down", 0.01)):
            assert abs(blocks["mlp"][name]["kernel"][layer].std() / std - 1) < 0.05, name


@pytest.mark.parametrize(
    ("config", "targets", "message"),
    [
        (PLAIN, None, "to a model with decoder layers and to no other, got None for num_d.*=3"),
        (ALONE, TARGETS, r"to no other, got shape \(2, 12\) for num_decoder_layers=0"),
        (PLAIN, TARGETS[0], r"with B=2 and U at most max_length=16, got shape \(12,\)"),
        (PLAIN, TARGETS[:1], r"with B=2 and U at most max_length=16, got shape \(1, 12\)"),
        (PLAIN, make_tokens(2, 17), r"with B=2 and U at most max_length=16, got shape \(2, 17\)"),
    ],
    ids=["missing", "useless", "rank", "batch", "length"],
)
def test_decoder_tokens_that_do_not_fit_are_refused(config, targets, message):
    with pytest.raises(ValueError, match=f"decoder_tokens must be .*{message}"):
        jax.eval_shape(functools.partial(apply, config, targets=targets), *make_weights(config))


@pytest.mark.parametrize(
    "change", [{"causal": True}, {"num_classes": 2}, {"num_towers": 2, "num_classes": 2}], ids=str
)
def test_only_a_bidirectional_encoder_has_a_decoder(change):
    message = "model.num_decoder_layers must be 0 in a causal language model and in a classifier"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **change)
    with pytest.raises(ValueError, match="num_decoder_layers must be at least 0, got -1"):
        dataclasses.replace(PLAIN, num_decoder_layers=-1, num_classes=2)
