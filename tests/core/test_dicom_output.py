"""DICOM SEG and RTSTRUCT lie where their label map lies, for every orientation, as independent readers see them."""

import shutil
import subprocess
from functools import partial
from itertools import permutations, product

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_files import AFFINE, IDENTIFIERS, SEEDS, SERIES_UID, SHAPE, UIDS, enhanced, series, write
from matplotlib.path import Path as Outline
from pydicom.uid import ComputedRadiographyImageStorage
from scipy.spatial import cKDTree

from voxdino.core.errors import GeometryError, ImageError, LabelError
from voxdino.core.geometry import Grid
from voxdino.core.io import write_rtstruct, write_seg
from voxdino.core.io.dicom_output import DicomOutput
from voxdino.core.io.dicom_target import read_headers
from voxdino.core.labels import LabelSet
from voxdino.core.volume import LabelMap

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SPACINGS = [(0.7, 1.3, 2.5), (1.0, 1.0, 1.0), (0.4882812, 0.3, 7.25)]
ANGLES = [(0, 0, 0), (0.3, 0, 0), (0, -0.2, 0.1), (0.05, 0.4, -0.35), (-0.6, 0.5, 0.25)]
ORIENTATIONS = list(product(permutations(range(3)), product((1, -1), repeat=3)))
CLASSES = LabelSet(names=("background", "kidney_left", "liver tumour"), ids=(0, 4, 9))
NEAR_MM = 1e-4


def turned_affine(orientation, angles, spacing, origin=(-31.5, 12.25, 170.125)):
    """Array axis i runs along world axis order[i], with its sign, then all is turned by three angles."""
    order, signs = orientation
    linear = np.zeros((3, 3))
    linear[list(order), range(3)] = np.array(signs) * spacing
    for axis, angle in enumerate(angles):
        one, other = [i for i in range(3) if i != axis]
        turn = np.eye(3)
        turn[[one, other], [one, other]] = np.cos(angle)
        turn[one, other], turn[other, one] = -np.sin(angle), np.sin(angle)
        linear = turn @ linear
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = linear, origin
    return affine


def scattered(shape=SHAPE, seed=0, values=(0, 0, 4, 9)):
    array = np.random.default_rng(seed).choice(np.array(values, np.uint8), shape)
    array[0, 0, :] = max(values)  # no frame is empty: readers that stack what is there see all of them
    return array


def headers_of(tmp_path, images, *, keep_patient=False):
    """The headers as read from files; the folder has a name of its own for every call."""
    folder = write(tmp_path / f"series-{len(list(tmp_path.iterdir()))}", images)
    return read_headers([partial(file.open, "rb") for file in sorted(folder.iterdir())], keep_patient=keep_patient)


def case(tmp_path, number, array, affine=None):
    """(headers of a series with this affine, the label map with its axes in another order)."""
    affine = (
        turned_affine(ORIENTATIONS[number % 48], ANGLES[number % 5], SPACINGS[number % 3]) if affine is None else affine
    )
    order, flips = ORIENTATIONS[(7 * number + 5) % 48]
    flips = [sign < 0 for sign in flips]
    turned = np.flip(array.transpose(order), [axis for axis, flip in enumerate(flips) if flip])
    grid = Grid(array.shape, affine).transposed(order, flips)
    return headers_of(tmp_path, series(np.zeros(array.shape, np.int16), affine)), LabelMap(turned, grid)


def in_world(mask, affine_lps):
    """LPS millimetres (N, 3) of the voxels of a mask."""
    return np.argwhere(mask) @ affine_lps[:3, :3].T + affine_lps[:3, 3]


def assert_same_voxels(found, labels, value):
    expected = in_world(labels.array == value, LPS @ labels.grid.affine)
    assert len(found) == len(expected)
    distances, partners = cKDTree(expected).query(found)
    assert distances.max() < NEAR_MM
    assert len(set(partners.tolist())) == len(expected)
    np.testing.assert_allclose(found.mean(axis=0), expected.mean(axis=0), atol=NEAR_MM)


