"""What pairs of runs with equal seeds allow one to say."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

POWER = 0.8
"""How often as many pairs as `count_pairs` names decide, if things are as measured."""

_MOST_PAIRS = 10_000

type Verdict = Literal["confirmed", "not confirmed", "not decidable here"]


def describe_mean(values: Sequence[float]) -> tuple[float, float]:
    """Return a mean and half the width of its interval of 95 %, NaN of a single value."""
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return mean, math.nan
    return mean, _half_width(float(np.std(values, ddof=1)), count, 0.95)


class Gain(NamedTuple):
    """By how much one row is better than another, seed by seed.

    Attributes:
      mean: of the differences; positive = better.
      deviation: their standard deviation.
      num_pairs: how many there are, at least 2.
      num_better: in how many pairs the row is better.
      num_worse: in how many it is worse.
    """

    mean: float
    deviation: float
    num_pairs: int
    num_better: int
    num_worse: int

    def half_width(self, confidence: float = 0.95) -> float:
        """Return half the width of the mean's interval by Student's t.

        Args:
          confidence: of this one interval, in (0, 1).
        """
        return _half_width(self.deviation, self.num_pairs, confidence)


def compare_pairs(
    values: Sequence[float], against: Sequence[float], better: Literal["less", "more"]
) -> Gain:
    """Compare two rows seed by seed.

    Args:
      values: of the row that is judged.
      against: of the other, of the same seeds in the same order.
      better: whether less or more is better.

    Raises:
      ValueError: if there are fewer than two pairs, or values without a partner.
    """
    if len(values) != len(against) or len(values) < 2:
        raise ValueError(f"expected two pairs or more, got {len(values)} and {len(against)} values")
    gains = np.subtract(values, against, dtype=np.float64) * (1 if better == "more" else -1)
    return Gain(
        mean=float(gains.mean()),
        deviation=float(gains.std(ddof=1)),
        num_pairs=len(gains),
        num_better=int((gains > 0).sum()),
        num_worse=int((gains < 0).sum()),
    )


def judge_better(gain: Gain) -> Verdict:
    """Judge the claim that the row is better, by the two-sided interval of 95 %.

    Returns:
      "confirmed" if it lies above 0, "not confirmed" if below, else "not decidable here".
    """
    return _judge(gain, 0.0, gain.half_width(0.95))


def judge_no_worse(gain: Gain, margin: float) -> Verdict:
    """Judge the claim that the row is worse by less than a margin, by a one-sided test at 5 %.

    Args:
      margin: positive, in the units of the gain.

    Returns:
      "confirmed" if the interval of 90 % lies above -margin, "not confirmed" if below, else "not
      decidable here".
    """
    return _judge(gain, -margin, gain.half_width(0.9))


def is_equivalent(gain: Gain, margin: float) -> bool:
    """Say whether two one-sided tests (TOST) at 5 % each place the mean within ± a margin."""
    return abs(gain.mean) + gain.half_width(0.9) < margin


def count_pairs(gain: Gain, margin: float | None = None) -> int | None:
    """Return how many pairs decide four times in five, if mean and deviation are as measured.

    Args:
      margin: of `judge_no_worse`; None = of `judge_better`.

    Returns:
      int; None if 10,000 are too few.
    """
    distance = abs(gain.mean + (margin or 0.0))
    counts = np.arange(2, _MOST_PAIRS + 1)
    tail = 0.975 if margin is None else 0.95
    quantiles = stats.t.ppf(tail, counts - 1) + stats.t.ppf(POWER, counts - 1)
    decide = np.sqrt(counts) * distance > quantiles * gain.deviation
    return int(counts[decide.argmax()]) if decide.any() else None


def _half_width(deviation: float, count: int, confidence: float) -> float:
    quantile = float(stats.t.ppf((1 + confidence) / 2, count - 1))
    return quantile * deviation / math.sqrt(count)


def _judge(gain: Gain, bound: float, half_width: float) -> Verdict:
    if gain.mean - half_width > bound:
        return "confirmed"
    return "not confirmed" if gain.mean + half_width < bound else "not decidable here"
