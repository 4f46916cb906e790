"""Schedules of the topology: hand values at every edge."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import (
    AnnealingPhase,
    CosineAnnealing,
    Ramp,
    SparsitySchedule,
    UpdateSteps,
)


def make_ramp(**changes):
    return Ramp(**({"start_step": 10, "end_step": 30, "sparsity": 0.8} | changes))


def make_schedule(*ramps, **changes):
    return SparsitySchedule(**({"num_steps": 100, "ramps": ramps} | changes))


def test_a_linear_ramp_starts_where_the_density_is_and_ends_exactly():
    schedule = make_schedule(make_ramp(), initial_sparsity=0.2)
    density = schedule.density(jnp.array([0, 9, 10, 15, 20, 29, 30, 31, 99]))
    assert density.dtype == jnp.float32
    np.testing.assert_allclose(density[:6], [0.8, 0.8, 0.8, 0.65, 0.5, 0.23], rtol=1e-6)
    np.testing.assert_array_equal(density[6:], np.float32(1 - 0.8))


def test_a_cubic_ramp_is_that_of_gradual_magnitude_pruning():
    schedule = make_schedule(make_ramp(shape="cubic"), initial_sparsity=0.1)
    step = np.arange(10, 31)
    sparsity = 0.8 + (0.1 - 0.8) * (1 - (step - 10) / 20) ** 3
    np.testing.assert_allclose(schedule.density(jnp.array(step)), 1 - sparsity, rtol=2e-6)


def test_stairs_jump_after_equal_stretches_and_the_last_at_the_end():
    schedule = make_schedule(make_ramp(stairs=4))
    step = np.arange(0, 40)
    stair = np.clip((step - 10) // 5, 0, 4)
    np.testing.assert_allclose(schedule.density(jnp.array(step)), 1 - 0.2 * stair, rtol=1e-6)
    cubic = make_schedule(make_ramp(stairs=4, shape="cubic")).density(jnp.array(step))
    np.testing.assert_allclose(cubic, 0.2 + 0.8 * (1 - stair / 4) ** 3, rtol=1e-6)


def test_stairs_that_do_not_divide_the_ramp_jump_at_the_next_step():
    schedule = make_schedule(make_ramp(stairs=7))
    step = np.arange(10, 31)
    stair = (step - 10) * 7 // 20
    np.testing.assert_allclose(schedule.density(jnp.array(step)), 1 - 0.8 * stair / 7, rtol=1e-6)


def test_stairs_are_exact_at_large_steps():
    # f32 would put the last jump a step early: (2^24 + 2) / (2^24 + 3) rounds to 1.
    long = Ramp(start_step=0, end_step=2**24 + 3, sparsity=0.9, stairs=2)
    schedule = SparsitySchedule(num_steps=2**25, ramps=(long,))
    density = schedule.density(jnp.array([2**23 + 1, 2**23 + 2, 2**24 + 2, 2**24 + 3]))
    np.testing.assert_allclose(density, [1, 0.55, 0.55, 0.1], rtol=1e-6)


def test_ramps_follow_each_other_with_rests_between():
    back = make_ramp(start_step=50, end_step=90, sparsity=0.0)
    schedule = make_schedule(make_ramp(stairs=2), back)
    density = schedule.density(jnp.array([[0, 19, 20], [30, 50, 70], [89, 90, 99]]))
    expected = [[1, 1, 0.6], [0.2, 0.2, 0.6], [0.98, 1, 1]]
    np.testing.assert_allclose(density, expected, rtol=1e-6)
    assert density[2, 1] == density[2, 2] == 1


def test_a_schedule_without_ramps_is_constant():
    schedule = make_schedule(initial_sparsity=0.9)
    np.testing.assert_array_equal(schedule.density(jnp.array([0, 99])), np.float32(1 - 0.9))


def test_each_phase_anneals_its_own_fraction():
    first = AnnealingPhase(start_step=0, end_step=10, fraction=0.4)
    second = AnnealingPhase(start_step=20, end_step=60, fraction=0.2, coefficient=0.5)
    annealing = CosineAnnealing(num_steps=100, phases=(first, second))
    fraction = annealing.fraction(jnp.array([0, 5, 9, 10, 19, 20, 40, 59, 60]))
    expected = [
        0.4,
        0.2,
        0.2 * (1 + np.cos(0.9 * np.pi)),
        0,
        0,
        0.2,
        0.1 * (1 + np.cos(0.25 * np.pi)),
        0.1 * (1 + np.cos(0.5 * np.pi * 39 / 40)),
        0,
    ]
    np.testing.assert_allclose(fraction, expected, atol=1e-7)


def test_a_coefficient_of_zero_is_constant():
    constant = AnnealingPhase(start_step=0, end_step=100, fraction=0.3, coefficient=0.0)
    annealing = CosineAnnealing(num_steps=100, phases=(constant,))
    np.testing.assert_array_equal(annealing.fraction(jnp.arange(100)), np.float32(0.3))


def test_updates_are_multiples_of_the_interval_before_the_end():
    updates = UpdateSteps(interval=10, end_step=40)
    assert np.flatnonzero(updates.due(jnp.arange(60))).tolist() == [10, 20, 30]
    assert updates.last_step == 30
    updates = UpdateSteps(interval=10, end_step=41, start_step=0)
    assert np.flatnonzero(updates.due(jnp.arange(60))).tolist() == [0, 10, 20, 30, 40]
    assert updates.last_step == 40
    updates = UpdateSteps(interval=10, end_step=41, start_step=21)
    assert np.flatnonzero(updates.due(jnp.arange(60))).tolist() == [30, 40]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_ramp(start_step=-1), "start_step=-1"),
        (lambda: make_ramp(end_step=30.0), "end_step=30.0"),
        (lambda: make_ramp(end_step=10), "start_step=10, end_step=10"),
        (lambda: make_ramp(sparsity=1.0), r"\[0, 1\), as 1 would empty .* sparsity=1.0"),
        (lambda: make_ramp(shape="square"), "shape='square'"),
        (lambda: make_ramp(stairs=0), "stairs=0"),
        (lambda: make_ramp(stairs=21), "stairs=21 from step 10 to 30"),
        (lambda: make_schedule(num_steps=0), "num_steps=0"),
        (lambda: make_schedule(initial_sparsity=1.0), "initial_sparsity=1.0"),
        (lambda: make_schedule(make_ramp(), num_steps=29), r"run of 29, got \[10, 30\)"),
        (
            lambda: make_schedule(make_ramp(), make_ramp(start_step=29, end_step=40)),
            r"ramps must be in order and not overlap, got \[29, 40\) after one that ends at 30",
        ),
        (lambda: AnnealingPhase(start_step=5, end_step=5), "start_step=5, end_step=5"),
        (lambda: AnnealingPhase(start_step=0, end_step=5, fraction=1.1), "fraction=1.1"),
        (lambda: AnnealingPhase(start_step=0, end_step=5, coefficient=-1), "coefficient=-1"),
        (
            lambda: CosineAnnealing(
                num_steps=4, phases=(AnnealingPhase(start_step=0, end_step=5),)
            ),
            r"phases must lie within the run of 4, got \[0, 5\)",
        ),
        (lambda: CosineAnnealing(num_steps=0, phases=()), "num_steps=0"),
        (lambda: UpdateSteps(interval=0, end_step=5), "interval=0"),
        (lambda: UpdateSteps(interval=5, end_step=0), "end_step=0"),
        (lambda: UpdateSteps(interval=10, end_step=10), "interval=10 .* end_step=10"),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
