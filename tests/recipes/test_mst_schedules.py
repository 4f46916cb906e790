"""MST's schedules: when sparsity climbs, rests and returns, and what the defaults cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import hybrid_mask
from sparsejax.recipes import mst_schedules


@pytest.mark.ci
def test_schedules_are_functions_of_a_traced_step():
    mst = mst_schedules(1000, update_interval_fraction=0.01)
    traces = []

    @jax.jit
    def read(step):
        traces.append(step)
        return mst.sparsity.density(step), mst.annealing.fraction(step), mst.updates.due(step)

    steps = jnp.arange(0, 1000, 37)
    expected = read(steps)
    for index, step in enumerate(steps):
        for value, values in zip(read(step), expected, strict=True):
            assert value.shape == () and value == values[index]
    assert len(traces) == 2
    assert mst.sparsity.density(5) == 1


def test_mst_climbs_in_stairs_rests_and_is_dense_after_its_last_update():
    mst = mst_schedules(600_000, update_interval_fraction=1 / 6000)
    assert mst.sparse_attention == (60_000, 522_000)
    assert mst.updates.last_step == 599_900
    step = jnp.array([0, 5_999, 6_000, 59_999, 60_000, 522_000, 560_950, 599_900])
    density = mst.sparsity.density(step)
    np.testing.assert_allclose(density, [1, 1, 0.91, 0.19, 0.1, 0.1, 0.55, 1], rtol=1e-5)
    assert density[-1] == 1
    # A run that goes on stays as it is.
    assert mst.sparsity.density(700_000) == 1
    assert not mst.updates.due(jnp.arange(600_000, 800_000, 100)).any()
    fraction = mst.annealing.fraction(jnp.array([0, 30_000, 60_000, 291_000, 522_000, 561_000]))
    np.testing.assert_allclose(fraction, [0.3, 0.15, 0.3, 0.15, 0.3, 0.15], rtol=1e-5)


@pytest.mark.ci
@pytest.mark.parametrize(("stairs", "low", "high"), [(10, 0.235, 0.236), (None, 0.231, 0.232)])
def test_mst_costs_a_quarter_of_dense_training_of_gpt2_small(stairs, low, high):
    num_steps, num_layers, width, length = 600_000, 12, 768, 1024
    mst = mst_schedules(num_steps, stairs=stairs, update_interval_fraction=1 / 6000)
    # Forward FLOPs of a token; backward they double, dense and sparse alike.
    weights = 2 * (num_layers * 12 * width**2 + 50304 * width)
    attention = num_layers * 4 * length * width
    # A mask keeps what it has until the next update.
    density = np.mean(mst.sparsity.density(jnp.arange(0, num_steps, mst.updates.interval)))
    start, end = mst.sparse_attention
    window = (end - start) / num_steps
    pairs = length * (length + 1) / 2
    kept = window * hybrid_mask(length, stride=128).sum() / pairs + 1 - window
    cost = (weights * density + attention * kept) / (weights + attention)
    assert low < cost < high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mst_schedules(1000, warmup=0.5, restoration=0.5), "warmup=0.5, restoration=0.5"),
        (lambda: mst_schedules(1000, warmup=0.0), "warmup=0.0"),
        (
            lambda: mst_schedules(1000, update_interval_fraction=0.5),
            "restoration=0.13 must reach an update .* got 130 steps .* every 500 steps",
        ),
        # The last update is the first step of the restoration.
        (
            lambda: mst_schedules(1000, restoration=0.02, update_interval_fraction=0.02),
            "restoration=0.02 must reach an update .* got 20 steps .* every 20 steps",
        ),
        (
            lambda: mst_schedules(2),
            "leave an ultra-sparse phase in 2 steps, got 1 step of warm-up and 2 of",
        ),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
