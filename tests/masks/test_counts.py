"""Counts of an update: against exact fractions, and feasible whatever is asked."""

import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import count_kept, update_counts

HEAD = 50304 * 768
LARGEST = 2**31 - 1

sizes = st.one_of(st.integers(1, 2000), st.integers(1, LARGEST), st.just(LARGEST))
# A CPU takes subnormal numbers for zero.
fractions = st.floats(0, 1, width=32, allow_subnormal=False)


def paper_counts(kept, size, density, fraction):
    """Return the released rule in exact arithmetic."""
    delta = math.floor((1 - density - (1 - Fraction(kept, size))) * size)
    num_drop = max(math.floor(kept * fraction), delta)
    return num_drop, num_drop - delta


@hypothesis.given(size=sizes, density=fractions)
def test_kept_is_within_one_of_the_exact_product(size, density):
    kept = int(count_kept(size, density))
    excess = kept - Fraction(density) * size
    # Densities below 2^-8 have digits beyond 2^-31.
    lost = 0 if density >= 2**-8 else Fraction(size, 2**31)
    assert -Fraction(1, 2) - lost <= excess < 1
    assert density == 0 or kept >= 1


def test_f32_is_too_coarse_and_not_used():
    # Odd counts above 2^24, and up to half an entry is forgiven.
    for size in (2**25 + 3, HEAD + 3, LARGEST):
        assert count_kept(size, 0.75) == math.ceil(Fraction(3, 4) * size - Fraction(1, 2))
        assert count_kept(size, 1.0) == size
        assert count_kept(size, 0.0) == 0


@hypothesis.given(size=st.integers(1, 2**20), percent=st.integers(0, 100))
def test_densities_that_f32_does_not_hold_keep_what_they_say(size, percent):
    # Half of the forgiven amount of large counts is where the two may differ.
    hypothesis.assume(size * percent % 100 == 0 or size < 2**13)
    expected = math.ceil(Fraction(percent, 100) * size)
    assert count_kept(size, percent / 100) == expected
    assert count_kept(size, 1 - np.float32(1 - percent / 100)) in (expected, expected + 1)


@hypothesis.given(size=st.integers(1, 2**22), data=st.data())
def test_a_measured_density_gives_its_count_back(size, data):
    kept = data.draw(st.integers(0, size))
    assert count_kept(size, np.float32(kept / size)) == kept


@pytest.mark.ci
def test_more_density_never_keeps_less():
    densities = jnp.sort(jax.random.uniform(jax.random.key(0), (5000,)))
    for size in (7, 1000, 2**19 + 1, HEAD, LARGEST):
        assert (jnp.diff(count_kept(size, densities)) >= 0).all()


@hypothesis.given(size=sizes, density=fractions, fraction=fractions, data=st.data())
def test_updates_are_feasible_and_reach_the_density_exactly(size, density, fraction, data):
    kept = data.draw(st.integers(0, size))
    counts = update_counts(jnp.int32(kept), size=size, density=density, update_fraction=fraction)
    num_drop, num_grow = (int(count) for count in counts)
    assert 0 <= num_drop <= kept
    assert 0 <= num_grow <= size - kept + num_drop
    assert kept - num_drop + num_grow == count_kept(size, density)
    delta = kept - int(count_kept(size, density))
    lost = 0 if fraction >= 2**-8 else Fraction(kept, 2**31)
    if num_drop != delta:
        assert -1 - lost < num_drop - Fraction(fraction) * kept <= Fraction(1, 2)
    if num_grow > 0 and delta > 0:
        assert num_drop > delta


@hypothesis.given(
    size=st.integers(1, 4000),
    percents=st.tuples(st.integers(0, 100), st.integers(0, 100)),
    data=st.data(),
)
def test_updates_are_those_of_the_paper(size, percents, data):
    kept = data.draw(st.integers(0, size))
    density, fraction = (Fraction(percent, 100) for percent in percents)
    counts = update_counts(
        jnp.int32(kept), size=size, density=float(density), update_fraction=float(fraction)
    )
    assert tuple(map(int, counts)) == paper_counts(kept, size, density, fraction)


def test_hand_values():
    def update(kept, density, fraction):
        counts = update_counts(
            jnp.int32(kept), size=1000, density=density, update_fraction=fraction
        )
        return tuple(map(int, counts))

    assert update(500, 0.5, 0.3) == (150, 150)  # steady
    assert update(500, 0.5, 0.0) == (0, 0)  # annealed
    assert update(500, 0.4, 0.3) == (150, 50)  # sparser: grows less
    assert update(500, 0.1, 0.3) == (400, 0)  # much sparser: only drops
    assert update(100, 0.3, 0.3) == (30, 230)  # restoration
    assert update(1000, 1.0, 0.3) == (300, 300)  # dense
    assert update(700, 0.7, 0.7) == (490, 490)  # 0.7 as f32 is below seven tenths


def test_out_of_range_fractions_are_clamped():
    assert count_kept(10, 1.5) == 10 and count_kept(10, -0.5) == 0
    counts = update_counts(jnp.int32(4), size=10, density=2.0, update_fraction=7.0)
    assert tuple(map(int, counts)) == (4, 10)


def test_layers_at_once_without_recompiling():
    traces = []

    @jax.jit
    def update(kept, density, fraction):
        traces.append(density)
        return update_counts(kept, size=HEAD, density=density, update_fraction=fraction)

    kept = jnp.array([10**6, 3 * 10**6])
    for density in (0.05, 0.082):
        num_drop, num_grow = update(kept, jnp.float32(density), jnp.float32(0.25))
        np.testing.assert_array_equal(kept - num_drop + num_grow, count_kept(HEAD, density))
    np.testing.assert_array_equal(num_drop, [250_000, 750_000])
    assert len(traces) == 1


@pytest.mark.parametrize("size", [0, -1, 2**31])
def test_bad_sizes_are_named(size):
    with pytest.raises(ValueError, match=f"size must be from 1 to 2147483647, got size={size}"):
        count_kept(size, 0.5)


def test_counts_must_be_integers():
    with pytest.raises(ValueError, match="kept.dtype=float32"):
        update_counts(jnp.float32(3), size=10, density=0.5, update_fraction=0.5)
