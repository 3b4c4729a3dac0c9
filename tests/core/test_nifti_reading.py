"""What NIfTI files hold comes out exactly: every type, byte order, rank, scale and transform."""

import gzip
import tracemalloc

import nibabel
import numpy as np
import pytest
from crafted import AFFINE, SHAPE, nifti_bytes, nifti_file, numbered

from voxdino.core.errors import LabelError
from voxdino.core.io import ReadOptions, read_grid, read_label_map, read_volume

DTYPES = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64]


@pytest.mark.parametrize("name", ["case.nii", "case.nii.gz", "CASE.NII.GZ"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_type_and_grid_are_the_files_own(tmp_path, dtype, name):
    path = nifti_file(tmp_path, "case.nii.gz" if name.lower().endswith("gz") else "case.nii", numbered(dtype))
    path = path.rename(tmp_path / name)
    volume = read_volume(path)
    assert volume.array.dtype == dtype
    np.testing.assert_array_equal(volume.array[0], numbered(dtype))
    np.testing.assert_allclose(volume.grid.affine, AFFINE, atol=1e-6)
    assert volume.grid.orientation == "LAS"
    assert volume.grid.spacing == pytest.approx((0.8, 1.5, 5.0))
    assert volume.notes == ()
    assert volume.source == path
    grid, channels = read_grid(path)
    assert grid.same_as(volume.grid)
    assert channels == 1


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("dtype", DTYPES)
def test_byte_order_changes_no_bit(tmp_path, dtype, kind):
    little = read_volume(nifti_file(tmp_path, "little.nii", numbered(dtype), kind=kind))
    big_file = nifti_file(tmp_path, "big.nii.gz", numbered(dtype), kind=kind, endian=">")
    assert gzip.decompress(big_file.read_bytes())[:2] == b"\0\0"
    big = read_volume(big_file)
    assert big.array.dtype == little.array.dtype == dtype
    assert big.array.tobytes() == little.array.tobytes()
    np.testing.assert_array_equal(big.grid.affine, little.grid.affine)


@pytest.mark.parametrize(("slope", "inter"), [(2.0, -1024.0), (0.5, 0.0), (1.0, 3.0), (-1.0, 0.0)])
def test_a_set_scale_is_applied_in_float32_and_agrees_with_nibabel(tmp_path, slope, inter):
    path = nifti_file(tmp_path, scl_slope=slope, scl_inter=inter)
    volume = read_volume(path)
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.array[0], np.asanyarray(nibabel.load(path).dataobj), rtol=1e-6)


@pytest.mark.parametrize(("slope", "inter"), [(0.0, 0.0), (0.0, 5.0), (np.nan, np.nan), (np.inf, 0.0), (1.0, 0.0)])
def test_no_scale_keeps_the_stored_type(tmp_path, slope, inter):
    volume = read_volume(nifti_file(tmp_path, scl_slope=slope, scl_inter=inter))
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array[0], numbered())


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_labels_beyond_what_floats_hold_are_exact(tmp_path, dtype):
    array = numbered(dtype) + np.array(2**53 + 1, dtype)
    labels = read_label_map(nifti_file(tmp_path, array=array))
    np.testing.assert_array_equal(labels.array, array)
    assert labels.array.dtype == dtype


def test_images_beyond_what_float32_holds_are_noted(tmp_path):
    array = numbered(np.int32)
    assert read_volume(nifti_file(tmp_path, array=array)).notes == ()
    array[0, 0, 0] = 2**24 + 1
    (note,) = read_volume(nifti_file(tmp_path, array=array)).notes
    assert "16777217 lose their last digits" in note


def test_one_frame_is_three_dimensional_and_noted(tmp_path):
    path = nifti_file(tmp_path, array=numbered()[..., None, None])
    volume = read_volume(path)
    assert volume.array.shape == (1, *SHAPE)
    assert "one frame" in volume.notes[0]
    assert read_grid(path)[0].shape == SHAPE


def test_several_frames_are_channels_on_request(tmp_path):
    frames = np.stack([numbered(), numbered() + 1, numbered() + 2], axis=-1)
    path = nifti_file(tmp_path, array=frames)
    volume = read_volume(path, frames_as_channels=True)
    np.testing.assert_array_equal(volume.array, np.moveaxis(frames, -1, 0))
    assert read_grid(path)[1] == 3


def test_two_dimensional_files_are_one_slice(tmp_path):
    volume = read_volume(nifti_file(tmp_path, array=numbered()[..., 0]))
    assert volume.array.shape == (1, 5, 6, 1)
    assert "one slice" in volume.notes[0]
    np.testing.assert_allclose(volume.grid.affine, AFFINE, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 6, 1), (1, 6, 7), (1, 1, 1)])
def test_axes_of_one_voxel_are_kept(tmp_path, shape):
    assert read_volume(nifti_file(tmp_path, array=numbered(shape=shape))).array.shape == (1, *shape)


@pytest.mark.parametrize("channels", [3, 4])
def test_colour_voxels_are_channels(tmp_path, channels):
    colour = np.random.default_rng(0).integers(0, 255, (*SHAPE, channels), dtype=np.uint8)
    record = np.dtype([(name, "u1") for name in "RGBA"[:channels]])
    path = nifti_file(tmp_path, array=colour.view(record)[..., 0])
    np.testing.assert_array_equal(read_volume(path).array, np.moveaxis(colour, -1, 0))
    assert read_grid(path)[1] == channels
    with pytest.raises(LabelError, match=f"{channels} channels"):
        read_label_map(path)


