"""What the model promises: who sees what, sparse is dense where nothing is pruned, options agree.

Weights come from NumPy and programs are compiled once per configuration without expensive
passes: compilation is what these tests cost.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.accounting.flops import count_transformer_flops
from sparsejax.models import AttentionOptions, SparsityMask, Transformer
from sparsejax.models.residual import dropout
from sparsejax.patterns import BlockPattern
from tests.small_models import make_config

LENGTH = 64
DECODER = make_config(
    vocab_size=32,
    model_dim=32,
    mlp_dim=48,
    max_length=LENGTH,
    block=BlockPattern(block_q=16, block_kv=16),
)
ENCODER = dataclasses.replace(
    DECODER, causal=False, num_classes=3, positions="rotary", num_kv_heads=1
)
DENSE, MASKED = AttentionOptions(sparse=False), AttentionOptions()
ZERO = AttentionOptions(pruned_logits="zero")

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def split_abstract(config):
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graphdef, params, masks = nnx.split(model, nnx.Param, SparsityMask)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(masks)


def make_weights(config, seed=0):
    """Random parameters, larger than an initializer's, and masks that keep everything."""
    _, params, masks = split_abstract(config)
    draw = np.random.default_rng(seed).normal
    params = jax.tree.map(lambda x: np.float32(draw(0, 0.3, x.shape)), params)
    return params, jax.tree.map(lambda x: np.ones(x.shape, bool), masks)


def make_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, DECODER.vocab_size, shape)


def prune(masks, pattern_LIJ):
    assert jax.tree.leaves(masks)[0].shape == (2, 1, 1, 4, 4)
    return jax.tree.map(lambda _: np.array(pattern_LIJ, bool)[:, None, None], masks)


def apply(config, options, params, masks, tokens, mask=None, key=None, probe=False):
    model = nnx.merge(split_abstract(config)[0], params, masks)
    return model(tokens, mask=mask, dropout_key=key, attention_options=options, probe=probe)


@functools.cache
def forward(config, options):
    """The compiled map (params, masks, tokens[, mask, key]) -> logits."""
    return jit(lambda *args: apply(config, options, *args).logits)


@functools.cache
def gradient(config, options):
    """The compiled gradient of sum(logits * weights) by the parameters, for a batch of 2."""

    def compute(params, masks, tokens, weights):
        return (apply(config, options, params, masks, tokens).logits * weights).sum()

    weights = np.zeros((2, LENGTH, config.vocab_size), np.float32)
    lowered = jit(jax.grad(compute)).lower(*make_weights(config), make_tokens(2, LENGTH), weights)
    return lowered.compile()


def assert_close(got, expected, atol=2e-5):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=atol)


# Query blocks see themselves and block 0; what lies above the diagonal must not matter.
SPARSE = np.stack([np.eye(4, dtype=bool)] * 2)
SPARSE[:, :, 0] = True
SPARSE[:, 0, 3] = True


@pytest.mark.parametrize("options", [DENSE, MASKED], ids=["dense", "sparse"])
def test_a_decoder_sees_no_later_token(options):
    params, masks = make_weights(DECODER)
    tokens, changed = make_tokens(2, LENGTH), make_tokens(2, LENGTH, seed=1)
    changed[:, :38] = tokens[:, :38]
    run = functools.partial(forward(DECODER, options), params, prune(masks, SPARSE))
    before, after = run(tokens), run(changed)
    assert_close(before[:, :38], after[:, :38], atol=1e-6)
    assert (np.abs(before - after).max(-1)[:, 38:] > 1e-3).mean() > 0.9


@pytest.mark.ci
def test_dense_logits_do_not_depend_on_later_embeddings():
    params, masks = make_weights(DECODER)
    later = np.arange(LENGTH)[:, None] > 37
    direction = np.float32(later * np.random.default_rng(1).normal(size=(1, DECODER.model_dim)))

    def move_later_positions(amount):
        moved = params | {"position": params["position"] + amount * direction}
        return apply(DECODER, DENSE, moved, masks, make_tokens(2, LENGTH)).logits[0]

    _, slope = jit(lambda: jax.jvp(move_later_positions, (0.0,), (1.0,)))()
    assert (slope[:38] == 0).all()
    assert (np.abs(slope[38:]).max(-1) > 1e-3).all()


