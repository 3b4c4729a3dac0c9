"""NRRD and MetaImage agree with SimpleITK both ways and with NIfTI; damage is refused where SimpleITK reads on."""

import gzip
import re

import numpy as np
import pytest
import SimpleITK
from crafted import SHAPE, numbered

from voxdino.core.errors import GeometryError, ImageError, InputError, LabelError, SafetyError
from voxdino.core.geometry import Grid
from voxdino.core.io import digest_image, image_files, read_grid, read_label_map, read_volume, write_volume
from voxdino.core.safe_files import digest_file
from voxdino.core.volume import Volume

SUFFIXES = [".nrrd", ".mha"]
DTYPES = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64]


def rotation():
    a, b = 0.3, -0.2
    first = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    second = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return first @ second @ np.array([[0, 1, 0], [0, 0, -1], [1, 0, 0]])


def itk_image(array, *, is_vector=False):
    """A SimpleITK image of (x, y, z) or (x, y, z, C) values, oblique and anisotropic."""
    axes = (2, 1, 0, 3) if is_vector else (2, 1, 0)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.transpose(axes)), isVector=is_vector)
    image.SetSpacing((0.8, 1.5, 5.0))
    image.SetOrigin((10.25, -20.5, 1000.0))
    image.SetDirection(rotation().ravel().tolist())
    return image


def itk_file(folder, suffix, array, *, compressed=True, **kwargs):
    path = folder / f"case{suffix}"
    SimpleITK.WriteImage(itk_image(array, **kwargs), str(path), compressed)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_files_of_simpleitk_are_read_as_it_reads_them(tmp_path, suffix, compressed, dtype):
    path = itk_file(tmp_path, suffix, numbered(dtype), compressed=compressed)
    volume = read_volume(path)
    assert volume.array.dtype == dtype
    np.testing.assert_array_equal(volume.array[0], numbered(dtype))
    image = itk_image(numbered(dtype))
    for index in [(0, 0, 0), (4, 0, 0), (0, 5, 0), (0, 0, 6), (4, 5, 6)]:
        lps = np.array(image.TransformIndexToPhysicalPoint(index))
        np.testing.assert_allclose(volume.grid.index_to_world(index)[0], lps * (-1, -1, 1), atol=1e-9)
    assert volume.notes == ()
    grid, channels = read_grid(path)
    assert (grid.same_as(volume.grid), channels) == (True, 1)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_simpleitk_reads_what_we_write(tmp_path, suffix):
    affine = np.eye(4)
    affine[:3, :3] = rotation() * (0.8, 1.5, 5.0)
    affine[:3, 3] = (1.5, -2.5, 1e3)
    grid = Grid(SHAPE, affine)
    write_volume(tmp_path / f"a{suffix}", Volume(numbered(shape=(1, *SHAPE)), grid))
    image = SimpleITK.ReadImage(str(tmp_path / f"a{suffix}"))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image).T, numbered())
    for index in [(0, 0, 0), (4, 0, 0), (0, 5, 0), (0, 0, 6)]:
        world = np.array(image.TransformIndexToPhysicalPoint(index)) * (-1, -1, 1)
        np.testing.assert_allclose(world, grid.index_to_world(index)[0], atol=1e-9)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_they_lie_where_the_same_nifti_lies(tmp_path, suffix):
    SimpleITK.WriteImage(itk_image(numbered()), str(tmp_path / "same.nii.gz"))
    nifti = read_volume(tmp_path / "same.nii.gz")
    other = read_volume(itk_file(tmp_path, suffix, numbered()))
    np.testing.assert_array_equal(other.array, nifti.array)
    assert other.grid.same_as(nifti.grid)
    write_volume(tmp_path / "back.nii.gz", other)
    assert read_volume(tmp_path / "back.nii.gz").grid.same_as(nifti.grid)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_vectors_are_channels(tmp_path, suffix):
    array = np.random.default_rng(0).random((*SHAPE, 3), dtype=np.float32)
    path = itk_file(tmp_path, suffix, array, is_vector=True)
    np.testing.assert_array_equal(read_volume(path).array, np.moveaxis(array, -1, 0))
    assert read_grid(path)[1] == 3
    with pytest.raises(LabelError, match="3 channels"):
        read_label_map(path)


