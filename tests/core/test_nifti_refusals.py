"""Damaged, lying and odd NIfTI files: each is refused with its name, the fact and a fix, before memory is taken."""

import gzip
import os
import resource
import struct
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from crafted import AFFINE, FIELDS, SHAPE, nifti_bytes, nifti_file, numbered

from voxdino.core.errors import GeometryError, ImageError, InputError, LabelError, SafetyError, VoxdinoError
from voxdino.core.io import read_grid, read_label_map, read_volume

NUM_BYTES = 352 + 2 * int(np.prod(SHAPE))


def refused(path, kind: type[VoxdinoError] = ImageError, *words, read=read_volume):
    """The message, after the checks that every refusal must pass."""
    with pytest.raises(kind) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "Fix: " in message
    assert "\n" not in message
    assert caught.value.exit_code == (5 if kind is SafetyError else 3)
    for word in words:
        assert word in message, message
    return message


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_truncated_gzip(tmp_path, share):
    path = nifti_file(tmp_path, array=np.random.default_rng(0).integers(0, 99, (20, 20, 20), dtype=np.int16))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(path, ImageError, "truncated, got ", " of ")


@pytest.mark.parametrize("missing", [1, 4, 8])
def test_gzip_without_its_checksum(tmp_path, missing):
    path = nifti_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-missing])
    refused(path, ImageError, f"truncated, got {NUM_BYTES} of {NUM_BYTES} bytes", "checksum at the end is missing")


@pytest.mark.parametrize("length", [351, 360, NUM_BYTES - 1])
def test_truncated_plain_file(tmp_path, length):
    path = tmp_path / "case.nii"
    path.write_bytes(nifti_bytes()[:length])
    refused(path, ImageError, f"truncated, got {length} of")


def test_every_flipped_bit_of_the_voxels_is_noticed_in_gzip(tmp_path):
    path = nifti_file(tmp_path, array=np.random.default_rng(0).integers(0, 99, SHAPE, dtype=np.int16))
    data = path.read_bytes()
    for position in range(12, len(data), 7):  # behind the gzip header
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises((ImageError, GeometryError)):
            read_volume(path)
    damaged = bytearray(data)
    damaged[-6] ^= 1
    path.write_bytes(damaged)
    refused(path, ImageError, "checksum")


def test_stored_blocks_with_a_flipped_bit_fail_the_checksum(tmp_path):
    path = tmp_path / "case.nii.gz"
    data = bytearray(gzip.compress(nifti_bytes(), compresslevel=0))
    data[-40] ^= 1
    path.write_bytes(data)
    refused(path, ImageError, "checksum")


@pytest.mark.parametrize("name", ["case.nii", "case.nii.gz"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("empty", "empty file (0 bytes)"),
        ("one byte", "text"),
        ("folder", "is a folder"),
        ("fifo", "is a named pipe"),
        ("device", "is a device"),
        ("dangling", "symbolic link to a file that does not exist"),
        ("missing", "no such file"),
    ],
)
def test_what_is_no_image_file_at_all(tmp_path, name, kind, words):
    path = tmp_path / name
    match kind:
        case "empty":
            path.touch()
        case "one byte":
            path.write_bytes(b"x")
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "dangling":
            path.symlink_to(tmp_path / "nowhere")
    refused(path, ImageError, words)
    refused(path, ImageError, words, read=read_grid)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("case.nii", gzip.compress(nifti_bytes(), mtime=0), "is a gzip file"),
        ("case.nii.gz", nifti_bytes(), "an uncompressed NIfTI image. Fix: name it .nii."),
        ("case.nii", b"\x89PNG\r\n\x1a\n" + b"\0" * 400, "a PNG picture"),
        ("case.nii.gz", b"\xff\xd8\xff\xe0" + b"\0" * 400, "a JPEG picture"),
        ("case.nii", b"\0" * 128 + b"DICM" + b"\0" * 400, "a DICOM file"),
        ("case.nii.gz", gzip.compress(b"\0" * 128 + b"DICM" + b"\0" * 400, mtime=0), "a DICOM file"),
        ("case.nii", b"NRRD0004\n" * 50, "an NRRD image"),
        ("case.nii", b"<!DOCTYPE html><html>" * 50, "a web page"),
        ("case.nii.gz", b"version https://git-lfs.github.com/spec/v1\n" * 9, "a Git LFS pointer"),
        ("case.nii.gz", b"PK\x03\x04" + b"\0" * 400, "a zip archive"),
        ("case.nii", os.urandom(4).replace(b"\x5c", b"x") + b"\xfe" * 400, "of an unknown type"),
        ("case.nii", nifti_bytes(magic=b"abc\0"), "an Analyze header"),
        ("case.nii", nifti_bytes(magic=b"ni1\0"), "the header of a NIfTI pair"),
        ("case.nii", nifti_bytes(magic=b"n+7\0"), "its magic is"),
    ],
)
def test_the_real_type_is_named(tmp_path, name, data, words):
    path = tmp_path / name
    path.write_bytes(data)
    refused(path, ImageError, words)


