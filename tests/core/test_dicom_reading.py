"""DICOM series as volumes: whatever the order, the files, the encoding, the same voxels in the same place."""

import shutil
from itertools import permutations, product

import dicom_files as made
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from voxdino.core.geometry import Grid
from voxdino.core.io import is_scan, read_grid, read_volume
from voxdino.core.io.dicom import list_series, source_files

ROTATIONS = [np.eye(3)[list(order)] * signs for order in permutations(range(3)) for signs in product((1, -1), repeat=3)]


def rotation(a, b, c):
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


OBLIQUE = [rotation(*angles) for angles in ((0, 0, 0), (0.1, 0, 0), (0, -0.2, 0.05), (0.3, 0.2, -0.4), (0, 0, 0.7))]
SPACINGS = [(0.8, 1.5, 5.0), (1.0, 1.0, 1.0), (0.3125, 0.7, 0.6)]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("tilt", OBLIQUE, ids=range(5))
def test_a_series_lies_where_it_was_put_in_all_48_orientations(tmp_path, tilt, spacing):
    array = made.numbered((3, 4, 3))
    for index, turn in enumerate(ROTATIONS):
        affine = np.eye(4)
        affine[:3, :3] = tilt @ turn * spacing
        affine[:3, 3] = 12.3, -45.6, 78.9
        volume = read_volume(made.write(tmp_path / str(index), made.series(array, affine)))
        expected, grid = array, Grid(array.shape, affine)
        if np.linalg.det(affine) < 0:  # a series has no slice order of its own: it is read right-handed
            expected, grid = array[:, :, ::-1], grid.transposed((0, 1, 2), (False, False, True))
        assert np.array_equal(volume.array[0], expected)
        assert np.abs(volume.grid.affine - grid.affine).max() < 1e-4


def test_file_names_numbers_and_order_say_nothing(tmp_path):
    datasets = made.series()
    straight = read_volume(made.write(tmp_path / "a", datasets))
    for dataset in datasets:
        dataset.InstanceNumber = 1
    shuffled = [datasets[index] for index in np.random.default_rng(0).permutation(len(datasets))]
    volume = read_volume(made.write(tmp_path / "b", shuffled, names="IM{:05d}"))
    assert np.array_equal(volume.array, straight.array)
    assert volume.grid.same_as(straight.grid)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_every_plain_encoding_reads_the_same(tmp_path, syntax, dtype):
    datasets = made.series(made.numbered((5, 3, 2), dtype), syntax=syntax)
    assert np.array_equal(read_volume(made.write(tmp_path / "s", datasets)).array[0], made.numbered((5, 3, 2), dtype))


@pytest.mark.parametrize("kind", ["u1", "i2", "u2"])
def test_big_endian_reads_the_same(tmp_path, kind):
    array = made.numbered((5, 3, 2), kind)
    datasets = made.series(array, syntax=ExplicitVRBigEndian)
    for dataset, plane in zip(datasets, np.moveaxis(array, 2, 0), strict=True):
        plane = np.append(np.ascontiguousarray(plane.T).ravel(), np.zeros(plane.size % 2, kind)).astype(kind)
        dataset.PixelData = (plane.view("<u2") if kind == "u1" else plane).byteswap().tobytes()
        dataset["PixelData"].VR = "OW"
    assert np.array_equal(read_volume(made.write(tmp_path / "s", datasets)).array[0], array)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_files_without_preamble_and_meta_header_are_read_when_they_are_consistent(tmp_path, syntax):
    for index, dataset in enumerate(made.series(syntax=syntax)):
        (tmp_path / f"{index}").write_bytes(made.encode(dataset, preamble=False))
    assert np.array_equal(read_volume(tmp_path).array[0], made.numbered())


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_compressed_series_read_as_their_plain_ones(tmp_path, syntax):
    array = np.random.default_rng(1).integers(-900, 900, (40, 33, 3)).astype(np.int16)
    volume = read_volume(made.write(tmp_path, [made.compress(one, syntax) for one in made.series(array)]))
    assert np.array_equal(volume.array[0], array)


