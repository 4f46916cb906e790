"""Problems that show whether kernels that search for masks are right.

Letters: K N as in `transposable_mask`.
"""

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from pallas_kernels.doctor import oracles
from pallas_kernels.doctor.problem import Function, Maker, Problem
from pallas_kernels.transposable_mask import transposable_mask
from pallas_kernels.transposable_mask.call import TransposableFacts


def _make(facts: TransposableFacts) -> Problem:
    shape = facts.rows, facts.columns
    (w,) = oracles.make_normal((shape,))
    # Whole numbers that every dtype holds: their sums are exact in any order, and many are equal.
    w = jnp.clip(jnp.round(64 * w), -255, 255).astype(facts.dtype)
    draws = np.random.default_rng(5).random(shape)
    factors = {
        "whole": np.ones(shape),
        "zeros": draws < 0.5,
        # Beside them nothing else would count, and sums would not be exact.
        "not finite": np.select([draws < 0.2, draws < 0.4], [np.inf, np.nan], 0.0),
    }

    def call(implementation, directions) -> Function:
        def search(inputs, factor):
            (w,) = inputs
            scaled = w if factor is None else w * factor.astype(w.dtype)
            return (transposable_mask(scaled, implementation=implementation),)

        return search

    return Problem(
        names={"forward": ("mask",)},
        inputs=(w,),
        masks={name: jnp.asarray(factor, facts.dtype) for name, factor in factors.items()},
        call=call,
        reference=call("reference", ("forward",)),
        plain=None,
    )


def _shrink_rows(facts: TransposableFacts) -> Iterator[TransposableFacts]:
    for rows in sorted({min(facts.rows, most) for most in (1024, facts.rows)}):
        yield dataclasses.replace(facts, rows=rows)


TRANSPOSABLE_MASK = Maker(TransposableFacts, _make, _shrink_rows)
