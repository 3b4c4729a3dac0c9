"""Laws of the metrics: agreement with brute force and published numbers, and the rules for empty masks."""

import json
from itertools import product
from math import isnan
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from voxdino.core.errors import GeometryError
from voxdino.evaluation.masks import pair_maps, pair_masks
from voxdino.evaluation.metrics import METRICS
from voxdino.evaluation.overlap import dice, iou
from voxdino.evaluation.papers import COLUMNS
from voxdino.evaluation.reference import CASES, SAME_DEFINITION
from voxdino.evaluation.surface import cell_codes, element_areas, surface_distances
from voxdino.models.reference import check_reference_values

SPACINGS = {2: [(1.0, 1.0), (0.7, 2.3)], 3: [(1.0, 1.0, 1.0), (3.0, 0.8, 0.8), (0.9, 2.3, 5.1)]}
SHAPES = [(9, 14), (5, 9, 11)]
REFERENCE = Path(__file__).parent / "reference-values"


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


def elements_of(mask, spacing):
    """Places (N, axes) and areas (N,) of all surface elements, cell by cell."""
    areas, padded = element_areas(spacing), np.pad(mask, 1)
    places, weights = [], []
    for cell in product(*(range(size - 1) for size in padded.shape)):
        corners = padded[tuple(slice(i, i + 2) for i in cell)].ravel()
        if 0 < corners.sum() < corners.size:
            places.append(np.array(cell) * spacing)
            weights.append(areas[int((corners << np.arange(corners.size)).sum())])
    return np.array(places), np.array(weights)


def edges_of(mask, spacing):
    """Places (N, axes) of all voxels with a neighbour outside, voxel by voxel."""
    padded, steps = np.pad(mask, 1), np.eye(mask.ndim, dtype=int)
    neighbours = [*steps, *-steps]
    return np.array(
        [
            np.array(voxel) * spacing
            for voxel in np.argwhere(padded)
            if not all(padded[tuple(voxel + step)] for step in neighbours)
        ]
    )


def nearest(places):
    """Distances from each place of the first set to the second, and the other way round."""
    between = np.linalg.norm(places[0][:, None] - places[1][None], axis=-1)
    return between.min(axis=1), between.min(axis=0)


def brute_force(prediction, reference, spacing, tolerance):
    """Every surface metric from all pairs of elements."""
    (places, weights) = zip(*(elements_of(mask, spacing) for mask in (prediction, reference)), strict=True)
    percentiles, largest, within, total, area = [], 0.0, 0.0, 0.0, 0.0
    for distances, weight in zip(nearest(places), weights, strict=True):
        order = np.argsort(distances)
        running = np.cumsum(weight[order]) / weight.sum()
        percentiles.append(distances[order][np.flatnonzero(running >= 0.95)[0]])
        largest = max(largest, distances.max())
        within += weight[distances <= tolerance + 1e-9].sum()
        total, area = total + (distances * weight).sum(), area + weight.sum()
    sides = nearest([edges_of(mask, spacing) for mask in (prediction, reference)])
    in_voxels = np.concatenate(nearest([edges_of(mask, (1.0,) * mask.ndim) for mask in (prediction, reference)]))
    return {
        "hd95": max(percentiles),
        "hd": largest,
        "assd": total / area,
        "nsd": within / area,
        "meddinov3:hd95": max(np.percentile(side, 95) for side in sides),
        "meddinov3:nsd": (np.concatenate(sides) <= tolerance + 1e-9).mean(),
        "dinomed3d:hd95": np.percentile(in_voxels, 95),
        "segdino:hd95": np.percentile(in_voxels, 95),
    }


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("decade", range(10))
def test_surface_metrics_equal_brute_force_on_two_hundred_pairs(ndim, decade):
    for seed in range(10 * decade, 10 * decade + 10):
        rng = np.random.default_rng(seed)
        shape = tuple(rng.integers(3, 7 if ndim == 3 else 14, ndim).tolist())
        spacing = tuple(rng.uniform(0.4, 4.0, ndim).tolist())
        prediction, reference = blobs(shape, seed, share=rng.uniform(0.1, 0.6))
        got = scores(prediction, reference, spacing, tolerance=1.5)
        for name, value in brute_force(prediction, reference, spacing, 1.5).items():
            assert got[name] == pytest.approx(value, rel=1e-6), (name, seed)


def test_every_number_of_the_published_tools_is_met():
    (result,) = check_reference_values(REFERENCE, CASES)
    assert result.passed and result.largest_error <= result.tolerance == 1e-6