def test_a_zip_archive_and_a_folder_in_a_folder_read_as_the_folder(tmp_path):
    datasets = made.series()
    folder = read_volume(made.write(tmp_path / "a" / "deep" / "deeper", datasets).parents[1])
    archive = read_volume(made.write_zip(tmp_path / "scan.zip", datasets))
    assert np.array_equal(folder.array, archive.array)
    assert folder.grid.same_as(archive.grid)


def test_whole_numbers_stay_whole_and_ct_fits_16_bits(tmp_path):
    stored = made.numbered(dtype=np.uint16) * 500
    volume = read_volume(made.write(tmp_path, made.series(stored, slope=1, intercept=-32768)))
    assert volume.array.dtype == np.int16
    assert np.array_equal(volume.array[0], stored.astype(int) - 32768)


def test_a_scale_of_each_slice_is_applied_to_it(tmp_path):
    def scale(dataset, index):
        dataset.RescaleSlope = made.number(0.5 + index)

    volume = read_volume(made.write(tmp_path, made.series(intercept=-3, per_slice=scale)))
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array[0], made.numbered() * (0.5 + np.arange(7, dtype=np.float32)) - 3)


def test_a_table_of_values_is_looked_up(tmp_path):
    def add_table(dataset, _):
        table = Dataset()
        table.LUTDescriptor, table.ModalityLUTType = [256, 0, 16], "OD"
        table["LUTDescriptor"].VR = "US"
        table.LUTData = (np.arange(256, dtype="<u2") * 3).tobytes()
        table["LUTData"].VR = "OW"
        dataset.ModalityLUTSequence = Sequence([table])
        del dataset.RescaleSlope, dataset.RescaleIntercept

    volume = read_volume(made.write(tmp_path, made.series(made.numbered(dtype=np.uint8), per_slice=add_table)))
    assert np.array_equal(volume.array[0], made.numbered() * 3)


@pytest.mark.parametrize(
    "keyword, value", [("PhotometricInterpretation", "MONOCHROME1"), ("PresentationLUTShape", "INVERSE")]
)
def test_inverted_brightness_is_turned_and_noted(tmp_path, keyword, value):
    def invert(dataset, _):
        setattr(dataset, keyword, value)

    volume = read_volume(made.write(tmp_path, made.series(made.numbered(dtype=np.uint8), per_slice=invert)))
    assert np.array_equal(volume.array[0], 255 - made.numbered())
    assert any("inverted" in note for note in volume.notes)


def test_padding_reads_as_the_smallest_measured_value(tmp_path):
    array = made.numbered() + 10
    array[0, :, 2] = -2000

    def pad(dataset, index):
        dataset.add_new("PixelPaddingValue", "SS", -2000)

    volume = read_volume(made.write(tmp_path, made.series(array, intercept=-1024, per_slice=pad)))
    expected = np.where(array == -2000, array[array > -2000].min(), array) - 1024
    assert np.array_equal(volume.array[0], expected)
    assert "padding in 6 voxels" in " ".join(volume.notes)


def test_bits_beyond_those_stored_are_cleared(tmp_path):
    def shorten(dataset, _):
        dataset.BitsStored, dataset.HighBit = 12, 11

    stored = made.numbered(dtype=np.uint16) | 0xF000
    volume = read_volume(made.write(tmp_path, made.series(stored, per_slice=shorten)))
    assert np.array_equal(volume.array[0], made.numbered())


def test_a_multi_frame_image_is_placed_by_its_functional_groups(tmp_path):
    dataset = made.enhanced(made.numbered(dtype=np.uint16))
    (tmp_path / "one.dcm").write_bytes(made.encode(dataset))
    volume = read_volume(tmp_path / "one.dcm")
    assert np.array_equal(volume.array[0], made.numbered() - 1024)
    assert volume.grid.largest_offset(Grid(made.SHAPE, made.AFFINE)) < 1e-4


