"""vmap of a launch: one call whose examples are those of all that it batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.triton.batching import fold_vmap, repeat_shared


def _add(x, y):
    x, y = repeat_shared((x, y))
    return x + y


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
@pytest.mark.parametrize("examples", [(3, 3), (3, 1), (1, 3), (1, 1)])
def test_examples_meet_their_own_whatever_is_batched(axes, examples):
    rng = np.random.default_rng(0)
    arrays = [
        rng.random((2, n, 4) if axis == 0 else (n, 4)).astype(np.float32)
        for axis, n in zip(axes, examples, strict=True)
    ]
    shapes = []

    def add(x, y):
        shapes.append((x.shape, y.shape))
        return _add(x, y)

    got = jax.vmap(fold_vmap(add), in_axes=axes)(*arrays)
    expected = jax.vmap(lambda x, y: x + y, in_axes=axes)(*arrays)
    np.testing.assert_array_equal(got, expected)
    # What all examples share is handed on once.
    for axis, n, shape in zip(axes, examples, shapes[-1], strict=True):
        assert shape[0] == (1 if (axis is None and n == 1) else 2 * max(examples))


def test_two_axes_are_folded_one_after_the_other():
    x, y = jnp.arange(24.0).reshape(2, 3, 4, 1), jnp.arange(3.0).reshape(3, 1, 1)
    got = jax.vmap(jax.vmap(fold_vmap(_add)), in_axes=(0, None))(x, y)
    np.testing.assert_array_equal(got, x + y)
