"""TIFF pictures of one page: 16 bit, float, tiles or strips; Pillow for compressions that tifffile leaves out."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from voxdino.core.errors import ImageError, VoxdinoError
from voxdino.core.io.pillow import Picture, decode_with_pillow, require_few_pixels, with_notes
from voxdino.core.io.streams import truncated

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it would say is in our errors

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_JPEG_COMPRESSIONS = (6, 7, 34712, 33003, 33005)
_ORIENTATION = 274


@dataclass(frozen=True)
class TiffFacts:
    """What the tags of the only page say. channels: after palette and alpha are resolved."""

    shape: tuple[int, int]
    samples: int
    channels: int
    photometric: int
    depth: int
    compressed: bool
    lossy: bool
    alpha: bool
    orientation: int


def read_facts(path: Path) -> TiffFacts:
    """The facts, without decoding. Errors: ImageError, SafetyError."""
    with _page(path) as page:
        return _facts(page, path)


def decode_tiff(path: Path) -> Picture:
    """The samples of a TIFF. Errors: ImageError for pages, pyramids, damage, kinds of pixel we do not convert."""
    with _page(path) as page:
        facts = _facts(page, path)
        _require_whole(page, path)
        samples = _decode(page, facts, path)
        colormap = page.colormap
    if samples is None:
        if facts.depth > 8 and (facts.samples > 1 or facts.photometric == _WHITE_IS_ZERO):
            fact = f"has {facts.depth}-bit samples in a compression that we cannot decode."
            raise ImageError(fact, where=path, fix="save it uncompressed or with deflate.")
        if facts.orientation > 4 and not facts.compressed:  # Pillow 13 garbles them
            raise ImageError("has colours of a rare kind and is turned.", where=path, fix="save it upright, as RGB.")
        return decode_with_pillow(path)
    notes: tuple[str, ...] = ()
    palette = None
    if facts.photometric == _PALETTE:
        palette = (np.asarray(colormap).T >> 8).astype(np.uint8)  # (entries, 3)
    if samples.dtype == np.bool_:
        samples = samples.astype(np.uint8)
        palette = np.array([[0], [255]], dtype=np.uint8)
    if facts.photometric == _WHITE_IS_ZERO:
        if samples.dtype.kind != "u":
            raise ImageError(f"has white as 0 in {samples.dtype} samples.", where=path, fix="save it with black as 0.")
        samples = (2**facts.depth - 1 - samples).astype(samples.dtype)
        notes = ("inverted: the file has white as 0",)
    return with_notes(Picture(samples, palette, facts.alpha, facts.orientation, facts.lossy), *notes)


def write_tiff(path: Path, pixels: NDArray[Any]) -> None:
    """Write (H, W) or (H, W, 3) with deflate and no metadata."""
    kind = "rgb" if pixels.ndim == 3 else "minisblack"
    tifffile.imwrite(path, pixels, compression="zlib", photometric=kind, metadata=None, software=False)


@contextmanager
def _page(path: Path) -> Iterator[Any]:
    """The only page of the file."""
    fix = "save the page that is meant as a picture of its own."
    try:
        with tifffile.TiffFile(path) as file:
            if len(file.pages) == 0:
                raise ImageError("is damaged or truncated: no page.", where=path, fix="copy or export it again.")
            if len(file.pages) > 1:
                raise ImageError(f"has {len(file.pages)} pages.", where=path, fix=fix)
            page = file.pages[0]
            images = int((file.imagej_metadata or {}).get("images", 1)) if file.is_imagej else 1
            if images > 1 or page.subifds or page.imagedepth > 1:
                fact = "is a pyramid." if page.subifds else f"is a stack of {max(images, page.imagedepth)} pictures."
                raise ImageError(fact, where=path, fix=fix)
            yield page
    except (VoxdinoError, OSError):
        raise
    except Exception as error:  # parsers of hostile files raise anything
        reason = " ".join(str(error).split())[:150]
        raise ImageError(f"is damaged or truncated ({reason}).", where=path, fix="copy or export it again.") from error


def _facts(page: Any, path: Path) -> TiffFacts:
    shape = (int(page.imagelength), int(page.imagewidth))
    if min(shape) < 1:
        raise ImageError(f"declares {shape[0]} x {shape[1]} pixels.", where=path, fix="export it again.")
    require_few_pixels(shape, path)
    samples, photometric = int(page.samplesperpixel), int(page.photometric)
    base = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3}.get(photometric)
    if base is None or samples not in (base, base + 1):
        fact = f"has {samples} samples per pixel of the kind {getattr(page.photometric, 'name', photometric)}."
        raise ImageError(fact, where=path, fix="save it as grey or RGB.")
    orientation = page.tags.get(_ORIENTATION)
    return TiffFacts(
        shape,
        samples,
        1 if photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO) else 3,
        photometric,
        int(page.bitspersample),
        int(page.compression) != 1,
        int(page.compression) in _JPEG_COMPRESSIONS,
        samples > base,
        int(orientation.value) if orientation is not None else 1,
    )


def _require_whole(page: Any, path: Path) -> None:
    end = max((o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)), default=0)
    size = path.stat().st_size
    if end > size:
        raise truncated(size, end, path)
    bits = page.imagewidth * page.samplesperpixel * page.bitspersample
    declared = int(page.imagelength) * ((int(bits) + 7) // 8)
    if int(page.compression) == 1 and sum(page.databytecounts) < declared:
        raise truncated(sum(page.databytecounts), declared, path)


def _decode(page: Any, facts: TiffFacts, path: Path) -> NDArray[Any] | None:
    """Samples (H, W, S) in native order, or None where Pillow must do it."""
    if facts.photometric in (_CMYK, _YCBCR) or facts.lossy:
        return None
    try:
        samples = np.asarray(page.asarray())
    except (KeyError, ValueError) as error:
        if "imagecodecs" in str(error):
            return None
        raise
    if samples.dtype.kind not in "buif":
        raise ImageError(f"has samples of type {samples.dtype}.", where=path, fix="save it as integers or float32.")
    if samples.ndim == 3 and samples.shape[0] == facts.samples and samples.shape[1:] == facts.shape:
        samples = np.moveaxis(samples, 0, -1)  # planes one after the other
    return samples.reshape(*facts.shape, facts.samples).astype(samples.dtype.newbyteorder("="), copy=False)
