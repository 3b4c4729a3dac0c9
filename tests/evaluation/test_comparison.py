"""Laws of paired tests and ranks; SciPy is the other implementation."""

from itertools import product
from math import nan

import numpy as np
import pytest
from scipy import stats

from voxdino.core.errors import InputError
from voxdino.evaluation.comparison import (
    critical_difference,
    holm,
    paired_test,
    rank_table,
    smallest_detectable_difference,
)


@pytest.mark.parametrize("num", [5, 12, 40, 200])
def test_wilcoxon_without_ties_is_scipys_exact_one(num):
    a, b = np.random.default_rng(num).normal([[0.1], [0.0]], 1, (2, num))
    assert paired_test(a.tolist(), b.tolist()) == pytest.approx(stats.wilcoxon(a, b, method="exact").pvalue, rel=1e-9)


def test_wilcoxon_with_ties_counts_all_signs():
    differences = [1.0, 1.0, -2.0, 3.0, 3.0, 3.0, -1.0, 4.0]
    ranks = stats.rankdata(np.abs(differences))
    centred = [sum(r if s else -r for r, s in zip(ranks, signs, strict=True)) for signs in product((0, 1), repeat=8)]
    found = sum(r if d > 0 else -r for r, d in zip(ranks, differences, strict=True))
    expected = np.mean([abs(value) >= abs(found) for value in centred])
    assert paired_test(differences, [0.0] * 8) == pytest.approx(expected)


def test_wilcoxon_of_many_cases_is_near_the_exact_one():
    a = np.round(np.random.default_rng(0).normal(0.08, 1, 700), 2)
    expected = stats.wilcoxon(a, correction=True, method="asymptotic").pvalue
    assert paired_test(a.tolist(), [0.0] * 700) == pytest.approx(expected, rel=1e-9)


def test_permutation_counts_all_signs_of_few_cases():
    differences = [0.3, 0.1, 0.2, -0.1]  # as large a sum: this one, all +, the other 0.1 -, and their opposites
    assert paired_test(differences, [0.0] * 4, method="permutation") == pytest.approx(6 / 16)


@pytest.mark.parametrize("num", [30, 600])
def test_permutation_of_many_cases_agrees_with_scipy(num):
    a = np.random.default_rng(num).normal(0.1, 0.5, num)
    expected = stats.permutation_test(
        (a,), np.mean, permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(1)
    ).pvalue
    assert paired_test(a.tolist(), [0.0] * num, method="permutation") == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("method", ["wilcoxon", "permutation"])
@pytest.mark.parametrize("num", [12, 50])
def test_paired_tests_hold_their_level(method, num):
    scores = np.random.default_rng(num).beta(8, 1.5, (1000, 2, num))  # two methods as good as each other, skewed
    found = [paired_test(a, b, method=method) <= 0.05 for a, b in scores.tolist()]
    assert 0.03 <= np.mean(found) <= 0.065


@pytest.mark.parametrize("method", ["wilcoxon", "permutation"])
def test_paired_tests_find_a_clear_difference_and_none_between_equals(method):
    a = np.random.default_rng(0).beta(8, 2, 30)
    assert paired_test((a + 0.05).tolist(), a.tolist(), method=method) < 0.001
    assert paired_test(a.tolist(), a.tolist(), method=method) == 1.0
    assert paired_test([nan, 0.5], [0.4, nan], method=method) == 1.0


@pytest.mark.parametrize("method", ["wilcoxon", "permutation"])
def test_slices_of_one_patient_are_one_difference(method):
    a, b = [0.9, 0.8, 0.7, nan, 0.6], [0.5, 0.6, 0.8, 0.1, 0.3]
    merged = paired_test([0.85, 0.7, 0.6], [0.55, 0.8, 0.3], method=method)
    assert paired_test(a, b, method=method, groups=["p", "p", "q", "q", "r"]) == pytest.approx(merged)


def test_unequal_lengths_are_refused():
    with pytest.raises(InputError, match="3 scores against 2: paired tests need the same cases"):
        paired_test([0.1, 0.2, 0.3], [0.1, 0.2])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_ranks_by_hand_with_a_tie_and_a_task_that_lacks_a_score():
    scores = np.array([[0.9, 0.8, 0.7], [0.5, 0.6, 0.5], [nan, 0.1, 0.2]])
    found = rank_table(scores)
    assert (found.mean_ranks, found.num_tasks) == ((1.75, 1.5, 2.75), 2)
    assert rank_table(scores, better="lower").mean_ranks == (2.25, 2.5, 1.25)


def test_friedman_by_permutation_agrees_with_scipy_and_ranks_need_two_methods():
    scores = np.random.default_rng(4).normal([0.0, 0.0, 0.4], 1, (40, 3))
    expected = stats.friedmanchisquare(*scores.T).pvalue
    assert rank_table(scores).p_value == pytest.approx(expected, abs=0.02)
    with pytest.raises(InputError, match="1 methods with 40 tasks"):
        rank_table(scores[:, :1])


@pytest.mark.parametrize("num", [2, 5, 12])
def test_critical_difference_is_nemenyis(num):
    quantile = stats.studentized_range.ppf(0.95, num, np.inf) / np.sqrt(2)
    expected = quantile * np.sqrt(num * (num + 1) / (6 * 14))
    assert critical_difference(num, 14) == pytest.approx(expected, rel=1e-3)


def test_a_difference_of_the_smallest_detectable_size_is_found_in_four_of_five_samples():
    rng = np.random.default_rng(0)
    size = smallest_detectable_difference(rng.normal(0, 1, 400).tolist()) * np.sqrt(400 / 25)
    found = [stats.ttest_1samp(rng.normal(size, 1, 25), 0).pvalue < 0.05 for _ in range(500)]
    assert 0.74 <= np.mean(found) <= 0.86
    assert smallest_detectable_difference([0.1, nan]) is None


def test_what_a_sample_could_show_does_not_grow_with_the_slices_of_its_patients():
    patients = np.random.default_rng(1).normal(0, 1, 20)
    slices = np.repeat(patients, 30).tolist()
    groups = np.repeat(np.arange(20), 30).tolist()
    alone = smallest_detectable_difference(patients.tolist())
    assert smallest_detectable_difference(slices, groups=groups) == pytest.approx(alone)
    assert smallest_detectable_difference(slices) < alone / 5
    assert smallest_detectable_difference([0.1, nan, 0.3], groups=["p", "q", "p"]) is None
