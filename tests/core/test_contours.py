"""Contours are exactly the mask: filled again under either rule they give its voxels, and its area and centroid."""

import numpy as np
import pytest

from voxdino.core.io.contours import trace_polygons


def fill(polygons, shape):
    """(crossings, windings) of every voxel centre, by brute force over the polygons' vertical edges."""
    row, column = np.indices(shape)
    crossings, windings = np.zeros(shape, int), np.zeros(shape, int)
    for polygon in polygons:
        for (r0, c0), (r1, c1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            meets = (
                (min(r0, r1) <= row) & (row < max(r0, r1)) & (column > c0 + (row - r0) * (c1 - c0) / ((r1 - r0) or 1))
            )
            crossings += meets
            windings += np.where(meets, np.sign(r1 - r0).astype(int), 0)
    return crossings, windings


def moments(polygons):
    """Area and centroid (row, column) by the shoelace formula."""
    area, centre = 0.0, np.zeros(2)
    for polygon in polygons:
        after = np.roll(polygon, -1, axis=0)
        cross = polygon[:, 1] * after[:, 0] - polygon[:, 0] * after[:, 1]
        area += cross.sum() / 2
        centre += ((polygon + after) * cross[:, None]).sum(axis=0) / 6
    return area, centre / area


def blobs(seed, density):
    return np.random.default_rng(seed).random((11, 14)) < density


MASKS = {
    "one voxel": np.ones((1, 1), bool),
    "ring": np.pad(np.pad(np.zeros((1, 2), bool), 1, constant_values=True), 1),
    "island in a hole": np.pad(np.pad(np.pad(np.ones((1, 1), bool), 2), 1, constant_values=True), 1),
    "two holes in a row": np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]], bool),
    "holes one over the other": np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 0, 1], [1, 1, 1]], bool),
    "diagonal hole": np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1]], bool),
    "chessboard": np.indices((6, 7)).sum(axis=0) % 2 == 0,
    **{f"noise {density} {seed}": blobs(seed, density) for density in (0.2, 0.5, 0.8, 0.93) for seed in range(6)},
}


@pytest.mark.parametrize("name", MASKS)
def test_filled_contours_are_the_mask_under_either_rule(name):
    mask = MASKS[name]
    polygons = trace_polygons(mask)
    crossings, windings = fill(polygons, mask.shape)
    np.testing.assert_array_equal(crossings % 2 == 1, mask)
    np.testing.assert_array_equal(windings != 0, mask)


@pytest.mark.parametrize("name", MASKS)
def test_contours_have_the_area_and_the_centroid_of_the_mask(name):
    mask = MASKS[name]
    area, centre = moments(trace_polygons(mask))
    assert area == mask.sum()
    np.testing.assert_allclose(centre, np.argwhere(mask).mean(axis=0), atol=1e-9)


def test_a_ring_is_one_polygon_whose_hole_hangs_on_a_channel():
    ring = MASKS["ring"][1:-1, 1:-1]
    (polygon,) = trace_polygons(ring)
    assert len(polygon) == 4 + 4 + 2  # two rectangles, and both ends of the channel twice
    assert {tuple(point) for point in polygon} >= {(-0.5, -0.5), (2.5, 3.5), (0.5, 0.5), (1.5, 2.5), (0.5, -0.5)}


def test_voxels_that_touch_at_a_corner_are_polygons_of_their_own():
    assert len(trace_polygons(np.eye(3, dtype=bool))) == 3


def test_nothing_has_no_contour():
    assert trace_polygons(np.zeros((3, 4), bool)) == []
