"""What predictions leave behind: probabilities that agree with the label map, formats on request, tables of volumes."""

import csv
import json
from itertools import permutations, product

import blosc2
import numpy as np
import pytest
import torch
from small_models import LABELS, make_volume

from voxdino.core.errors import GeometryError, UsageError
from voxdino.core.geometry import Grid
from voxdino.core.io import read_label_map, write_volume
from voxdino.core.io.writers import WRITERS, format_for
from voxdino.core.labels import LabelSet, Region
from voxdino.inference import probabilities
from voxdino.inference.cases import find_cases
from voxdino.inference.export import export_labels
from voxdino.inference.outputs import PROBABILITIES_SUFFIX, OutputSettings, write_volumes
from voxdino.inference.probabilities import keep_probabilities
from voxdino.inference.run import predict_cases
from voxdino.preparation.orientation import slice_geometry

REGIONS = LabelSet(
    names=("background", "oedema", "core"),
    ids=(0, 1, 2),
    regions=(Region(name="whole", ids=(1, 2)), Region(name="core", ids=(2,))),
    region_ids=(1, 2),
)
ORIENTATIONS = list(product(permutations(range(3)), product((False, True), repeat=3)))


def slabs_of(logits, num_slices=2):
    for first in range(0, len(logits), num_slices):
        yield first, logits[first : first + num_slices]


def random_logits(geometry, num_outputs, seed=0):
    depth, rows, columns = geometry.native_shape
    made = torch.Generator().manual_seed(seed)
    return torch.randn((depth, num_outputs, rows, 2 * columns), generator=made)  # prepared finer than the original


@pytest.mark.parametrize("number", range(48))
def test_the_largest_probability_is_the_label_in_every_orientation(tmp_path, number):
    slice_axis = "SAR"[number % 3]
    order, flips = ORIENTATIONS[number]
    grid = Grid.from_spacing((3, 4, 5), (0.7, 1.1, 3.0)).transposed(order, flips)
    geometry = slice_geometry(grid, slice_axis)
    path = tmp_path / f"case{PROBABILITIES_SUFFIX}"
    labels = export_labels(
        keep_probabilities(slabs_of(random_logits(geometry, 3)), path, geometry, LABELS), geometry, LABELS
    )
    file = blosc2.open(str(path))
    found = file[:]
    assert (found.dtype, found.shape) == (np.float16, (3, *grid.shape))
    np.testing.assert_array_equal(LABELS.to_ids(found.argmax(axis=0).astype(np.uint8)), labels.array)
    np.testing.assert_allclose(found.sum(axis=0, dtype=np.float32), 1, atol=2e-3)
    assert dict(file.schunk.vlmeta.getall()) == {
        "names": ["background", "liver", "lesion"],
        "ids": [0, 5, 9],
        "affine": grid.affine.tolist(),
        "unit": "mm",
    }


def test_regions_have_a_probability_each_and_pictures_two_axes(tmp_path):
    geometry = slice_geometry(Grid.from_spacing((4, 5), unit="px"), None)
    path = tmp_path / f"case{PROBABILITIES_SUFFIX}"
    logits = random_logits(geometry, 2)
    labels = export_labels(keep_probabilities(slabs_of(logits), path, geometry, REGIONS), geometry, REGIONS)
    file = blosc2.open(str(path))
    whole, core = file[:]
    np.testing.assert_array_equal(np.where(core > 0.5, 2, np.where(whole > 0.5, 1, 0)), labels.array)
    assert file.schunk.vlmeta["names"] == ["whole", "core"]


def test_classes_a_few_at_a_time_have_the_same_probabilities(tmp_path, monkeypatch):
    geometry = slice_geometry(make_volume().grid, "S")
    logits = random_logits(geometry, 3)
    found = []
    for at_once in (1 << 20, 4 * 9 * 11 * 2, 1):
        monkeypatch.setattr(probabilities, "BYTES_AT_ONCE", at_once)
        path = tmp_path / f"{at_once}{PROBABILITIES_SUFFIX}"
        for _ in keep_probabilities(slabs_of(logits), path, geometry, LABELS):
            pass
        found.append(blosc2.open(str(path))[:])
    for other in found[1:]:
        np.testing.assert_allclose(other.astype(np.float32), found[0].astype(np.float32), atol=1e-3)


