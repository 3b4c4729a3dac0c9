"""Laws of the metrics: agreement with brute force and published numbers, and the rules for empty masks."""

import json
from itertools import product
from math import isnan
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from voxdino.core.errors import GeometryError
from voxdino.evaluation.masks import bounding_box, pair_masks
from voxdino.evaluation.metrics import METRICS
from voxdino.evaluation.overlap import dice, iou
from voxdino.evaluation.surface import cell_codes, element_areas, surface_distances

SPACINGS = {2: [(1.0, 1.0), (0.7, 2.3)], 3: [(1.0, 1.0, 1.0), (3.0, 0.8, 0.8), (0.9, 2.3, 5.1)]}
SHAPES = [(9, 14), (5, 9, 11)]


def blobs(shape, seed, share=0.3):
    """A smooth random mask and a similar one."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(shape)
    for axis in range(len(shape)):
        noise = noise + np.roll(noise, 1, axis) + np.roll(noise, -1, axis)
    other = noise + rng.standard_normal(shape) * noise.std() * 0.5
    return noise > np.quantile(noise, 1 - share), other > np.quantile(other, 1 - share)


def scores(prediction, reference, spacing, **options):
    pair = pair_masks(prediction, reference, spacing, **options)
    return {name: metric.compute(pair) for name, metric in METRICS.items()}


def brute_force(prediction, reference, spacing, tolerance):
    """HD95 and NSD from all pairs of surface elements, found cell by cell."""
    areas = element_areas(spacing)
    elements = []
    for mask in (prediction, reference):
        padded = np.pad(mask, 1)
        found = []
        for cell in product(*(range(size - 1) for size in padded.shape)):
            corners = padded[tuple(slice(i, i + 2) for i in cell)].ravel()
            if 0 < corners.sum() < corners.size:
                found.append((np.array(cell) * spacing, areas[int((corners << np.arange(corners.size)).sum())]))
        elements.append(found)
    percentiles, within, area = [], 0.0, 0.0
    for mine, other in (elements, elements[::-1]):
        others = np.array([position for position, _ in other])
        directed = sorted((np.linalg.norm(others - position, axis=1).min(), weight) for position, weight in mine)
        total = sum(weight for _, weight in directed)
        running = np.cumsum([weight for _, weight in directed]) / total
        percentiles.append(next(d for (d, _), share in zip(directed, running, strict=True) if share >= 0.95))
        within += sum(weight for d, weight in directed if d <= tolerance + 1e-9)
        area += total
    return max(percentiles), within / area


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
@pytest.mark.parametrize("seed", range(3))
def test_surface_metrics_equal_brute_force(shape, seed):
    prediction, reference = blobs(shape, seed)
    for spacing in SPACINGS[len(shape)]:
        got = scores(prediction, reference, spacing, tolerance=1.0)
        hd95, nsd = brute_force(prediction, reference, spacing, 1.0)
        assert got["hd95"] == pytest.approx(hd95, rel=1e-6)
        assert got["nsd"] == pytest.approx(nsd, abs=1e-9)


def test_surface_metrics_equal_the_surface_distance_package():
    folder = Path(__file__).parent / "reference-values"
    values, masks = json.loads((folder / "metrics.json").read_text()), load_file(folder / "metrics.safetensors")
    num_compared = 0
    for name, case in values["cases"].items():
        prediction, reference = (masks[f"{name}.{which}"].astype(bool) for which in ("prediction", "reference"))
        for tolerance in (1.0, 2.0):
            got = scores(prediction, reference, tuple(case["spacing_mm"]), tolerance=tolerance)
            wanted = {
                "hd95": case.get("surface_distance.hd95_mm"),
                "nsd": case.get(f"surface_distance.nsd_{tolerance:.0f}mm"),
                "dice": float(case["dice"]),
            }
            for metric, value in wanted.items():
                if value is not None:
                    assert got[metric] == pytest.approx(value, abs=1e-9, nan_ok=True), (name, metric)
                    num_compared += 1
    assert num_compared > 30


def test_element_areas_by_hand():
    areas = element_areas((3.0, 2.0, 1.0))
    assert areas[0] == areas[255] == 0
    assert areas[0b00001111] == pytest.approx(2.0)  # the plane across the first axis: 2 x 1
    assert areas[0b00110011] == pytest.approx(3.0)
    assert areas[0b01010101] == pytest.approx(6.0)
    corner = np.cross((-1.5, 1.0, 0.0), (-1.5, 0.0, 0.5))  # the triangle through the middles of three edges
    assert areas[1] == areas[128] == pytest.approx(np.linalg.norm(corner) / 2)
    np.testing.assert_allclose(areas, areas[::-1])  # inside and outside are alike
    lengths = element_areas((2.0, 1.0))
    np.testing.assert_allclose(lengths[[0, 1, 3, 5, 9]], [0, np.hypot(1, 0.5), 1, 2, 2 * np.hypot(1, 0.5)])


def test_the_surface_of_a_box_has_its_area():
    mask = np.ones((4, 6, 5), bool)
    codes = cell_codes(mask)
    flat = element_areas((1.0, 1.0, 1.0))[codes]
    assert flat[2:-2, 2:-2, 0].sum() == 1 * 3  # a face is worth its area
    assert codes.shape == (5, 7, 6)
    assert (codes > 0).all()


def test_shifted_cubes_by_hand():
    prediction, reference = np.zeros((2, 20, 20, 20), bool)
    reference[5:15, 5:15, 5:15] = True
    prediction[5:15, 5:15, 7:17] = True
    got = scores(prediction, reference, (1.0, 1.0, 3.0))
    assert got["dice"] == pytest.approx(0.8)
    assert got["iou"] == pytest.approx(8 / 12)
    assert got["hd95"] == pytest.approx(6.0)
    assert got["volume"] == pytest.approx(3.0)
    assert got["volume_error"] == 0.0
    assert scores(prediction, reference, (1.0, 1.0, 3.0), tolerance=6.0)["nsd"] == 1.0


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_rules_for_empty_masks(shape):
    empty, full = np.zeros(shape, bool), np.ones(shape, bool)
    spacing = (1.0,) * len(shape)
    volume = full.size / (1000 if len(shape) == 3 else 1)
    for prediction, reference, error in ((empty, full, -volume), (full, empty, volume)):
        got = scores(prediction, reference, spacing)
        assert (got["dice"], got["iou"], got["nsd"]) == (0.0, 0.0, 0.0)
        assert isnan(got["hd95"])
        assert got["volume_error"] == pytest.approx(error)
    got = scores(empty, empty, spacing)
    assert all(isnan(got[name]) for name in ("dice", "iou", "hd95", "nsd"))
    assert got["volume"] == got["volume_error"] == 0.0


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_states_its_rule_and_reaches_its_best_for_equal_masks(name):
    metric = METRICS[name]
    assert "empty" in (metric.compute.__doc__ or "").lower()
    assert metric.definition
    mask, _ = blobs((5, 9, 11), 0)
    value = metric.compute(pair_masks(mask, mask, (2.0, 1.0, 0.5)))
    assert metric.better is None or value == {"higher": 1.0, "lower": 0.0}[metric.better]


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_every_metric_is_blind_to_where_the_structure_lies_and_keeps_its_input(name, shape):
    prediction, reference = blobs(shape, 4)
    spacing = SPACINGS[len(shape)][1]
    margins = [(3, 1), (0, 4), (2, 2)][: len(shape)]
    before = prediction.copy()
    near = METRICS[name].compute(pair_masks(prediction, reference, spacing))
    far = METRICS[name].compute(pair_masks(np.pad(prediction, margins), np.pad(reference, margins), spacing))
    assert far == pytest.approx(near, rel=1e-12)
    np.testing.assert_array_equal(prediction, before)


def test_single_voxels_are_as_far_apart_as_they_are():
    prediction, reference = np.zeros((2, 4, 9, 9), bool)
    prediction[1, 2, 3] = reference[3, 5, 7] = True
    got = scores(prediction, reference, (3.0, 0.8, 0.5))
    assert got["hd95"] == pytest.approx(np.linalg.norm([6.0, 2.4, 2.0]), rel=1e-6)


def test_a_volume_of_one_slice_is_scored_as_a_picture():
    prediction, reference = blobs((9, 14), 1)
    flat = scores(prediction, reference, (0.7, 2.3))
    for axis in range(3):
        spacing = [0.7, 2.3]
        spacing.insert(axis, 5.0)
        thin = scores(np.expand_dims(prediction, axis), np.expand_dims(reference, axis), tuple(spacing))
        assert [thin[name] for name in ("dice", "hd95", "nsd")] == [flat[name] for name in ("dice", "hd95", "nsd")]
        assert thin["volume"] == pytest.approx(flat["volume"] * 5 / 1000)


def test_overlap_by_hand():
    prediction, reference = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 1], bool)
    assert dice(prediction, reference) == 2 / 5
    assert iou(prediction, reference) == 1 / 4


def test_bounding_box_is_the_smallest():
    mask = np.zeros((6, 7, 8), bool)
    mask[2, 3, 4] = mask[4, 3, 6] = True
    assert bounding_box(mask) == (slice(2, 5), slice(3, 4), slice(4, 7))
    assert mask[bounding_box(np.zeros_like(mask))].size == 0


def test_masks_of_different_shapes_are_refused():
    with pytest.raises(GeometryError, match="a prediction of 2 x 3 voxels, a reference of 3 x 2"):
        pair_masks(np.zeros((2, 3), bool), np.zeros((3, 2), bool), (1.0, 1.0))


def test_directed_distances_are_sorted_and_weigh_the_whole_surface():
    prediction, reference = blobs((5, 9, 11), 2)
    spacing = (3.0, 0.8, 0.8)
    both = surface_distances(prediction, reference, spacing)
    for directed, mask in ((both.from_prediction, prediction), (both.from_reference, reference)):
        assert (np.diff(directed.distances) >= 0).all()
        assert directed.area == pytest.approx(element_areas(spacing)[cell_codes(mask)].sum())
