"""What may be drawn, and how often, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.generation.sampling import Sampling, draw_tokens, keep_nucleus

LOGITS = np.random.default_rng(0).normal(0, 2, (5, 40)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(0), len(LOGITS))


def _softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _find_nucleus(probabilities, top_p):
    """Take the likeliest, one after the other, until their sum is enough."""
    kept, total = set(), 0.0
    for token in np.argsort(-probabilities, kind="stable"):
        kept.add(int(token))
        total += probabilities[token]
        if total >= top_p:
            return kept
    return kept


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
def test_the_nucleus_is_the_fewest_likeliest_that_sum_to_top_p(top_p):
    kept = np.asarray(keep_nucleus(jnp.asarray(LOGITS), top_p))
    for row, probabilities in zip(kept, _softmax(LOGITS), strict=True):
        assert set(np.flatnonzero(row)) == _find_nucleus(probabilities, top_p)


def test_of_equally_likely_tokens_no_more_are_kept_than_needed():
    assert keep_nucleus(jnp.zeros((1, 4)), 0.5).tolist() == [[True, True, False, False]]


def test_without_a_temperature_the_likeliest_is_taken():
    found = draw_tokens(jnp.asarray(LOGITS), KEYS, Sampling(None))
    np.testing.assert_array_equal(found, LOGITS.argmax(-1))


@pytest.mark.ci
@pytest.mark.parametrize("top_k, top_p", [(None, None), (3, None), (None, 0.8), (6, 0.5)])
def test_tokens_are_drawn_as_often_as_their_probability_among_those_kept(top_k, top_p):
    number, temperature = 4000, 1.7
    scaled = LOGITS[0] / temperature
    tokens = np.arange(len(scaled))
    kept = set(np.argsort(-scaled, kind="stable")[:top_k])
    # The nucleus is that of what the first filter has left.
    left = _softmax(np.where(np.isin(tokens, [*kept]), scaled, -np.inf))
    if top_p is not None:
        kept = _find_nucleus(left, top_p)
    expected = np.where(np.isin(tokens, [*kept]), left, 0)
    expected /= expected.sum()
    sampling = Sampling(
        jnp.float32(temperature),
        None if top_k is None else jnp.int32(top_k),
        None if top_p is None else jnp.float32(top_p),
    )
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[0]), (number, len(scaled)))
    keys = jax.random.split(jax.random.key(1), number)
    found = np.bincount(draw_tokens(logits, keys, sampling), minlength=len(scaled)) / number
    assert set(np.flatnonzero(found)) <= kept
    assert np.abs(found - expected).max() < 4 * 0.5 / np.sqrt(number)
