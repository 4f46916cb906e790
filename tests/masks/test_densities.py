"""Densities of layers: known values of GPT-2, the total they add up to, and inside a program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import layer_densities, layer_densities_at

BLOCKS = {
    "qkv": (12, 768, 2304),
    "output": (12, 768, 768),
    "up": (12, 768, 3072),
    "down": (12, 3072, 768),
}
GPT2 = BLOCKS | {"head": (50304, 768)}
# Small layers become dense one after the other.
UNEQUAL = {"tiny": (8, 8), "small": (3, 32, 16), "middle": (128, 64), "large": (512, 512)}


def total_density(shapes, densities):
    sizes = {name: np.prod(shape) for name, shape in shapes.items()}
    return sum(sizes[name] * densities[name] for name in shapes) / sum(sizes.values())


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [(GPT2, [0.108, 0.162, 0.101, 0.101, 0.082]), (BLOCKS, [0.100, 0.150, 0.094, 0.094])],
)
def test_densities_of_gpt2_small(shapes, expected):
    densities = layer_densities(shapes, density=0.1)
    assert list(densities) == list(shapes)
    np.testing.assert_allclose(list(densities.values()), expected, atol=5e-4)


@pytest.mark.parametrize("method", ["erdos_renyi", "uniform"])
@pytest.mark.parametrize("density", [1e-4, 0.013, 0.1, 0.37, 0.8, 0.999, 1.0])
def test_all_layers_together_have_the_density_asked_for(method, density):
    for shapes in (GPT2, UNEQUAL):
        densities = layer_densities(shapes, density=density, method=method)
        assert all(0 < value <= 1 for value in densities.values())
        np.testing.assert_allclose(total_density(shapes, densities), density, rtol=1e-12)


def test_layers_beyond_dense_are_dense_and_the_rest_is_solved_again():
    densities = layer_densities(UNEQUAL, density=0.1)
    assert densities["tiny"] == densities["small"] == 1
    rest = {name: UNEQUAL[name] for name in ("middle", "large")}
    entries = sum(np.prod(shape) for shape in rest.values())
    left = 0.1 * sum(np.prod(shape) for shape in UNEQUAL.values()) - 8 * 8 - 3 * 32 * 16
    for name, value in layer_densities(rest, density=left / entries).items():
        np.testing.assert_allclose(densities[name], value, rtol=1e-12)
    # Both follow (K + N) / (K N).
    expected = (192 / (128 * 64)) / (1024 / 512**2)
    np.testing.assert_allclose(densities["middle"] / densities["large"], expected)


def test_a_stacked_layer_counts_as_often_as_it_is_stacked():
    apart = {f"up_{index}": (768, 3072) for index in range(12)} | {"head": (50304, 768)}
    together = layer_densities({"up": (12, 768, 3072), "head": (50304, 768)}, density=0.1)
    densities = layer_densities(apart, density=0.1)
    np.testing.assert_allclose(densities["up_7"], together["up"])
    np.testing.assert_allclose(densities["head"], together["head"])


def test_uniform_is_uniform():
    assert set(layer_densities(GPT2, density=0.3, method="uniform").values()) == {0.3}


@pytest.mark.ci
@pytest.mark.parametrize("method", ["erdos_renyi", "uniform"])
@pytest.mark.parametrize("shapes", [GPT2, UNEQUAL])
def test_traced_densities_are_the_static_ones(shapes, method):
    traces = []

    @jax.jit
    def compute(density):
        traces.append(density)
        return layer_densities_at(density, shapes, method=method)

    for density in (0.001, 0.01, 0.02, 0.1, 0.25, 0.5, 0.9, 0.999):
        densities = compute(jnp.float32(density))
        for name, value in layer_densities(shapes, density=density, method=method).items():
            np.testing.assert_allclose(densities[name], value, atol=1e-6)
    for limit, asked in ((0, 0.0), (0, -0.5), (1, 1.0), (1, 1.5)):
        assert set(map(float, compute(jnp.float32(asked)).values())) == {limit}
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({}, {}, "at least one layer"),
        ({"head": (50304,)}, {}, r"'head': \(50304,\)"),
        ({"head": (8, 0)}, {}, r"'head': \(8, 0\)"),
        (GPT2, {"method": "balanced"}, "method='balanced'"),
        (GPT2, {"density": 0.0}, "density=0.0"),
        (GPT2, {"density": float("nan")}, "density=nan"),
    ],
)
def test_bad_input_is_named(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        layer_densities(shapes, **({"density": 0.5} | options))
