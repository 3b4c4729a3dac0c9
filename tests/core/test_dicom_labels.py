"""DICOM segmentations and contours as label maps on the grid of their images."""

import dicom_files as made
import nibabel
import numpy as np
import pytest
from pydicom.uid import RLELossless

from voxdino.core.errors import GeometryError, LabelError
from voxdino.core.geometry import Grid
from voxdino.core.io import read_label_map
from voxdino.core.io.dicom.contours import inside
from voxdino.core.io.options import ReadOptions


def parts(dtype=bool):
    """Two segments that do not touch all slices: numbers 1 and 4."""
    masks = {1: np.zeros(made.SHAPE, dtype), 4: np.zeros(made.SHAPE, dtype)}
    masks[1][1:3, 2:5, 1:3] = 1
    masks[4][3:, 1:, 4] = 1
    return masks


LABELS = parts(np.uint8)[1] + 4 * parts(np.uint8)[4]


def write(path, dataset):
    path.write_bytes(made.encode(dataset))
    return path


@pytest.fixture
def scan(tmp_path):
    return made.write(tmp_path / "scan", made.series())


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
@pytest.mark.parametrize("syntax", [None, RLELossless])
def test_every_kind_of_segmentation_lies_on_its_images(tmp_path, scan, kind, syntax):
    if syntax and kind == "BINARY":
        pytest.skip("run-length encoding has no single bits")
    dataset = made.segmentation(LABELS if kind == "LABELMAP" else parts(float), kind=kind)
    path = write(tmp_path / "seg.dcm", made.compress(dataset, syntax) if syntax else dataset)
    label = read_label_map(path, like=scan)
    assert np.array_equal(label.array, LABELS)
    assert label.grid.same_as(Grid(made.SHAPE, made.AFFINE))


def test_a_folder_of_images_and_their_segmentation_is_a_label_map_on_their_grid(scan):
    write(scan / "seg.dcm", made.segmentation(parts()))
    label = read_label_map(scan)
    assert np.array_equal(label.array, LABELS)


def test_a_segmentation_alone_spans_its_own_frames(tmp_path):
    label = read_label_map(write(tmp_path / "a.dcm", made.segmentation(parts())))
    assert np.array_equal(label.array, LABELS[:, :, 1:5])  # slice 3 has no frame, and is there
    assert label.grid.same_as(
        Grid((5, 6, 4), made.AFFINE @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0] * 3 + [1]]))
    )


@pytest.mark.parametrize("order, flips", [((0, 1, 2), (1, 1, 0)), ((2, 0, 1), (0, 1, 1)), ((1, 0, 2), (0, 0, 1))])
def test_a_segmentation_is_turned_to_the_image_it_belongs_to(tmp_path, order, flips):
    grid = Grid(made.SHAPE, made.AFFINE).transposed(order, [bool(flip) for flip in flips])
    turned = np.flip(LABELS.transpose(order), [axis for axis, flip in enumerate(flips) if flip])
    nibabel.save(nibabel.Nifti1Image(np.zeros(grid.shape, np.uint8), grid.affine), tmp_path / "image.nii.gz")
    path = write(tmp_path / "seg.dcm", made.segmentation(parts()))
    assert np.array_equal(read_label_map(path, like=tmp_path / "image.nii.gz").array, turned)


def test_overlapping_segments_are_refused_until_it_is_said_which_wins(tmp_path, scan):
    masks = parts()
    masks[4] |= masks[1]
    path = write(tmp_path / "seg.dcm", made.segmentation(masks))
    with pytest.raises(LabelError, match=r"1 \(part 1\) and 4 \(part 4\) share voxels.*--segment NAME=ID"):
        read_label_map(path, like=scan)
    later = read_label_map(path, like=scan, options=ReadOptions(segments=(("part 4", 1), ("1", 2))))
    assert np.array_equal(later.array, np.where(masks[1], 2, masks[4]))
    only = read_label_map(path, like=scan, options=ReadOptions(segments=(("4", 9),)))
    assert np.array_equal(only.array, 9 * masks[4])
    with pytest.raises(LabelError, match=r"no segment 'liver'. It has 1 \(part 1\), 4 \(part 4\)"):
        read_label_map(path, like=scan, options=ReadOptions(segments=(("liver", 1),)))


