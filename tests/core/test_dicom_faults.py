"""The DICOM rows of the catalogue of faults: each bad input ends in its own message and exit code."""

import io
import struct
import subprocess
import sys
import zipfile
import zlib

import dicom_files as made
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    MPEG2MPML,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    MediaStorageDirectoryStorage,
    RLELossless,
)

from voxdino.core.errors import EXIT_INPUT, EXIT_RESOURCE, EXIT_SAFETY, VoxdinoError
from voxdino.core.io import read_volume
from voxdino.core.io.dicom import pixels


def refusal(path, exit_code, *words, **settings):
    with pytest.raises(VoxdinoError) as caught:
        read_volume(path, **settings)
    assert caught.value.exit_code == exit_code
    told = str(caught.value)
    assert caught.value.fix
    assert str(path) in told
    assert [word for word in words if word not in told] == [], told
    assert not any(seed in told for seed in made.SEEDS)


def one(folder, dataset, name="a.dcm"):
    (folder / name).write_bytes(dataset if isinstance(dataset, bytes) else made.encode(dataset))
    return folder / name


def test_b1_a_missing_slice_names_the_gap(tmp_path):
    datasets = made.series()
    del datasets[3]
    refusal(made.write(tmp_path, datasets), EXIT_INPUT, "gap between z = -62.5 and z = -52.5 mm: 1 slice is missing")


def test_b2_unequal_distances_are_refused_and_rounding_is_not(tmp_path):
    def move(share):
        def change(dataset, index):
            if index >= 3:
                dataset.ImagePositionPatient[2] = made.number(dataset.ImagePositionPatient[2] + 5 * share)

        return made.series(per_slice=change)

    assert np.array_equal(read_volume(made.write(tmp_path / "a", move(0.008))).array[0], made.numbered())
    refusal(made.write(tmp_path / "b", move(0.02)), EXIT_INPUT, "unequal distances", "5 to 5.1 mm")


@pytest.mark.parametrize("is_localizer", [False, True])
def test_b4_several_series_are_listed_and_one_must_be_chosen(tmp_path, is_localizer):
    extra = made.series(made.numbered((4, 4, 1)), series_uid=made.OTHER_SERIES_UID)
    if is_localizer:  # of the same series
        extra[0].SeriesInstanceUID, extra[0].ImageType = made.SERIES_UID, ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    folder = made.write(tmp_path, made.series() + extra)
    kind = "CT localizer" if is_localizer else "CT"
    refusal(folder, EXIT_INPUT, "holds 2 series", "5 x 6 x 7 voxels", f"{kind}, 4 x 4 x 1", "--series NUMBER")
    refusal(folder, EXIT_INPUT, "has no series 9", series="9")


def test_b6_a_varying_orientation_is_refused(tmp_path):
    def turn(dataset, index):
        if index == 4:
            dataset.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]

    refusal(made.write(tmp_path, made.series(per_slice=turn)), EXIT_INPUT, "orientation varies")


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, RLELossless, HTJ2KLossless])
def test_b8_a_missing_decoder_names_the_package(tmp_path, monkeypatch, syntax):
    class Absent:
        is_available = False
        missing_dependencies = ("pylibjpeg - requires pylibjpeg>=2.0", "gdcm - requires gdcm>=3.0.10")

    monkeypatch.setattr(pixels, "get_decoder", lambda uid: Absent())
    dataset = made.with_fragments(made.series()[0], syntax, [b"\xff\xd8" + b"x" * 40])
    refusal(one(tmp_path, dataset), EXIT_RESOURCE, UID(syntax).name, "pip install 'voxdino[dicom]'", "pylibjpeg, gdcm")


def test_b8_what_nobody_decodes_says_so(tmp_path):
    refusal(one(tmp_path, made.with_fragments(made.series()[0], MPEG2MPML, [b"x" * 40])), EXIT_INPUT, "MPEG2")


@pytest.mark.parametrize(
    "syntax, fragment",
    [
        (JPEGLosslessSV1, b"\xff\xd8\xff\xc3\x00\x04ab"),
        (JPEGLSLossless, b"\xff\xd8\xff\xf7" + b"\xff" * 60),
        (JPEG2000Lossless, b"\xff\x4f\xff\x51" + b"\xff" * 60),
        (RLELossless, b"\0" * 64),
    ],
)
def test_b9_malformed_fragments_end_the_child_and_not_us(tmp_path, syntax, fragment):
    dataset = made.with_fragments(made.series()[0], syntax, [fragment])
    refusal(one(tmp_path, dataset), EXIT_INPUT, "cannot be decoded")


