"""The slots of a ring. What is copied, waited for and given back is proven with the kernels."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hopper.ring import Ring


def _make_ring(**options):
    return Ring(smem={}, full=None, free=None, stages=3, **options)


@pytest.mark.parametrize("number", [0, 1])
def test_slots_follow_one_another_in_each_of_two_rings_that_lie_side_by_side(number):
    ring = _make_ring().beside(number)
    slots = [int(ring.find_slot(jnp.int32(step))) for step in range(7)]
    assert slots == [3 * number + i for i in (0, 1, 2, 0, 1, 2, 0)]
    for slot, following in itertools.pairwise(slots):
        assert ring.next_slot(slot) == following
        assert ring.previous_slot(following) == slot


def test_staggered_programs_begin_with_slots_of_their_own():
    def find_slots(program):
        del program
        return _make_ring(is_staggered=True).find_slot(jnp.arange(2, dtype=jnp.int32))

    slots = jax.vmap(find_slots, axis_name="program")(jnp.arange(4))
    np.testing.assert_array_equal(slots, [[0, 1], [1, 2], [2, 0], [0, 1]])
