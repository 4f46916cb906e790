"""Every refused model setting is named with its value and what was expected."""

import pytest

from sparsejax.models import TransformerConfig
from sparsejax.patterns import BlockPattern, NMPattern

GOOD = dict(
    vocab_size=32,
    num_layers=2,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=48,
    max_length=64,
    causal=True,
    block=BlockPattern(block_q=16, block_kv=32),
)


PATCHES = dict(patch_values=12, vocab_size=0, causal=False, num_classes=3)


def test_a_good_config_passes():
    assert TransformerConfig(**GOOD).head_dim == 8
    assert GOOD["block"].grid(64) == (4, 2)
    TransformerConfig(**GOOD | {"causal": False})  # a masked language model
    TransformerConfig(**GOOD | PATCHES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 0}, "model.vocab_size must be at least 1, got 0"),
        ({"model_dim": -32}, "model.model_dim must be at least 1, got -32"),
        ({"num_kv_heads": 0}, "model.num_kv_heads must be at least 1, got 0"),
        ({"model_dim": 34}, "model.model_dim must be a multiple of num_heads=4, got 34"),
        ({"num_kv_heads": 3}, "model.num_kv_heads must be a divisor of num_heads=4, got 3"),
        ({"dropout_rate": 1.0}, "model.dropout_rate must be in [0, 1), got 1.0"),
        ({"positions": "alibi"}, "model.positions must be 'learned' or 'rotary', got 'alibi'"),
        (
            {"positions": "rotary", "model_dim": 36},
            "model.model_dim must be an even multiple of num_heads=4 with rotary positions, got 36",
        ),
        (
            {"dtype": "float64"},
            "model.dtype must be None or one of ('float32', 'bfloat16', 'float16'), got 'float64'",
        ),
        ({"num_towers": 3}, "model.num_towers must be 1 or 2, got 3"),
        ({"num_towers": 2}, "model.num_towers must be 1 in a language model, got 2"),
        ({"num_classes": 10}, "model.num_classes must be 0 in a causal language model, got 10"),
        (
            {"causal": False, "num_classes": 1},
            "model.num_classes must be at least 2, or 0 in a language model, got 1",
        ),
        ({"patch_values": -1}, "model.patch_values must be at least 0, got -1"),
        (PATCHES | {"vocab_size": 32}, "model.vocab_size must be 0 with patches, got 32"),
        (PATCHES | {"num_classes": 0}, "model.num_classes must be at least 2 with patches, got 0"),
        (PATCHES | {"num_towers": 2}, "model.num_towers must be 1 with patches, got 2"),
        ({"init_std": 0.0}, "model.init_std must be positive, got 0.0"),
        (
            {"init_std": 0.02, "linear_init": "torch"},
            "model.linear_init must be 'lecun_normal' with init_std=0.02, got 'torch'",
        ),
        (
            {"linear_init": "xavier"},
            "model.linear_init must be one of ('lecun_normal', 'torch'), got 'xavier'",
        ),
        ({"mlp_dropout_rate": 1.0}, "model.mlp_dropout_rate must be in [0, 1), got 1.0"),
        (
            {"mlp_activation": "tanh"},
            "model.mlp_activation must be one of ('gelu', 'gelu_exact', 'relu', 'geglu', "
            "'swiglu'), got 'tanh'",
        ),
        (
            {"sparse_weights": (("mlp/.*", NMPattern()), ("mlp/gate", NMPattern()))},
            "model.sparse_weights must match some of ('attention/qkv', 'attention/out', "
            "'mlp/up', 'mlp/down', 'embedding'), but 'mlp/gate' matches none",
        ),
        (
            {"sparse_weights": (("mlp/(", NMPattern()),)},
            "model.sparse_weights must be regular expressions, but 'mlp/(': "
            "missing ), unterminated subpattern at position 4",
        ),
        ({"max_length": 48}, "block_kv=32 must divide the sequence length, got length=48"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named(settings, message):
    with pytest.raises(ValueError) as error:
        TransformerConfig(**GOOD | settings)
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["block_q", "block_kv"])
def test_a_block_holds_a_position(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {name}=0"):
        BlockPattern(**{"block_q": 16, "block_kv": 16, name: 0})


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", NMPattern()),
        ("2:4 transposable", NMPattern(2, 4, transposable=True)),
        ("1:16", NMPattern(1, 16)),
    ],
)
def test_weight_patterns_are_read_as_they_are_written(text, pattern):
    assert NMPattern.parse(text) == pattern and str(pattern) == text
    assert NMPattern.parse(f" {text} ") == pattern


@pytest.mark.parametrize("text", ["", "2-4", "2:4 twice", "2:4transposable", "-1:4", "x2:4"])
def test_what_is_no_weight_pattern_is_refused(text):
    with pytest.raises(ValueError, match="a pattern must be like '2:4' or '2:4 transposable'"):
        NMPattern.parse(text)


@pytest.mark.parametrize("sizes", [(0, 4), (5, 4), (-1, 4), (2.0, 4), (True, 4)])
def test_a_weight_pattern_keeps_some_of_a_group(sizes):
    with pytest.raises(ValueError, match="n and m must be ints, 1 <= n <= m, got n="):
        NMPattern(*sizes)
    with pytest.raises(ValueError, match="transposable must be a bool, got 'yes'"):
        NMPattern(2, 4, "yes")  # type: ignore