@pytest.mark.parametrize("name", ["case.nii", "case.nii.gz"])
def test_sizes_far_beyond_the_file_are_refused_before_memory_is_taken(tmp_path, name):
    path = nifti_file(tmp_path, name, dim=(3, 32767, 32767, 32767, 1, 1, 1, 1))
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, SafetyError, "32767 x 32767 x 32767", "64.0 TiB", "bytes")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - limit < 200_000


def test_sizes_that_fit_memory_but_not_the_file_are_truncation(tmp_path):
    refused(nifti_file(tmp_path, "a.nii", dim=(3, 50, 60, 70, 1, 1, 1, 1)), ImageError, "truncated, got", "420352")
    gz = nifti_file(tmp_path, "a.nii.gz", dim=(3, 300, 300, 300, 1, 1, 1, 1))
    refused(gz, ImageError, "300 x 300 x 300", "cannot hold them")
    refused(nifti_file(tmp_path, "a.nii.gz", dim=(3, 15, 16, 17, 1, 1, 1, 1)), ImageError, "truncated, got 772 of 8512")


def test_a_bomb_stops_at_the_given_limit_and_at_the_declared_size(tmp_path):
    path = nifti_file(tmp_path, array=np.zeros((128, 128, 128), np.int16))
    assert path.stat().st_size < 10_000
    with pytest.raises(SafetyError, match=r"4\.0 MiB in memory; 1\.0 MiB may be used"):
        read_volume(path, max_bytes=1 << 20)
    small_header = nifti_bytes(dim=(3, 5, 6, 7, 1, 1, 1, 1))[:352] + b"\0" * (64 << 20)
    path.write_bytes(gzip.compress(small_header))
    refused(path, ImageError, f"more data than the {NUM_BYTES} bytes")


def test_more_voxels_than_declared_is_damage(tmp_path):
    for name in ("a.nii", "a.nii.gz"):
        refused(nifti_file(tmp_path, name, dim=(3, 5, 6, 6, 1, 1, 1, 1)), ImageError, "holds more data than the 712")


@pytest.mark.parametrize(
    ("dim", "words"),
    [
        ((3, 5, 0, 7, 1, 1, 1, 1), "5 x 0 x 7"),
        ((3, 5, -6, 7, 1, 1, 1, 1), "5 x -6 x 7"),
        ((0, 5, 6, 7, 1, 1, 1, 1), "0 dimensions"),
        ((1, 5, 6, 7, 1, 1, 1, 1), "1 dimensions"),
        ((8, 5, 6, 7, 1, 1, 1, 1), "8 dimensions"),
        ((200, 5, 6, 7, 1, 1, 1, 1), "200 dimensions"),
        ((-3, 5, 6, 7, 1, 1, 1, 1), "-3 dimensions"),
        ((4, 5, 6, 7, 0, 1, 1, 1), "5 x 6 x 7 x 0"),
    ],
)
def test_impossible_sizes(tmp_path, dim, words):
    for read in (read_volume, read_grid):
        refused(nifti_file(tmp_path, dim=dim), ImageError, words, read=read)


