"""PNG files checked chunk by chunk: Pillow takes files without an end, and cuts 16-bit colour to 8 bits."""

import struct
import zlib
from dataclasses import dataclass
from os import PathLike

from voxdino.core.errors import ImageError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class PngFacts:
    """depth: bits per sample. colour_type: 0 grey, 2 RGB, 3 palette, 4 grey + alpha, 6 RGBA."""

    width: int
    height: int
    depth: int
    colour_type: int
    num_frames: int


def check_png(data: bytes, where: str | PathLike[str]) -> PngFacts:
    """The facts of a PNG whose every chunk is whole: checksums hold, and the end mark is there. Errors: ImageError."""
    fix = "copy or export it again."
    if len(data) < 33 or not data.startswith(_SIGNATURE) or data[12:16] != b"IHDR":
        raise ImageError(f"truncated: {len(data)} bytes hold no PNG header.", where=where, fix=fix)
    width, height, depth, colour_type = struct.unpack(">IIBB", data[16:26])
    if width == 0 or height == 0:
        raise ImageError(f"the header declares {height} x {width} pixels.", where=where, fix=fix)
    num_frames = 1
    at = len(_SIGNATURE)
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind = data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data):
            break
        (checksum,) = struct.unpack(">I", data[end - 4 : end])
        if zlib.crc32(data[at + 4 : end - 4]) != checksum:
            fact = f"is damaged: the checksum of its {kind.decode('latin-1')} chunk differs."
            raise ImageError(fact, where=where, fix=fix)
        if kind == b"acTL" and length >= 4:
            num_frames = int.from_bytes(data[at + 8 : at + 12], "big")
        if kind == b"IEND":
            return PngFacts(width, height, depth, colour_type, num_frames)
        at = end
    raise ImageError(f"truncated, got {len(data)} bytes without the end mark (IEND).", where=where, fix=fix)
