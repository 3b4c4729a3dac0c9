"""read(write(x)) == x for every format and type; results lie on the header of the image they belong to."""

import gzip
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from crafted import AFFINE, SHAPE, nifti_file, numbered

from voxdino.core.errors import GeometryError, ImageError, LabelError
from voxdino.core.geometry import Grid
from voxdino.core.io import READERS, image_suffix, is_image, read_label_map, read_volume, write_label_map, write_volume
from voxdino.core.volume import LabelMap, Volume

VOLUME_SUFFIXES = [".nii", ".nii.gz", ".nrrd", ".mha"]
PICTURE_SUFFIXES = [".png", ".tif"]
INTEGERS = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]

ANGLE = 0.3
OBLIQUE = np.array(
    [
        [0.8 * np.cos(ANGLE), -1.5 * np.sin(ANGLE), 0, -20.125],
        [0.8 * np.sin(ANGLE), 1.5 * np.cos(ANGLE), 0, 1e-3],
        [0, 0, -5.0, 1234.5],
        [0, 0, 0, 1],
    ]
)
GRID = Grid(SHAPE, OBLIQUE)


@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
@pytest.mark.parametrize("dtype", [*INTEGERS, np.float32, np.float64])
@pytest.mark.parametrize("layout", ["C", "F"])
def test_a_volume_comes_back_as_it_was_written(tmp_path, suffix, dtype, layout):
    array = np.array(numbered(dtype, (1, *SHAPE)), order=layout)
    path = tmp_path / f"case{suffix}"
    write_volume(path, Volume(array, GRID))
    volume = read_volume(path)
    assert volume.array.dtype == dtype
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.grid.affine, OBLIQUE, atol=1e-4 if "nii" in suffix else 1e-12)  # sform: float32
    assert volume.notes == ()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
def test_channels_come_back_in_their_order(tmp_path, suffix):
    array = np.random.default_rng(0).random((3, *SHAPE), dtype=np.float32)
    path = tmp_path / f"case{suffix}"
    write_volume(path, Volume(array, GRID))
    np.testing.assert_array_equal(read_volume(path, frames_as_channels=True).array, array)


@pytest.mark.parametrize("suffix", [*VOLUME_SUFFIXES, *PICTURE_SUFFIXES])
@pytest.mark.parametrize(
    ("largest", "dtype"), [(0, np.uint8), (1, np.uint8), (255, np.uint8), (256, np.uint16), (65_535, np.uint16)]
)
def test_labels_come_back_in_the_smallest_type(tmp_path, suffix, largest, dtype):
    is_picture = suffix in PICTURE_SUFFIXES
    shape, grid = ((5, 6), Grid.from_spacing((5, 6), unit="px")) if is_picture else (SHAPE, GRID)
    array = np.minimum(np.arange(np.prod(shape)).reshape(shape), largest).astype(np.int64)
    array[-1, -1] = largest
    path = tmp_path / f"case{suffix}"
    write_label_map(path, LabelMap(array, grid))
    labels = read_label_map(path)
    np.testing.assert_array_equal(labels.array, array)
    assert labels.array.dtype == dtype
    assert labels.grid.unit == grid.unit


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha", ".tif"])
def test_labels_over_16_bit_are_written_where_the_format_can(tmp_path, suffix):
    grid = Grid.from_spacing((2, 3), unit="px") if suffix == ".tif" else Grid.from_spacing((1, 2, 3))
    array = np.full(grid.shape, 70_000)
    write_label_map(tmp_path / f"a{suffix}", LabelMap(array, grid))
    np.testing.assert_array_equal(read_label_map(tmp_path / f"a{suffix}").array, array)


