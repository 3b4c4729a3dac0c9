"""Laws of the mean and its interval."""

from math import nan

import numpy as np
import pytest
from scipy.stats import bootstrap

from voxdino.evaluation.statistics import mean_interval


@pytest.mark.parametrize("num", [12, 60])
def test_interval_agrees_with_scipy(num):
    values = np.random.default_rng(num).beta(8, 1.5, num)
    ours = mean_interval(values.tolist())
    theirs = bootstrap((values,), np.mean, method="BCa", n_resamples=5000, rng=np.random.default_rng(0))
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.05 * width)


def test_interval_holds_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.normal(0.8, 0.1, 50).tolist()) for _ in range(200)]
    covered = sum(i.low is not None and i.high is not None and i.low <= 0.8 <= i.high for i in intervals)
    assert 180 <= covered <= 199


def test_undefined_values_are_counted_not_averaged():
    got = mean_interval([0.5, nan, 0.7, nan])
    assert got.mean == pytest.approx(0.6)
    assert (got.num_cases, got.num_undefined) == (4, 2)


def test_the_same_seed_gives_the_same_interval():
    values = [0.1, 0.5, 0.9, 0.4]
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)


def test_intervals_of_nothing_one_and_equals():
    assert mean_interval([]).mean is None
    assert mean_interval([nan]).num_undefined == 1
    assert (mean_interval([0.4]).mean, mean_interval([0.4]).low) == (0.4, None)
    same = mean_interval([0.4, 0.4, 0.4])
    assert same.low == same.high == pytest.approx(0.4)