def seg_file(tmp_path, headers, labels, encoding="binary", classes=CLASSES, **output):
    path = tmp_path / f"{encoding}.seg.dcm"
    write_seg.write(path, labels, headers, classes, DicomOutput(**output), encoding)
    return path


def rtstruct_file(tmp_path, headers, labels, classes=CLASSES, **output):
    path = tmp_path / "case.rtstruct.dcm"
    write_rtstruct.write(path, labels, headers, classes, DicomOutput(**output))
    return path


def filled(dataset, number, labels):
    """LPS positions of the voxel centres inside the contours of an ROI, each on the plane of its contour."""
    roi = next(item for item in dataset.ROIContourSequence if item.ReferencedROINumber == number)
    to_index = np.linalg.inv(LPS @ labels.grid.affine)
    found = []
    for contour in roi.get("ContourSequence", []):
        points = np.array(contour.ContourData, float).reshape(-1, 3) @ to_index[:3, :3].T + to_index[:3, 3]
        (flat,) = np.flatnonzero(np.ptp(points, axis=0) < 0.01)
        plane = [axis for axis in range(3) if axis != flat]
        centres = np.argwhere(np.ones([labels.grid.shape[axis] for axis in plane]))
        inside = centres[Outline(points[:, plane]).contains_points(centres)]
        placed = np.empty((len(inside), 3))
        placed[:, plane], placed[:, flat] = inside, points[:, flat].mean()
        found.append(placed)
    return np.concatenate(found) @ (LPS @ labels.grid.affine)[:3, :3].T + (LPS @ labels.grid.affine)[:3, 3]


@pytest.mark.parametrize("number", range(48))
@pytest.mark.parametrize("encoding", ["binary", "labelmap"])
def test_segments_lie_where_highdicom_finds_them(tmp_path, number, encoding):
    headers, labels = case(tmp_path, number, scattered(seed=number))
    seg = highdicom.seg.segread(seg_file(tmp_path, headers, labels, encoding))
    volume = seg.get_volume(combine_segments=True)
    for value, index in ((4, 1), (9, 2)):
        shown = index if encoding == "binary" else value
        assert_same_voxels(in_world(volume.array == shown, volume.affine), labels, value)


@pytest.mark.parametrize("number", range(48))
def test_a_segment_lies_where_simpleitk_finds_it(tmp_path, number):
    shape = (8, 6, 7)  # GDCM misreads the last byte of single bits where it is not full
    headers, labels = case(tmp_path, number, scattered(shape, number, values=(0, 4)))
    one = LabelSet(names=("background", "liver"), ids=(0, 4))
    image = sitk.ReadImage(str(seg_file(tmp_path, headers, labels, classes=one)))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    assert_same_voxels(in_world(sitk.GetArrayViewFromImage(image).T > 0, affine), labels, 4)


@pytest.mark.parametrize("number", range(48))
def test_contours_filled_by_another_library_are_the_label_map(tmp_path, number):
    headers, labels = case(tmp_path, number, scattered(seed=number))
    dataset = pydicom.dcmread(rtstruct_file(tmp_path, headers, labels))
    for value, roi in ((4, 1), (9, 2)):
        assert_same_voxels(filled(dataset, roi, labels), labels, value)


@pytest.mark.slow
@pytest.mark.parametrize("orientation", range(48))
def test_all_orientations_obliques_and_spacings_come_back(tmp_path, orientation):
    for angles, spacing in product(ANGLES, SPACINGS):
        headers, labels = case(
            tmp_path, orientation, scattered(), turned_affine(ORIENTATIONS[orientation], angles, spacing)
        )
        volume = highdicom.seg.segread(seg_file(tmp_path, headers, labels)).get_volume(combine_segments=True)
        dataset = pydicom.dcmread(rtstruct_file(tmp_path, headers, labels))
        for value, index in ((4, 1), (9, 2)):
            assert_same_voxels(in_world(volume.array == index, volume.affine), labels, value)
            assert_same_voxels(filled(dataset, index, labels), labels, value)