@pytest.mark.parametrize("key", sorted({"surface_distance.average_mm", *SAME_DEFINITION.values()}))
def test_a_number_that_differs_from_the_tools_is_noticed(key, tmp_path):
    values = json.loads((REFERENCE / "metrics.json").read_text())
    told = next(case for case in values["cases"].values() if case.get(key))
    told[key] = [told[key][0] * (1 + 1e-5), told[key][1]] if isinstance(told[key], list) else told[key] * (1 + 1e-5)
    (tmp_path / "metrics.json").write_text(json.dumps(values))
    (tmp_path / "metrics.safetensors").write_bytes((REFERENCE / "metrics.safetensors").read_bytes())
    (result,) = check_reference_values(tmp_path, CASES)
    assert not result.passed and result.largest_error == pytest.approx(1e-5, rel=0.1)


def test_the_share_of_surface_grows_with_the_tolerance_as_in_the_surface_distance_package():
    values, masks = json.loads((REFERENCE / "metrics.json").read_text()), load_file(REFERENCE / "metrics.safetensors")
    told = {name: case for name, case in values["cases"].items() if "surface_distance.nsd_2mm" in case}
    assert len(told) > 4
    for name, case in told.items():
        prediction, reference = (masks[f"{name}.{which}"].astype(bool) for which in ("prediction", "reference"))
        got = scores(prediction, reference, tuple(case["spacing_mm"]), tolerance=2.0)
        assert got["nsd"] == pytest.approx(case["surface_distance.nsd_2mm"], rel=1e-9)


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


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_empty_masks_can_be_scored_best_and_worst_instead(shape):
    empty, full = np.zeros(shape, bool), np.ones(shape, bool)
    spacing = SPACINGS[len(shape)][1]
    for name, metric in METRICS.items():
        if metric.better is None or metric.paper is not None:
            assert metric.definition_under("score") == metric.definition
            continue
        best, worst = (1.0, 0.0) if metric.better == "higher" else (0.0, np.linalg.norm(np.multiply(shape, spacing)))
        for prediction, reference, value in ((empty, empty, best), (empty, full, worst), (full, empty, worst)):
            assert metric.value(pair_masks(prediction, reference, spacing), "score") == pytest.approx(value), name
        assert metric.definition_under("score") == f"{metric.definition}:empty-scored"
        assert "diagonal" in metric.rule_under("score") and "NaN" in metric.rule_under("undefined")
        mask, other = blobs(shape, 1)
        pair = pair_masks(mask, other, spacing)
        assert metric.value(pair, "score") == metric.value(pair, "undefined")


def test_the_papers_rules_for_empty_masks():
    empty, full = np.zeros((4, 5), bool), np.ones((4, 5), bool)
    pairs = ((empty, empty), (empty, full), (full, empty))  # (prediction, reference)
    nan = float("nan")
    wanted = {
        "meddinov3:dice": (nan, 0.0, nan),
        "meddinov3:hd95": (nan, nan, nan),
        "meddinov3:nsd": (nan, 0.0, nan),
        "nnunet:dice": (nan, 0.0, 0.0),
        "nnunet:iou": (nan, 0.0, 0.0),
        "dinomed3d:dice": (1.0, 0.0, 0.0),
        "dinomed3d:hd95": (0.0, nan, nan),
        "segdino:dice": (nan, 0.0, 0.0),
        "segdino:iou": (nan, 0.0, 0.0),
        "segdino:hd95": (0.0, nan, nan),
    }
    assert set(wanted) == set(COLUMNS)
    for name, values in wanted.items():
        for rule in ("undefined", "score"):
            got = [COLUMNS[name].value(pair_masks(*pair, (1.0, 2.0)), rule) for pair in pairs]
            assert got == pytest.approx(values, nan_ok=True), name


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


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_boxes_of_all_structures_are_the_smallest_that_hold_both_masks(shape, order):
    rng = np.random.default_rng(5)
    maps = np.where(rng.random((2, *shape)) < 0.06, rng.integers(0, 95, (2, *shape)), 0)
    prediction, reference = (np.array(one, order=order, dtype="u1" if order == "C" else "i8") for one in maps)
    members = [(index, index + 1) for index in range(1, 90)]  # overlapping regions, more than one word of bits
    pair = pair_maps(prediction, reference, (1.0, 2.0, 3.0)[: len(shape)])
    for indices, box in zip(members, pair.boxes(members), strict=True):
        found = np.argwhere(np.isin(pair.prediction, indices) | np.isin(pair.reference, indices))
        wanted = (
            [slice(int(a), int(b) + 1) for a, b in zip(found.min(0), found.max(0), strict=True)] if len(found) else []
        )
        assert list(box) == (wanted or [slice(0, 0)] * len(shape))


@pytest.mark.parametrize("name", METRICS)
def test_no_metric_depends_on_the_order_in_memory(name):
    prediction, reference = blobs((5, 9, 11), 3)
    spacing = (3.0, 0.8, 0.5)
    plain = METRICS[name].compute(pair_masks(prediction, reference, spacing))
    turned = METRICS[name].compute(pair_masks(*map(np.asfortranarray, (prediction, reference)), spacing))
    assert turned == pytest.approx(plain, rel=1e-12)


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