def test_nan_and_infinity_are_counted(tmp_path):
    array = numbered(np.float32)
    array[0, 0, 0] = np.nan
    refused(nifti_file(tmp_path, array=array), ImageError, "1 NaN among 210 voxels", "--nan-policy fill")
    array[1, 1, :2], array[2, 2, :3] = np.inf, -np.inf
    refused(nifti_file(tmp_path, array=array), ImageError, "1 NaN, 2 +infinity, 3 -infinity")


def test_nothing_but_nan_cannot_be_filled(tmp_path):
    path = nifti_file(tmp_path, array=np.full(SHAPE, np.nan, np.float32))
    for policy in ("refuse", "fill"):
        refused(
            path, ImageError, "210 NaN", "no value is finite", read=lambda p, n=policy: read_volume(p, nan_policy=n)
        )


def test_a_scale_that_makes_infinity_is_noticed(tmp_path):
    path = nifti_file(tmp_path, array=numbered(np.float64) * 1e300, scl_slope=1e30, scl_inter=1)
    refused(path, ImageError, "+infinity")


def test_several_frames_where_one_is_expected(tmp_path):
    path = nifti_file(tmp_path, array=np.zeros((*SHAPE, 4), np.int16))
    refused(path, ImageError, "4 frames (5 x 6 x 7 x 4)", "pick one frame", "channels")
    refused(path, ImageError, "4 frames", read=read_label_map)
    vector = nifti_file(tmp_path, array=np.zeros((*SHAPE, 1, 3), np.float32))
    refused(vector, ImageError, "3 frames")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "no type"),
        (1, "1-bit"),
        (32, "complex64"),
        (1536, "float128"),
        (1792, "complex128"),
        (77, "type code 77"),
        (-5, "code -5"),
    ],
)
def test_type_codes_that_are_unknown(tmp_path, code, words):
    refused(nifti_file(tmp_path, datatype=code), ImageError, words, "Fix: export it as integers or float32")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"srow_x": (0.0, 0.0, 0.0, 0.0)}, "singular"),
        ({"srow_x": (0.0,) * 4, "srow_y": (0.0,) * 4, "srow_z": (0.0,) * 4}, "singular"),
        ({"srow_y": (0.0, np.nan, 0.0, 0.0)}, "NaN"),
        ({"srow_y": (0.0, 1.5, 0.0, np.inf)}, "infinity"),
        ({"srow_x": (-0.8, 0.3, 0.0, 90.0)}, "sheared"),
        ({"pixdim": (1, 0.8, 0, 5, 1, 1, 1, 1)}, "pixdim[2] is 0"),
        ({"pixdim": (1, -0.8, 1.5, 5, 1, 1, 1, 1)}, "pixdim[1] is -0.8"),
        ({"pixdim": (1, 0.8, 1.5, np.nan, 1, 1, 1, 1)}, "pixdim[3] is nan"),
        ({"pixdim": (1, 0.8, 1.5, np.inf, 1, 1, 1, 1)}, "pixdim[3] is inf"),
        ({"sform_code": 0, "qform_code": 1, "pixdim": (1, 0.8, 1.5, 0, 1, 1, 1, 1)}, "pixdim[3]"),
    ],
)
@pytest.mark.parametrize("read", [read_volume, read_label_map, read_grid])
def test_transforms_that_place_nothing(tmp_path, fields, words, read):
    refused(nifti_file(tmp_path, **fields), GeometryError, words, read=read)


def test_a_qform_that_is_no_rotation_counts_only_where_it_is_used(tmp_path):
    data = bytearray(nifti_bytes(qform_code=1, sform_code=0))
    struct.pack_into("<3f", data, 256, 0.9, 0.9, 0.9)  # quatern_b, c, d: longer than 1
    path = tmp_path / "case.nii"
    path.write_bytes(data)
    refused(path, GeometryError, "qform is unusable")
    struct.pack_into("<h", data, FIELDS["sform_code"][0], 1)
    path.write_bytes(data)
    np.testing.assert_allclose(read_volume(path).grid.affine, AFFINE, atol=1e-6)


