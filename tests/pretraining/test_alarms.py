"""Alarms: each kind of collapse is said once, with what to do; a healthy run says nothing."""

import json
import math
import re

import pytest

from voxdino.core.errors import CheckpointError
from voxdino.pretraining.alarms import FIXES, AlarmLimits, Alarms
from voxdino.pretraining.config import DistillationStage, PretrainConfig, SelfDistillationStage
from voxdino.pretraining.provenance import FREE_TO_CHANGE

K = 1000
HEALTHY = {
    "losses": {"dino": 5.0, "ibot": 5.2, "koleo": -0.7},
    "entropies": {"dino": 0.5 * math.log(K)},
    "rank": 80.0,
    "spread": 0.7,
    "gradient_norm": 1.5,
}


def alarms(**limits):
    return Alarms({"dino": K}, AlarmLimits(**{"warmup_steps": 100, "patience": 2, "quiet_steps": 50, **limits}))


def kinds(said):
    return [alarm.kind for alarm in said]


def test_a_healthy_run_says_nothing():
    watch = alarms()
    assert all(watch.update(step, **HEALTHY) == () for step in range(0, 1000, 10))


@pytest.mark.parametrize(
    "numbers, kind, words",
    [
        ({"entropies": {"dino": 0.01}}, "one_hot", "teacher's dino targets have an entropy of 0.01 nats"),
        ({"entropies": {"dino": math.log(K)}}, "even", "of 6.91 at most: they say the same of every image"),
        ({"rank": 1.2}, "low_rank", "an effective rank of 1.2"),
        ({"rank": 0.0}, "low_rank", "an effective rank of 0.0"),
        ({"spread": 0.01}, "same_direction", "differ by 0.01"),
        ({"gradient_norm": 0.0}, "no_gradient", "nothing trains"),
    ],
)
def test_each_kind_of_collapse_is_said_with_what_to_do(numbers, kind, words):
    watch = alarms()
    first, second = (watch.update(step, **numbers) for step in (200, 201))
    of_one_batch = "entropies" in numbers or "gradient_norm" in numbers  # which says little
    assert kinds(first) == ([] if of_one_batch else [kind])
    (alarm,) = first or second
    assert (alarm.kind, alarm.step, alarm.is_fatal) == (kind, 201 if of_one_batch else 200, False)
    assert words in alarm.fact and alarm.fix == FIXES[kind]
    assert str(alarm) == f"step {alarm.step}: {alarm.fact} Fix: {alarm.fix}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["losses", "entropies", "rank", "spread", "gradient_norm"])
def test_what_is_no_number_is_fatal_at_once_and_comes_first(name, value):
    watch = alarms()
    watch.update(199, spread=0.0)
    given = {name: {"dino": value} if name in ("losses", "entropies") else value}
    said = watch.update(0, **{"spread": 0.0, **given}) or watch.update(200, **{"spread": 0.0, **given})
    assert said[0].kind == "not_a_number" and said[0].is_fatal
    assert str(value) in said[0].fact


def test_a_rank_that_halves_is_said_before_it_is_low():
    watch = alarms()
    for step, rank in enumerate((90, 100, 95, 70)):
        assert watch.update(200 + step, rank=float(rank)) == ()
    (alarm,) = watch.update(210, rank=45.0)
    assert alarm.kind == "falling_rank" and "from 100.0 to 45.0" in alarm.fact


def test_a_slow_fall_over_many_reports_is_none():
    watch = alarms(rank_window=3)
    assert all(watch.update(200 + step, rank=100 * 0.9**step) == () for step in range(20))


def test_fresh_heads_may_be_anything_but_only_for_a_while():
    watch = alarms()
    assert all(watch.update(step, **{**HEALTHY, "entropies": {"dino": math.log(K)}}) == () for step in range(100))
    assert watch.update(100, entropies={"dino": math.log(K)}) == ()
    assert kinds(watch.update(101, entropies={"dino": math.log(K)})) == ["even"]


def test_one_good_report_starts_the_count_again():
    watch = alarms(patience=3)
    for step, norm in enumerate((0.0, 0.0, 0.5, 0.0, 0.0)):
        assert watch.update(200 + step, gradient_norm=norm) == ()
    assert kinds(watch.update(205, gradient_norm=0.0)) == ["no_gradient"]


def test_an_alarm_is_not_repeated_before_its_time():
    watch = alarms()
    said = [step for step in range(200, 320) if watch.update(step, spread=0.0)]
    assert said == [200, 250, 300]


def test_a_resumed_run_says_the_same():
    reports = ((90.0, 5.0), (80.0, 0.0), (30.0, 0.0), (2.0, 0.0))
    numbers = [{"rank": rank, "entropies": {"dino": entropy}} for rank, entropy in reports]
    whole, first, second = alarms(), alarms(), alarms()
    expected = [whole.update(200 + step, **one) for step, one in enumerate(numbers)]
    before = [first.update(200 + step, **one) for step, one in enumerate(numbers[:2])]
    second.load_state(json.loads(json.dumps(first.state())))
    after = [second.update(202 + step, **one) for step, one in enumerate(numbers[2:])]
    assert before + after == expected and any(expected)


def test_another_state_is_refused():
    with pytest.raises(CheckpointError, match="holds no state of alarms"):
        alarms().load_state({"ranks": "many"})


def test_what_to_do_never_needs_settings_that_a_resumed_run_refuses():
    stages = (*SelfDistillationStage.model_fields, *DistillationStage.model_fields)
    fixed = {*PretrainConfig.model_fields, *stages, "batches", "prototypes"} - FREE_TO_CHANGE
    for text in FIXES.values():
        before, _, _ = text.partition("start a new one")
        assert not fixed & set(re.findall(r"\w+", before)), text
