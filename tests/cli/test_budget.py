"""A time budget covers the whole road."""

import time

import pytest

from voxdino.cli.budget import LEAST_TRAINING_S, Budget


@pytest.mark.parametrize(
    "total_s, spent_s, reserved_s, expected_s",
    [
        (720.0, 20.0, 100.0, 600.0),  # training gets what is left but for the steps after it
        (720.0, 20.0, 600.0, 350.0),  # never less than half of what is left
        (60.0, 55.0, 30.0, LEAST_TRAINING_S),  # nor than a few steps
        (60.0, 200.0, 30.0, LEAST_TRAINING_S),
    ],
)
def test_training_gets_what_the_other_steps_leave(total_s, spent_s, reserved_s, expected_s):
    budget = Budget(total_s, started=time.monotonic() - spent_s)
    assert budget.for_training_s(reserved_s) == pytest.approx(expected_s, abs=1)


def test_without_a_budget_there_is_no_end():
    assert Budget(None).left_s() == float("inf")
