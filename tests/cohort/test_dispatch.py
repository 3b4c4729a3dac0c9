"""Laws of a crew: every case ends exactly once, a lost worker's case goes elsewhere, a poisoned one is set aside."""

import os
import sys
from types import SimpleNamespace

import pytest
from tasks import Square, tries

from voxdino.cohort.crew import LocalCrew, parse_crew
from voxdino.cohort.dispatch import Cohort
from voxdino.cohort.pace import Pace
from voxdino.core.errors import ImageError, ResourceError, UsageError
from voxdino.core.shards import Shard, file_of, files_of_shards
from voxdino.preparation.case import Case
from voxdino.preparation.workers import Outcome


def run(task, items, notes=None, size=2):
    cohort = Cohort(LocalCrew(size), on_note=None if notes is None else notes.append)
    return list(cohort.over_cases(task, items, [f"case {item}" for item in items]))


def values(outcomes):
    return {outcome.index: outcome.value for outcome in outcomes}


def test_every_item_ends_once_and_bad_ones_by_name(tmp_path):
    items = [3, -1, 5, 7, -2, 9, 11]
    outcomes = run(Square(tmp_path), items)
    assert sorted(outcome.index for outcome in outcomes) == list(range(len(items)))
    assert values(outcomes) == {n: item * item if item > 0 else None for n, item in enumerate(items)}
    faults = {outcome.index: outcome.fault.error for outcome in outcomes if outcome.fault}
    assert {n: (type(error), error.where) for n, error in faults.items()} == {
        1: (ImageError, "case -1"),
        4: (ImageError, "case -2"),
    }
    assert all(tries(tmp_path, item) == 1 for item in items)  # the image's own fault: no second try


def test_a_lost_workers_case_is_done_by_another_and_nothing_twice(tmp_path):
    notes = []
    items = list(range(8))
    outcomes = run(Square(tmp_path, kills_once=(2, 5)), items, notes)
    assert values(outcomes) == {n: n * n for n in items}
    assert len(outcomes) == len(items)
    assert {item: tries(tmp_path, item) for item in items} == {n: 2 if n in (2, 5) else 1 for n in items}
    assert sorted(notes) == [f"a worker was lost with case {n}; it is tried again" for n in (2, 5)]


def test_a_poisoned_case_is_named_and_set_aside_after_two_tries(tmp_path):
    outcomes = run(Square(tmp_path, kills=(1,)), [0, 1, 2, 3])
    assert values(outcomes) == {0: 0, 1: None, 2: 4, 3: 9}
    [fault] = [outcome.fault for outcome in outcomes if outcome.fault]
    assert (fault.error.where, tries(tmp_path, 1)) == ("case 1", 2)
    assert "ended its worker 2 times" in fault.error.fact
    assert not isinstance(fault.error, ResourceError)  # which would end the run


def test_a_case_that_lacks_memory_is_tried_twice_and_many_in_a_row_end_the_run(tmp_path):
    (tmp_path / "one").mkdir()
    outcomes = run(Square(tmp_path / "one", starves=(1,)), [0, 1, 2, 3])
    assert values(outcomes) == {0: 0, 1: None, 2: 4, 3: 9}
    assert tries(tmp_path / "one", 1) == 2
    with pytest.raises(ResourceError, match="memory ended"):
        run(Square(tmp_path, starves=tuple(range(20))), list(range(20)))
    assert sum(tries(tmp_path, item) for item in range(20)) <= 6 + 2  # three per worker, and what is in work then


class Scripted:
    """A crew of two: the case is given out, both workers are lost, both come back."""

    size = 2

    def __init__(self):
        self.turns = [[(0, "ready"), (1, "ready")], [(0, "lost"), (1, "lost")], [(0, "ready"), (1, "ready")]]
        self.asked = None

    def start(self, task):
        self.task = task

    def give(self, worker, index, item, name):
        self.asked = worker, index, item

    def wait(self, timeout_s):
        if self.turns:
            return self.turns.pop(0)
        worker, index, item = self.asked
        return [(worker, Outcome(index, self.task(item), None))]

    def replace(self, worker):
        raise AssertionError("nobody hangs")

    def stop(self):
        self.asked = None