@pytest.mark.ci
def test_sparse_logits_depend_on_earlier_embeddings_of_kept_blocks_alone():
    params, masks = make_weights(DECODER)
    only_37 = np.zeros((2, LENGTH, DECODER.vocab_size), np.float32)
    only_37[:, 37] = np.random.default_rng(0).normal(size=DECODER.vocab_size)
    grads = gradient(DECODER, MASKED)(params, prune(masks, SPARSE), make_tokens(2, LENGTH), only_37)
    seen = np.abs(grads["position"]).max(-1) > 0
    # Position 37 lies in block 2, which sees itself up to 37, and block 0.
    np.testing.assert_array_equal(np.flatnonzero(seen), [*range(16), *range(32, 38)])


@pytest.mark.ci
def test_every_parameter_has_a_gradient_and_no_mask_has_one():
    params, masks = make_weights(DECODER)
    tokens = make_tokens(2, LENGTH)
    weights = np.random.default_rng(0).normal(size=(2, LENGTH, DECODER.vocab_size))
    grads = gradient(DECODER, MASKED)(params, masks, tokens, np.float32(weights))
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    for path, grad in jax.tree.leaves_with_path(grads):
        per_layer = grad if "blocks" in jax.tree_util.keystr(path) else grad[None]
        for part in per_layer:
            assert np.isfinite(part).all() and np.abs(part).max() > 0, path

    def by_mask(masks):
        return apply(DECODER, MASKED, params, masks, tokens).logits.sum()

    types = jax.tree.leaves(jax.eval_shape(jax.grad(by_mask, allow_int=True), masks))
    assert [x.dtype for x in types] == [jax.dtypes.float0]


@pytest.mark.parametrize(
    "options", [MASKED, pytest.param(ZERO, marks=pytest.mark.ci)], ids=["masked", "zero"]
)
def test_sparse_attention_that_keeps_everything_is_dense(options):
    params, masks = make_weights(DECODER)
    tokens = make_tokens(2, LENGTH)
    dense = forward(DECODER, DENSE)(params, masks, tokens)
    assert_close(forward(DECODER, options)(params, masks, tokens), dense)
    everywhere = forward(DECODER, options)(params, prune(masks, SPARSE), tokens)
    assert np.abs(everywhere - dense).max() > 0.01


def test_pruning_a_block_changes_the_rows_that_read_it_and_no_others():
    params, masks = make_weights(DECODER)
    run = functools.partial(forward(DECODER, MASKED), params)
    tokens = make_tokens(2, LENGTH)

    def changed_blocks(layer, row, column):
        kept = np.ones((2, 4, 4), bool)
        kept[layer, row, column] = False
        difference = np.abs(run(prune(masks, kept), tokens) - run(masks, tokens))
        return (difference.reshape(2, 4, 16, -1).max((0, 2, 3)) > 1e-4).tolist()

    assert changed_blocks(1, 3, 1) == [False, False, False, True]
    assert changed_blocks(1, 1, 0) == [False, True, False, False]
    # From the first layer on, the second hands the change to the later rows.
    assert changed_blocks(0, 1, 0) == [False, True, True, True]
    assert changed_blocks(0, 0, 3) == [False, False, False, False]


@pytest.mark.ci
@pytest.mark.parametrize("options", [DENSE, MASKED], ids=["dense", "sparse"])
def test_a_length_between_blocks_is_the_start_of_a_longer_sequence(options):
    params, masks = make_weights(DECODER)
    tokens = make_tokens(2, LENGTH)
    run = functools.partial(forward(DECODER, options), params, prune(masks, SPARSE))
    assert_close(run(tokens[:, :40]), run(tokens)[:, :40])


@pytest.mark.parametrize(
    "options", [pytest.param(DENSE, marks=pytest.mark.ci), MASKED], ids=["dense", "sparse"]
)
def test_an_encoder_ignores_what_padding_holds(options):
    params, masks = make_weights(ENCODER)
    tokens, changed = make_tokens(2, LENGTH), make_tokens(2, LENGTH, seed=1)
    real = np.arange(LENGTH) < np.array([[45], [64]])
    run = functools.partial(forward(ENCODER, options), params, masks)
    logits = run(tokens, real)
    assert_close(run(np.where(real, tokens, changed), real), logits, atol=1e-6)
    assert np.abs(run(np.where(real, changed, tokens), real) - logits).max() > 1e-3
    assert np.abs(run(tokens, np.ones_like(real)) - logits)[0].max() > 1e-3
    assert_close(logits, forward(ENCODER, DENSE)(params, masks, tokens, real))