@pytest.mark.parametrize(
    ("offset", "words"), [(0.0, "byte 0"), (100.0, "byte 100"), (np.nan, "byte nan"), (np.inf, "byte inf"),
                          (352.5, "byte 352.5"), (1e9, "not believed"), (2000.0, "truncated")]
)  # fmt: skip
def test_voxel_offsets_that_cannot_be(tmp_path, offset, words):
    refused(nifti_file(tmp_path, vox_offset=offset), ImageError, words)


def test_an_intercept_that_is_no_number(tmp_path):
    refused(nifti_file(tmp_path, scl_slope=2.0, scl_inter=np.inf), ImageError, "scl_inter is inf")


def with_extensions(*sizes, total):
    """A .nii whose extensions declare `sizes` in an area of `total` bytes."""
    area = b"".join(struct.pack("<ii", size, 6).ljust(16, b"x") for size in sizes).ljust(total, b"\0")
    data = nifti_bytes(vox_offset=352 + total)
    return data[:348] + b"\1\0\0\0" + area + data[352:]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (with_extensions(160, total=32), "extension 1 declares 160 bytes; 32 are there"),
        (with_extensions(16, 17, total=48), "extension 2 declares 17 bytes"),
        (with_extensions(-16, total=16), "declares -16 bytes"),
        (with_extensions(8, total=16), "declares 8 bytes"),
        (with_extensions(*[16] * 1000, total=16_000), "more than 100 header extensions"),
    ],
)
def test_extensions_that_lie(tmp_path, data, words):
    path = tmp_path / "case.nii"
    path.write_bytes(data)
    refused(path, ImageError, words)


@pytest.mark.parametrize("name", ["case.hdr", "case.img", "case.hdr.gz"])
def test_pairs_are_refused_by_their_name(tmp_path, name):
    path = tmp_path / name
    nibabel.Nifti1Pair(numbered(), AFFINE).to_filename(tmp_path / "case.img")
    refused(path, ImageError, "half of an Analyze or NIfTI pair", "single .nii.gz file")


@pytest.mark.parametrize(("value", "words"), [(1.5, "1.5"), (0.9, "0.9"), (1.0011, "1.0011")])
def test_labels_that_are_no_whole_numbers(tmp_path, value, words):
    array = numbered(np.float32)
    array[3, 3, 3] = value
    refused(
        nifti_file(tmp_path, array=array),
        LabelError,
        "no whole numbers",
        words,
        "nearest neighbour",
        read=read_label_map,
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_labels_that_are_no_numbers(tmp_path, value):
    array = numbered(np.float32)
    array[3, 3, 3] = value
    refused(nifti_file(tmp_path, array=array), LabelError, "NaN or infinity in 1 voxels", read=read_label_map)


def test_a_file_cut_while_it_is_read(tmp_path, monkeypatch):
    path = nifti_file(tmp_path, "case.nii", np.zeros((50, 50, 50), np.int16))
    from voxdino.core.io import nifti

    whole = nifti.require_plausible

    def cut(*args, **kwargs):
        whole(*args, **kwargs)
        os.truncate(path, 200_000)

    monkeypatch.setattr(nifti, "require_plausible", cut)
    refused(path, ImageError, "truncated, got 200000 of 250352")


@pytest.mark.parametrize("seed", range(4))
def test_random_header_bytes_never_end_in_a_foreign_error(tmp_path, seed):
    rng = np.random.default_rng(seed)
    data = nifti_bytes()
    path = tmp_path / "case.nii"
    for _ in range(150):
        damaged = bytearray(data)
        for position in rng.integers(0, 352, rng.integers(1, 6)):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            volume = read_volume(path)
        except (InputError, SafetyError):
            continue
        assert volume.array[0].size == volume.array.size or volume.num_channels in (3, 4)


def test_refusals_work_without_asserts(tmp_path):
    path = nifti_file(tmp_path, dim=(3, 5, 0, 7, 1, 1, 1, 1))
    code = f"from voxdino.core.io import read_volume\nread_volume({str(path)!r})"
    result = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=False)
    assert "ImageError" in result.stderr
    assert "5 x 0 x 7" in result.stderr
