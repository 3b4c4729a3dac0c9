"""Writers on a full or read-only disk and at a limit of size: exit 4, nothing half-written, the old file whole."""

import resource
import subprocess
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, generate_uid

from voxdino.core.errors import EXIT_RESOURCE, ResourceError
from voxdino.core.geometry import Grid
from voxdino.core.io import write_rtstruct, write_seg
from voxdino.core.io.dicom_output import DicomOutput
from voxdino.core.io.dicom_target import PATIENT_TAGS
from voxdino.core.io.writers import write_labels
from voxdino.core.labels import LabelSet
from voxdino.core.volume import LabelMap
from voxdino.inference.outputs import write_volumes
from voxdino.inference.probabilities import keep_probabilities
from voxdino.preparation.orientation import slice_geometry

GRID = Grid.from_spacing((48, 40, 9), (0.7, 0.9, 3.0))
ARRAY = np.zeros(GRID.shape, np.uint8)
ARRAY[5:30:2, 8:31:2, :], ARRAY[33:40, 3:37:3, 2:] = 1, 2
LABELS = LabelMap(ARRAY, GRID)
CLASSES = LabelSet(names=("background", "liver", "tumour"), ids=(0, 1, 2))


def headers():
    fixed = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    images = []
    for index in range(GRID.shape[2]):
        image = Dataset()
        for name, value in {**dict.fromkeys(PATIENT_TAGS, ""), **fixed}.items():
            setattr(image, name, value)
        image.SOPClassUID, image.SOPInstanceUID, image.Modality = CTImageStorage, generate_uid(), "CT"
        image.Rows, image.Columns, image.PixelSpacing, image.SliceThickness = 40, 48, [0.9, 0.7], 3
        image.ImageOrientationPatient, image.ImagePositionPatient = [-1, 0, 0, 0, -1, 0], [0, 0, 3 * index]
        images.append(image)
    return images


def probabilities(path):
    geometry = slice_geometry(GRID, "S")
    logits = torch.randn((*geometry.native_shape[:1], 3, *geometry.native_shape[1:]))
    list(keep_probabilities([(0, logits)], path, geometry, CLASSES))


WRITE = {
    "nifti": lambda path: write_labels("nifti", path, LABELS),
    "nii": lambda path: write_labels("nii", path, LABELS),
    "nrrd": lambda path: write_labels("nrrd", path, LABELS),
    "mha": lambda path: write_labels("mha", path, LABELS),
    "dicom-seg-binary": lambda path: write_seg.write(path, LABELS, headers(), CLASSES, DicomOutput(), "binary"),
    "dicom-seg-labelmap": lambda path: write_seg.write(path, LABELS, headers(), CLASSES, DicomOutput(), "labelmap"),
    "rtstruct": lambda path: write_rtstruct.write(path, LABELS, headers(), CLASSES, DicomOutput()),
    "probabilities": probabilities,
    "volumes": lambda path: write_volumes(path, [("case", {f"label {i}": i / 7 for i in range(500)}, "ml")]),
}
SUFFIX = {
    "nifti": ".nii.gz",
    "nii": ".nii",
    "nrrd": ".nrrd",
    "mha": ".mha",
    "probabilities": ".b2nd",
    "volumes": ".csv",
}


@contextmanager
def largest_file(num_bytes):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own: remount(options) changes it."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a small file system")
        return place

    yield mount
    subprocess.run(["umount", "--lazy", str(place)], capture_output=True, check=False)


@pytest.mark.parametrize("name", WRITE)
def test_a_writer_stopped_at_any_tenth_of_its_file_leaves_the_old_one(tmp_path, name):
    path = tmp_path / f"case{SUFFIX.get(name, '.dcm')}"
    WRITE[name](path)
    old = path.read_bytes()
    for tenth in range(10):
        with largest_file(len(old) * tenth // 10), pytest.raises(ResourceError) as caught:
            WRITE[name](path)
        assert caught.value.exit_code == EXIT_RESOURCE
        assert (caught.value.where, bool(caught.value.fix)) == (str(path), True)
        assert path.read_bytes() == old
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", WRITE)
def test_a_full_disk_is_named_and_keeps_what_is_there(small_disk, name):
    disk = small_disk("size=128k")
    (disk / "mine").write_bytes(b"kept")
    with suppress(OSError), (disk / "rest").open("wb", buffering=0) as rest:
        while True:
            rest.write(bytes(4096))
    with pytest.raises(ResourceError, match="the disk is full"):
        WRITE[name](disk / f"case{SUFFIX.get(name, '.dcm')}")
    assert {path.name for path in disk.iterdir()} == {"mine", "rest"}
    assert (disk / "mine").read_bytes() == b"kept"


@pytest.mark.parametrize("name", WRITE)
def test_a_read_only_disk_is_named(small_disk, name):
    disk = small_disk("size=1m,ro")
    with pytest.raises(ResourceError, match="cannot be written"):
        WRITE[name](disk / f"case{SUFFIX.get(name, '.dcm')}")