def test_compressed_multi_frame_images_are_read_frame_by_frame(tmp_path):
    dataset = made.compress(made.enhanced(made.numbered(dtype=np.uint16)), RLELossless)
    (tmp_path / "one.dcm").write_bytes(made.encode(dataset))
    assert np.array_equal(read_volume(tmp_path / "one.dcm").array[0], made.numbered() - 1024)


def test_colour_is_three_channels(tmp_path):
    def colour(dataset, index):
        made.set_pixels(dataset, np.stack([made.numbered()[:, :, index].T * k for k in (0, 1, 2)], -1).astype(np.uint8))

    volume = read_volume(made.write(tmp_path, made.series(per_slice=colour)))
    assert np.array_equal(volume.array, np.stack([made.numbered() * k for k in (0, 1, 2)]))


def test_planar_and_palette_colours_are_converted(tmp_path):
    def planar(dataset, index):
        values = np.stack([made.numbered()[:, :, index].T * k for k in (0, 1, 2)], -1).astype(np.uint8)
        made.set_pixels(dataset, values)
        dataset.PlanarConfiguration = 1
        dataset.PixelData = values.transpose(2, 0, 1).tobytes()

    def palette(dataset, _):
        dataset.PhotometricInterpretation = "PALETTE COLOR"
        for factor, name in enumerate(("Red", "Green", "Blue")):
            dataset.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [256, 0, 8])
            table = (np.arange(256) * factor % 256).astype(np.uint8)
            dataset.add_new(f"{name}PaletteColorLookupTableData", "OW", table.tobytes())

    expected = np.stack([made.numbered() * k for k in (0, 1, 2)])
    for name, change in (("planar", planar), ("palette", palette)):
        datasets = made.series(made.numbered(dtype=np.uint8), per_slice=change)
        assert np.array_equal(read_volume(made.write(tmp_path / name, datasets)).array, expected)


def test_a_tilted_gantry_is_straightened_and_said(tmp_path):
    affine = made.AFFINE.copy()
    affine[1, 2] = 1.5  # every slice one row further: the straight stack is exact
    volume = read_volume(made.write(tmp_path, made.series(affine=affine)))
    assert volume.grid.shape == (5, 12, 7)
    assert any("gantry tilt of 16.7 degrees" in note for note in volume.notes)
    inside = np.argwhere(np.ones(made.SHAPE))
    places = Grid(made.SHAPE, affine).index_to_world(inside)
    there = np.linalg.inv(volume.grid.affine) @ np.c_[places, np.ones(len(places))].T
    indices = np.rint(there[:3]).astype(int)
    np.testing.assert_allclose(there[:3], indices, atol=1e-6)
    np.testing.assert_allclose(volume.array[0][tuple(indices)], made.numbered().ravel(), atol=1e-4)


def test_a_slice_between_two_rows_is_interpolated(tmp_path):
    affine = made.AFFINE.copy()
    affine[1, 2] = 0.75  # half a row
    ramp = np.broadcast_to(np.arange(6.0)[None, :, None] * 10, made.SHAPE).astype(np.int16)
    volume = read_volume(made.write(tmp_path, made.series(ramp, affine)))
    place = np.linalg.inv(volume.grid.affine) @ affine @ [2, 3, 1, 1]
    low = volume.array[0][2, int(np.floor(place[1])), 1]
    high = volume.array[0][2, int(np.ceil(place[1])), 1]
    assert (low + high) / 2 == pytest.approx(30)


def test_copies_and_foreign_files_are_left_aside_and_said(tmp_path):
    folder = made.write(tmp_path, made.series())
    shutil.copy(folder / "000.dcm", folder / "copy.dcm")
    (folder / "readme.txt").write_text("hello")
    (folder / ".DS_Store").write_text("hidden")
    volume = read_volume(folder)
    assert np.array_equal(volume.array[0], made.numbered())
    assert "1 files are copies" in " ".join(volume.notes)
    assert "1 other file " in " ".join(volume.notes)


