"""Pictures of results are written whole, in 2-D and 3-D, in true proportions."""

import numpy as np
import pytest
from PIL import Image

from voxdino.core.errors import GeometryError
from voxdino.core.geometry import Grid
from voxdino.core.labels import LabelSet
from voxdino.core.volume import LabelMap, Volume
from voxdino.evaluation.pictures import overlay_grid, overlay_picture

LABELS = LabelSet(names=("background", "liver", "lesion"), ids=(0, 5, 9))


def case(grid, channels=1):
    array = np.zeros(grid.shape, np.uint8)
    array[tuple(slice(2, size - 2) for size in grid.shape)] = 5
    dtype = np.uint8 if channels == 3 else np.int16
    image = np.random.default_rng(0).integers(0, 255, (channels, *grid.shape)).astype(dtype)
    return Volume(image, grid), LabelMap(array, grid), LabelMap(np.roll(array, 1, 0), grid)


def colours(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize(
    "grid, channels",
    [
        (Grid.from_spacing((12, 14, 6), (1.0, 1.0, 3.0)), 1),
        (Grid.from_spacing((12, 14), unit="px"), 1),
        (Grid.from_spacing((12, 14), unit="px"), 3),
    ],
    ids=["3d", "2d", "rgb"],
)
def test_reference_and_prediction_are_drawn_in_colour(tmp_path, grid, channels):
    overlay_picture(tmp_path / "a.png", *case(grid, channels), LABELS, title="case a", num_slices=1)
    picture = colours(tmp_path / "a.png").astype(int)
    blue = (picture[..., 2] - picture[..., 0]) > 40
    third = picture.shape[1] // 3
    assert blue[:, third : 2 * third].mean() > 0.05
    assert blue[:, 2 * third :].mean() > 0.05
    if channels == 1:
        assert not blue[:-60, : third - 10].any()


def test_anisotropic_voxels_keep_their_proportions(tmp_path):
    for name, spacing in (("square", (1.0, 1.0, 1.0)), ("tall", (1.0, 2.0, 1.0))):
        grid = Grid.from_spacing((20, 20, 5), spacing)
        overlay_picture(tmp_path / f"{name}.png", *case(grid), LABELS, num_slices=1)
    square, tall = (colours(tmp_path / f"{name}.png").shape for name in ("square", "tall"))
    assert square[1] == tall[1]
    assert tall[0] > 1.4 * square[0]


def test_several_cases_make_several_rows_and_the_same_file_each_time(tmp_path):
    grid = Grid.from_spacing((12, 14, 6))
    cases = [(f"case {i}", *case(grid)) for i in range(3)]
    overlay_grid(tmp_path / "a.png", cases, LABELS)
    overlay_grid(tmp_path / "b.png", cases, LABELS)
    overlay_grid(tmp_path / "one.png", cases[:1], LABELS)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert colours(tmp_path / "a.png").shape[0] > 2 * colours(tmp_path / "one.png").shape[0]


def test_without_predictions_two_panels_show_where_the_labels_lie(tmp_path):
    grid = Grid.from_spacing((12, 14, 6))
    image, reference, prediction = case(grid)
    overlay_grid(tmp_path / "two.png", [("a", image, reference, None)], LABELS)
    overlay_grid(tmp_path / "three.png", [("a", image, reference, prediction)], LABELS)
    two, three = colours(tmp_path / "two.png").astype(int), colours(tmp_path / "three.png")
    assert two.shape[1] == pytest.approx(three.shape[1] * 2 / 3, rel=0.02)
    half = two.shape[1] // 2
    blue = (two[..., 2] - two[..., 0]) > 40
    assert blue[:, half:].mean() > 0.05 and not blue[:-60, : half - 10].any()


def test_nothing_to_show_is_still_a_picture(tmp_path):
    grid = Grid.from_spacing((12, 14, 6))
    image, reference, _ = case(grid)
    empty = LabelMap(np.zeros_like(reference.array), grid)
    overlay_picture(tmp_path / "a.png", image, empty, empty, LABELS)
    assert colours(tmp_path / "a.png").size


def test_different_shapes_are_refused(tmp_path):
    image, reference, _ = case(Grid.from_spacing((12, 14, 6)))
    _, _, other = case(Grid.from_spacing((12, 14, 7)))
    with pytest.raises(GeometryError, match="different shapes"):
        overlay_picture(tmp_path / "a.png", image, reference, other, LABELS)
