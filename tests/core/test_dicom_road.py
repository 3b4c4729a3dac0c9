"""From a DICOM series on the disk to DICOM output that our own readers find again: folders, archives, chosen series."""

import numpy as np
import pytest
from dicom_files import AFFINE, OTHER_SERIES_UID, SHAPE, enhanced, series, write, write_zip

from voxdino.core.errors import GeometryError, ImageError, UsageError
from voxdino.core.geometry import Grid, canonical_transpose
from voxdino.core.io import read_grid, read_label_map
from voxdino.core.io.writers import Origin, write_labels
from voxdino.core.labels import LabelSet
from voxdino.core.volume import LabelMap

CLASSES = LabelSet(names=("background", "liver", "tumour"), ids=(0, 1, 2))
ARRAY = np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.uint8)


def folder(tmp_path):
    return write(tmp_path / "scan", series())


def archive(tmp_path):
    return write_zip(tmp_path / "scan.zip", series())


def multi_frame(tmp_path):
    return next(write(tmp_path / "scan", [enhanced()]).iterdir())


def on_grid(labels, grid):
    """The array of a label map with its axes as those of `grid`."""
    order, flips = canonical_transpose(
        Grid(labels.grid.shape, np.linalg.inv(grid.affine) @ labels.grid.affine), (0, 1, 2)
    )
    turned = labels.array.transpose(order)
    assert labels.grid.transposed(order, flips).same_as(grid, 1e-3)
    return turned[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]


@pytest.mark.parametrize("source", [folder, archive, multi_frame])
@pytest.mark.parametrize("name", ["dicom-seg-binary", "dicom-seg-labelmap", "rtstruct"])
def test_our_readers_find_what_our_writers_wrote(tmp_path, source, name):
    image = source(tmp_path)
    grid, _ = read_grid(image)
    labels = LabelMap(on_grid(LabelMap(ARRAY, Grid(SHAPE, AFFINE)), grid), grid)
    path = tmp_path / "out" / "case.dcm"
    write_labels(name, path, labels, Origin(image, classes=CLASSES))
    found = read_label_map(path, like=image)
    np.testing.assert_array_equal(on_grid(found, grid), labels.array)


def test_the_series_that_was_read_is_the_one_referred_to(tmp_path):
    def renumber(dataset, index):
        dataset.SeriesNumber = 8

    image = write(tmp_path / "scan", series())
    write(image, series(series_uid=OTHER_SERIES_UID, per_slice=renumber), names="other{:03d}.dcm")
    labels = LabelMap(ARRAY, Grid(SHAPE, AFFINE))
    path = tmp_path / "case.seg.dcm"
    write_labels("dicom-seg", path, labels, Origin(image, "8", CLASSES))
    assert OTHER_SERIES_UID.encode() in path.read_bytes()
    with pytest.raises(ImageError, match="holds 2 series"):
        write_labels("dicom-seg", tmp_path / "no.seg.dcm", labels, Origin(image, None, CLASSES))
    assert not (tmp_path / "no.seg.dcm").exists()


def test_dicom_output_needs_a_dicom_image(tmp_path):
    labels = LabelMap(ARRAY, Grid(SHAPE, AFFINE))
    with pytest.raises(UsageError, match="has nothing to refer to"):
        write_labels("rtstruct", tmp_path / "a.dcm", labels, Origin(tmp_path / "image.nii.gz", None, CLASSES))
    with pytest.raises(GeometryError, match="is a volume, which png cannot hold"):
        write_labels("png", tmp_path / "a.png", labels)
    assert list(tmp_path.iterdir()) == []
