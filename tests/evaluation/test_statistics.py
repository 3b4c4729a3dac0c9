"""Laws of the mean and its interval."""

from math import nan

import numpy as np
import pytest
from scipy import stats

from voxdino.evaluation.statistics import groups_to_draw, mean_interval, seeds_summary, t_quantile, warn_of_few


@pytest.mark.parametrize("num", [12, 60])
def test_interval_is_scipys_bca_at_levels_widened_for_the_number_of_cases(num):
    values = np.random.default_rng(num).beta(8, 1.5, num)
    ours = mean_interval(values.tolist())
    level = 1 - 2 * stats.norm.sf(np.sqrt(num / (num - 1)) * stats.t.ppf(0.975, num - 1))
    drawn = stats.bootstrap(
        (values,), np.mean, method="BCa", n_resamples=20_000, confidence_level=level, rng=np.random.default_rng(0)
    )
    low, high = drawn.confidence_interval
    assert ours.low == pytest.approx(low, abs=0.05 * (high - low))
    assert ours.high == pytest.approx(high, abs=0.05 * (high - low))


def with_misses(share):
    def draw(rng, shape):
        return np.where(rng.random(shape) < share, 0.0, rng.beta(20, 2, shape))

    return draw


SAMPLES = {  # how scores look: name -> (draw, true mean)
    "normal": (lambda rng, shape: rng.normal(0.8, 0.1, shape), 0.8),
    "dice": (lambda rng, shape: rng.beta(8, 1.5, shape), 8 / 9.5),
    "dice near 1": (lambda rng, shape: rng.beta(4, 0.5, shape), 4 / 4.5),
    "dice with misses": (with_misses(0.1), 0.9 * 20 / 22),
    "distances": (lambda rng, shape: rng.lognormal(1, 0.5, shape), np.exp(1.125)),
}


@pytest.mark.parametrize("num", [50, 200])
@pytest.mark.parametrize("name", SAMPLES)
def test_interval_holds_the_true_mean_in_93_to_97_of_100_samples(name, num):
    draw, truth = SAMPLES[name]
    samples = draw(np.random.default_rng(num), (2000 if num == 50 else 1000, num))
    intervals = [mean_interval(sample.tolist()) for sample in samples]
    assert 0.93 <= np.mean([i.low <= truth <= i.high for i in intervals]) <= 0.97


def test_interval_of_ten_cases_holds_the_true_mean_in_over_90_of_100_samples():
    samples = np.random.default_rng(10).beta(8, 1.5, (1000, 10))
    intervals = [mean_interval(sample.tolist()) for sample in samples]
    assert 0.91 <= np.mean([i.low <= 8 / 9.5 <= i.high for i in intervals]) <= 0.97


def test_slices_of_patients_count_as_patients():
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(50), 8).tolist()
    covered = {True: 0, False: 0}
    for _ in range(300):
        values = (rng.normal(0.8, 0.1, 50).repeat(8) + rng.normal(0, 0.02, 400)).tolist()
        for by_patient in covered:
            found = mean_interval(values, groups=groups if by_patient else None)
            covered[by_patient] += found.low <= 0.8 <= found.high
    assert 0.92 <= covered[True] / 300 <= 0.98
    assert covered[False] / 300 < 0.7  # what one gets who counts slices


def test_groups_of_one_change_nothing_and_one_group_has_no_interval():
    values = [0.4, nan, 0.9, 0.7, 0.8]
    assert mean_interval(values, groups=list("abcde")) == mean_interval(values)
    found = mean_interval(values, groups=["a"] * 5)
    assert (found.mean, found.low, found.num_undefined) == (pytest.approx(0.7), None, 1)


def test_large_groups_weigh_as_many_values():
    values, groups = [1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]
    assert mean_interval(values, groups=groups).mean == 0.75


@pytest.mark.parametrize("dof", [1, 2, 7, 199, 100_000])
@pytest.mark.parametrize("probability", [0.025, 0.5, 0.8, 0.975])
def test_t_quantiles_agree_with_scipy(dof, probability):
    assert t_quantile(probability, dof) == pytest.approx(stats.t.ppf(probability, dof), rel=1e-6, abs=1e-9)


def test_seeds_have_a_mean_and_a_deviation_and_one_seed_has_none():
    assert seeds_summary([0.8, 0.9, 1.0]) == (pytest.approx(0.9), pytest.approx(0.1))
    assert seeds_summary([0.8]) == (0.8, None)


def test_few_cases_are_warned_of_up_to_49():
    assert warn_of_few(50) == ()
    assert warn_of_few(49, "patients") == ("49 patients: intervals over fewer than 50 tend to be too narrow.",)


@pytest.mark.parametrize(
    ("groups", "is_defined", "are_drawn"),
    [
        ("aabbccddeeff", None, True),
        ("aabbccddee", None, False),
        ("abcde", None, True),  # one value each: the same either way
        ("aabbccddeeff", [True] * 10 + [False] * 2, False),
        ("aabbccddeeff", [True, False] * 3 + [False] * 6, True),
        ("", None, True),
    ],
)
def test_groups_are_drawn_where_six_have_a_value(groups, is_defined, are_drawn):
    assert groups_to_draw(tuple(groups), is_defined) == (tuple(groups) if are_drawn else None)
    assert groups_to_draw(None, is_defined) is None


def test_undefined_values_are_counted_not_averaged():
    got = mean_interval([0.5, nan, 0.7, nan])
    assert got.mean == pytest.approx(0.6)
    assert (got.num_cases, got.num_undefined) == (4, 2)


def test_the_same_seed_gives_the_same_interval():
    values = [0.1, 0.5, 0.9, 0.4, 0.35, 0.77, 0.62, 0.68, 0.53]
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)


def test_intervals_of_nothing_one_and_equals():
    assert mean_interval([]).mean is None
    assert mean_interval([nan]).num_undefined == 1
    assert (mean_interval([0.4]).mean, mean_interval([0.4]).low) == (0.4, None)
    same = mean_interval([0.4, 0.4, 0.4])
    assert same.low == same.high == pytest.approx(0.4)
