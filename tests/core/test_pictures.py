"""Pictures: no bit is lost, colours and labels are told apart, and what is odd, cut or lossy is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from voxdino.core.errors import ImageError, InputError, LabelError, SafetyError
from voxdino.core.io import ReadOptions, read_grid, read_label_map, read_volume
from voxdino.core.io.pictures import turn

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
COLOUR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
DEEP_COLOUR = RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
FLOAT = RNG.random((5, 7), dtype=np.float32)
PALETTE = (10, 20, 30, 200, 0, 0, 0, 250, 0)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bytes(array, colour_type, *, width=None, height=None, extra=b""):
    """A PNG of (H, W) or (H, W, C) integers, 8 or 16 bit."""
    rows = array.astype(array.dtype.newbyteorder(">"))
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    size = (width or array.shape[1], height or array.shape[0])
    head = struct.pack(">IIBBBBB", *size, 8 * array.dtype.itemsize, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def saved(folder, name, image, **kwargs):
    path = folder / name
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **kwargs)
    return path


def palette_image():
    image = Image.new("P", (3, 2))
    image.putdata([0, 1, 2, 0, 1, 2])
    image.putpalette(PALETTE)
    return image


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("a.png", GREY), ("a.png", DEEP), ("a.png", COLOUR), ("a.bmp", GREY), ("a.bmp", COLOUR),
        ("a.tif", GREY), ("a.tif", DEEP), ("a.tif", COLOUR), ("a.tif", FLOAT), ("a.TIFF", DEEP),
    ],
)  # fmt: skip
def test_lossless_pictures_keep_every_value(tmp_path, name, array):
    path = saved(tmp_path, name, array)
    volume = read_volume(path)
    expected = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    assert volume.array.dtype == array.dtype
    np.testing.assert_array_equal(volume.array, expected)
    assert (volume.grid.shape, volume.grid.unit, volume.grid.spacing) == ((5, 7), "px", (1.0, 1.0))
    assert volume.notes == ()
    grid, channels = read_grid(path)
    assert (grid.shape, channels) == ((5, 7), len(expected))


@pytest.mark.parametrize("compression", [None, "zlib", "tiff_lzw", "packbits", "tiff_adobe_deflate"])
@pytest.mark.parametrize("array", [GREY, DEEP], ids=["8", "16"])
def test_compressed_tiff_keeps_every_value(tmp_path, compression, array):
    path = tmp_path / "a.tif"
    if compression in (None, "zlib"):
        tifffile.imwrite(path, array, compression=compression)
    else:
        saved(tmp_path, "a.tif", array, compression=compression)
    np.testing.assert_array_equal(read_volume(path).array[0], array)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int32, np.uint32, np.float64])
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_deep_colour_tiff_keeps_every_value(tmp_path, dtype, endian, planar):
    array = DEEP_COLOUR.astype(dtype)
    stored = array if planar == "contig" else np.moveaxis(array, -1, 0).copy()
    tifffile.imwrite(tmp_path / "a.tif", stored, byteorder=endian, photometric="rgb", planarconfig=planar)
    volume = read_volume(tmp_path / "a.tif")
    assert volume.array.dtype == dtype
    np.testing.assert_array_equal(volume.array, np.moveaxis(array, -1, 0))


def test_tiled_tiff_is_read(tmp_path):
    array = RNG.integers(0, 65536, (70, 50), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", array, tile=(16, 32), compression="zlib")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.tif").array[0], array)


@pytest.mark.parametrize("colour_type", [2, 6])
def test_16_bit_colour_png_keeps_every_value(tmp_path, colour_type):
    channels = {2: 3, 6: 4}[colour_type]
    array = RNG.integers(0, 65536, (5, 7, channels), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png_bytes(array, colour_type))
    volume = read_volume(tmp_path / "a.png")
    np.testing.assert_array_equal(volume.array, np.moveaxis(array, -1, 0)[:3])
    assert volume.notes == (() if colour_type == 2 else ("alpha channel dropped",))


def test_palettes_are_colours_in_images_and_indices_in_labels(tmp_path):
    for name in ("a.png", "a.tif", "a.gif", "a.bmp"):
        path = saved(tmp_path, name, palette_image())
        volume = read_volume(path)
        assert volume.array.shape == (3, 2, 3)
        assert volume.array[:, 0].T.tolist() == [[10, 20, 30], [200, 0, 0], [0, 250, 0]]
        assert "palette resolved to colours" in volume.notes
        labels = read_label_map(path)
        assert labels.array.tolist() == [[0, 1, 2], [0, 1, 2]]
        assert "palette picture read as indices" in labels.notes
        assert read_grid(path)[1] == 3


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "g4.tif"])
def test_1_bit_pictures_are_black_and_white_and_masks_0_and_1(tmp_path, name):
    bits = np.array([[True, False, True], [False, False, True]])
    path = saved(tmp_path, name, bits, **({"compression": "group4"} if name == "g4.tif" else {}))
    assert read_volume(path).array[0].tolist() == [[255, 0, 255], [0, 0, 255]]
    assert read_label_map(path).array.tolist() == [[1, 0, 1], [0, 0, 1]]
    assert read_grid(path)[1] == 1


@pytest.mark.parametrize(("mode", "channels"), [("LA", 1), ("RGBA", 3)])
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_alpha_is_dropped_and_noted(tmp_path, mode, channels, name):
    samples = RNG.integers(0, 256, (5, 7, channels + 1), dtype=np.uint8)
    path = saved(tmp_path, name, Image.fromarray(samples, mode))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, np.moveaxis(samples, -1, 0)[:channels])
    assert "alpha channel dropped" in volume.notes
    assert read_grid(path)[1] == channels


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_is_converted_and_noted(tmp_path, name):
    path = saved(tmp_path, name, Image.new("CMYK", (7, 5), (255, 0, 0, 0)))
    volume = read_volume(path)
    assert volume.array.shape == (3, 5, 7)
    assert volume.array[0].max() < 40 < 200 < volume.array[1].min()
    assert "CMYK converted to RGB" in volume.notes


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_with_white_as_zero_is_inverted_and_noted(tmp_path, dtype):
    array = np.array([[0, 1, np.iinfo(dtype).max]], dtype=dtype)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="miniswhite")
    volume = read_volume(tmp_path / "a.tif")
    assert volume.array[0, 0].tolist() == [np.iinfo(dtype).max, np.iinfo(dtype).max - 1, 0]
    assert any("inverted" in note for note in volume.notes)


def decoded_jpeg(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "lzw.tif"])
def test_pictures_are_turned_as_their_exif_says(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.kron(GREY // 2, np.ones((8, 8), np.uint8)))
    settings = {"tiffinfo": exif} if name.endswith("tif") else {"exif": exif}
    path = saved(tmp_path, name, image, **settings, **({"compression": "tiff_lzw"} if name == "lzw.tif" else {}))
    turned = Image.fromarray(np.asarray(image) if name != "a.jpg" else decoded_jpeg(path))
    turned.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(turned))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array[0], expected)
    assert read_grid(path)[0].shape == expected.shape
    assert any("EXIF" in note for note in volume.notes) == (orientation > 1)
    if name != "a.jpg":
        np.testing.assert_array_equal(read_label_map(path).array, expected)


def test_turning_is_what_the_exif_standard_says():
    array = np.arange(6).reshape(2, 3)
    assert turn(array, 1).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert turn(array, 3).tolist() == [[5, 4, 3], [2, 1, 0]]
    assert turn(array, 6).tolist() == [[3, 0], [4, 1], [5, 2]]  # a quarter turn clockwise
    assert turn(array, 8).tolist() == [[2, 5], [1, 4], [0, 3]]


def refused(path, words, *, kind=ImageError, read=read_volume):
    with pytest.raises(kind) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert words in message, message
    assert "Fix: " in message
    assert caught.value.exit_code == (5 if kind is SafetyError else 3)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_lossy_masks_are_refused_unless_a_threshold_is_given(tmp_path, name):
    mask = np.kron(np.eye(4, dtype=np.uint8) * 255, np.ones((8, 8), np.uint8))
    path = saved(tmp_path, name, mask, **({"compression": "jpeg"} if name == "a.tif" else {"quality": 60}))
    refused(path, "lossy format for labels", kind=LabelError, read=read_label_map)
    labels = read_label_map(path, options=ReadOptions(lossy_threshold=127))
    np.testing.assert_array_equal(labels.array, mask // 255)
    assert labels.notes == ("lossy mask: values above 127 are 1",)


def test_a_lossy_threshold_changes_no_lossless_mask(tmp_path):
    path = saved(tmp_path, "a.png", np.array([[0, 1, 2, 200]], np.uint8))
    assert read_label_map(path, options=ReadOptions(lossy_threshold=127)).array.tolist() == [[0, 1, 2, 200]]


def test_16_bit_labels_are_exact(tmp_path):
    for name in ("a.png", "a.tif"):
        np.testing.assert_array_equal(read_label_map(saved(tmp_path, name, DEEP)).array, DEEP)


def test_colour_labels_are_read_only_where_they_are_grey(tmp_path):
    grey = np.repeat(GREY[..., None], 3, axis=-1)
    labels = read_label_map(saved(tmp_path, "a.png", grey))
    np.testing.assert_array_equal(labels.array, GREY)
    assert any("stored as colour" in note for note in labels.notes)
    refused(saved(tmp_path, "a.png", COLOUR), "has colours", kind=LabelError, read=read_label_map)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.tif"])
def test_animations_and_pages_are_refused(tmp_path, name):
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    path = saved(tmp_path, name, frames[0], save_all=True, append_images=frames[1:])
    words = "2 pages" if name == "a.tif" else "2 pictures"
    refused(path, words)
    refused(path, words, read=read_label_map)
    refused(path, words, read=read_grid)


def test_stacks_and_pyramids_are_refused(tmp_path):
    stack = np.zeros((3, 5, 7), np.uint16)
    tifffile.imwrite(tmp_path / "stack.tif", stack, imagej=True)
    refused(tmp_path / "stack.tif", "3 pages")
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as writer:
        writer.write(np.zeros((64, 64), np.uint8), subifds=1)
        writer.write(np.zeros((32, 32), np.uint8), subfiletype=1)
    refused(tmp_path / "pyramid.tif", "pyramid")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.gif", "a.tif", "lzw.tif", "deflate.tif"])
def test_truncated_pictures_are_refused(tmp_path, name):
    array = RNG.integers(0, 256, (60, 70), dtype=np.uint8)
    compression = {"lzw.tif": "tiff_lzw", "deflate.tif": "tiff_adobe_deflate"}.get(name)
    path = saved(tmp_path, name, array, **({"compression": compression} if compression else {}))
    data = path.read_bytes()
    for length in (30, len(data) // 2, int(len(data) * 0.9)):
        path.write_bytes(data[:length])
        with pytest.raises(ImageError, match=r"truncated|damaged"):
            read_volume(path)


@pytest.mark.parametrize("missing", [1, 4, 8, 12])
def test_a_png_without_its_tail_is_refused(tmp_path, missing):
    path = saved(tmp_path, "a.png", GREY)
    path.write_bytes(path.read_bytes()[:-missing])
    refused(path, "truncated, got")


def test_every_flipped_bit_of_a_png_is_noticed(tmp_path):
    path = saved(tmp_path, "a.png", COLOUR)
    data = path.read_bytes()
    for position in range(8, len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises((InputError, SafetyError)):
            read_volume(path)


def test_bombs_are_refused_before_they_grow(tmp_path):
    huge = png_bytes(GREY, 0, width=60_000, height=60_000)
    (tmp_path / "a.png").write_bytes(huge)
    refused(tmp_path / "a.png", "60000 x 60000 pixels", kind=SafetyError)
    refused(tmp_path / "a.png", "too many pixels", kind=SafetyError, read=read_grid)
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((1, 100_000_000), np.uint8), compression="zlib", rowsperstrip=1)
    refused(tmp_path / "a.tif", "1 x 100000000 pixels", kind=SafetyError)
    saved(tmp_path, "a.gif", GREY)
    data = bytearray((tmp_path / "a.gif").read_bytes())
    data[6:10] = b"\xff\xff\xff\xff"
    (tmp_path / "a.gif").write_bytes(data)
    refused(tmp_path / "a.gif", "too many pixels", kind=SafetyError)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.png", b"", "empty file"),
        ("a.png", b"x", "it is text"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "truncated"),
        ("a.jpg", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "is not a JPEG picture: it is a PNG picture"),
        ("a.tif", b"\xff\xd8\xff\xe0" + b"\0" * 50, "it is a JPEG picture"),
        ("a.tif", b"II*\0" + b"\0" * 50, "damaged or truncated"),
        ("a.bmp", b"BM" + b"\xff" * 50, "cannot be decoded"),
        ("a.gif", b"GIF89a" + b"\0" * 50, "decoded"),
        ("a.png", png_bytes(GREY, 0, width=7, height=500), "truncated, got 40 of 4000 bytes"),
        ("a.png", png_bytes(GREY, 0).replace(b"IHDR", b"XHDR"), "no PNG header"),
    ],
)
def test_what_is_no_picture_is_said(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    refused(tmp_path / name, words)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "LA", "RGBA", "P"])
def test_png_of_every_kind_and_size_has_the_pixels_it_declares(tmp_path, mode):
    for width, height in ((1, 1), (3, 2), (9, 17), (16, 5)):
        path = saved(tmp_path, "a.png", Image.new(mode, (width, height)))
        assert read_volume(path).grid.shape == (height, width)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2), (4, 1), (5, 5), (8, 8), (9, 17)])
def test_interlaced_png_is_read(tmp_path, width, height):
    array = RNG.integers(0, 256, (height, width), dtype=np.uint8)
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    parts = [array[y::dy, x::dx] for x, y, dx, dy in passes]
    raw = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1))
    tail = chunk(b"IEND", b"")
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(raw)) + tail)
    np.testing.assert_array_equal(read_volume(path).array[0], array)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(raw[:-1])) + tail)
    refused(path, f"truncated, got {len(raw) - 1} of {len(raw)} bytes")


def test_kinds_of_pixel_we_do_not_convert_are_refused(tmp_path):
    refused(saved(tmp_path, "a.tif", Image.new("LAB", (7, 5))), "CIELAB")
    (tmp_path / "a.png").write_bytes(png_bytes(DEEP_COLOUR[..., :2].copy(), 4))
    refused(tmp_path / "a.png", "16-bit grey with alpha")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 7), np.complex64))
    refused(tmp_path / "a.tif", "complex64")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 7, 5), np.uint8), photometric="minisblack", planarconfig="contig")
    refused(tmp_path / "a.tif", "5 samples per pixel")


def test_float_tiff_with_nan_is_refused_and_filled_on_request(tmp_path):
    array = FLOAT.copy()
    array[2, 3] = np.nan
    path = saved(tmp_path, "a.tif", array)
    refused(path, "1 NaN among 35 voxels")
    assert read_volume(path, nan_policy="fill").array[0, 2, 3] == FLOAT[array == array].min()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.gif", "a.tif"])
def test_random_bytes_never_end_in_a_foreign_error(tmp_path, name):
    path = saved(tmp_path, name, COLOUR if name != "a.gif" else GREY)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data)
        for position in rng.integers(0, min(len(data), 300), rng.integers(1, 5)):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_volume(path)
        except (InputError, SafetyError):
            continue


@pytest.mark.shared
def test_real_pictures_agree_with_pillow(shared_folder):
    data = shared_folder / "data"
    for path in sorted((data / "em_isbi2012" / "train").glob("*/*.png"))[:4]:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            np.testing.assert_array_equal(read_volume(path).array[0], np.asarray(image))
    masks = sorted((data / "isic2017" / "masks").rglob("*.jpg"))[:5]
    assert masks
    for path in masks:
        assert set(np.unique(read_label_map(path, options=ReadOptions(lossy_threshold=127)).array)) <= {0, 1}
