"""FLOP counts against hand counts of GPT-2 and against XLA's own analysis."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.accounting.flops import count_transformer_flops
from sparsejax.models import TransformerConfig
from sparsejax.patterns import BlockPattern

_BLOCK = BlockPattern(block_q=64, block_kv=64)
_GPT2_SMALL = TransformerConfig(
    num_layers=12,
    model_dim=768,
    num_heads=12,
    num_kv_heads=12,
    mlp_dim=3072,
    vocab_size=50304,
    max_length=1024,
    causal=False,
    block=_BLOCK,
)
_GROUPED = TransformerConfig(
    num_layers=2,
    model_dim=128,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=256,
    vocab_size=300,
    max_length=128,
    mlp_activation="geglu",
    causal=False,
    block=_BLOCK,
)
_CAUSAL = dataclasses.replace(_GROUPED, causal=True)


def test_gpt2_small_per_token_by_hand():
    flops = count_transformer_flops(_GPT2_SMALL)
    linears = sum(layer.linears for layer in flops.layers) / 1024
    attention = sum(layer.attention for layer in flops.layers) / 1024
    assert linears == 2 * 12 * 12 * 768**2  # 169.9 million
    assert attention == 12 * 4 * 1024 * 768  # 37.7 million
    assert flops.head / 1024 == 2 * 768 * 50304  # 77.3 million
    assert flops.forward / 1024 == linears + attention + flops.head / 1024
    assert flops.training == 3 * flops.forward == flops.forward + flops.backward


def test_components_of_a_layer_by_hand():
    flops = count_transformer_flops(_GROUPED)
    assert dataclasses.asdict(flops.layers[1]) == {
        "qkv": 2 * 128 * 128 * (4 + 2 + 2) * 32,
        "scores": 2 * 128 * 128 * 4 * 32,
        "values": 2 * 128 * 128 * 4 * 32,
        "output": 2 * 128 * 4 * 32 * 128,
        "up": 2 * 2 * 128 * 128 * 256,
        "down": 2 * 128 * 128 * 256,
        "cross_attention": 0.0,
    }
    assert flops.layers[1].backward == 2 * flops.layers[1].forward
    assert flops.head == 2 * 128 * 128 * 300


def test_a_classifier_has_a_head_at_one_position_and_patches_are_multiplied():
    classifier = dataclasses.replace(_GROUPED, num_classes=10)
    assert count_transformer_flops(classifier).head == 2 * 128 * 10
    patched = dataclasses.replace(classifier, vocab_size=0, patch_values=48)
    flops = count_transformer_flops(patched)
    assert flops.patches == 2 * 128 * 128 * 48
    assert flops.forward == count_transformer_flops(classifier).forward + flops.patches
    assert list(flops.parts) == ["patches", "layer 0", "layer 1", "head"]


def test_a_decoder_attends_twice():
    both = dataclasses.replace(_GROUPED, num_decoder_layers=1)
    flops = count_transformer_flops(both, weight_density={"decoder/mlp/up": 0.5})
    (decoder,), encoder = flops.decoder_layers, flops.layers[0]
    assert decoder.cross_attention == encoder.qkv + encoder.attention + encoder.output
    assert decoder.attention == count_transformer_flops(_CAUSAL).layers[0].attention
    assert (decoder.up, decoder.down) == (0.5 * encoder.up, encoder.down)
    assert list(flops.parts) == ["layer 0", "layer 1", "decoder layer 0", "head"]


def test_causal_counts_each_visible_pair_once():
    full = count_transformer_flops(_GROUPED).layers[0]
    causal = count_transformer_flops(_CAUSAL).layers[0]
    visible_pairs = sum(position + 1 for position in range(128))
    assert causal.attention == full.attention * visible_pairs / 128**2
    assert causal.linears == full.linears


def test_densities_scale_their_own_components():
    dense = count_transformer_flops(_CAUSAL).layers
    sparse = count_transformer_flops(
        _CAUSAL,
        attention_density=jnp.array([0.25, 0.0]),
        weight_density={"attention/qkv": 0.5, "mlp/down": (1.0, 0.75)},
    ).layers
    assert sparse[0].attention == 0.25 * dense[0].attention
    assert sparse[1].attention == 0
    for layer in range(2):
        assert sparse[layer].qkv == 0.5 * dense[layer].qkv
        assert sparse[layer].output == dense[layer].output
        assert sparse[layer].up == dense[layer].up
    assert [layer.down for layer in sparse] == [dense[0].down, 0.75 * dense[1].down]


def transformer(params, x_TD):
    """Grouped-query layers with a gated MLP, then a head; norms and residuals left plain."""
    length, model_dim = x_TD.shape
    for layer in params["layers"]:
        q_TKGH = jnp.einsum("td,dkgh->tkgh", x_TD, layer["q"])
        k_TKH, v_TKH = jnp.einsum("td,xdkh->xtkh", x_TD, layer["kv"])
        logits = jnp.einsum("tkgh,skh->kgts", q_TKGH, k_TKH)
        mixed = jnp.einsum("kgts,skh->tkgh", jax.nn.softmax(logits), v_TKH)
        x_TD += mixed.reshape(length, -1) @ layer["out"]
        gate, up = x_TD @ layer["gate"], x_TD @ layer["up"]
        x_TD += (jax.nn.relu(gate) * up) @ layer["down"]
    return x_TD @ params["head"]


@pytest.mark.ci
def test_counts_agree_with_xla():
    width, heads, length = _GROUPED.model_dim, 2, _GROUPED.max_length
    layer = {
        "q": (width, heads, 2, 32),
        "kv": (2, width, heads, 32),
        "out": (128, width),
        "gate": (width, 256),
        "up": (width, 256),
        "down": (256, width),
    }
    shapes = {"layers": [layer, layer], "head": (width, 300)}
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    x_TD = jax.ShapeDtypeStruct((length, width), jnp.float32)

    def loss(params, x_TD):
        return (transformer(params, x_TD) ** 2).sum()

    flops = count_transformer_flops(_GROUPED)
    programs = {
        flops.forward: transformer,
        flops.training: jax.value_and_grad(loss, argnums=(0, 1)),
    }
    for counted, program in programs.items():
        xla = jax.jit(program).lower(params, x_TD).compile().cost_analysis()["flops"]
        # XLA adds softmax, activations and residuals, a few per cent at these sizes.
        assert counted <= xla <= 1.05 * counted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_density": 1.5}, "attention_density=1.5"),
        ({"attention_density": float("nan")}, "attention_density=nan"),
        ({"weight_density": {"mlp/up": (0.5, -0.5)}}, r"\['mlp/up'\]=\(0.5, -0.5\)"),
        ({"weight_density": {"mlp/up": (0.5,)}}, r"\['mlp/up'\]=\(0.5,\) for num_layers=2"),
        ({"weight_density": {"mlp/gate": 0.5}}, r"some of .* got \['mlp/gate'\]"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        count_transformer_flops(_CAUSAL, **options)


def test_counts_are_plain_numbers():
    flops = count_transformer_flops(_CAUSAL, attention_density=np.float32(0.5))
    assert type(flops.forward) is float
