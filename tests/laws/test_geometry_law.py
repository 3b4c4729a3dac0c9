"""The geometry law: a label map through preparation and back through the predictor's export is the same file again.

48 axis orders x 5 oblique rotations x 3 spacings, with files on disk, all slice axes, and in-plane resampling.
"""

import os
from itertools import permutations, product

import numpy as np
import pytest
import torch

from voxdino.core.geometry import Grid
from voxdino.core.io import read_label_map, read_volume, write_label_map
from voxdino.core.labels import LabelSet
from voxdino.core.volume import LabelMap, Volume
from voxdino.inference.export import export_labels
from voxdino.preparation.intensity import ChannelPolicy
from voxdino.preparation.plan import Plan
from voxdino.preparation.prepare import prepare_case

LABELS = LabelSet(names=("background", "a", "b", "c"), ids=(0, 2, 7, 300))
SHAPE = (5, 4, 6)  # along x, y, z of an untilted patient
SPACINGS = ((1.0, 1.0, 1.0), (0.7, 0.7, 5.0), (0.6, 2.2, 1.1))
ORDERS = [(order, flips) for order in permutations(range(3)) for flips in product((False, True), repeat=3)]


def rotation(degrees):
    """A rotation about all three axes."""
    total = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[[i, j], [i, j]] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        total = total @ turn
    return total


OBLIQUES = [rotation(degrees) for degrees in ((0, 0, 0), (3, -2, 5), (-12, 7, 20), (25, -15, 10), (-8, 31, -22))]


def make_plan(slice_axis="S", in_plane_spacing=None):
    return Plan(
        dataset="law",
        fingerprint_digest="",
        ndim=2 if slice_axis is None else 3,
        labels=LABELS,
        channels=(ChannelPolicy(name="MR", source=0, kind="mr", lower=None, upper=None, mean=None, sd=None),),
        slice_axis=slice_axis,
        in_plane_spacing=in_plane_spacing,
        magnification=2.0,
        crop=(8, 8),
        tile=(8, 8),
        context_slices=0,
        input_builder="repeat",
        batch_size=2,
        patch_size=16,
    )


def one_hot_slabs(label, num_outputs, slices_at_once=2):
    """Logits as a perfect model would give them, a few slices at a time: (first slice, (d, K, H, W))."""
    for first in range(0, len(label), slices_at_once):
        indices = torch.from_numpy(label[first : first + slices_at_once].astype(np.int64))
        yield first, 10 * torch.nn.functional.one_hot(indices, num_outputs).movedim(-1, 1).float()


