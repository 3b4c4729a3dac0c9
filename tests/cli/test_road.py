"""The end of the road tells what has no score, and draws what was predicted as it was predicted."""

from pathlib import Path

import numpy as np
import pytest

from voxdino.cli import road
from voxdino.core.errors import InputError, PartialError
from voxdino.core.geometry import Grid
from voxdino.core.io import write_label_map, write_volume
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.core.volume import LabelMap, Volume
from voxdino.preparation.case import Case
from voxdino.preparation.intensity import ChannelPolicy
from voxdino.preparation.plan import Plan

LABELS = LabelSet(names=("background", "liver", "lesion"), ids=(0, 1, 2))
SHAPE = (6, 5, 4)


def draw_case(folder: Path, name: str) -> Case:
    """An image and a reference whose values 1 and 2 are to be swapped by --map."""
    grid, array = Grid.from_spacing(SHAPE, (1.0, 1.0, 3.0)), np.zeros(SHAPE, np.uint8)
    array[1:3], array[4] = 2, 1
    image, label = folder / "images" / f"{name}.nii.gz", folder / "labels" / f"{name}.nii.gz"
    write_volume(image, Volume(array[None].astype(np.int16), grid))
    write_label_map(label, LabelMap(array, grid))
    predicted = np.where(array == 0, 0, 3 - array).astype(np.uint8)
    write_label_map(folder / "run" / "validation" / f"{name}.nii.gz", LabelMap(predicted, grid))
    return Case(name, (image,), label)


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    return [draw_case(tmp_path, name) for name in ("good", "lost")]


@pytest.fixture
def plan() -> Plan:
    return Plan(
        dataset="two",
        fingerprint_digest="",
        ndim=3,
        labels=LABELS,
        channels=(ChannelPolicy(name="MR", source=0, kind="mr"),),
        slice_axis="S",
        in_plane_spacing=None,
        magnification=1.0,
        crop=(8, 8),
        tile=(8, 8),
        context_slices=0,
        input_builder="repeat",
        batch_size=2,
        patch_size=4,
        read_options=ReadOptions(label_map=((1, 2), (2, 1))),
    )


def walked(plan: Plan, cases: list[Case], folder: Path, failed: dict[str, str]) -> road.Road:
    scores = road.score_held_back(plan, folder, cases, failed, 1)
    return road.Road(folder.parent, folder, scores=scores)


def test_cases_without_a_score_are_named_and_end_the_road_in_part(plan, cases, tmp_path):
    (tmp_path / "run" / "validation" / "lost.nii.gz").unlink()
    end = walked(plan, cases, tmp_path / "run", {"lost": "lost.nii.gz: is torn."}).error()
    assert isinstance(end, PartialError)
    assert "1 of 2 held-back cases have no score: lost (lost.nii.gz: is torn.)" in str(end)
    assert '"lost.nii.gz: is torn."' in (tmp_path / "run" / "scores.json").read_text()
    also = walked(plan, cases, tmp_path / "run", {}).error(PartialError("3 cases were set aside"))
    assert "lost (" in str(also) and "3 cases were set aside" in str(also)


def test_a_road_without_any_score_has_failed(plan, cases, tmp_path, capsys):
    for path in (tmp_path / "run" / "validation").iterdir():
        path.unlink()
    end = walked(plan, cases, tmp_path / "run", {})
    road.draw(plan, tmp_path / "run", cases, end.scores)
    road.print_road(end)
    assert isinstance(end.error(), InputError) and "picture" not in capsys.readouterr().out


def test_a_whole_road_ends_well_and_is_drawn_as_it_is_scored(plan, cases, tmp_path, monkeypatch):
    end = walked(plan, cases, tmp_path / "run", {})
    assert end.error() is None and end.error(PartialError("set aside")) is not None
    assert end.scores is not None and end.scores.mean() == 1.0
    drawn = []
    monkeypatch.setattr(road, "overlay_grid", lambda _, rows, *__, **___: drawn.extend(rows))
    road.draw(plan, tmp_path / "run", cases, end.scores)
    for _, _, reference, prediction in drawn:
        np.testing.assert_array_equal(prediction.array, reference.array)
    assert len(drawn) == 2
