"""SPION's pooling and top-k told plainly, and its pattern as pooling and selection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import pool_attention, spion_pattern, top_k_blocks
from tests.masks.flood_oracles import flood_fill_oracle, flood_oracle


def pool_oracle(attention, *, block_size, filter_size, causal=False):
    length = len(attention)
    attention = np.tril(attention) if causal else attention
    convolved = np.zeros((length, length))
    for t in range(length):
        for s in range(length):
            for k in range(-(filter_size // 2), filter_size // 2 + 1):
                if 0 <= t + k < length and 0 <= s + k < length:
                    convolved[t, s] += attention[t + k, s + k]
    blocks = range(0, length, block_size)
    return np.array(
        [[convolved[i : i + block_size, j : j + block_size].mean() for j in blocks] for i in blocks]
    )


def top_k_oracle(pooled, *, density, causal=False):
    size = len(pooled)
    visible = np.tril(np.ones((size, size), bool)) if causal else np.ones((size, size), bool)
    largest_first = sorted(zip(*np.nonzero(visible), strict=True), key=lambda ij: -pooled[ij])
    kept = np.eye(size, dtype=bool)
    for block in largest_first[: int(np.floor(visible.sum() * density - size))]:
        kept[block] = True
    return kept


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "filter_size", [5, *(pytest.param(n, marks=pytest.mark.ci) for n in (1, 8 * 2 - 1, 31))]
)
def test_pooling_equals_the_double_loop(filter_size, causal):
    attention = np.random.default_rng(1).random((24, 24), np.float32)
    pooled = pool_attention(
        jnp.array(attention), block_size=4, filter_size=filter_size, causal=causal
    )
    expected = pool_oracle(attention, block_size=4, filter_size=filter_size, causal=causal)
    np.testing.assert_allclose(pooled, expected, rtol=1e-6)


def test_pooling_without_filter_is_the_block_mean():
    attention = np.random.default_rng(2).random((2, 12, 12), np.float32)
    pooled = pool_attention(jnp.array(attention), block_size=3, filter_size=None)
    np.testing.assert_allclose(pooled, attention.reshape(2, 4, 3, 4, 3).mean((2, 4)), rtol=1e-6)


@pytest.mark.ci
def test_pooling_needs_little_memory_beside_the_map():
    attention = jax.ShapeDtypeStruct((2, 1024, 1024), jnp.float32)
    compiled = pool_attention.lower(attention, block_size=64, filter_size=31).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * 2 * 1024**2 * 4


@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.ci), True])
@pytest.mark.parametrize(
    "variant", ["cf", *(pytest.param(v, marks=pytest.mark.ci) for v in ("c", "f"))]
)
def test_pattern_is_pooling_then_selection(variant, causal):
    logits = np.random.default_rng(3).normal(size=(3, 48, 48)).astype(np.float32)
    attention = np.array(jax.nn.softmax(2 * logits, axis=-1))
    density = 0.4 if variant == "c" else None
    kept = spion_pattern(
        jnp.array(attention),
        block_size=6,
        quantile=0.8,
        filter_size=5,
        variant=variant,
        density=density,
        causal=causal,
    )
    assert kept.shape == (3, 8, 8) and kept.dtype == jnp.bool_
    for layer in range(3):
        pooled = pool_oracle(
            attention[layer], block_size=6, filter_size=1 if variant == "f" else 5, causal=causal
        )
        if density is None:
            expected = flood_fill_oracle(pooled, quantile=0.8, causal=causal)
            if causal:
                threshold = np.quantile(pooled[np.tril_indices(8)], 0.8)
                expected = flood_oracle(pooled, threshold=threshold, causal=True)
        else:
            expected = top_k_oracle(pooled, density=density, causal=causal)
        np.testing.assert_array_equal(kept[layer], expected)
    if causal:
        assert not np.triu(kept, 1).any()


@pytest.mark.ci
@pytest.mark.parametrize("variant", ["cf", "c"])
def test_layers_are_independent_and_compilation_changes_nothing(variant):
    options = dict(block_size=3, quantile=0.6, filter_size=3, variant=variant)
    options |= {"density": 0.5} if variant == "c" else {}
    attention = jnp.array(np.random.default_rng(4).random((3, 12, 12), np.float32))
    kept = spion_pattern(attention, **options)
    order = np.array([2, 0, 1])
    np.testing.assert_array_equal(spion_pattern(attention[order], **options), kept[order])
    with jax.disable_jit():
        np.testing.assert_array_equal(spion_pattern(attention, **options), kept)


@pytest.mark.parametrize("variant", ["cf", "c"])
def test_a_layer_with_a_nan_keeps_its_diagonal_alone(variant):
    attention = np.random.default_rng(5).random((2, 20, 20), np.float32)
    options = dict(block_size=4, quantile=0.6, filter_size=3, variant=variant)
    options |= {"density": 0.5} if variant == "c" else {}
    healthy = np.array(spion_pattern(jnp.array(attention), **options))
    attention[0, 7, 3] = np.nan
    kept = np.array(spion_pattern(jnp.array(attention), **options))
    np.testing.assert_array_equal(kept[0], np.eye(5, dtype=bool))
    np.testing.assert_array_equal(kept[1], healthy[1])


@pytest.mark.ci
def test_half_precision_maps_are_accumulated_in_f32():
    attention = jnp.array(np.random.default_rng(6).random((24, 24)), jnp.bfloat16)
    options = dict(block_size=4, filter_size=5)
    pooled = pool_attention(attention, **options)
    assert pooled.dtype == jnp.float32
    np.testing.assert_array_equal(pooled, pool_attention(attention.astype("float32"), **options))


@pytest.mark.parametrize(
    "density", [0.5, *(pytest.param(d, marks=pytest.mark.ci) for d in (1 / 7, 1.0))]
)
@pytest.mark.parametrize("causal", [False, True])
def test_top_k_takes_the_largest_beside_the_diagonal(density, causal):
    density = max(density, 7 / 28) if causal else density
    pooled = np.random.default_rng(7).random((7, 7), np.float32)
    kept = top_k_blocks(jnp.array(pooled), density=density, causal=causal)
    np.testing.assert_array_equal(kept, top_k_oracle(pooled, density=density, causal=causal))


@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.ci), True])
def test_exact_top_k_keeps_as_many_blocks_of_every_head(causal):
    pooled = np.random.default_rng(7).random((2, 3, 7, 7), np.float32)
    kept = np.array(top_k_blocks(jnp.array(pooled), density=0.5, causal=causal, exact=True))
    count = 14 if causal else 25
    np.testing.assert_array_equal(kept.sum((2, 3)), count)
    beside = np.where(np.eye(7, dtype=bool), -1, np.tril(pooled) if causal else pooled)
    for values, chosen in zip(beside.reshape(6, -1), kept.reshape(6, -1), strict=True):
        assert chosen[np.argsort(-values)[: count - 7]].all()
    assert kept.diagonal(axis1=2, axis2=3).all() and not (causal and np.triu(kept, 1).any())


SQUARE = jnp.ones((8, 8))


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        (SQUARE, {"quantile": 1.0}, "quantile=1.0"),
        (SQUARE, {"quantile": float("nan")}, "quantile=nan"),
        (SQUARE, {"quantile": 1.0, "variant": "c", "density": 0.5}, "quantile=1.0"),
        (SQUARE, {"block_size": 3}, "block_size=3 for length=8"),
        (SQUARE, {"block_size": 0}, "block_size=0"),
        (SQUARE, {"filter_size": 4}, "filter_size=4"),
        (SQUARE, {"variant": "fc"}, "variant='fc'"),
        (SQUARE, {"variant": "c"}, "density=None"),
        (SQUARE, {"density": 0.5}, "quantile=0.9 and density=0.5"),
        (SQUARE, {"quantile": None}, "quantile=None and density=None"),
        (SQUARE, {"quantile": None, "density": 0.2}, "density=0.2"),
        (SQUARE, {"walk": "drunken"}, "walk='drunken'"),
        (SQUARE, {"variant": "c", "density": 0.2}, "density=0.2"),
        (SQUARE, {"variant": "c", "density": float("nan")}, "density=nan"),
        (jnp.ones((8, 4)), {}, r"attention.shape=\(8, 4\)"),
        (jnp.ones((8, 8), int), {}, "attention.dtype=int32"),
    ],
)
def test_bad_input_is_named(attention, options, message):
    with pytest.raises(ValueError, match=message):
        spion_pattern(attention, **{"block_size": 2, "quantile": 0.9} | options)