def test_a_worker_lost_while_idle_gets_no_work_before_it_is_back():
    outcomes = list(Cohort(Scripted()).over_cases(lambda item: item * item, [3], ["case 3"]))
    assert values(outcomes) == {0: 9}


class Unloadable:
    """Ends whatever process unpickles it."""

    def __call__(self, item):
        return item

    def __reduce__(self):
        return os._exit, (3,)


def test_workers_that_never_start_end_the_run():
    with pytest.raises(ResourceError, match="no worker starts"):
        run(Unloadable(), [1, 2])


def test_a_worker_that_hangs_is_replaced(tmp_path, monkeypatch):
    from voxdino.cohort import dispatch

    monkeypatch.setattr(dispatch, "_LOOK_EVERY_S", 0.1)
    cohort = Cohort(LocalCrew(1), stall_after_s=0.4)
    outcomes = list(cohort.over_cases(Square(tmp_path, seconds=60.0), [1], ["case 1"]))
    assert "ended its worker 2 times" in outcomes[0].fault.error.fact
    assert tries(tmp_path, 1) == 2


@pytest.mark.parametrize("text", ["", "local:0", "local:x", "ray:4", "rays", "slurm"])
def test_a_place_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="--on is"):
        parse_crew(text)


def test_without_ray_the_option_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for text in ("ray", "ray://head:10001"):
        with pytest.raises(ResourceError, match=r"pip install 'voxdino\[ray\]', or use --on local"):
            parse_crew(text)


@pytest.mark.parametrize("end", [ConnectionError("nobody there"), Exception("The node timed out during startup")])
@pytest.mark.parametrize("address", ["ray", "ray://head:10001"])
def test_a_cluster_that_does_not_answer_is_named_and_no_other_one_taken(monkeypatch, address, end):
    asked = []

    def init(*, address=None, **_):
        asked.append(address)
        raise end if address == "auto" else ValueError("bad")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    with pytest.raises(ResourceError, match="no Ray cluster answers"):
        parse_crew(address)
    assert asked == ([None, "auto"] if address == "ray" else [address])


def test_a_cluster_that_is_started_here_works_as_readily_as_this_process(monkeypatch):
    asked = []
    made = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda **how: asked.append(how),
        cluster_resources=lambda: {"CPU": 3.0},
        remote=lambda **_: lambda worker: worker,
    )
    monkeypatch.setitem(sys.modules, "ray", made)
    assert parse_crew("ray").size == 3
    assert [how["_system_config"] for how in asked] == [{"worker_niceness": 0}]  # Ray's own default is 15


def test_shards_together_have_every_case_once_in_whatever_order_they_were_found():
    cases = [Case(f"c{number:02}", (), None) for number in range(11)]
    parts = [Shard.parse(f"{number}/4").of(cases) for number in range(1, 5)]
    assert sorted(case.id for part in parts for case in part) == [case.id for case in cases]
    assert {len(part) for part in parts} == {2, 3}
    assert [Shard.parse("2/4").of(cases[::-1])] == [parts[1]]


def test_files_of_shards_are_told_from_others_of_the_folder(tmp_path):
    whole = tmp_path / "scores.json"
    parts = [file_of(whole, Shard(number, 12)) for number in (1, 2)]
    assert [part.name for part in parts] == ["scores.1of12.json", "scores.2of12.json"] and file_of(whole, None) == whole
    for name in (*parts, whole, "scores.proof.json", "scores.1of12.json.old", "xscores.1of12.json"):
        (tmp_path / name).write_text("")
    assert files_of_shards(whole) == parts


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="such as 2/8"):
        Shard.parse(text)


def test_the_pace_is_told_now_and_then_and_at_the_end():
    told = []
    pace = Pace(told.append, every_s=3600.0)
    for done in range(1, 6):
        pace(done, 5)
    assert len(told) == 1 and told[0].startswith("5 of 5 cases, ")
    every = Pace(told.append, every_s=0.0)
    every(1, 5)
    assert told[-1].startswith("1 of 5 cases, ") and told[-1].endswith(" a minute")