def test_b9_a_child_that_dies_is_the_files_fault(tmp_path, monkeypatch):
    dataset = made.with_fragments(made.series()[0], RLELossless, [b"\0" * 64])
    monkeypatch.setattr(pixels.sys, "executable", "/bin/false")
    refusal(one(tmp_path, dataset), EXIT_INPUT, "its decoder ended early")


def test_b12_missing_pixel_spacing_is_refused_in_3d(tmp_path):
    def forget(dataset, _):
        del dataset.PixelSpacing
        dataset.ImagerPixelSpacing = [0.2, 0.2]

    refusal(made.write(tmp_path, made.series(per_slice=forget)), EXIT_INPUT, "no PixelSpacing")


@pytest.mark.parametrize("spacing", [[0, 1], [-1, 1]])
def test_spacing_that_is_no_length_is_refused(tmp_path, spacing):
    def spoil(dataset, _):
        dataset.PixelSpacing = spacing

    refusal(made.write(tmp_path, made.series(per_slice=spoil)), EXIT_INPUT, "PixelSpacing is")


def test_b13_frames_without_position_and_phases_are_refused(tmp_path):
    dataset = made.enhanced(made.numbered(dtype=np.uint16))
    phases = made.enhanced(made.numbered((5, 6, 8), np.uint16))
    groups = phases.PerFrameFunctionalGroupsSequence
    for index, frame in enumerate(groups):
        frame.PlanePositionSequence = groups[index // 2 * 2].PlanePositionSequence
    refusal(one(tmp_path, phases), EXIT_INPUT, "images in each place")
    del dataset.PerFrameFunctionalGroupsSequence
    refusal(one(tmp_path, dataset), EXIT_INPUT, "7 of 7 images have no position")


def test_b13_a_wrong_number_of_frames_is_refused(tmp_path):
    dataset = made.enhanced()
    dataset.NumberOfFrames = 9
    refusal(one(tmp_path, dataset), EXIT_INPUT, "describes 7 frames, but declares 9")


def test_b16_bytes_that_only_begin_like_dicom_are_refused(tmp_path):
    implicit_big = struct.pack(">HHL", 8, 0x16, 26) + b"1.2.840.10008.5.1.4.1.1.2\0" + b"\0" * 200
    refusal(one(tmp_path, implicit_big), EXIT_INPUT)
    refusal(one(tmp_path, b"\x08\0\x16\0" + b"\xff" * 300), EXIT_INPUT)
    refusal(one(tmp_path, b"\0" * 128 + b"DICM"), EXIT_INPUT)
    refusal(one(tmp_path, b"hello, this is text"), EXIT_INPUT, "is no DICOM file")


@pytest.mark.parametrize("left", [0.2, 0.6, 0.99])
def test_b17_truncated_files_are_refused(tmp_path, left):
    data = made.encode(made.series(made.numbered((20, 20, 1)))[0])
    refusal(one(tmp_path, data[: int(left * len(data))]), EXIT_INPUT)


def test_b17_pixel_data_shorter_than_declared_is_refused(tmp_path):
    dataset = made.series()[0]
    dataset.Rows = 600
    refusal(one(tmp_path, dataset), EXIT_INPUT, "truncated: 60 bytes of pixel data, 6000 are declared")
    dataset.Rows = dataset.Columns = 65535
    refusal(one(tmp_path, dataset), EXIT_SAFETY, "65535 x 65535 x 1 voxels", max_bytes=1 << 30)


@pytest.mark.parametrize("depth", [100, 200, 10_000])
@pytest.mark.parametrize("is_open", [False, True])
def test_b18_sequences_nested_without_end_are_refused(tmp_path, depth, is_open):
    data = made.encode(made.series()[0])
    item, nested = struct.Struct("<HHL"), b""
    for _ in range(depth):
        if is_open:
            nested = item.pack(0xFFFE, 0xE000, 0xFFFFFFFF) + nested + item.pack(0xFFFE, 0xE00D, 0)
            nested = sequence(0xFFFFFFFF) + nested + item.pack(0xFFFE, 0xE0DD, 0)
        else:
            nested = item.pack(0xFFFE, 0xE000, len(nested)) + nested
            nested = sequence(len(nested)) + nested
    at = data.index(struct.pack("<HH", 0x0020, 0x000D))
    refusal(one(tmp_path, data[:at] + nested + data[at:]), EXIT_INPUT)


def sequence(length):
    return struct.pack("<HH2sHL", 0x0018, 0x9346, b"SQ", 0, length)


def test_b19_a_deflated_bomb_is_refused_before_it_unpacks(tmp_path):
    dataset = made.patient(syntax=DeflatedExplicitVRLittleEndian)
    data = made.encode(dataset)
    start = data.index(b"1.2.840.10008.1.2.1.99")
    packed = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    bomb = b"".join(packed.compress(b"\0" * (1 << 20)) for _ in range(70)) + packed.flush()
    meta = pydicom.filereader.read_file_meta_info(one(tmp_path, data))
    length = 132 + 12 + meta.FileMetaInformationGroupLength
    assert start < length
    path = one(tmp_path, data[:length] + bomb)
    assert path.stat().st_size < 100_000
    refusal(path, EXIT_SAFETY, "deflated", "64.0 MiB")


def test_b19_an_element_longer_than_any_file_is_refused(tmp_path):
    data = made.encode(made.series()[0])
    at = data.index(struct.pack("<HH", 0x0020, 0x000D))
    lie = struct.pack("<HH2sHL", 0x0019, 0x1001, b"OB", 0, 0xFFFFFFF0)
    refusal(one(tmp_path, data[:at] + lie + data[at:]), EXIT_SAFETY, "declares an element of 4.0 GiB")


def test_b19_bombs_and_lies_are_refused_in_200_mb(tmp_path):
    whole = made.encode(made.patient(syntax=DeflatedExplicitVRLittleEndian))
    meta = pydicom.filereader.read_file_meta_info(one(tmp_path, whole))
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    mebibyte = packer.compress(b"\0" * (1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)  # stands for itself
    bomb = one(tmp_path, whole[: 144 + meta.FileMetaInformationGroupLength] + 2200 * mebibyte, "bomb.dcm")
    plain = made.encode(made.series()[0])
    at = plain.index(struct.pack("<HH", 0x0020, 0x000D))
    lie = struct.pack("<HH2sHL", 0x0019, 0x1001, b"OB", 0, 0xFFFFFFF0)
    code = """
import resource, sys
from voxdino.core.errors import SafetyError
from voxdino.core.io import dicom, read_volume
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
for path in sys.argv[1:]:
    try:
        read_volume(path)
    except SafetyError:
        print(peak() - before)
"""
    command = [sys.executable, "-c", code, bomb, one(tmp_path, plain[:at] + lie + plain[at:], "lie.dcm")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(told) == 2
    assert max(map(int, told)) < 200  # MB; libraries loaded meanwhile are counted too


def directory(*parts):
    dataset = made.patient(sop_class=MediaStorageDirectoryStorage)
    record = Dataset()
    record.ReferencedFileID = list(parts)
    dataset.DirectoryRecordSequence = Sequence([record])
    return made.encode(dataset)


def test_b20_a_dicomdir_is_never_followed(tmp_path):
    folder = made.write(tmp_path, made.series())
    (folder / "DICOMDIR").write_bytes(directory("IMAGES", "IM1"))
    volume = read_volume(folder)
    assert np.array_equal(volume.array[0], made.numbered())
    assert "not followed" in " ".join(volume.notes)
    refusal(folder / "DICOMDIR", EXIT_SAFETY, "never followed")
    (folder / "DICOMDIR").write_bytes(directory("..", "..", "etc", "passwd"))
    with pytest.raises(VoxdinoError, match="leads outside") as caught:
        read_volume(folder)
    assert caught.value.exit_code == EXIT_SAFETY


def test_b21_two_pictures_make_no_volume(tmp_path):
    def unplace(dataset, _):
        del dataset.ImagePositionPatient, dataset.ImageOrientationPatient

    refusal(made.write(tmp_path, made.series(per_slice=unplace)), EXIT_INPUT, "7 of 7 images have no position")


def test_b23_archives_that_lead_outside_or_hold_archives_or_bombs_are_refused(tmp_path):
    data = made.encode(made.series()[0])
    for name in ("../a.dcm", "/etc/a.dcm", "a/../../b.dcm", "C:/a.dcm"):
        refusal(archive(tmp_path, {name: data}), EXIT_SAFETY, "leads outside")
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as nested:
        nested.writestr("a.dcm", data)
    refusal(archive(tmp_path, {"b.zip": inner.getvalue()}), EXIT_SAFETY, "another archive")
    refusal(archive(tmp_path, {"b.dcm": inner.getvalue()}), EXIT_SAFETY, "another archive")
    bomb = archive(tmp_path, {"a.dcm": b"\0" * 4096})
    declared = bytearray(bomb.read_bytes())
    struct.pack_into("<L", declared, declared.index(b"PK\x01\x02") + 24, 300 << 20)
    bomb.write_bytes(declared)
    refusal(bomb, EXIT_SAFETY, "1 files of 300.0 MiB in an archive of")


def test_b23_a_damaged_archive_is_refused(tmp_path):
    path = archive(tmp_path, {"a.dcm": made.encode(made.series()[0])})
    data = bytearray(path.read_bytes())
    data[400] ^= 1
    path.write_bytes(data)
    refusal(path, EXIT_INPUT, "checksum")
    path.write_bytes(data[:-60])
    refusal(path, EXIT_INPUT, "zip")


def archive(folder, members):
    with zipfile.ZipFile(folder / "scan.zip", "w", zipfile.ZIP_DEFLATED) as made_archive:
        for name, data in members.items():
            made_archive.writestr(name, data)
    return folder / "scan.zip"


def test_different_images_in_one_place_are_refused(tmp_path):
    datasets = made.series()
    twin = made.series()[3]
    refusal(made.write(tmp_path, [*datasets, twin]), EXIT_INPUT, "two different images lie in the same place")


def test_images_of_several_sizes_or_kinds_are_refused(tmp_path):
    small = made.series(made.numbered((4, 6, 7)))[6]
    refusal(made.write(tmp_path / "a", [*made.series()[:6], small]), EXIT_INPUT, "different sizes: 4 x 6, 5 x 6")
    inverted = made.series()[6]
    inverted.PhotometricInterpretation = "MONOCHROME1"
    refusal(made.write(tmp_path / "b", [*made.series()[:6], inverted]), EXIT_INPUT, "different kinds")


def test_slices_off_their_line_are_refused(tmp_path):
    def push(dataset, index):
        dataset.ImagePositionPatient[0] = made.number(dataset.ImagePositionPatient[0] + (index == 3))

    refusal(made.write(tmp_path, made.series(per_slice=push)), EXIT_INPUT, "do not lie in one line")


@pytest.mark.parametrize("orientation", [[1, 0, 0, 1, 0, 0], [2, 0, 0, 0, 1, 0], [1, 0, 0, 0.1, 1, 0], [0] * 6])
def test_an_orientation_that_is_none_is_refused(tmp_path, orientation):
    def spoil(dataset, _):
        dataset.ImageOrientationPatient = orientation

    refusal(made.write(tmp_path, made.series(per_slice=spoil)), EXIT_INPUT, "ImageOrientationPatient")


def test_random_damage_ends_in_our_own_errors(tmp_path):
    data = made.encode(made.series(syntax=ExplicitVRLittleEndian)[0])
    random = np.random.default_rng(3)
    for _ in range(60):
        damaged = bytearray(data)
        for place in random.integers(132, len(data), size=random.integers(1, 6)):
            damaged[place] = random.integers(256)
        path = one(tmp_path, bytes(damaged))
        try:
            read_volume(path, max_bytes=1 << 28)
        except VoxdinoError as error:
            assert error.exit_code in (EXIT_INPUT, EXIT_SAFETY)


@pytest.mark.parametrize(
    "shape, dtype, words",
    [
        ((5, 6), "<i2", "decodes to 5 x 6, not to the size"),  # rows and columns exchanged
        ((6, 5, 3), "<i2", "decodes to 6 x 5 x 3, not to the size"),
        ((6, 5), "<u2", "decodes to uint16, not to the values"),
        ((6, 5), "<i4", "decodes to int32, not to the values"),
        ((60, 5000), "<i4", "larger than declared"),
        (None, "<i2", "its decoder ended early"),
    ],
)
def test_b24_a_decoder_that_ends_well_with_a_wrong_image_is_caught(tmp_path, monkeypatch, shape, dtype, words):
    answer = f"""#!{sys.executable}
import json, math, sys
question = json.loads(sys.stdin.buffer.readline())
sys.stdin.buffer.read(question["bytes"])
shape, dtype = {shape}, {dtype!r}
if shape is not None:
    sys.stdout.buffer.write(json.dumps({{"shape": shape, "dtype": dtype}}).encode() + b"\\n")
    sys.stdout.buffer.write(bytes(math.prod(shape) * int(dtype[-1])))
"""
    decoder = one(tmp_path, answer.encode(), "decoder")
    decoder.chmod(0o700)
    monkeypatch.setattr(pixels.sys, "executable", str(decoder))
    dataset = made.with_fragments(made.series()[0], RLELossless, [b"\0" * 64])
    refusal(one(tmp_path, dataset), EXIT_INPUT, words)