@pytest.mark.parametrize("suffix", [*VOLUME_SUFFIXES, *PICTURE_SUFFIXES])
def test_the_same_input_gives_the_same_bytes(tmp_path, suffix):
    is_picture = suffix in PICTURE_SUFFIXES
    grid = Grid.from_spacing((5, 6), unit="px") if is_picture else GRID
    for name in ("a", "b"):
        write_label_map(tmp_path / f"{name}{suffix}", LabelMap(numbered(shape=grid.shape), grid))
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(("suffix", "channels"), [(".png", 1), (".tif", 1), (".tif", 3), (".tiff", 3)])
def test_pictures_come_back(tmp_path, suffix, channels, dtype):
    array = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (channels, 5, 7), dtype=dtype)
    write_volume(tmp_path / f"a{suffix}", Volume(array, Grid.from_spacing((5, 7), unit="px")))
    np.testing.assert_array_equal(read_volume(tmp_path / f"a{suffix}").array, array)


def header(path):
    data = path.read_bytes()
    return (gzip.decompress(data) if path.name.endswith(".gz") else data)[:352]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sform_code": 0, "qform_code": 0},
        {"sform_code": 4, "qform_code": 1},
        {"xyzt_units": 3},
        {"descrip": b"patient: N. N."},
        {"scl_slope": 2.0, "scl_inter": -1024.0},
        {"dim": (4, 5, 6, 7, 1, 1, 1, 1)},
        {"dim": (5, 5, 6, 7, 1, 1, 1, 1)},
    ],
)
@pytest.mark.parametrize("endian", ["<", ">"])
def test_labels_keep_the_transforms_codes_units_and_rank_of_their_image(tmp_path, fields, endian):
    image = nifti_file(tmp_path, "image.nii.gz", endian=endian, **fields)
    volume = read_volume(image)
    out = tmp_path / "label.nii.gz"
    write_label_map(out, LabelMap(numbered(), volume.grid), like=image)
    old, new = nibabel.load(image), nibabel.load(out)
    assert new.shape == old.shape
    np.testing.assert_array_equal(np.asanyarray(new.dataobj).reshape(SHAPE), numbered())
    np.testing.assert_array_equal(new.affine, old.affine)
    for name in ("sform_code", "qform_code", "xyzt_units", "pixdim", "srow_x", "quatern_b", "qoffset_x", "dim"):
        np.testing.assert_array_equal(new.header[name], old.header[name])
    assert new.get_data_dtype() == np.uint8
    assert b"patient" not in header(out)
    assert len(new.header.extensions) == 0
    assert read_label_map(out).grid.same_as(volume.grid, tolerance=0.0)


def test_extensions_are_never_copied(tmp_path):
    image = nibabel.Nifti1Image(numbered(), AFFINE)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, b"patient: N. N."))
    image.to_filename(tmp_path / "image.nii")
    grid = read_volume(tmp_path / "image.nii").grid
    write_label_map(tmp_path / "label.nii", LabelMap(numbered(), grid), like=tmp_path / "image.nii")
    assert b"patient" in (tmp_path / "image.nii").read_bytes()
    assert b"patient" not in (tmp_path / "label.nii").read_bytes()
    assert (tmp_path / "label.nii").stat().st_size == 352 + numbered().size


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_two_dimensional_images_get_two_dimensional_labels(tmp_path, kind):
    image = nifti_file(tmp_path, "image.nii.gz", numbered()[..., 0], kind=kind)
    volume = read_volume(image)
    write_label_map(tmp_path / "label.nii.gz", LabelMap(volume.array[0], volume.grid), like=image)
    result = nibabel.load(tmp_path / "label.nii.gz")
    assert type(result) is kind
    assert result.shape == (5, 6)
    np.testing.assert_array_equal(result.dataobj, numbered()[..., 0])


def test_without_an_image_both_transforms_are_set(tmp_path):
    write_label_map(tmp_path / "a.nii.gz", LabelMap(numbered(), GRID))
    image = nibabel.load(tmp_path / "a.nii.gz")
    assert (image.header["sform_code"], image.header["qform_code"]) == (1, 1)
    np.testing.assert_allclose(image.get_sform(), OBLIQUE, atol=1e-4)
    np.testing.assert_allclose(image.get_qform(), OBLIQUE, atol=1e-3)
    assert image.header.get_xyzt_units()[0] == "mm"