@pytest.mark.ci
def test_an_unrolled_model_equals_the_scanned_one():
    params, masks = make_weights(DECODER)
    tokens = make_tokens(2, LENGTH)
    unrolled = dataclasses.replace(DECODER, scan_layers=False)
    expected = forward(DECODER, DENSE)(params, masks, tokens)
    assert_close(forward(unrolled, DENSE)(params, masks, tokens), expected)


@pytest.mark.ci
def test_counted_flops_agree_with_xla():
    sizes = {"num_layers": 2, "model_dim": 128, "num_heads": 2, "num_kv_heads": 2}
    sizes |= {"mlp_dim": 512, "vocab_size": 512}
    config = dataclasses.replace(DECODER, **sizes, max_length=128, scan_layers=False)
    _, params, masks = split_abstract(config)
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    lowered = forward(config, DENSE).lower(params, masks, tokens)
    xla = lowered.compile().cost_analysis()["flops"]
    # XLA's dense attention computes both triangles.
    counted = count_transformer_flops(dataclasses.replace(config, causal=False)).forward
    assert counted <= xla <= 1.05 * counted


@pytest.mark.ci
def test_rematerialisation_leaves_gradients_alone():
    params, masks = make_weights(DECODER)
    masks, tokens = prune(masks, SPARSE), make_tokens(2, LENGTH)
    weights = np.ones((2, LENGTH, DECODER.vocab_size), np.float32)
    remat = dataclasses.replace(DECODER, remat=True)
    expected = gradient(DECODER, MASKED)(params, masks, tokens, weights)
    got = gradient(remat, MASKED)(params, masks, tokens, weights)
    jax.tree.map(functools.partial(assert_close, atol=1e-3), got, expected)
    bytes_used, bytes_without = (
        gradient(c, MASKED).memory_analysis().temp_size_in_bytes for c in (remat, DECODER)
    )
    assert bytes_used < 0.8 * bytes_without


@pytest.mark.ci
def test_two_towers_compare_documents_through_four_features():
    config = dataclasses.replace(ENCODER, num_towers=2)
    params, masks = make_weights(config)
    documents = make_tokens(3, 2, LENGTH)
    real = np.arange(LENGTH) < np.array([50, 30])[:, None] + np.zeros((3, 1, 1), int)
    run = forward(config, DENSE)
    logits = run(params, masks, documents, real)
    assert logits.shape == (3, config.num_classes)
    swapped = run(params, masks, documents[:, ::-1], real[:, ::-1])
    assert np.abs(swapped - logits).max() > 1e-3
    # Swapping x and y swaps the first two features, keeps x * y and turns the sign of x - y.
    x, y, product, difference = np.split(params["hidden"]["kernel"], 4)
    kernel = np.concatenate([y, x, product, -difference])
    params["hidden"] = params["hidden"] | {"kernel": kernel}
    assert_close(run(params, masks, documents[:, ::-1], real[:, ::-1]), logits)


def test_dropout_zeroes_a_fraction_and_keeps_the_mean():
    x, key = jnp.full(40_000, 2.0), jax.random.key(0)
    y = np.asarray(dropout(x, 0.25, key))
    np.testing.assert_allclose(np.unique(y), [0, 2 / 0.75], rtol=1e-6)
    assert abs((y == 0).mean() - 0.25) < 0.01
    assert abs(y.mean() - 2) < 0.03
    assert dropout(x, 0.0, key) is x and dropout(x, 0.25, None) is x


@pytest.mark.ci
def test_dropout_follows_its_key_in_embeddings_and_blocks():
    config = dataclasses.replace(ENCODER, dropout_rate=0.2)
    params, masks = make_weights(config)
    tokens = make_tokens(2, LENGTH)
    first, second = jax.random.split(jax.random.key(0))

    def difference(params, key, other_key):
        a, b = (forward(config, DENSE)(params, masks, tokens, None, k) for k in (key, other_key))
        return np.abs(a - b).max()

    def silence(path, x):
        return x * (not {"out", "down"} & {part.key for part in path})

    # Embeddings of zero leave nothing to drop there; silent branches nothing in the blocks.
    no_embeddings = params | {"embedding": jax.tree.map(np.zeros_like, params["embedding"])}
    no_branches = jax.tree.map_with_path(silence, params)
    for weights in (params, no_embeddings, no_branches):
        assert difference(weights, first, first) == 0
        assert difference(weights, first, second) > 1e-3

    def program(config, key):
        return str(forward(config, DENSE).trace(params, masks, tokens, None, key).jaxpr)

    assert "random_bits" in program(config, first)
    assert "random_bits" not in program(config, None)
    assert "random_bits" not in program(ENCODER, first)


