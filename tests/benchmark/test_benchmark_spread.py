"""Laws of a benchmark over workers and shards: the cells of one process, each measured once, features computed once."""

import json
import pickle
from itertools import combinations

import pytest
import torch
from small_benchmark import draw_all, toy_grid

from voxdino.benchmark.bench import Bench
from voxdino.benchmark.grid import TaskEntry
from voxdino.benchmark.run import run_grid, units_of
from voxdino.cli import main as voxdino
from voxdino.core.errors import ImageError, ResourceError
from voxdino.core.locks import lock_folder
from voxdino.core.shards import Shard
from voxdino.preparation.workers import Fault, Outcome, attempt

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("few_draws")

PICTURES = TaskEntry(name="pictures", data="pictures.npz", probe="linear", resolutions=(16, 32), shots=(2,))
NEIGHBOURS = PICTURES.model_copy(update={"name": "neighbours", "probe": "knn", "resolutions": (17, 32)})
GRID = toy_grid(tasks=(PICTURES, NEIGHBOURS))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return draw_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    return untimed(run_grid(GRID, root, tmp_path_factory.mktemp("alone"), device="cpu"))


def untimed(outcome):
    return [result.model_copy(update={"elapsed_s": 0.0}) for result in outcome.results]


def elsewhere(task, units, names):
    """As a cluster does it: what travels is pickled."""
    for place in reversed(range(len(units))):
        travelled, unit = pickle.loads(pickle.dumps((task, units[place])))
        yield attempt(travelled, unit, place, names[place])


def test_units_hold_every_cell_once_and_no_two_compute_the_same_features(root, tmp_path):
    bench = Bench(GRID, root, tmp_path, torch.device("cpu"))
    units = units_of(bench)
    assert sorted(str(cell) for unit in units for cell in unit.cells) == sorted(map(str, bench.cells))
    assert len({unit.id for unit in units}) == len(units) == 2 * 2  # 16 and 17 pixels are one patch
    features = [
        {bench.data(cell).features(bench.encoders[cell.encoder], cell).folder for cell in unit.cells} for unit in units
    ]
    assert not any(one & other for one, other in combinations(features, 2))
    parts = [units_of(bench, Shard(number, 3)) for number in (1, 2, 3)]
    assert sorted(unit.id for part in parts for unit in part) == sorted(unit.id for unit in units)


def test_workers_elsewhere_leave_the_results_of_one_process(root, alone, tmp_path):
    told = []
    outcome = run_grid(GRID, root, tmp_path, device="cpu", over_cases=elsewhere, on_progress=lambda *n: told.append(n))
    assert untimed(outcome) == alone and not outcome.failed
    assert told[-1] == (len(alone), len(alone))
    again = run_grid(GRID, root, tmp_path, device="cpu", over_cases=elsewhere)
    assert untimed(again) == alone


def test_a_unit_that_is_tried_again_goes_on_where_the_lost_worker_was(root, alone, tmp_path):
    def lost(task, units, names):
        for place, unit in enumerate(units):
            task(unit)  # its worker is killed before it can say so
            if place:
                yield attempt(task, unit, place, names[place])
            else:
                yield Outcome(place, None, Fault(ImageError("ended its worker 2 times", where=names[place]), ""))

    measured = []
    measure = Bench.measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bench, "measure", lambda self, cell: measured.append(cell) or measure(self, cell))
        outcome = run_grid(GRID, root, tmp_path, device="cpu", over_cases=lost)
    assert len(measured) == len(set(measured)) == len(alone)
    assert untimed(outcome) == alone and not outcome.failed  # what the lost worker had written counts


def test_a_unit_without_a_worker_is_named_cell_by_cell_and_the_others_go_on(root, tmp_path):
    def poisoned(task, units, names):
        yield Outcome(0, None, Fault(ImageError("ended its worker 2 times", where=names[0]), ""))
        for place in range(1, len(units)):
            yield attempt(task, units[place], place, names[place])

    outcome = run_grid(GRID, root, tmp_path, device="cpu", over_cases=poisoned)
    bad = units_of(Bench(GRID, root, tmp_path, torch.device("cpu")))[0]
    assert set(outcome.failed) == {str(cell) for cell in bad.cells}
    assert all("ended its worker 2 times" in told for told in outcome.failed.values()) and outcome.results


def test_a_budget_holds_for_workers_too(root, tmp_path):
    none = run_grid(GRID, root, tmp_path, device="cpu", budget_s=0.0, over_cases=elsewhere)
    assert len(none.missing) == len(Bench(GRID, root, tmp_path, torch.device("cpu")).cells) and not none.results


def test_shards_at_the_same_time_and_then_a_plain_call_have_every_cell_once(root, alone, tmp_path):
    for number in (1, 2):
        with lock_folder(tmp_path, part=str(Shard(3 - number, 2))):  # the other one is at work
            run_grid(GRID, root, tmp_path, device="cpu", shard=Shard(number, 2))
            with pytest.raises(ResourceError, match="another run"):
                run_grid(GRID, root, tmp_path, device="cpu")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert len(before) == len(alone)
    assert untimed(run_grid(GRID, root, tmp_path, device="cpu")) == alone
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == before


def test_the_data_sets_are_prepared_by_one_shard_while_the_others_wait(root, tmp_path, monkeypatch):
    masks = TaskEntry(name="masks", data="masks", probe="patch_linear", resolutions=(64,))
    opened = Bench.__init__

    def open_alone(self, *given):
        with pytest.raises(ResourceError), lock_folder(tmp_path, part="sets"):
            pass
        opened(self, *given)

    monkeypatch.setattr(Bench, "__init__", open_alone)
    assert run_grid(toy_grid(tasks=(masks,)), root, tmp_path, device="cpu", shard=Shard(1, 1)).results


@pytest.mark.slow
def test_the_command_measures_in_shards_and_over_processes(root, alone, tmp_path, capsys):
    GRID.write(root / "grid.json")
    command = ["benchmark", str(root / "grid.json"), "-w", str(tmp_path), "--device", "cpu", "--json"]
    assert not voxdino([*command, "--shard", "1/2"])
    first = json.loads(capsys.readouterr().out)["num_measured"]
    assert 0 < first < len(alone) and not (tmp_path / "report").exists()
    assert not voxdino([*command, "--on", "local:2"])
    done = capsys.readouterr()
    assert json.loads(done.out)["num_measured"] == len(alone) and (tmp_path / "report" / "report.html").is_file()
    assert f"{len(alone)} of {len(alone)} cells" in done.err


def test_a_shard_that_waits_for_the_data_sets_says_so(root, tmp_path, monkeypatch):
    monkeypatch.setattr("voxdino.benchmark.run._WAIT_FOR_SETS_S", 0.01)
    told = []
    with lock_folder(tmp_path, part="sets"), pytest.raises(ResourceError, match="another run"):
        run_grid(GRID, root, tmp_path, device="cpu", shard=Shard(1, 2), say=told.append)
    assert len(told) == 1 and told[0].startswith("waiting for another run in")
