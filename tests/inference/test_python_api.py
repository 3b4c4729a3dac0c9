"""Laws of `voxdino.load(run).predict(image)`: whatever holds the image, the label map is the same."""

import subprocess
import sys

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from small_models import make_volume

import voxdino
from voxdino.core.errors import CheckpointError, ImageError, UsageError
from voxdino.core.io import read_label_map, write_volume
from voxdino.core.io.in_memory import to_volume
from voxdino.inference.cases import find_cases
from voxdino.inference.load import load_model
from voxdino.inference.run import predict_cases
from voxdino.inference.settings import PredictSettings


class MetaTensor:
    """What MONAI's class of this name offers."""

    def __init__(self, array, affine, meta):
        self.array, self.affine, self.meta = array, torch.from_numpy(affine), meta


def as_simple_itk(volume):
    image = SimpleITK.GetImageFromArray(volume.array[0].transpose(2, 1, 0))
    lps = np.diag([-1.0, -1, 1, 1]) @ volume.grid.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


HELD = {
    "volume": lambda v: v,
    "nibabel": lambda v: nibabel.Nifti1Image(v.array[0], v.grid.affine),
    "nibabel with frames": lambda v: nibabel.Nifti1Image(np.moveaxis(v.array, 0, -1), v.grid.affine),
    "SimpleITK": as_simple_itk,
    "MetaTensor": lambda v: MetaTensor(v.array, v.grid.affine.copy(), {}),
    "MetaTensor in LPS": lambda v: MetaTensor(v.array, np.diag([-1.0, -1, 1, 1]) @ v.grid.affine, {"space": "LPS"}),
}


@pytest.mark.parametrize("hold", HELD.values(), ids=HELD)
def test_an_image_in_memory_is_the_volume_it_holds(hold):
    volume = make_volume()
    found = to_volume(hold(volume), ndim=3)
    np.testing.assert_array_equal(found.array, volume.array)
    np.testing.assert_allclose(found.grid.affine, volume.grid.affine, atol=1e-12)
    with pytest.raises(UsageError, match="says itself where it lies"):
        to_volume(hold(volume), ndim=3, spacing=(1, 1, 1))


@pytest.mark.parametrize("make", [np.array, torch.from_numpy], ids=["numpy", "torch"])
def test_an_array_lies_where_its_affine_or_spacing_says(make):
    volume = make_volume()
    by_affine = to_volume(make(volume.array), ndim=3, affine=volume.grid.affine)
    assert by_affine.grid.same_as(volume.grid)
    by_spacing = to_volume(make(volume.array[0]), ndim=3, spacing=(0.7, 0.9, 3.0))
    assert by_spacing.grid.spacing == pytest.approx((0.7, 0.9, 3.0))
    assert by_spacing.grid.orientation == "RAS"
    np.testing.assert_array_equal(by_spacing.array, volume.array)


def test_a_picture_in_memory_has_rows_and_columns():
    array = np.arange(3 * 5 * 4, dtype=np.uint8).reshape(5, 4, 3)
    picture = SimpleITK.GetImageFromArray(array, isVector=True)
    picture.SetSpacing((0.5, 2.0))  # of columns, rows
    found = to_volume(picture, ndim=2)
    np.testing.assert_array_equal(found.array, np.moveaxis(array, -1, 0))
    assert found.grid.spacing == (2.0, 0.5)
    assert to_volume(array[..., 0], ndim=2).grid.unit == "px"
    assert to_volume(MetaTensor(array[None, ..., 0], np.diag([2, 0.5, 1.0, 1]), {}), ndim=2).grid.spacing == (2.0, 0.5)


@pytest.mark.parametrize(
    "image, how, error, words",
    [
        (np.zeros((3, 4, 5)), {}, UsageError, "how large its voxels are"),
        (np.zeros((3, 4, 5)), {"spacing": (1, 1)}, UsageError, "for 3 axes"),
        (np.zeros((3, 4, 5)), {"spacing": (1, 1, 0)}, UsageError, "positive length"),
        (np.zeros((3, 4, 5)), {"spacing": (1, 1, 1), "affine": np.eye(4)}, UsageError, "both spacing and affine"),
        (np.zeros((3, 4)), {"spacing": (1, 1, 1)}, ImageError, "for a model of 3-D images"),
        (np.zeros((3, 4, 5), complex), {"spacing": (1, 1, 1)}, ImageError, "complex128 values"),
        (np.array("text"), {}, ImageError, "real numbers"),
    ],
)
def test_what_is_no_image_is_refused(image, how, error, words):
    with pytest.raises(error, match=words):
        to_volume(image, ndim=3, **how)


def test_nibabel_images_in_micrometres_are_brought_to_millimetres():
    image = nibabel.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.diag([700.0, 900, 3000, 1]))
    image.header.set_xyzt_units("micron")
    assert to_volume(image, ndim=3).grid.spacing == pytest.approx((0.7, 0.9, 3.0))


@pytest.fixture
def scan(tmp_path):
    write_volume(tmp_path / "scan.nii.gz", make_volume())
    return tmp_path / "scan.nii.gz"


def test_a_file_an_array_and_the_command_give_one_label_map(run_folder, scan, tmp_path):
    model = voxdino.load(run_folder, device="cpu")
    labels = model.predict(scan)
    volume = make_volume()
    in_memory = model.predict(volume.array[0], affine=volume.grid.affine)
    np.testing.assert_array_equal(in_memory.array, labels.array)
    assert labels.grid.same_as(volume.grid)
    predict_cases(find_cases([scan]), load_model(run_folder), tmp_path / "out")
    np.testing.assert_array_equal(read_label_map(tmp_path / "out" / "scan.nii.gz").array, labels.array)
    np.testing.assert_array_equal(model.predict([scan]).array, labels.array)


def test_settings_and_votes_reach_the_engine(run_folder, scan):
    model = voxdino.load([run_folder, run_folder], device="cpu")
    mirrored = model.predict(scan, settings=PredictSettings(mirror=True))
    assert (mirrored.array != model.predict(scan).array).any()


def test_a_model_says_what_it_finds_and_whose_it_is(run_folder):
    model = voxdino.load(run_folder, device="cpu")
    assert model.labels == {"liver": 5, "lesion": 9}
    assert model.licence == "DINOv3 License"
    assert repr(model) == "<voxdino model first: liver, lesion>"


def test_images_that_do_not_fit_the_model_are_refused(run_folder, scan):
    model = voxdino.load(run_folder, device="cpu")
    two = np.zeros((2, 9, 8, 7), np.int16)
    with pytest.raises(ImageError, match="2 channels, the model needs 1"):
        model.predict(two, spacing=(1, 1, 1))
    with pytest.raises(ImageError, match="NaN"):
        model.predict(np.full((9, 8, 7), np.nan, np.float32), spacing=(1, 1, 1))
    with pytest.raises(UsageError, match="a file says itself"):
        model.predict(scan, spacing=(1, 1, 1))
    with pytest.raises(CheckpointError, match="no such run folder"):
        voxdino.load(run_folder.with_name("other"), device="cpu")


def test_importing_voxdino_loads_neither_torch_nor_numpy():
    code = "import sys, voxdino; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_runner_of_exported_models_and_the_road_to_it_import_no_torch():
    code = (
        "import sys; import voxdino.cli.app, voxdino.inference.api, voxdino.inference.onnx_model, "
        "voxdino.inference.run, voxdino.cli.summaries; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
