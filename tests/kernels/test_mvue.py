"""The estimators that prune gradients: unbiased, of the stated variance, two of four always."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nm_matmul.prune import prune_mvue

VARIANTS = pytest.mark.parametrize("exact", [False, True], ids=["approximate", "exact"])

# One group each: what sampling could get wrong.
GROUPS = {
    "ordinary": [0.5, -1.5, 1.0, -0.25],
    "one dominates": [0.1, 0.2, -8.0, 0.3],
    "just dominates": [1.0, 2.0, 3.0, 6.0],
    "small one matters": [1.0, 2.0, 3.0, 5.5],
    "ties": [1.0, -1.0, 1.0, 1.0],
    "ties of two": [2.0, 1.0, -2.0, 1.0],
    "two nonzero": [0.0, 3.0, 0.0, -1.0],
    "three nonzero": [1.0, 0.0, -2.0, 2.5],
    "wide range": [1e-3, 1.0, 1e-6, -1.0],
}


@functools.cache
def _jit(axis, exact):
    return jax.jit(functools.partial(prune_mvue, axis=axis, exact=exact))


def _inclusion(group, exact):
    """Probability of being kept, in f64, by the published closed forms."""
    a = np.abs(np.asarray(group, np.float64))
    total = a.sum()
    if exact:
        largest, rest = a.argmax(), total - a.max()
        if a[largest] >= rest:
            return np.where(np.arange(4) == largest, 1, a / (rest or 1))
        return 2 * a / total
    a = a + 2.0**-23 * total
    t = a / a.sum()
    k = t / (1 - t)
    return t * (1 + k.sum() - k)


@functools.cache
def _draw(exact, num_keys=20_000):
    """Prune every group under many keys: pruned and mask [key, group, 4]."""
    x = jnp.array(list(GROUPS.values()))
    prune = jax.jit(jax.vmap(functools.partial(prune_mvue, axis=-1, exact=exact), (None, 0)))
    pruned, mask = prune(x, jax.random.split(jax.random.key(0), num_keys))
    return np.asarray(pruned), np.asarray(mask)


@VARIANTS
@pytest.mark.parametrize("name", GROUPS)
def test_mean_is_what_was_pruned(name, exact):
    index = list(GROUPS).index(name)
    group, inclusion = np.array(GROUPS[name]), _inclusion(GROUPS[name], exact)
    pruned, mask = (a[:, index] for a in _draw(exact))
    assert (mask.sum(axis=-1) == 2).all()
    safe = np.maximum(inclusion, 1e-9)
    np.testing.assert_allclose(pruned, np.where(mask, group / safe, 0), rtol=2e-5, atol=1e-6)
    sigma = np.sqrt(np.maximum(inclusion * (1 - inclusion), 0) / len(mask))
    # 72 comparisons: beyond 4.5 sigma by chance once in 2000 suites, and the keys are fixed.
    assert (
        np.abs(mask.mean(axis=0) - inclusion)[group != 0] <= 4.5 * sigma[group != 0] + 1e-6
    ).all()
    assert (np.abs(pruned.mean(axis=0) - group) <= 4.5 * sigma * np.abs(group) / safe + 1e-5).all()


@VARIANTS
def test_pairs_have_their_probabilities(exact):
    """Marginals do not fix pairs: those of the approximate draw, and (1, 2) never in the exact."""
    group = np.abs(np.array(GROUPS["ordinary"]))
    _, mask = _draw(exact)
    mask = mask[:, list(GROUPS).index("ordinary")]
    pairs = (mask[:, :, None] & mask[:, None, :]).mean(axis=0)
    t = group / group.sum()
    expected = np.outer(t, t) * np.add.outer(1 / (1 - t), 1 / (1 - t))
    if exact:
        # Sorted .25 .5 1 1.5 at positions 3 0 2 1; here 2 a1 + a3 - a4 = 0.
        expected = np.zeros((4, 4))
        for i, j, p in ((3, 1, 0.5), (0, 2, 0.25), (0, 1, 0.75), (2, 1, 1.75)):
            expected[i, j] = expected[j, i] = p / group.sum()
    off = ~np.eye(4, dtype=bool)
    assert np.abs(pairs - expected)[off].max() < 4.5 * 0.5 / np.sqrt(len(mask))


@pytest.mark.ci
@pytest.mark.parametrize(("exact", "variance"), [(False, 2.011), (True, 1.895)])
def test_variance_on_gaussian_groups(exact, variance):
    """Numbers by f64 Monte Carlo over the closed forms, 16 million groups, error 0.0001."""
    num_groups = 400_000
    x = jax.random.normal(jax.random.key(1), (4, num_groups))
    prune = _jit(0, exact)
    squares = np.asarray(((prune(x, jax.random.key(2))[0] - x) ** 2).sum(axis=0), np.float64)
    deviation = squares.std() / np.sqrt(num_groups)
    assert deviation < 0.02 * variance
    assert abs(squares.mean() - variance) < 3 * deviation


@pytest.mark.ci
@VARIANTS
def test_empty_and_single_groups(exact):
    x = jnp.zeros((5, 4)).at[jnp.arange(4), jnp.arange(4)].set(jnp.array([3.0, -1.0, 1e-8, 1e20]))
    prune = jax.vmap(functools.partial(prune_mvue, axis=1, exact=exact), (None, 0))
    pruned, mask = jax.jit(prune)(x, jax.random.split(jax.random.key(0), 50))
    assert (mask.sum(axis=-1) == 2).all()
    np.testing.assert_allclose(pruned, np.broadcast_to(x, pruned.shape), rtol=1e-6)


@pytest.mark.ci
@VARIANTS
def test_the_scale_of_a_gradient_does_not_matter(exact):
    (x,) = np.random.default_rng(0).standard_normal((1, 64, 8)).astype(np.float32)
    key = jax.random.key(3)
    prune = _jit(0, exact)
    pruned, mask = prune(x, key)
    small, same = prune(x * np.float32(2.0**-40), key)
    np.testing.assert_array_equal(mask, same)
    np.testing.assert_array_equal(pruned * 2.0**-40, small)


@pytest.mark.ci
@VARIANTS
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_visible(exact, bad):
    x = jnp.where(jnp.eye(4, dtype=bool), bad, 1.0)
    pruned, mask = _jit(1, exact)(x, jax.random.key(0))
    assert (mask.sum(axis=1) == 2).all()
    assert not jnp.isfinite(pruned).all(axis=1).any()


@pytest.mark.ci
@VARIANTS
def test_axes_and_dtypes(exact):
    x = np.random.default_rng(0).standard_normal((3, 8, 5)).astype(np.float32)
    key = jax.random.key(0)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        low = jnp.asarray(x, dtype)
        pruned, mask = _jit(-2, exact)(low, key)
        assert pruned.dtype == dtype and mask.dtype == bool
        assert (mask.reshape(3, 2, 4, 5).sum(axis=2) == 2).all()
        assert not pruned[~mask].any()
        # Rounded once, at the end.
        full, _ = _jit(-2, exact)(low.astype(jnp.float32), key)
        np.testing.assert_array_equal(pruned, full.astype(dtype))


def test_an_axis_without_whole_groups_is_refused():
    with pytest.raises(ValueError, match=r"axis 0 of x must be a multiple of 4 .*\(6, 4\)"):
        prune_mvue(jnp.ones((6, 4)), jax.random.key(0), axis=-2)
