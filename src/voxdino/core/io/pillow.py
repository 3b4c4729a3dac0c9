"""Pillow's part of reading pictures: samples and palette as stored; modes it would clip or guess at are refused."""

from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from voxdino.core.errors import ImageError, SafetyError
from voxdino.core.geometry import format_shape

PILLOW_FORMATS = {
    ".png": ("PNG", "a PNG picture"),
    ".jpg": ("JPEG", "a JPEG picture"),
    ".jpeg": ("JPEG", "a JPEG picture"),
    ".bmp": ("BMP", "a BMP picture"),
    ".gif": ("GIF", "a GIF picture"),
}
MAX_PIXELS = 89_478_485  # Pillow's own limit for bombs: 256 MiB of 24-bit colour

GREY_MODES = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_ALPHA_MODES = ("LA", "RGBA")
_CONVERTED_MODES = ("CMYK", "YCbCr", "RGBX", "PA")
EXIF_ORIENTATION = 0x0112  # EXIF tag
_SAVE_AGAIN = "save it as 8- or 16-bit grey, or as RGB."


@dataclass(frozen=True, eq=False)
class Picture:
    """Decoded samples before anything is done to them.

    samples: (H, W, C), colour indices where there is a palette; alpha is the last channel where `alpha`.
    palette: (entries, 1 or 3) uint8, or None.
    """

    samples: NDArray[Any]
    palette: NDArray[np.uint8] | None = None
    alpha: bool = False
    orientation: int = 1
    lossy: bool = False
    notes: tuple[str, ...] = field(default=())


def open_picture(path: Path) -> Image.Image:
    name, _ = PILLOW_FORMATS.get(path.suffix.lower(), ("TIFF", ""))
    try:
        image = Image.open(path, formats=[name])
        num_frames = getattr(image, "n_frames", 1)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        fact = f"declares too many pixels; {MAX_PIXELS} are the most."
        raise SafetyError(fact, where=path, fix="cut it into smaller pictures.") from error
    except Exception as error:
        raise undecodable(path, error) from error
    try:
        require_few_pixels((image.height, image.width), path)
        if num_frames > 1 and image.format != "MPO":
            fix = "save the one that is meant as a picture of its own."
            raise ImageError(f"holds {num_frames} pictures (an animation or pages).", where=path, fix=fix)
    except (ImageError, SafetyError):
        image.close()
        raise
    return image


def decode_with_pillow(path: Path) -> Picture:
    """The samples as Pillow gives them; modes it would clip or guess at are refused."""
    with open_picture(path) as image:
        orientation = int(image.getexif().get(EXIF_ORIENTATION, 1))
        notes = ("the first of several pictures read",) if image.format == "MPO" else ()
        if image.format == "TIFF" and orientation > 1:  # Pillow turns these itself
            orientation, notes = 1, (f"turned as its EXIF orientation ({orientation}) says",)
        lossy = image.format in ("JPEG", "MPO") or image.info.get("compression") == "jpeg"
        mode = image.mode
        try:
            if mode == "1":
                grey = np.array([[0], [255]], dtype=np.uint8)
                bits = np.asarray(image).astype(np.uint8)[..., None]
                return Picture(bits, grey, orientation=orientation)
            if mode == "P":
                colours = np.array(image.getpalette(), dtype=np.uint8).reshape(-1, 3)
                if "transparency" in image.info:
                    notes = (*notes, "transparent colour ignored")
                return Picture(np.asarray(image)[..., None], colours, orientation=orientation, notes=notes)
            if mode in _CONVERTED_MODES:
                notes = (*notes, f"{mode} converted to RGB")
                samples = np.asarray(image.convert("RGB"))
            elif mode in GREY_MODES or mode in ("RGB", "RGBA"):
                samples = np.asarray(image)
            else:
                raise ImageError(f"has pixels of the kind {mode!r}.", where=path, fix=_SAVE_AGAIN)
        except ImageError:
            raise
        except Exception as error:  # decoders of hostile files raise anything
            raise undecodable(path, error) from error
    samples = samples if samples.ndim == 3 else samples[..., None]
    samples = samples.astype(samples.dtype.newbyteorder("="), copy=False)
    return Picture(samples, None, mode in _ALPHA_MODES, orientation, lossy, notes)


def require_few_pixels(shape: tuple[int, int], where: str | PathLike[str]) -> None:
    """SafetyError for more pixels than any examination has."""
    if shape[0] * shape[1] > MAX_PIXELS:
        fact = f"declares {format_shape(shape)} pixels; {MAX_PIXELS} are the most."
        raise SafetyError(fact, where=where, fix="cut it into smaller pictures.")


def undecodable(path: Path, error: Exception) -> ImageError:
    reason = " ".join(str(error).split())[-150:]
    word = "truncated" if "truncated" in reason.lower() else "damaged"
    return ImageError(f"is {word}: it cannot be decoded ({reason}).", where=path, fix="copy or export it again.")


def with_notes(picture: Picture, *notes: str) -> Picture:
    """The picture with more notes."""
    return replace(picture, notes=(*picture.notes, *notes))
