"""The learning rate rises, falls, and follows the steps or the clock."""

import itertools

import pytest

from voxdino.training.schedule import SCHEDULES, learning_rate_factor, progress_of


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_rises_to_one_and_never_rises_again(name):
    factors = [learning_rate_factor(p / 200, warmup=0.1, curve=SCHEDULES[name]) for p in range(201)]
    assert 0 < factors[0] <= 0.05
    assert max(factors) == pytest.approx(1.0)
    peak = factors.index(max(factors))
    assert peak == 20
    assert all(a <= b for a, b in itertools.pairwise(factors[: peak + 1]))
    assert all(a >= b for a, b in itertools.pairwise(factors[peak:]))
    assert name == "constant" or factors[-1] == pytest.approx(0.0)


def test_a_linear_rate_falls_evenly():
    factors = [learning_rate_factor(p, warmup=0.2, curve=SCHEDULES["linear"]) for p in (0.2, 0.4, 0.6, 0.8, 1.0)]
    assert factors == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_no_warm_up_starts_at_the_top():
    assert learning_rate_factor(0.0, warmup=0.0, curve=SCHEDULES["cosine"]) == 1.0


def test_without_a_budget_the_clock_does_not_count():
    assert progress_of(30, 120, elapsed_s=1e9, time_budget_s=None) == 0.25


def test_with_a_budget_whichever_ends_first_counts():
    assert progress_of(30, 120, elapsed_s=50.0, time_budget_s=100.0) == 0.5
    assert progress_of(90, 120, elapsed_s=50.0, time_budget_s=100.0) == 0.75