def test_a_run_that_stops_early_leaves_no_probabilities(tmp_path):
    geometry = slice_geometry(make_volume().grid, "S")
    slabs = keep_probabilities(
        slabs_of(random_logits(geometry, 3)), tmp_path / f"a{PROBABILITIES_SUFFIX}", geometry, LABELS
    )
    next(slabs)
    slabs.close()
    assert list(tmp_path.iterdir()) == []


def test_probabilities_lie_beside_the_label_map_and_are_made_again_when_damaged(model, tmp_path):
    write_volume(tmp_path / "in" / "case_0000.nii.gz", make_volume())
    cases, out = find_cases([tmp_path / "in"]), tmp_path / "out"
    output = OutputSettings(probabilities=True)
    predict_cases(cases, model, out, output=output)
    path = out / f"case{PROBABILITIES_SUFFIX}"
    labels = read_label_map(out / "case.nii.gz")
    np.testing.assert_array_equal(np.array([0, 5, 9])[blosc2.open(str(path))[:].argmax(axis=0)], labels.array)
    before = path.read_bytes()
    assert predict_cases(cases, model, out, output=output).num_kept == 1
    path.write_bytes(before[:-7])
    assert predict_cases(cases, model, out, output=output).num_done == 1
    assert path.read_bytes() == before
    with pytest.raises(UsageError, match="another format or other files beside it"):
        predict_cases(cases, model, out)
    predict_cases(cases, model, out, overwrite=True)
    assert not path.exists()


@pytest.mark.parametrize("name", ["nifti", "nii", "nrrd", "mha"])
def test_a_volume_is_written_in_any_format_of_volumes_with_the_same_labels(model, tmp_path, name):
    write_volume(tmp_path / "in" / "case_0000.nii.gz", make_volume())
    cases = find_cases([tmp_path / "in"])
    predict_cases(cases, model, tmp_path / "own")
    predict_cases(cases, model, tmp_path / "out", output=OutputSettings(format=name))
    own, other = read_label_map(tmp_path / "own" / "case.nii.gz"), tmp_path / "out" / f"case{WRITERS[name].suffix}"
    np.testing.assert_array_equal(read_label_map(other).array, own.array)
    np.testing.assert_allclose(read_label_map(other).grid.affine, own.grid.affine, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("dicom-seg", UsageError, "is no DICOM image, so a dicom-seg file has nothing to refer to"),
        ("rtstruct", UsageError, "write --format nifti"),
        ("png", GeometryError, "is a volume, which png cannot hold"),
        ("nrdd", UsageError, "Did you mean 'nrrd'"),
    ],
)
def test_a_format_that_cannot_hold_the_case_is_refused_before_any_work(model, tmp_path, name, error, told):
    write_volume(tmp_path / "in" / "case_0000.nii.gz", make_volume())
    with pytest.raises(error, match=told):
        predict_cases(find_cases([tmp_path / "in"]), model, tmp_path / "out", output=OutputSettings(format=name))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("a.nii.gz", "nifti"),
        ("a.NII", "nii"),
        ("a.nhdr", "nrrd"),
        ("a.mhd", "mha"),
        ("a.jpg", "png"),
        ("series", "dicom-seg"),
    ],
)
def test_without_a_wish_the_format_is_the_images_own(image, name):
    assert format_for(image) == name


def test_volumes_are_a_table_of_cases_and_labels(tmp_path):
    volumes = [("b, 1", {"liver": 1500.25, "tumour": 0.0}, "ml"), ("a", {"liver": 2.0}, "px")]
    write_volumes(tmp_path / "v.csv", volumes)
    write_volumes(tmp_path / "v.json", volumes)
    rows = [
        {"case": "b, 1", "label": "liver", "volume": 1500.25, "unit": "ml"},
        {"case": "b, 1", "label": "tumour", "volume": 0.0, "unit": "ml"},
        {"case": "a", "label": "liver", "volume": 2.0, "unit": "px"},
    ]
    assert json.loads((tmp_path / "v.json").read_text()) == rows
    with (tmp_path / "v.csv").open(newline="") as file:
        assert [{**row, "volume": float(row["volume"])} for row in csv.DictReader(file)] == rows
    with pytest.raises(UsageError, match=r"is \.csv or \.json"):
        write_volumes(tmp_path / "v.xlsx", volumes)