@pytest.mark.ci
def test_bfloat16_activations_keep_float32_parameters_and_logits():
    config = dataclasses.replace(DECODER, dtype="bfloat16")
    params, masks = make_weights(config)
    assert {x.dtype for x in jax.tree.leaves(split_abstract(config)[1])} == {jnp.dtype("float32")}
    tokens = make_tokens(2, LENGTH)
    logits = forward(config, DENSE)(params, masks, tokens)
    exact = forward(DECODER, DENSE)(params, masks, tokens)
    assert logits.dtype == jnp.float32
    relative = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    assert 1e-4 < relative < 0.03


@pytest.mark.ci
def test_attention_maps_are_stacked_by_layer_and_pass_no_gradient():
    params, masks = make_weights(DECODER)
    tokens = make_tokens(2, LENGTH)

    def probe(params):
        return apply(DECODER, DENSE, params, masks, tokens, probe=True)

    compiled_probe = jit(probe)
    output = compiled_probe(params)
    assert output.attention_maps.shape == (2, LENGTH, LENGTH)
    assert_close(output.logits, forward(DECODER, DENSE)(params, masks, tokens))
    assert_close(output.attention_maps.sum(-1), np.ones((2, LENGTH)))
    assert (np.triu(output.attention_maps, 1) == 0).all()
    second_layer_louder = params | {
        "blocks": jax.tree.map(
            lambda x: x * np.array([1, 2])[(...,) + (None,) * (x.ndim - 1)], params["blocks"]
        )
    }
    same = np.abs(compiled_probe(second_layer_louder).attention_maps - output.attention_maps).max(
        (1, 2)
    )
    assert same[0] == 0 and same[1] > 1e-3
    grads = jit(jax.grad(lambda p: (probe(p).attention_maps ** 2).sum()))(params)
    assert all((grad == 0).all() for grad in jax.tree.leaves(grads))


@pytest.mark.ci
def test_the_model_is_the_same_in_tree_mode():
    params, masks = make_weights(DECODER)
    tokens = make_tokens(2, LENGTH)

    def program():
        split_abstract.cache_clear()
        return str(jax.make_jaxpr(functools.partial(apply, DECODER, MASKED))(params, masks, tokens))

    graph_program = program()
    with nnx.set_graph_mode(False):
        assert program() == graph_program
    split_abstract.cache_clear()


@pytest.mark.ci
def test_initialisation():
    config = dataclasses.replace(DECODER, init_std=0.02, model_dim=64, mlp_dim=128)

    @jit
    def init(key):
        model = Transformer(config, rngs=nnx.Rngs(params=key))
        _, params, masks = nnx.split(model, nnx.Param, SparsityMask)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(masks)

    params, masks = init(jax.random.key(0))
    blocks = params["blocks"]
    for layer in range(2):
        for kernel in (blocks["attention"]["qkv"], blocks["mlp"]["up"]):
            assert abs(kernel["kernel"][layer].std() - 0.02) < 0.001
        for kernel in (blocks["attention"]["out"], blocks["mlp"]["down"]):
            assert abs(kernel["kernel"][layer].std() - 0.01) < 0.0005
    up = blocks["mlp"]["up"]["kernel"]
    assert np.abs(up[0] - up[1]).max() > 0.01
    assert jax.tree.leaves(masks)[0].shape == (2, 1, 1, 4, 4)
    assert all(mask.all() for mask in jax.tree.leaves(masks))


@pytest.mark.parametrize("shape", [(LENGTH,), (1, 2, LENGTH), (1, LENGTH + 1)])
def test_tokens_of_another_shape_are_refused(shape):
    params, masks = make_weights(DECODER)
    expected = r"tokens must be \[B, T\] with T at most max_length=64, got shape"
    with pytest.raises(ValueError, match=expected):
        apply(DECODER, DENSE, params, masks, np.zeros(shape, np.int32))
