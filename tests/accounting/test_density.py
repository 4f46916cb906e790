"""What a phase computes of a model: densities, and FLOPs against hand counts."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.accounting.density import Density, compute_density, count_phase_flops
from sparsejax.patterns import BlockPattern, NMPattern, Unstructured, WeightBlocks
from sparsejax.recipes import Phase
from sparsejax.recipes.dynamic.mst import HybridAttention
from tests.small_models import make_config

_LAYERS, _LENGTH, _WIDTH, _HIDDEN = 2, 16, 8, 32
_SPARSE = Phase("sparse", sparse_weights=True)


def _model(**changes):
    options = {"vocab_size": 10, "num_layers": _LAYERS, "model_dim": _WIDTH, "mlp_dim": _HIDDEN}
    options |= {"sparse_weights": (("mlp/.*", NMPattern(transposable=True)),)}
    return make_config(**options | {"max_length": _LENGTH} | changes)


def _masks(kept=(0.5, 0.25)):
    rows = jnp.arange(_WIDTH)[:, None] / _WIDTH < jnp.asarray(kept)[:, None, None]
    up = jnp.broadcast_to(rows, (_LAYERS, _WIDTH, _HIDDEN))
    block_mask = jnp.zeros((_LAYERS, 1, 1, 2, 2), bool).at[..., 0].set(True)
    mlp = {"up": {"kernel_mask": up}, "down": {"kernel_mask": up.swapaxes(1, 2)}}
    return {"blocks": {"mlp": mlp, "attention": {"block_mask": block_mask}}}


def test_density_is_that_of_the_phase():
    density = compute_density(_model(), _masks(), _SPARSE)
    np.testing.assert_array_equal(density.attention, [1, 1])
    np.testing.assert_allclose(density.weights["mlp/up"], [0.5, 0.25])
    np.testing.assert_allclose(density.weights["mlp/down"], [0.5, 0.25])
    assert density.mean_weights == 0.375
    attention = compute_density(_model(), _masks(), Phase("sparse", sparse_attention=True))
    np.testing.assert_allclose(attention.attention, [2 / 3, 2 / 3])
    assert attention.weights == {} and attention.mean_weights is None


@pytest.mark.parametrize(
    ("transposable", "grad_pruning", "passes"),
    [
        # Kept share of y, dx and dW of a layer that keeps half.
        (True, "none", 0.5 + 0.5 + 1),
        (True, "mvue", 0.5 + 0.5 + 0.5),
        (False, "none", 0.5 + 1 + 1),
        (False, "mvue", 0.5 + 1 + 0.5),
    ],
)
def test_the_three_products_leave_out_different_things(transposable, grad_pruning, passes):
    model = _model(sparse_weights=(("mlp/.*", NMPattern(transposable=transposable)),))
    phase = _SPARSE._replace(grad_pruning=grad_pruning)
    density = compute_density(model, _masks((0.5, 0.5)), phase)
    dense = count_phase_flops(model, phase, density._replace(weights={}))
    product = 2 * _LENGTH * _WIDTH * _HIDDEN  # one pass of one feed-forward weight
    saved = _LAYERS * 2 * product * (3 - passes)
    assert count_phase_flops(model, phase, density) == pytest.approx(dense - saved)


def test_gates_and_towers_are_counted():
    def count(**changes):
        model = _model(causal=False, num_classes=2, sparse_weights=(), **changes)
        return count_phase_flops(model, Phase("dense"), compute_density(model, {}, Phase("dense")))

    gate = 3 * _LAYERS * 2 * _LENGTH * _WIDTH * _HIDDEN
    assert count(mlp_activation="swiglu") - count() == gate
    assert count(mlp_activation="relu") == count()
    assert count(num_towers=2) == 2 * count()


def test_a_decoder_is_counted_with_what_it_keeps():
    def count(weights, **changes):
        patterns = (("(decoder/)?mlp/.*", NMPattern(transposable=True)),)
        model = _model(causal=False, num_decoder_layers=3, sparse_weights=patterns, **changes)
        density = Density(np.ones(_LAYERS), weights)
        return count_phase_flops(model, _SPARSE, density)

    projection, pairs = 2 * _LENGTH * _WIDTH**2, 2 * _LENGTH**2 * _WIDTH
    past = 2 * _LENGTH * (_LENGTH + 1) // 2 * _WIDTH
    feed_forward = 2 * _LENGTH * _WIDTH * _HIDDEN
    encoder_layer = 4 * projection + 2 * pairs + 2 * feed_forward
    decoder_layer = encoder_layer + 4 * projection + 2 * past
    head = 2 * _LENGTH * _WIDTH * 10
    dense = 3 * (_LAYERS * encoder_layer + 3 * decoder_layer + head)
    assert count({}) == dense
    # Half of y and of dx, of one weight in every layer of one stack.
    assert count({"decoder/mlp/up": np.full(3, 0.5)}) == dense - 3 * feed_forward
    assert count({"mlp/up": np.full(_LAYERS, 0.5)}) == dense - _LAYERS * feed_forward
    # Keys and values of one head instead of two, in three attentions.
    saved = 3 * (_LAYERS + 2 * 3) * projection
    assert count({}, num_kv_heads=1) == dense - saved


@pytest.mark.parametrize("pattern", [Unstructured(), WeightBlocks(5, 4)], ids=str)
def test_a_sparse_embedding_thins_the_head(pattern):
    model = _model(sparse_weights=(("embedding", pattern),))
    kept = jnp.zeros((10, _WIDTH) if isinstance(pattern, Unstructured) else (2, 2), bool)
    kept = kept.at[: len(kept) // 2].set(True)
    phase = _SPARSE._replace(masked_gradients=True)
    masks = {"embedding": {"embedding_mask": kept, "gradient_mask": jnp.ones((2, 2), bool)}}
    density = compute_density(model, masks, phase)
    assert density.weights["embedding"].tolist() == [0.5]
    dense = count_phase_flops(model, phase, density._replace(weights={}))
    head = 2 * _LENGTH * _WIDTH * 10
    assert count_phase_flops(model, phase, density) == pytest.approx(dense - 3 * head / 2)
    # With the dense gradient, as in a step that changes the topology.
    flops = count_phase_flops(model, phase, density, dense_gradient=True)
    assert flops == pytest.approx(dense - 2 * head / 2)


def test_hybrid_attention_counts_positions():
    # What MST keeps of GPT-2's causal pairs with its strides.
    model = _model(max_length=1024, block=BlockPattern(block_q=64, block_kv=64))
    for stride, kept in {128: 0.241, 64: 0.136, 32: 0.092, 16: 0.093}.items():
        phase = Phase(
            "sparse", sparse_attention=True, position_mask=HybridAttention(stride, causal=True)
        )
        density = compute_density(model, {}, phase)
        np.testing.assert_allclose(density.attention, [kept] * _LAYERS, atol=6e-4)