def there_and_back(folder, grid, array, plan):
    """A label file, prepared; its prepared label handed back as logits; the prediction written and read again."""
    write_label_map(folder / "label.nii", LabelMap(array, grid))
    label = read_label_map(folder / "label.nii")
    image = Volume(np.arange(array.size, dtype=np.int16).reshape(1, *array.shape), label.grid)
    prepared = prepare_case("case", image, label, plan)
    assert prepared.label is not None
    slabs = one_hot_slabs(prepared.label, plan.labels.num_outputs)
    predicted = export_labels(slabs, prepared.geometry, plan.labels)
    write_label_map(folder / "prediction.nii", predicted, like=folder / "label.nii")
    return prepared, label, read_label_map(folder / "prediction.nii")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk_or_for_threads(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def oriented_case(order, flips, turn, spacing, seed=0):
    grid = Grid(SHAPE, np.block([[turn * spacing, np.array([[-31.5], [17.25], [102.0]])], [np.zeros((1, 3)), 1.0]]))
    grid = grid.transposed(order, flips)
    return grid, np.random.default_rng(seed).choice(np.array(LABELS.ids, np.uint16), grid.shape)


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
@pytest.mark.parametrize("turn", range(len(OBLIQUES)), ids=lambda i: f"oblique{i}")
def test_labels_come_back_voxel_for_voxel_on_their_grid(tmp_path, turn, spacing):
    for seed, (order, flips) in enumerate(ORDERS):
        grid, array = oriented_case(order, flips, OBLIQUES[turn], spacing, seed)
        _, label, predicted = there_and_back(tmp_path, grid, array, make_plan("SAR"[seed % 3]))
        assert (predicted.array != array).sum() == 0, (order, flips)
        np.testing.assert_allclose(predicted.grid.affine, label.grid.affine, atol=1e-6, rtol=0)
        np.testing.assert_allclose(predicted.grid.affine, grid.affine, atol=1e-4, rtol=0)  # files hold float32


@pytest.mark.parametrize("spacing", [(0.7, 0.7, 5.0), (0.6, 2.2, 1.1)], ids=str)
@pytest.mark.parametrize("factor", [1.0, 1.31, 2.0, 3.2])
def test_labels_come_back_where_the_plan_is_finer_than_the_scan(tmp_path, spacing, factor):
    for seed, (order, flips) in enumerate(ORDERS[::5]):
        grid, array = oriented_case(order, flips, OBLIQUES[2], spacing, seed)
        finer = tuple(np.array(spacing)[[1, 0]] / factor)  # rows along A, columns along R
        prepared, _, predicted = there_and_back(tmp_path, grid, array, make_plan("S", in_plane_spacing=finer))
        assert prepared.geometry.prepared_shape[1:] == tuple(round(n * factor) for n in (SHAPE[1], SHAPE[0]))
        np.testing.assert_array_equal(predicted.array, array)


def test_all_cases_of_a_set_lie_alike_once_prepared(tmp_path):
    turn, spacing = OBLIQUES[1], SPACINGS[2]
    upright, array = oriented_case((0, 1, 2), (False, False, False), turn, spacing)
    expected, _, _ = there_and_back(tmp_path, upright, array, make_plan("A"))
    for order, flips in ORDERS:
        grid = upright.transposed(order, flips)
        turned = np.flip(array.transpose(order), tuple(np.flatnonzero(flips)))
        prepared, _, _ = there_and_back(tmp_path, grid, np.ascontiguousarray(turned), make_plan("A"))
        assert prepared.label is not None
        np.testing.assert_array_equal(prepared.label, expected.label)


def test_pictures_come_back(tmp_path):
    grid = Grid.from_spacing((7, 9), unit="px")
    array = np.random.default_rng(0).choice(np.array(LABELS.ids, np.uint16), grid.shape)
    write_label_map(tmp_path / "label.png", LabelMap(array, grid))
    label = read_label_map(tmp_path / "label.png")
    prepared = prepare_case("case", Volume(np.zeros((1, 7, 9), np.uint8), grid), label, make_plan(None))
    assert prepared.label is not None
    predicted = export_labels(one_hot_slabs(prepared.label, 4), prepared.geometry, LABELS)
    np.testing.assert_array_equal(predicted.array, array)
    assert predicted.grid.ndim == 2


@pytest.mark.shared
@pytest.mark.parametrize(
    "image, label",
    [
        ("ct_mr/example_ct.nii.gz", "ct_mr/example_ct_seg104_silver.nii.gz"),
        ("ct_mr/example_mr_sm.nii.gz", "ct_mr/example_seg_mr.nii.gz"),
        ("hippocampus/imagesTr/hippocampus_001_0000.nii.gz", "hippocampus/labelsTr/hippocampus_001.nii.gz"),
    ],
)
@pytest.mark.parametrize("slice_axis", ["S", "A", "R"])
def test_real_label_maps_come_back_under_the_headers_of_their_images(shared_folder, tmp_path, image, label, slice_axis):
    volume, reference = read_volume(shared_folder / "data" / image), read_label_map(shared_folder / "data" / label)
    if volume.grid.shape != reference.grid.shape:
        pytest.skip("these files are of different scans")
    values = tuple(int(value) for value in np.unique(reference.array))
    labels = LabelSet(names=tuple(f"label {value}" for value in values), ids=values)
    plan = make_plan(slice_axis).model_copy(update={"labels": labels})
    prepared = prepare_case("case", volume, reference, plan)
    assert prepared.label is not None
    predicted = export_labels(one_hot_slabs(prepared.label, len(values), 1), prepared.geometry, labels)
    write_label_map(tmp_path / "prediction.nii.gz", predicted, like=shared_folder / "data" / image)
    written = read_label_map(tmp_path / "prediction.nii.gz")
    np.testing.assert_array_equal(written.array, reference.array)
    np.testing.assert_allclose(written.grid.affine, volume.grid.affine, atol=1e-6, rtol=0)
