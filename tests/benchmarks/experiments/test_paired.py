"""What pairs of runs allow one to say: intervals, verdicts, and how many pairs would decide."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.experiments.paired import (
    compare_pairs,
    count_pairs,
    describe_mean,
    is_equivalent,
    judge_better,
    judge_no_worse,
)

RNG = np.random.default_rng(0)
LOSSES = RNG.normal(2.0, 0.05, 10)
NOISE = 0.01 * np.array([1, -1] * 5)


def compare(values, against, better):
    return compare_pairs(list(values), list(against), better)


def p_value(test):
    return test[1]


def test_the_interval_is_that_of_scipys_paired_test():
    others = LOSSES + RNG.normal(0.03, 0.02, 10)
    gain = compare(LOSSES, others, "less")
    interval = stats.ttest_rel(others, LOSSES).confidence_interval(0.95)
    half_width = gain.half_width()
    np.testing.assert_allclose(
        [gain.mean - half_width, gain.mean + half_width], [interval.low, interval.high]
    )
    assert gain.num_better + gain.num_worse == gain.num_pairs == 10
    assert gain.num_better == (others > LOSSES).sum()


def test_less_of_a_loss_and_more_of_an_accuracy_are_gains():
    lower, higher = [1.0, 1.1, 0.9], [1.2, 1.25, 1.2]
    assert compare(lower, higher, "less").mean > 0 > compare(lower, higher, "more").mean


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [(0.1, "confirmed"), (-0.1, "not confirmed"), (0.001, "not decidable here")],
)
def test_better_is_said_only_of_intervals_without_zero(shift, verdict):
    others = LOSSES + shift + NOISE
    assert judge_better(compare(LOSSES, others, "less")) == verdict


@pytest.mark.parametrize(
    ("worse_by", "verdict", "equivalent"),
    [
        (0.0, "confirmed", True),
        (-0.1, "confirmed", False),  # better by more than the margin
        (0.1, "not confirmed", False),
        (0.021, "not decidable here", False),
        # Half an interval of 90 % is .0061 wide here, of 50 % .0023, of 95 % .0075.
        (0.0155, "not decidable here", False),
        (0.0132, "confirmed", True),
    ],
)
def test_no_worse_than_a_margin_is_a_one_sided_test(worse_by, verdict, equivalent):
    gain = compare(LOSSES + worse_by + NOISE, LOSSES, "less")
    assert judge_no_worse(gain, 0.02) == verdict
    assert is_equivalent(gain, 0.02) is equivalent
    # TOST in scipy's words: the larger p of two one-sided tests.
    difference = worse_by + NOISE
    p = max(
        p_value(stats.ttest_1samp(difference, -0.02, alternative="greater")),
        p_value(stats.ttest_1samp(difference, 0.02, alternative="less")),
    )
    assert equivalent is bool(p < 0.05)


def test_pairs_that_would_tell_do_so_four_times_in_five():
    gain = compare([0.0, 2.0], [0.0, 0.0], "more")._replace(mean=0.5, deviation=1.0)
    count = count_pairs(gain)
    assert count == 34  # of any table of the paired t-test, for half a standard deviation
    drawn = RNG.normal(0.5, 1.0, (4000, count))
    decided = p_value(stats.ttest_1samp(drawn, 0.0, axis=1)) < 0.05
    assert 0.77 < decided.mean() < 0.83
    # A margin shifts what has to be told from 0.
    assert count_pairs(gain._replace(mean=-0.5), margin=1.0) == count_pairs(gain, margin=0.0)
    assert count_pairs(gain._replace(mean=1e-6)) is None
    assert count_pairs(gain._replace(deviation=0.0)) == 2


def test_pairs_need_partners():
    with pytest.raises(ValueError, match="two pairs or more, got 3 and 2 values"):
        compare([1, 2, 3], [1, 2], "less")
    with pytest.raises(ValueError, match="got 1 and 1"):
        compare([1], [1], "less")


def test_a_mean_of_one_value_has_no_interval():
    mean, half_width = describe_mean([3.0])
    assert mean == 3.0 and np.isnan(half_width)
    mean, half_width = describe_mean(list(LOSSES))
    interval = stats.ttest_1samp(LOSSES, 0).confidence_interval(0.95)
    np.testing.assert_allclose([mean - half_width, mean + half_width], interval)
