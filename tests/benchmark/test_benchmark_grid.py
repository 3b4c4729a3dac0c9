"""A grid file says what is measured, once each; what cannot be meant is refused."""

from collections import Counter
from itertools import pairwise

import pytest
from small_benchmark import toy_grid

from voxdino.benchmark.grid import Cell, EncoderEntry, Grid, TaskEntry, cells_of
from voxdino.core.errors import ConfigError

SEEDED = {"pictures": False, "volumes": True, "masks": False}


def cells(grid: Grid, **sites: tuple[str, ...]) -> tuple[Cell, ...]:
    return cells_of(grid, {"tiny": None, "pixels": None}, sites, SEEDED)


def test_every_combination_comes_once_and_seeds_only_where_they_matter():
    found = cells(toy_grid())
    assert len(set(found)) == len(found)
    counts = Counter((cell.task, cell.resolution, cell.shots) for cell in found if cell.encoder == "tiny")
    assert counts == {
        ("pictures", 16, None): 1,
        ("pictures", 32, None): 1,
        ("pictures", 32, 2): 2,
        ("volumes", 16, None): 2,
        ("masks", 64, None): 1,
    }


def test_cells_of_one_encoder_and_resolution_come_together():
    places = [(cell.task, cell.encoder, cell.resolution) for cell in cells(toy_grid())]
    assert sum(first != second for first, second in pairwise(places)) == len(set(places)) - 1


def test_each_site_is_held_out_in_turn():
    task = TaskEntry(name="masks", data="d", probe="patch_linear", resolutions=(64,), hold_out="group")
    found = cells(toy_grid(tasks=(task,)), masks=("north", "south"))
    assert [(cell.site, cell.shots) for cell in found if cell.encoder == "tiny"] == [("north", None), ("south", None)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"encoders": [{"name": "a", "source": "x"}, {"name": "a", "source": "y"}]}, "encoders: 'a' comes twice"),
        ({"tasks": [{"name": "t", "data": "d", "probe": "linear", "resolution": 112}]}, "Did you mean 'resolutions'"),
        ({"tasks": [{"name": "t", "data": "d", "probe": "linear", "resolutions": [0]}]}, "above 0"),
        ({"tasks": [{"name": "t", "data": "d", "probe": "knn", "resolutions": [9], "shots_at": 8}]}, "shots_at 8"),
        ({"seeds": []}, "seeds"),
        (
            {"tasks": [{"name": "t", "data": "d", "probe": "knn", "resolutions": [9], "corruptions": ["blurr"]}]},
            "no corruption 'blurr'. Did you mean 'blur'",
        ),
        ({"tasks": [{"name": "t", "data": "d", "probe": "knn", "resolutions": [9], "strengths": [6]}]}, "from 1 to 5"),
        *(
            ({"tasks": [{"name": "t", "data": "d", "probe": "knn", "resolutions": [9], **settings}]}, told)
            for settings, told in (
                ({"corruptions": ["blur"], "strengths": []}, "strengths"),
                ({"corruptions": ["blur"], "hold_out": "group"}, "corruptions are not measured of sites: leave them"),
                ({"shots": [1], "hold_out": "group"}, "shots are not measured of sites: leave them out, or take"),
            )
        ),
    ],
)
def test_a_grid_that_cannot_be_meant_is_refused(change, told):
    value = {
        "encoders": [{"name": "a", "source": "x"}],
        "tasks": [{"name": "t", "data": "d", "probe": "linear", "resolutions": [112]}],
    }
    with pytest.raises(ConfigError, match=told):
        Grid.from_json({**value, **change}, where="grid.json")


def test_a_grid_file_says_what_the_grid_says(tmp_path):
    grid = toy_grid(encoders=(EncoderEntry(name="ünï <b>", source="random:tiny"),))
    grid.write(tmp_path / "grid.json")
    assert Grid.read(tmp_path / "grid.json") == grid


def test_every_fault_and_strength_follows_the_probe_that_it_asks():
    task = TaskEntry(
        name="volumes",
        data="d",
        probe="slice_max",
        resolutions=(16, 32),
        corruptions=("blur", "noise"),
        strengths=(5, 1),
    )
    found = [cell for cell in cells(toy_grid(tasks=(task,))) if cell.encoder == "tiny" and cell.resolution == 32]
    asked = [(cell.seed, cell.corruption, cell.strength) for cell in found]
    faults = [(0, name, strength) for name in ("blur", "noise") for strength in (1, 5)]
    assert asked == [(0, None, 0), *faults, (1, None, 0)]


def test_a_cell_is_named_as_before_there_were_corruptions():
    cell = Cell(task="t", encoder="e", resolution=112, shots=4, seed=2)
    assert cell.key == {"task": "t", "encoder": "e", "resolution": 112, "shots": 4, "site": None, "seed": 2}
    assert cell.model_copy(update={"corruption": "blur", "strength": 1}).key != cell.key