@pytest.mark.parametrize("multi_frame", [False, True])
def test_every_frame_and_contour_names_the_image_it_lies_on(tmp_path, multi_frame):
    array = scattered()
    images = [enhanced(np.zeros(SHAPE, np.int16))] if multi_frame else series(np.zeros(SHAPE, np.int16))
    headers = headers_of(tmp_path, images)
    labels = LabelMap(array, Grid(SHAPE, AFFINE))
    seg = pydicom.dcmread(seg_file(tmp_path, headers, labels))
    references = [
        frame.DerivationImageSequence[0].SourceImageSequence[0] for frame in seg.PerFrameFunctionalGroupsSequence
    ]
    positions = [
        frame.PlanePositionSequence[0].ImagePositionPatient[2] for frame in seg.PerFrameFunctionalGroupsSequence
    ]
    contours = [
        (item.ContourImageSequence[0], item.ContourData[2])
        for roi in pydicom.dcmread(rtstruct_file(tmp_path, headers, labels)).ROIContourSequence
        for item in roi.ContourSequence
    ]
    for reference, height in [*zip(references, positions, strict=True), *contours]:
        index = round((float(height) - AFFINE[2, 3]) / AFFINE[2, 2])
        if multi_frame:
            assert reference.ReferencedFrameNumber == index + 1
        assert reference.ReferencedSOPInstanceUID == headers[0 if multi_frame else index].SOPInstanceUID
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == SERIES_UID


