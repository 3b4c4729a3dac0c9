"""2-D pictures (PNG, JPEG, BMP, GIF, TIFF): every sample kept, turned as EXIF says, grey stays one channel."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from voxdino.core.errors import GeometryError, ImageError, LabelError
from voxdino.core.geometry import Grid
from voxdino.core.io.options import ReadOptions
from voxdino.core.io.pillow import (
    EXIF_ORIENTATION,
    GREY_MODES,
    PILLOW_FORMATS,
    Picture,
    decode_with_pillow,
    open_picture,
    undecodable,
)
from voxdino.core.io.png import check_png
from voxdino.core.io.sniff import name_type
from voxdino.core.io.tiff import decode_tiff, read_facts, write_tiff
from voxdino.core.safe_files import require_file, write_atomic
from voxdino.core.volume import Volume

TIFF_SUFFIXES = (".tif", ".tiff")
SUFFIXES = (*PILLOW_FORMATS, *TIFF_SUFFIXES)


def read(path: Path) -> Volume:
    """The picture (C, H, W): grey 1 channel, colour 3; 16 bit kept, palettes resolved, alpha dropped, EXIF turned.

    Errors: ImageError for damaged, animated, many-page or odd pictures; SafetyError for bombs.
    """
    picture = decode(path)
    samples, notes = picture.samples, list(picture.notes)
    if picture.alpha:
        samples = samples[..., :-1]
        notes.append("alpha channel dropped")
    if picture.palette is not None:
        samples = picture.palette[np.minimum(samples[..., 0], len(picture.palette) - 1)]
        notes.append("palette resolved to colours" if samples.shape[-1] == 3 else "1-bit picture read as 0 and 255")
    return _as_volume(picture, samples, notes, path)


def read_labels(path: Path, options: ReadOptions) -> Volume:
    """The label values (1, H, W): palette indices, grey values, or 0 and 1 of a lossy mask over its threshold.

    Errors: LabelError for JPEG without `lossy_threshold`, and for colours that are no grey.
    """
    picture = decode(path)
    samples, notes = picture.samples, list(picture.notes)
    if picture.alpha:
        samples = samples[..., :-1]
        notes.append("alpha channel dropped")
    if samples.shape[-1] > 1:
        if not (samples == samples[..., :1]).all():
            fix = "save the labels as one channel of class numbers."
            raise LabelError("has colours; labels are one number per pixel.", where=path, fix=fix)
        samples = samples[..., :1]
        notes.append("grey picture stored as colour, one channel read")
    if picture.lossy:
        if options.lossy_threshold is None:
            fact = f"is a JPEG: a lossy format for labels (values {_some_values(samples)})."
            fix = "save masks as PNG; or, for a two-class mask, say --lossy-labels 127."
            raise LabelError(fact, where=path, fix=fix)
        samples = (samples > options.lossy_threshold).astype(np.uint8)
        notes.append(f"lossy mask: values above {options.lossy_threshold} are 1")
    elif picture.palette is not None:
        notes.append("palette picture read as indices" if picture.palette.shape[1] == 3 else "1-bit mask read as 0, 1")
    return _as_volume(picture, samples, notes, path)


def read_grid(path: Path) -> tuple[Grid, int]:
    """Grid and channels, without decoding the pixels."""
    _require_type(path)
    if path.suffix.lower() in TIFF_SUFFIXES:
        facts = read_facts(path)
        shape, channels, orientation = facts.shape, facts.channels, facts.orientation
    else:
        with open_picture(path) as image:
            shape = (image.height, image.width)
            channels = 1 if image.mode in GREY_MODES else 3
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    if orientation in (5, 6, 7, 8):
        shape = shape[::-1]
    return Grid.from_spacing(shape, unit="px"), channels


def write(path: Path, array: NDArray[Any], grid: Grid) -> None:
    """Write (1 or 3, H, W) integers as PNG (8 or 16 bit) or TIFF (any depth, deflate). No metadata is written."""
    if grid.ndim != 2:
        raise GeometryError("a volume does not fit a picture.", where=path, fix="write it as .nii.gz.")
    pixels = array[0] if len(array) == 1 else np.moveaxis(array, 0, -1)  # (H, W) or (H, W, 3)
    if pixels.dtype == np.bool_:
        pixels = pixels.view(np.uint8)
    suffix = path.suffix.lower()
    if suffix == ".png" and pixels.dtype != np.uint8 and (pixels.dtype != np.uint16 or pixels.ndim == 3):
        raise ImageError(f"PNG cannot hold {pixels.dtype} here.", where=path, fix="write it as .tif.")
    if pixels.ndim == 3 and pixels.shape[2] != 3:
        raise ImageError(f"{pixels.shape[2]} channels make no picture.", where=path, fix="write 1 or 3 channels.")
    with write_atomic(path) as temporary:
        if suffix == ".png":
            Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG")
        else:
            write_tiff(temporary, pixels)


def decode(path: Path) -> Picture:
    """The samples of a picture whose content is what its name says. Errors: as `read`."""
    _require_type(path)
    if path.suffix.lower() in TIFF_SUFFIXES:
        return decode_tiff(path)
    if path.suffix.lower() == ".png":
        facts = check_png(path.read_bytes(), path)
        if facts.depth == 16 and facts.colour_type == 4:
            raise ImageError("has 16-bit grey with alpha.", where=path, fix="save it as 16-bit grey without alpha.")
        if facts.depth == 16 and facts.colour_type != 0:
            return _decode_deep_png(path, alpha=facts.colour_type == 6)
    return decode_with_pillow(path)


def _decode_deep_png(path: Path, *, alpha: bool) -> Picture:
    """16-bit colour, which Pillow would cut to 8 bits."""
    import SimpleITK

    try:
        samples = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path), imageIO="PNGImageIO"))
    except RuntimeError as error:
        raise undecodable(path, error) from error
    return Picture(np.asarray(samples), alpha=alpha)


def _require_type(path: Path) -> None:
    require_file(path, kind=ImageError)
    with path.open("rb") as file:
        found = name_type(file.read(512))
    suffix = path.suffix.lower()
    expected = "a TIFF picture" if suffix in TIFF_SUFFIXES else PILLOW_FORMATS[suffix][1]
    if found != expected:
        raise ImageError(f"is not {expected}: it is {found}.", where=path, fix="give it the suffix of what it is.")


def _as_volume(picture: Picture, samples: NDArray[Any], notes: list[str], path: Path) -> Volume:
    if 2 <= picture.orientation <= 8:
        samples = turn(samples, picture.orientation)
        notes.append(f"turned as its EXIF orientation ({picture.orientation}) says")
    array = np.ascontiguousarray(np.moveaxis(samples, -1, 0))  # (C, H, W)
    return Volume(array, Grid.from_spacing(array.shape[1:], unit="px"), tuple(notes), path)


def turn(samples: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Samples (H, W, ...) as a viewer shows them, given the EXIF orientation 1 to 8."""
    if orientation >= 5:
        samples = samples.swapaxes(0, 1)
    flip_rows, flip_columns = {2: (0, 1), 3: (1, 1), 4: (1, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}.get(
        orientation, (0, 0)
    )
    return samples[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def _some_values(samples: NDArray[Any]) -> str:
    values = np.unique(samples).tolist()
    return ", ".join(str(value) for value in values[:6]) + (" ..." if len(values) > 6 else "")