@pytest.mark.parametrize("suffix", [".nhdr", ".mhd"])
def test_headers_with_their_data_beside_them_are_read(tmp_path, suffix):
    for compressed in (False, True):
        path = itk_file(tmp_path, suffix, numbered(), compressed=compressed)
        np.testing.assert_array_equal(read_volume(path).array[0], numbered())


@pytest.mark.parametrize("suffix", [".nhdr", ".mhd"])
def test_an_image_has_another_digest_when_voxels_beside_its_header_change(tmp_path, suffix):
    path = itk_file(tmp_path, suffix, numbered(), compressed=False)
    [voxels] = [file for file in tmp_path.iterdir() if file != path]
    assert image_files(path) == [path, voxels]
    before, header = digest_image(path), path.read_bytes()
    voxels.write_bytes(voxels.read_bytes()[::-1])
    assert digest_image(path) != before and path.read_bytes() == header
    voxels.unlink()
    assert digest_image(path) == digest_file(path)  # reading it says what is missing


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_image_of_one_file_has_the_digest_of_that_file(tmp_path, suffix):
    path = itk_file(tmp_path, suffix, numbered())
    assert image_files(path) == [path] and digest_image(path) == digest_file(path)


@pytest.mark.parametrize("suffix", [".nhdr", ".mhd"])
@pytest.mark.parametrize("target", ["../secret.raw", "/etc/passwd", "https://example.org/a.raw"])
def test_headers_never_read_outside_their_folder(tmp_path, suffix, target):
    (tmp_path / "secret.raw").write_bytes(b"\0" * 1000)
    (tmp_path / "sub").mkdir()
    path = itk_file(tmp_path / "sub", suffix, numbered(np.uint8), compressed=False)
    text = re.sub(r"(data file: |ElementDataFile = ).*", rf"\g<1>{target}", path.read_text())
    path.write_text(text)
    with pytest.raises(SafetyError) as caught:
        read_volume(path)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("compressed", [False, True])