def test_segments_are_coded_named_coloured_and_tracked(tmp_path):
    headers, labels = case(tmp_path, 3, scattered())
    for encoding, numbers in (("binary", [1, 2]), ("labelmap", [4, 9])):
        path = seg_file(tmp_path, headers, labels, encoding, model="liver_dpt", version="0123abcd")
        items = [item for item in pydicom.dcmread(path).SegmentSequence if item.SegmentNumber]
        assert [item.SegmentNumber for item in items] == numbers
        assert [item.SegmentLabel for item in items] == ["kidney_left", "liver tumour"]
        kidney, tumour = (item.SegmentedPropertyTypeCodeSequence[0] for item in items)
        assert (kidney.CodeValue, tumour.CodeValue) == ("64033007", "108369006")
        assert kidney.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
        assert items[1].AnatomicRegionSequence[0].CodeMeaning == "Liver"
        assert items[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == "liver_dpt"
        assert items[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == "0123abcd"
        assert len({tuple(item.RecommendedDisplayCIELabValue) for item in items}) == 2
        assert len({item.TrackingUID for item in items}) == 2


def test_few_segments_are_binary_and_many_a_label_map(tmp_path):
    affine = turned_affine(ORIENTATIONS[0], ANGLES[0], SPACINGS[0])
    headers = headers_of(tmp_path, series(np.zeros(SHAPE, np.int16), affine))
    for count, kind in ((16, "BINARY"), (17, "LABELMAP")):
        classes = LabelSet(names=("background", *(f"c{i}" for i in range(count))), ids=tuple(range(count + 1)))
        path = seg_file(tmp_path, headers, LabelMap(scattered(), Grid(SHAPE, affine)), "auto", classes)
        seg = pydicom.dcmread(path)
        assert seg.SegmentationType == kind
        assert len([item for item in seg.SegmentSequence if item.SegmentNumber]) == count


@pytest.mark.parametrize("encoding", ["binary", "labelmap"])
def test_nothing_found_is_a_file_too(tmp_path, encoding):
    headers, labels = case(tmp_path, 0, np.zeros(SHAPE, np.uint8))
    seg = highdicom.seg.segread(seg_file(tmp_path, headers, labels, encoding))
    assert not seg.get_volume(combine_segments=True).array.any()
    rois = pydicom.dcmread(rtstruct_file(tmp_path, headers, labels)).ROIContourSequence
    assert [("ContourSequence" in roi) for roi in rois] == [False, False]


def test_a_picture_becomes_a_segmentation_of_its_image(tmp_path):
    image = series(np.zeros((5, 6, 1), np.uint8), modality="CR", sop_class=ComputedRadiographyImageStorage)[0]
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID"):
        del image[name]
    array = scattered((6, 5, 1))[:, :, 0]
    labels = LabelMap(array, Grid.from_spacing((6, 5)))
    headers = headers_of(tmp_path, [image])
    seg = pydicom.dcmread(seg_file(tmp_path, headers, labels, "labelmap"))
    np.testing.assert_array_equal(seg.pixel_array, array)
    with pytest.raises(GeometryError, match="a picture has no place in space"):
        rtstruct_file(tmp_path, headers, labels)


def test_the_patient_is_copied_only_when_asked_and_never_anything_else(tmp_path):
    labels = LabelMap(scattered(), Grid(SHAPE, AFFINE))
    references = {*UIDS.values(), SERIES_UID}
    copied = {IDENTIFIERS[name] for name in ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber",
                                            "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName")}  # fmt: skip
    for keep in (False, True):
        headers = headers_of(tmp_path, series(per_slice=_with_private_text), keep_patient=keep)
        for make in (seg_file, rtstruct_file):
            data = make(tmp_path, headers, labels, keep_patient=keep).read_bytes()
            found = {seed for seed in (*SEEDS, "PRIVATE-SECRET") if seed.encode() in data}
            assert found - references == (copied if keep else set())
            assert {uid for uid in references if uid.encode() in data} == references


def _with_private_text(dataset, index):
    dataset.private_block(0x0011, "SEEDED", create=True).add_new(1, "LO", "PRIVATE-SECRET")


def test_names_of_other_alphabets_come_through(tmp_path):
    def rename(dataset, index):
        dataset.SpecificCharacterSet = "ISO_IR 100"
        dataset.PatientName = "Ångström^Zoë"

    headers = headers_of(tmp_path, series(per_slice=rename), keep_patient=True)
    labels = LabelMap(scattered(), Grid(SHAPE, AFFINE))
    classes = LabelSet(names=("background", "Ödem", "肝"), ids=(0, 4, 9))
    seg = pydicom.dcmread(seg_file(tmp_path, headers, labels, classes=classes))
    assert [item.SegmentLabel for item in seg.SegmentSequence] == ["Ödem", "肝"]
    structures = pydicom.dcmread(rtstruct_file(tmp_path, headers, labels, classes=classes))
    assert [roi.ROIName for roi in structures.StructureSetROISequence] == ["Ödem", "肝"]
    assert seg.PatientName == structures.PatientName == "Ångström^Zoë"


def test_labels_without_names_and_images_without_references_are_refused(tmp_path):
    headers, labels = case(tmp_path, 0, scattered())
    other = LabelSet(names=("background", "liver"), ids=(0, 4))
    with pytest.raises(LabelError, match="holds the label 9, which no class has"):
        seg_file(tmp_path, headers, labels, classes=other)
    empty = LabelMap(np.zeros(labels.grid.shape, np.uint8), labels.grid)
    with pytest.raises(LabelError, match="nothing says which were looked for"):
        seg_file(tmp_path, headers, empty, classes=None)
    large = LabelMap(labels.array.astype(np.uint32) * 70_000, labels.grid)
    with pytest.raises(LabelError, match="DICOM SEG goes up to 65535"):
        seg_file(tmp_path, headers, large, classes=None)
    del headers[0].SeriesInstanceUID
    for make in (seg_file, rtstruct_file):
        with pytest.raises(ImageError, match="no SeriesInstanceUID"):
            make(tmp_path, headers, labels)
    assert not list(tmp_path.glob("*.dcm"))


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy (Debian: dicom3tools)")
@pytest.mark.parametrize("keep_patient", [False, True])
def test_what_we_write_is_standard_conformant(tmp_path, keep_patient):
    headers = headers_of(tmp_path, series(), keep_patient=keep_patient)
    labels = LabelMap(scattered(), Grid(SHAPE, AFFINE))
    for make in (seg_file, rtstruct_file):
        done = subprocess.run(
            ["dciodvfy", make(tmp_path, headers, labels, keep_patient=keep_patient)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Error" not in done.stderr, done.stderr