def test_half_of_the_maximum_belongs_to_a_fractional_segment(tmp_path, scan):
    shares = {1: np.linspace(0, 1, 210).reshape(made.SHAPE)}
    path = write(tmp_path / "seg.dcm", made.segmentation(shares, kind="FRACTIONAL", most=200, sparse=False))
    label = read_label_map(path, like=scan)
    assert np.array_equal(label.array, np.rint(shares[1] * 200) >= 100)


def test_a_value_that_is_no_segment_is_refused(tmp_path, scan):
    dataset = made.segmentation(LABELS, kind="LABELMAP")
    del dataset.SegmentSequence[-1]
    with pytest.raises(LabelError, match="value 4, which is none of its segments"):
        read_label_map(write(tmp_path / "seg.dcm", dataset), like=scan)


@pytest.mark.parametrize(
    "shift, words", [((0.4, 0, 0), "between the voxels"), ((0, 0, 2.5), "between"), ((0, 30, 0), "outside")]
)
def test_a_segmentation_that_does_not_fit_its_image_is_refused(tmp_path, scan, shift, words):
    affine = made.AFFINE.copy()
    affine[:3, 3] += shift
    with pytest.raises(GeometryError, match=words):
        read_label_map(write(tmp_path / "seg.dcm", made.segmentation(parts(), affine)), like=scan)
    affine[:3, 0] *= 2
    with pytest.raises(GeometryError, match="another direction or spacing"):
        read_label_map(write(tmp_path / "seg.dcm", made.segmentation(parts(), affine)), like=scan)


def test_segmentations_of_a_tilted_scan_follow_it_onto_the_straight_grid(tmp_path):
    affine = made.AFFINE.copy()
    affine[1, 2] = 1.5
    scan = made.write(tmp_path / "scan", made.series(parts(np.int16)[1], affine))
    straight = read_label_map(scan)
    label = read_label_map(write(tmp_path / "seg.dcm", made.segmentation({1: parts()[1]}, affine)), like=scan)
    assert np.array_equal(label.array, straight.array)


def box(low, high, z, affine=made.AFFINE):
    """The corners of a rectangle, in millimetres."""
    corners = np.array([(low[0], low[1], z), (high[0], low[1], z), (high[0], high[1], z), (low[0], high[1], z)])
    return corners @ affine[:3, :3].T + affine[:3, 3]


def test_contours_enclose_voxel_centres_and_inner_ones_are_holes(tmp_path, scan):
    contours = {
        "ring": [box((0.5, 0.5), (4.4, 5.4), 2), box((1.5, 1.5), (3.4, 4.4), 2)],
        "dot": [box((2, 2), (2.9, 2.9), 5)],
    }
    label = read_label_map(write(tmp_path / "rt.dcm", made.structures(contours)), like=scan)
    expected = np.zeros(made.SHAPE, int)
    expected[1:5, 1:6, 2] = 1
    expected[2:4, 2:5, 2] = 0
    expected[2, 2, 5] = 2
    assert np.array_equal(label.array, expected)


def test_contours_beside_their_images_need_no_other_word(scan):
    path = write(scan / "rt.dcm", made.structures({"box": [box((0.5, 0.5), (3.4, 3.4), 2)]}))
    assert read_label_map(path).array.sum() == 9
    assert read_label_map(scan).array.sum() == 9