def test_a_picture_without_a_place_in_space_is_two_dimensional(tmp_path):
    dataset = made.series()[0]
    del dataset.ImagePositionPatient, dataset.ImageOrientationPatient
    (tmp_path / "a.dcm").write_bytes(made.encode(dataset))
    volume = read_volume(tmp_path / "a.dcm")
    assert volume.array.shape == (1, 6, 5)
    assert volume.grid.spacing == (1.5, 0.8)
    assert volume.grid.unit == "mm"
    del dataset.PixelSpacing
    dataset.ImagerPixelSpacing = [0.1, 0.1]
    (tmp_path / "a.dcm").write_bytes(made.encode(dataset))
    volume = read_volume(tmp_path / "a.dcm")
    assert volume.grid.unit == "px"
    assert "no PixelSpacing" in " ".join(volume.notes)


def test_a_single_slice_is_a_volume_of_one(tmp_path):
    (tmp_path / "a.dcm").write_bytes(made.encode(made.series()[2]))
    volume = read_volume(tmp_path / "a.dcm")
    assert volume.array.shape == (1, 5, 6, 1)
    assert volume.grid.spacing == pytest.approx((0.8, 1.5, 5.0))
    assert "a single slice" in " ".join(volume.notes)


def test_the_grid_comes_from_the_headers_alone(tmp_path):
    folder = made.write(tmp_path, made.series())
    grid, channels = read_grid(folder)
    assert channels == 1
    assert grid.same_as(read_volume(folder).grid)


def test_series_are_listed_without_the_patient(tmp_path):
    scout = made.series(made.numbered((4, 4, 1)), series_uid=made.OTHER_SERIES_UID)[0]
    scout.ImageType, scout.SeriesNumber = ["ORIGINAL", "PRIMARY", "LOCALIZER"], 1
    listed = list_series(made.write(tmp_path, [*made.series(), scout]))
    assert [one.describe() for one in listed] == [
        "1: CT localizer, 4 x 4 x 1 voxels at 0.8 x 1.5 x 5 mm, 1 file",
        "3: CT, 5 x 6 x 7 voxels at 0.8 x 1.5 x 5 mm, 7 files",
    ]
    assert not any(seed in repr(listed) for seed in made.SEEDS)


def test_a_series_is_chosen_by_number_or_uid(tmp_path):
    other = made.series(made.numbered((3, 3, 2)), series_uid=made.OTHER_SERIES_UID)
    for dataset in other:
        dataset.SeriesNumber = 4
    folder = made.write(tmp_path, [*made.series(), *other])
    assert read_volume(folder, series="4").grid.shape == (3, 3, 2)
    assert read_volume(folder, series=made.SERIES_UID).grid.shape == made.SHAPE
    assert read_grid(folder, series="3")[0].shape == made.SHAPE


def test_the_files_of_a_volume_come_in_the_order_of_its_slices(tmp_path):
    datasets = made.series()
    files = source_files(made.write(tmp_path, datasets[::-1]))
    found = []
    for open_file in files:
        with open_file() as file:
            found.append(pydicom.dcmread(file).SOPInstanceUID)
    assert found == [dataset.SOPInstanceUID for dataset in datasets]


def test_folders_archives_and_nameless_files_are_known_by_their_first_bytes(tmp_path):
    folder = made.write(tmp_path / "scan", made.series()[:2], names="{}")
    assert is_scan(folder)
    assert is_scan(folder / "0")
    assert is_scan(made.write_zip(tmp_path / "a.bin", made.series()[:1]))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.nii").write_bytes(b"x" * 400)
    assert not is_scan(tmp_path / "text")
    assert not is_scan(tmp_path / "text" / "a.nii")


@pytest.mark.shared
def test_the_jpeg_2000_series_lies_where_its_nifti_twin_does(shared_folder):
    data = shared_folder / "data" / "ct_mr"
    volume, twin = read_volume(data / "example_ct_dicom"), read_volume(data / "example_seg_dicom.nii.gz")
    turned = volume.grid.transposed((0, 1, 2), (False, True, False))
    assert turned.same_as(twin.grid, 1e-3)
    assert volume.array.dtype == np.int16
    assert volume.array.min() == -1024