def test_the_sform_wins_and_disagreement_is_noted(tmp_path):
    flipped = AFFINE @ np.diag([-1, 1, 1, 1])
    image = nibabel.Nifti1Image(numbered(), AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(flipped, 1)
    image.to_filename(tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(volume.grid.affine, AFFINE, atol=1e-6)
    assert any("sform and qform disagree by up to" in note and "sform is used" in note for note in volume.notes)
    image.set_qform(AFFINE, 1)
    image.to_filename(tmp_path / "b.nii.gz")
    assert read_volume(tmp_path / "b.nii.gz").notes == ()


def test_spacing_comes_from_the_affine_not_from_pixdim(tmp_path):
    volume = read_volume(nifti_file(tmp_path, pixdim=(1, 5, 5, 5, 1, 1, 1, 1)))
    assert volume.grid.spacing == pytest.approx((0.8, 1.5, 5.0))
    assert any("differ from its affine's 0.8 x 1.5 x 5 mm" in note for note in volume.notes)


def test_the_qform_counts_where_no_sform_is_set(tmp_path):
    image = nibabel.Nifti1Image(numbered(), None)
    image.set_sform(None, 0)
    image.set_qform(AFFINE, 1)
    image.to_filename(tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(volume.grid.affine, AFFINE, atol=1e-5)
    assert volume.notes == ()


def test_without_any_transform_spacing_is_kept_and_orientation_called_unknown(tmp_path):
    volume = read_volume(nifti_file(tmp_path, sform_code=0, qform_code=0))
    np.testing.assert_allclose(volume.grid.affine, np.diag([0.8, 1.5, 5, 1]), atol=1e-6)
    assert any("orientation unknown" in note for note in volume.notes)


@pytest.mark.parametrize(("unit", "factor"), [(0, 1), (2, 1), (1, 1000), (3, 0.001), (2 | 8, 1)])
def test_lengths_are_millimetres(tmp_path, unit, factor):
    volume = read_volume(nifti_file(tmp_path, xyzt_units=unit))
    assert volume.grid.spacing == pytest.approx((0.8 * factor, 1.5 * factor, 5 * factor))
    assert bool(volume.notes) == (factor != 1)


def test_shear_within_rounding_is_read(tmp_path):
    affine = AFFINE.copy()
    affine[0, 1] = 1e-4
    assert read_volume(nifti_file(tmp_path, affine=affine)).notes == ()


def test_extensions_are_passed_by(tmp_path):
    image = nibabel.Nifti1Image(numbered(), AFFINE)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, b"patient: N. N."))
    image.to_filename(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").array[0], numbered())


def test_padding_after_the_voxels_is_harmless(tmp_path):
    (tmp_path / "a.nii").write_bytes(nifti_bytes() + b"\0" * 300)
    data = nifti_bytes()
    parts = gzip.compress(data[:400]) + gzip.compress(data[400:]) + b"\0" * 100  # two members, then padding
    (tmp_path / "b.nii.gz").write_bytes(parts)
    for name in ("a.nii", "b.nii.gz"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).array[0], numbered())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_labels_near_whole_numbers_are_rounded(tmp_path, dtype):
    array = numbered(dtype)
    array[0, 0, 1] = 0.9999999
    array[0, 0, 2] = 2.0005
    labels = read_label_map(nifti_file(tmp_path, array=array))
    assert labels.array.dtype == np.uint8
    np.testing.assert_array_equal(labels.array, numbered())


def test_the_mapping_of_the_options_is_applied(tmp_path):
    array = (numbered(np.uint8) > 60).astype(np.uint8) * 255
    labels = read_label_map(nifti_file(tmp_path, array=array), options=ReadOptions(label_map=((255, 1),)))
    np.testing.assert_array_equal(labels.array, array // 255)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_filling_puts_the_smallest_finite_value_and_notes_the_count(tmp_path, dtype):
    array = numbered(dtype) - 1000
    array[0, 0, 0], array[1, 1, 1], array[2, 2, 2] = np.nan, np.inf, -np.inf
    volume = read_volume(nifti_file(tmp_path, array=array), nan_policy="fill")
    assert volume.array.dtype == dtype
    assert (volume.array[0, 0, 0, 0], volume.array[0, 1, 1, 1], volume.array[0, 2, 2, 2]) == (-1000, -881, -1000)
    assert "1 NaN, 1 +infinity, 1 -infinity among 210 voxels; filled with -1000 and -881" in volume.notes[0]
    untouched = np.isfinite(array)
    np.testing.assert_array_equal(volume.array[0][untouched], array[untouched])


@pytest.mark.parametrize("name", ["case.nii", "case.nii.gz"])
@pytest.mark.parametrize("as_labels", [False, True])
def test_reading_holds_the_voxels_once(tmp_path, name, as_labels):
    path = nifti_file(tmp_path, name, np.zeros((128, 128, 200), np.int16))
    num_bytes = 128 * 128 * 200 * 2
    tracemalloc.start()
    try:
        if as_labels:
            read_label_map(path)
        else:
            read_volume(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < num_bytes + 2**20


def test_changing_the_array_changes_no_file(tmp_path):
    path = nifti_file(tmp_path)
    before = path.read_bytes()
    volume = read_volume(path)
    volume.array[:] = 0
    assert path.read_bytes() == before


@pytest.mark.shared
def test_real_files_agree_with_nibabel(shared_folder):
    paths = sorted((shared_folder / "data" / "ct_mr").glob("*.nii.gz"))
    assert paths
    for path in paths:
        volume, image = read_volume(path), nibabel.load(path)
        np.testing.assert_array_equal(volume.array[0], np.asanyarray(image.dataobj))
        np.testing.assert_allclose(volume.grid.affine, image.affine)
