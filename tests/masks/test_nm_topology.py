"""Drop and grow within groups of n in m, against a search by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import drop_and_grow_nm, magnitude_nm_mask

K, N = 24, 10


def make_case(n, m, seed=0):
    rng = np.random.default_rng(seed)
    weight, grad, start = (jnp.float32(rng.normal(size=(K, N))) for _ in range(3))
    return magnitude_nm_mask(start, n=n, m=m, axis=0), weight, grad


def drop_by_hand(mask, weight, num_drop):
    kept = np.array(mask).ravel()
    kept[np.argsort(np.where(kept, np.abs(weight).ravel(), np.inf))[:num_drop]] = False
    return kept.reshape(mask.shape)


@pytest.mark.parametrize(
    ("n", "m"), [(2, 4), *(pytest.param(*p, marks=pytest.mark.ci) for p in ((1, 4), (3, 6)))]
)
@pytest.mark.parametrize("num_drop", [0, 7, 1000])
def test_every_group_grows_its_largest_gradients(n, m, num_drop):
    mask, weight, grad = make_case(n, m)
    got = drop_and_grow_nm(mask, n=n, m=m, weight=weight, grad=grad, num_drop=num_drop)
    kept = drop_by_hand(mask, weight, num_drop)
    for start in range(0, K, m):
        for column in range(N):
            group = kept[start : start + m, column].copy()
            size = np.where(group, -1, np.abs(grad)[start : start + m, column])
            group[np.argsort(size)[::-1][: n - group.sum()]] = True
            np.testing.assert_array_equal(got[start : start + m, column], group)
    if num_drop == 0:
        np.testing.assert_array_equal(got, mask)


@pytest.mark.ci
@pytest.mark.parametrize(("growth", "at_random"), [("random", 16), ("mixed", 4)])
def test_the_random_share_ignores_gradients(growth, at_random):
    mask, weight, _ = make_case(2, 4)
    kept = drop_by_hand(mask, weight, 16)
    # Only what is grown at random can miss the one place with a gradient.
    hits = []
    for seed in range(20):
        key = jax.random.key(seed)
        place = np.random.default_rng(seed).permuted(np.arange(K).reshape(-1, 4), axis=1)[:, 0]
        grad = jnp.zeros((K, N)).at[place].set(1.0)
        got = drop_and_grow_nm(
            mask, n=2, m=4, weight=weight, grad=grad, num_drop=16, growth=growth, key=key
        )
        assert (np.asarray(got).reshape(-1, 4, N).sum(1) == 2).all()
        grown = np.asarray(got) & ~kept
        assert grown.sum() == 16
        hits.append(grown[np.asarray(grad) > 0].sum())
    lacking = 2 - kept.reshape(-1, 4, N).sum(1)
    free = np.minimum(lacking, 1).sum()
    if growth == "mixed":
        assert min(hits) >= (free * (16 - at_random)) // 32, "three of four go by gradient"
    assert len(set(hits)) > 1, "draws differ"
    again = [
        drop_and_grow_nm(
            mask, n=2, m=4, weight=weight, grad=weight, num_drop=16, growth=growth, key=key
        )
        for key in (jax.random.key(1), jax.random.key(1), jax.random.key(2))
    ]
    np.testing.assert_array_equal(again[0], again[1])
    assert (np.asarray(again[0]) != np.asarray(again[2])).any()


@pytest.mark.ci
def test_mixed_growth_takes_one_of_four_at_random():
    mask, weight, _ = make_case(2, 4)
    kept = drop_by_hand(mask, weight, 1000)
    assert not kept.any()
    # Groups are empty: 120 places, of which 30 are drawn. Gradients favour the first two of four.
    grad = jnp.tile(jnp.array([2.0, 1, 0, 0])[:, None], (K // 4, N))
    got = drop_and_grow_nm(
        mask,
        n=2,
        m=4,
        weight=weight,
        grad=grad,
        num_drop=1000,
        growth="mixed",
        key=jax.random.key(0),
    )
    favoured = np.asarray(got)[np.asarray(grad) > 0].sum()
    assert 90 <= favoured < 115, "90 by gradient, and those that the draw gives by chance"


@pytest.mark.ci
def test_a_traced_number_does_not_recompile():
    mask, weight, grad = make_case(2, 4)
    traces = []

    @jax.jit
    def change(num_drop):
        traces.append(num_drop)
        return drop_and_grow_nm(mask, n=2, m=4, weight=weight, grad=grad, num_drop=num_drop)

    changed = [int((change(jnp.int32(count)) != mask).sum()) for count in (0, 5, 50)]
    assert changed[0] == 0 < changed[1] < changed[2] and len(traces) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"growth": "best"}, "growth must be 'gradient', 'random' or 'mixed', got growth='best'"),
        ({"m": 5}, "K a multiple of m .* m=5"),
        ({"n": 5}, "1 <= n <= m, got .*n=5, m=4"),
        ({"grad": None}, r"grad must have the shape of the mask, \(24, 10\), got None"),
        ({"growth": "mixed"}, "key must be given for growth='mixed', got key=None"),
        ({"num_drop": 1.5}, "num_drop must be an integer scalar"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    mask, weight, grad = make_case(2, 4)
    options = {"n": 2, "m": 4, "weight": weight, "grad": grad, "num_drop": 3} | changes
    with pytest.raises(ValueError, match=message):
        drop_and_grow_nm(mask, **options)
