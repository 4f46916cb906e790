"""What a few texts say of heads and layers before blocks of attention are chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.calibration import calibrate_blocks, read_heads
from tests.models.test_dynamic_attention import (
    GRAPHDEF,
    LENGTH,
    MASKS,
    OPTIONS,
    PARAMS,
    SIZE,
    TOKENS,
)

BLOCKS, NUM, HEADS = OPTIONS.choose_blocks, LENGTH // SIZE, 4


@pytest.mark.ci
def test_habits_are_those_of_dense_attention_and_the_total_stays():
    model = nnx.merge(GRAPHDEF, PARAMS, MASKS)
    found = calibrate_blocks(model, TOKENS, BLOCKS)
    expected = np.zeros((2, 2, HEADS))
    for tokens in TOKENS:
        q, k = (np.asarray(x)[:, 0] for x in read_heads(model, tokens[None]))
        k = np.repeat(k, HEADS // k.shape[2], axis=2)
        scores = jnp.einsum("ltnh,lsnh->lnts", q, k) / q.shape[-1] ** 0.5
        shares = jax.nn.softmax(jnp.where(np.tri(LENGTH, dtype=bool), scores, -jnp.inf), -1)
        shares = np.asarray(shares.reshape(2, HEADS, NUM, SIZE, NUM, SIZE).sum(-1))
        row, column = np.indices((NUM, NUM))
        far = ((row - column >= 2) & (column > 0))[:, None]
        near = (row - column == 1)[:, None]
        expected[:, 0] += ((shares * far).max(-1) ** 2).mean((2, 3)) / 2
        expected[:, 1] += ((shares * near).sum(-1) ** 2).mean((2, 3)) / 2
    np.testing.assert_allclose(found.habits, expected, rtol=1e-4)
    total = BLOCKS.count(NUM, HEADS).sum()
    assert found.count(NUM, HEADS).sum() == 2 * total
    assert len(found.layer_shares) == 2


def test_a_choice_that_looks_ahead_is_not_calibrated():
    ahead = dataclasses.replace(BLOCKS, lookahead=True)
    with pytest.raises(ValueError, match="blocks must be causal, without lookahead"):
        calibrate_blocks(nnx.merge(GRAPHDEF, PARAMS, MASKS), TOKENS, ahead)