def test_contours_without_images_or_outside_of_them_are_refused(tmp_path, scan):
    alone = write(tmp_path / "rt.dcm", made.structures({"box": [box((0, 0), (3, 3), 2)]}))
    with pytest.raises(GeometryError, match="not beside it"):
        read_label_map(alone)
    for z in (2.5, 40):
        far = write(tmp_path / "rt.dcm", made.structures({"box": [box((0, 0), (3, 3), z)]}))
        with pytest.raises(GeometryError, match="outside of the image's slices, or between them"):
            read_label_map(far, like=scan)
    slanted = box((0, 0), (3, 3), 2) + np.outer([0, 1, 1, 0], [0, 0, 4])
    with pytest.raises(GeometryError, match="do not lie in the slices"):
        read_label_map(write(tmp_path / "rt.dcm", made.structures({"box": [slanted]})), like=scan)


def test_open_lines_enclose_nothing_and_are_noted(tmp_path, scan):
    dataset = made.structures({"line": [box((0, 0), (3, 3), 2)]}, geometry="OPEN_PLANAR")
    label = read_label_map(write(tmp_path / "rt.dcm", dataset), like=scan)
    assert not label.array.any()
    assert "1 open contours" in " ".join(label.notes)


def test_a_polygon_holds_the_centres_that_rays_cross_oddly_often():
    random = np.random.default_rng(5)
    for _ in range(20):
        points = random.uniform(-2, 12, size=(7, 2))
        i, j = np.meshgrid(np.arange(9), np.arange(11), indexing="ij")
        expected = np.zeros((9, 11), bool)
        for (i0, j0), (i1, j1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            crosses = (j0 < j) != (j1 < j)
            with np.errstate(invalid="ignore", divide="ignore"):
                expected ^= crosses & (i > i0 + (j - j0) * (i1 - i0) / (j1 - j0))
        assert np.array_equal(inside(points, (9, 11)), expected)


def test_several_segmentations_in_one_folder_must_be_told_apart(scan):
    write(scan / "a.dcm", made.segmentation(parts()))
    write(scan / "b.dcm", made.structures({"box": [box((0, 0), (3, 3), 2)]}))
    with pytest.raises(LabelError, match="2 segmentations or structure sets"):
        read_label_map(scan)


def choose(*numbers):
    return ReadOptions(segments=tuple((str(number), number) for number in numbers))


@pytest.mark.shared
@pytest.mark.parametrize(
    "file, images, twin, options",
    [
        ("liver.dcm", "ct-3slice", "liver_seg.nrrd", None),
        ("24x38x3/seg/label.seg", "24x38x3/image", "24x38x3/nrrd/label.nrrd", None),
        ("23x38x3/seg/label.seg", "23x38x3/multiframe/mf.dcm", "23x38x3/nrrd/label.nrrd", None),
        ("sparse-labelmap-noppv.dcm", "24x38x3/image", "sparse_labelmap_noppv_seg.nrrd", None),
        ("sparse-labelmap-ppv5.dcm", "24x38x3/image", "sparse_labelmap_ppv5_seg.nrrd", None),
        ("partial_overlaps.dcm", "ct-3slice", "partial_overlaps-1.nrrd", choose(1, 4, 5)),
        ("partial_overlaps.dcm", "ct-3slice", "partial_overlaps-2.nrrd", choose(2)),
        ("partial_overlaps.dcm", "ct-3slice", "partial_overlaps-3.nrrd", choose(3)),
    ],
)
def test_published_segmentations_read_to_the_values_of_their_twins(shared_folder, file, images, twin, options):
    folder = shared_folder / "data" / "dicom" / "dcmqi" / "data" / "segmentations"
    label = read_label_map(folder / file, like=folder / images, options=options)
    reference = read_label_map(folder / twin)
    assert label.grid.same_as(reference.grid)
    assert np.array_equal(label.array, reference.array)


@pytest.mark.shared
def test_the_published_contours_lie_on_their_images(shared_folder):
    folder = shared_folder / "data" / "dicom" / "rtutils" / "tests" / "mock_data"
    label = read_label_map(folder / "rt.dcm")
    assert label.array.shape == (512, 512, 2)
    assert set(np.unique(label.array)) == {0, 1}
