"""Continuations are as likely as the whole forward pass finds their tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.generation import score_continuations, scoring
from tests.generation.models import LENGTH, make_model
from tests.small_models import VOCAB


@pytest.mark.ci
def test_scores_are_sums_of_log_likelihoods_whatever_is_computed_together(monkeypatch):
    model, rng = make_model("masked"), np.random.default_rng(0)
    monkeypatch.setattr(scoring, "_MOST_EXAMPLES", 2)
    sizes = [(1, 1), (9, 3), (2, 12), (30, 30), (5, 60), (1, 64)]
    texts = [rng.integers(0, VOCAB, context + new) for context, new in sizes]
    contexts = [text[: size[0]] for text, size in zip(texts, sizes, strict=True)]
    new = [text[size[0] :] for text, size in zip(texts, sizes, strict=True)]
    found = score_continuations(model, contexts, new)
    padded = np.zeros((len(texts), LENGTH + 1), np.int32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    logits = jax.jit(lambda tokens: model(tokens).logits)(jnp.asarray(padded[:, :-1]))
    probabilities = np.exp(np.float64(logits))
    probabilities /= probabilities.sum(-1, keepdims=True)
    for row, (start, number) in enumerate(sizes):
        steps = np.arange(start - 1, start + number - 1)
        expected = np.log(probabilities[row, steps, padded[row, steps + 1]]).sum()
        np.testing.assert_allclose(found[row], expected, rtol=1e-5)