def test_truncation_is_named(tmp_path, suffix, compressed):
    array = np.random.default_rng(0).integers(0, 999, (9, 10, 11), dtype=np.int16)
    path = itk_file(tmp_path, suffix, array, compressed=compressed)
    data = path.read_bytes()
    for length in (len(data) // 100, len(data) // 2, len(data) - 8, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ImageError, match="truncated") as caught:
            read_volume(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "Fix: " in str(caught.value)
        assert caught.value.exit_code == 3


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_flipped_bit_of_the_voxels_is_noticed(tmp_path, suffix):
    array = np.random.default_rng(0).integers(0, 999, SHAPE, dtype=np.int16)
    path = itk_file(tmp_path, suffix, array)
    data = path.read_bytes()
    start = data.index(b"\n\n") + 12 if suffix == ".nrrd" else data.index(b"LOCAL") + 8
    for position in range(start, len(data), 5):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(ImageError, match=r"checksum|truncated|more data|other data"):
            read_volume(path)


def nrrd(folder, data=None, **fields):
    """A .nrrd with header fields replaced (None: left out)."""
    lines = {
        "type": "short",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": "5 6 7",
        "space directions": "(1,0,0) (0,1,0) (0,0,2)",
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": "raw",
        "space origin": "(0,0,0)",
        **{name.replace("_", " "): value for name, value in fields.items()},
    }
    text = "NRRD0004\n# note\n" + "".join(f"{name}: {value}\n" for name, value in lines.items() if value is not None)
    path = folder / "case.nrrd"
    path.write_bytes(text.encode() + b"\n" + (numbered().tobytes(order="F") if data is None else data))
    return path


def mha(folder, data=None, **fields):
    lines = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "0 0 0",
        "ElementSpacing": "1 1 2",
        "DimSize": "5 6 7",
        "ElementType": "MET_SHORT",
        **fields,
    }
    text = "".join(f"{name} = {value}\n" for name, value in lines.items() if value is not None)
    path = folder / "case.mha"
    body = numbered().tobytes(order="F") if data is None else data
    path.write_bytes((text + "ElementDataFile = LOCAL\n").encode() + body)
    return path


def test_the_crafted_files_are_good_and_name_their_space(tmp_path):
    for path in (nrrd(tmp_path), mha(tmp_path)):
        volume = read_volume(path)
        np.testing.assert_array_equal(volume.array[0], numbered())
        assert (volume.grid.orientation, volume.grid.spacing, volume.notes) == ("LPS", (1, 1, 2), ())
    big = numbered().astype(">i2").tobytes(order="F")
    for path in (nrrd(tmp_path, big, endian="big"), mha(tmp_path, big, BinaryDataByteOrderMSB="True")):
        np.testing.assert_array_equal(read_volume(path).array[0], numbered())
    assert read_volume(nrrd(tmp_path, space="RAS")).grid.orientation == "RAS"
    assert read_volume(nrrd(tmp_path, space="left-anterior-superior")).grid.orientation == "LAS"


def test_headers_without_directions_are_noted(tmp_path):
    plain = {"space": None, "space_directions": None, "space_origin": None}
    volume = read_volume(nrrd(tmp_path, **plain, spacings="1 2 3"))
    assert volume.grid.spacing == (1, 2, 3)
    assert "orientation unknown" in volume.notes[0]
    volume = read_volume(mha(tmp_path, TransformMatrix=None))
    assert "orientation unknown" in volume.notes[0]


def test_flat_files_are_one_slice(tmp_path):
    flat = numbered()[..., 0]
    data = flat.tobytes(order="F")
    two = {"dimension": "2", "sizes": "5 6", "kinds": None}
    paths = [
        nrrd(tmp_path, data, **two, space_directions="(1,0,0) (0,1,0)"),
        mha(tmp_path, data, NDims="2", DimSize="5 6", TransformMatrix="1 0 0 1", Offset="0 0", ElementSpacing="1 1"),
    ]
    for path in paths:
        volume = read_volume(path)
        np.testing.assert_array_equal(volume.array[0, :, :, 0], flat)
        assert "one slice" in volume.notes[0]


def test_lists_are_frames(tmp_path):
    frames = np.stack([numbered(), numbered() + 1], axis=-1)
    path = nrrd(
        tmp_path, frames.tobytes(order="F"), dimension="4", sizes="5 6 7 2", kinds="domain domain domain list",
        space_directions="(1,0,0) (0,1,0) (0,0,2) none",
    )  # fmt: skip
    with pytest.raises(ImageError, match="2 frames"):
        read_volume(path)
    np.testing.assert_array_equal(read_volume(path, frames_as_channels=True).array, np.moveaxis(frames, -1, 0))


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"type": None}, ImageError, "lacks 'type'"),
        ({"type": "block"}, ImageError, "type 'block'"),
        ({"endian": None}, ImageError, "byte order"),
        ({"encoding": "bzip2"}, ImageError, "encoding 'bzip2'"),
        ({"encoding": "ascii"}, ImageError, "encoding 'ascii'"),
        ({"byte_skip": "-1"}, ImageError, "byte skip: -1"),
        ({"sizes": "5 0 7"}, ImageError, "sizes 5 0 7"),
        ({"sizes": "5 -6 7"}, ImageError, "sizes 5 -6 7"),
        ({"sizes": "5 6"}, ImageError, "dimension 3 and sizes 5 6"),
        ({"sizes": "five 6 7"}, ImageError, "'sizes' is 'five 6 7'"),
        ({"sizes": "32767 32767 32767"}, SafetyError, "32767 x 32767 x 32767"),
        ({"sizes": "50 60 70"}, ImageError, "truncated"),
        ({"sizes": "5 6 6"}, ImageError, "more data"),
        ({"space_directions": "(1,0,0) (1,0,0) (0,0,2)"}, GeometryError, "singular"),
        ({"space_directions": "(1,0,0) (0,0,0) (0,0,2)"}, GeometryError, "singular"),
        ({"space_directions": "(1,0,0) (0.2,1,0) (0,0,2)"}, GeometryError, "sheared"),
        ({"space_directions": "(1,0,0) (nan,1,0) (0,0,2)"}, GeometryError, "NaN"),
        ({"space_directions": "(1,0,0) (0,1,0)"}, ImageError, "2 directions"),
        ({"space_origin": "(0,0)"}, ImageError, "different lengths"),
        ({"space_origin": "(a,0,0)"}, ImageError, "vector"),
        ({"data_file": "LIST"}, ImageError, "several files"),
        ({"data_file": "a%03d.raw 1 3 1"}, ImageError, "several files"),
        ({"TYPE": "short"}, ImageError, "twice"),
    ],
)
def test_nrrd_headers_that_cannot_be(tmp_path, fields, kind, words):
    path = nrrd(tmp_path, **fields)
    with pytest.raises(kind, match=re.escape(words)) as caught:
        read_volume(path)
    assert "Fix: " in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"ElementType": None}, ImageError, "lacks 'elementtype'"),
        ({"ElementType": "MET_STRING"}, ImageError, "MET_STRING"),
        ({"BinaryData": "False"}, ImageError, "as text"),
        ({"HeaderSize": "-1"}, ImageError, "HeaderSize = -1"),
        ({"NDims": "4"}, ImageError, "4 axes"),
        ({"DimSize": "5 0 7"}, ImageError, "5 0 7"),
        ({"DimSize": "5 6"}, ImageError, "'dimsize' is '5 6'"),
        ({"DimSize": "32767 32767 32767"}, SafetyError, "32767 x 32767 x 32767"),
        ({"DimSize": "50 60 70"}, ImageError, "truncated"),
        ({"ElementNumberOfChannels": "0"}, ImageError, "DimSize"),
        ({"ElementSpacing": "1 0 2"}, GeometryError, "spacing is 1 x 0 x 2"),
        ({"ElementSpacing": "1 -1 2"}, GeometryError, "spacing is 1 x -1 x 2"),
        ({"ElementSpacing": "1 nan 2"}, ImageError, "elementspacing"),
        ({"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, GeometryError, "singular"),
        ({"TransformMatrix": "1 0 0 0.3 1 0 0 0 1"}, GeometryError, "sheared"),
        ({"CompressedData": "True"}, ImageError, "checksum"),
    ],
)
def test_metaimage_headers_that_cannot_be(tmp_path, fields, kind, words):
    path = mha(tmp_path, **fields)
    with pytest.raises(kind, match=re.escape(words)) as caught:
        read_volume(path)
    assert "Fix: " in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nhdr", ".mhd"])
@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "empty file"), (b"x", "text"), (gzip.compress(b"a", mtime=0), "gzip"), (b"\x89PNG", "PNG")],
)
def test_what_is_something_else_is_named(tmp_path, suffix, data, words):
    path = tmp_path / f"case{suffix}"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=words):
        read_volume(path)


@pytest.mark.parametrize("make", [nrrd, mha])
def test_random_header_bytes_never_end_in_a_foreign_error(tmp_path, make):
    rng = np.random.default_rng(0)
    data = make(tmp_path).read_bytes()
    path = tmp_path / f"fuzz.{make.__name__}"
    for _ in range(200):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data) - 420, rng.integers(1, 5)):
            damaged[position] = rng.choice(np.frombuffer(b"0123456789 ().-=:\n\xffeNDa%/", np.uint8))
        path.write_bytes(damaged)
        try:
            read_volume(path)
        except (InputError, SafetyError):
            continue