def test_axes_beyond_16_bit_are_written_as_nifti_2(tmp_path):
    shape = (40_000, 1, 2)
    write_label_map(tmp_path / "a.nii.gz", LabelMap(np.ones(shape, np.uint8), Grid.from_spacing(shape)))
    assert isinstance(nibabel.load(tmp_path / "a.nii.gz"), nibabel.Nifti2Image)
    assert read_label_map(tmp_path / "a.nii.gz").grid.shape == shape


def test_an_image_of_another_format_lends_nothing_but_the_grid(tmp_path):
    write_volume(tmp_path / "image.nrrd", Volume(numbered(shape=(1, *SHAPE)), GRID))
    for suffix in VOLUME_SUFFIXES:
        write_label_map(tmp_path / f"l{suffix}", LabelMap(numbered(), GRID), like=tmp_path / "image.nrrd")
        assert read_label_map(tmp_path / f"l{suffix}").grid.same_as(GRID)


def test_labels_that_do_not_lie_on_their_image_are_refused(tmp_path):
    image = nifti_file(tmp_path, "image.nii.gz")
    for grid in (Grid(SHAPE, OBLIQUE), Grid.from_spacing((7, 6, 5))):
        with pytest.raises(GeometryError, match="do not lie on"):
            write_label_map(tmp_path / "a.nii.gz", LabelMap(np.zeros(grid.shape, np.uint8), grid), like=image)
    assert not (tmp_path / "a.nii.gz").exists()


def test_what_a_format_cannot_hold_is_refused_and_leaves_nothing(tmp_path):
    pixels, voxels = Grid.from_spacing((5, 6), unit="px"), Grid.from_spacing(SHAPE)
    flat, deep = np.zeros((5, 6), np.uint8), np.zeros(SHAPE, np.uint8)
    cases = [
        ("a.nii.gz", LabelMap(flat, pixels), GeometryError, "no place in space"),
        ("a.nrrd", LabelMap(flat, pixels), GeometryError, "no place in space"),
        ("a.mha", LabelMap(flat, pixels), GeometryError, "no place in space"),
        ("a.png", LabelMap(deep, voxels), GeometryError, "does not fit a picture"),
        ("a.png", LabelMap(flat + np.uint32(70_000), pixels), ImageError, "PNG cannot hold uint32"),
        ("a.jpg", LabelMap(flat, pixels), ImageError, "only read"),
        ("a.nii.gz", LabelMap(deep.astype(np.int8) - np.int8(1), voxels), LabelError, "label -1"),
        ("a.xyz", LabelMap(deep, voxels), ImageError, "no image format we know"),
    ]
    for name, labels, kind, words in cases:
        with pytest.raises(kind, match=words):
            write_label_map(tmp_path / name, labels)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
def test_a_file_size_limit_leaves_no_half_file_and_the_old_one(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_label_map(path, LabelMap(numbered(), GRID))
    before = path.read_bytes()
    code = (
        "import sys, signal, resource, numpy as np; from pathlib import Path\n"
        "from voxdino.core.io import write_volume\n"
        "from voxdino.core.geometry import Grid; from voxdino.core.volume import Volume\n"
        "from voxdino.core.errors import ResourceError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "array = np.random.default_rng(0).random((1, 40, 40, 40))\n"
        "try: write_volume(sys.argv[1], Volume(array, Grid.from_spacing((40, 40, 40))))\n"
        "except ResourceError as error: print(error); sys.exit(error.exit_code)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 4, result.stderr
    assert str(path) in result.stdout
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_suffixes_say_the_format():
    assert image_suffix("a/b.c.NII.GZ") == ".nii.gz"
    assert image_suffix("x.png") == ".png"
    assert image_suffix("x.gz") == image_suffix("x") == image_suffix("nii.txt") == ""
    assert is_image("x.Tiff")
    assert not is_image("x.csv")
    assert all(image_suffix(f"x{suffix}") == suffix for suffix in READERS)


@pytest.mark.parametrize("name", ["case.xyz", "case", "case.txt"])
def test_unknown_suffixes_name_the_known_ones(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ImageError, match=r"known formats: \.nii\.gz, .*\.png") as caught:
        read_volume(tmp_path / name)
    assert name in str(caught.value)
