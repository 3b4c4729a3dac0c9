"""Workers report what happened: results, real errors by case, their own death. Nothing hangs."""

import os
import signal
import time

import pytest

from voxdino.core.errors import LabelError, ResourceError
from voxdino.core.memory import available_memory
from voxdino.preparation import workers
from voxdino.preparation.workers import available_cpus, run_over_cases

NAMES = [f"case {n}" for n in range(12)]


def work(number: int) -> int:
    if number == 3:
        raise LabelError("holds 7.", where="three.nii.gz", fix="correct it.")
    if number == 5:
        raise ZeroDivisionError("oh")
    return number**2


def fill_the_disk(number: int) -> int:
    raise ResourceError("the disk is full.", where=f"{number}")


def die(number: int) -> int:
    if number == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def hang(number: int) -> int:
    time.sleep(60 if number == 4 else 0)
    return number


@pytest.mark.parametrize("num_workers", [1, 2])
def test_good_cases_give_results_and_bad_ones_their_own_error(num_workers):
    outcomes = {outcome.index: outcome for outcome in run_over_cases(work, range(12), NAMES, num_workers=num_workers)}
    assert sorted(outcomes) == list(range(12))
    assert all(outcomes[n].value == n**2 for n in range(12) if n not in (3, 5))
    assert str(outcomes[3].fault.error) == "three.nii.gz: holds 7. Fix: correct it."
    assert "in work" in outcomes[3].fault.details
    assert "case 5" in str(outcomes[5].fault.error) and "ZeroDivisionError: oh" in str(outcomes[5].fault.error)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_full_disk_ends_the_run(num_workers):
    with pytest.raises(ResourceError, match="disk is full"):
        list(run_over_cases(fill_the_disk, range(12), NAMES, num_workers=num_workers))


def test_a_killed_worker_is_noticed_at_once_and_its_case_named():
    start = time.monotonic()
    with pytest.raises(ResourceError, match=r"killed .*case 4.*--workers") as caught:
        list(run_over_cases(die, range(12), NAMES, num_workers=2))
    assert time.monotonic() - start < 60 and caught.value.exit_code == 4


def test_a_hanging_worker_is_ended_and_its_case_named(monkeypatch):
    monkeypatch.setattr(workers, "STALL_AFTER_S", 5.0)  # on a busy machine a worker takes seconds to begin
    with pytest.raises(ResourceError, match="case 4"):
        list(run_over_cases(hang, range(12), NAMES, num_workers=2))


def test_the_callback_runs_before_the_first_case():
    told = []
    for outcome in run_over_cases(work, range(3), NAMES, num_workers=1, on_started=lambda: told.append("started")):
        told.append(outcome.index)
    assert told == ["started", 0, 1, 2]


def test_large_cases_get_no_more_workers_than_memory_holds():
    assert workers._suitable_workers([available_memory()] * 3) == 1
    assert workers._suitable_workers([1000] * 3) == 1
    assert 1 <= workers._suitable_workers([10**6] * 300) <= available_cpus() <= (os.cpu_count() or 1)
