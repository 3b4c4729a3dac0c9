"""PNG files checked chunk by chunk: Pillow takes files without an end, and cuts 16-bit colour to 8 bits."""

import struct
import zlib
from dataclasses import dataclass
from os import PathLike

from voxdino.core.errors import ImageError
from voxdino.core.io.pillow import require_few_pixels
from voxdino.core.io.streams import truncated

_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # per pixel, by colour type
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class PngFacts:
    """depth: bits per sample. colour_type: 0 grey, 2 RGB, 3 palette, 4 grey + alpha, 6 RGBA."""

    width: int
    height: int
    depth: int
    colour_type: int
    is_interlaced: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of the decompressed pixels, with one filter byte per row."""
        passes = _ADAM7 if self.is_interlaced else ((0, 0, 1, 1),)
        sizes = [(-(-(self.height - y) // dy), -(-(self.width - x) // dx)) for x, y, dx, dy in passes]
        bits = self.depth * _SAMPLES[self.colour_type]
        return sum(rows * (1 + (columns * bits + 7) // 8) for rows, columns in sizes if rows > 0 and columns > 0)


class _PixelBytes:
    """Counts the decompressed pixel bytes, never holding more than a block of them."""

    def __init__(self, facts: PngFacts, where: str | PathLike[str]) -> None:
        self._missing = facts.num_bytes
        self._declared = facts.num_bytes
        self._where = where
        self._inflater = zlib.decompressobj()

    def feed(self, data: bytes) -> None:
        try:
            while self._missing >= 0:
                block = self._inflater.decompress(data, 1 << 18)
                data = self._inflater.unconsumed_tail
                self._missing -= len(block)
                if not block and not data:
                    break
        except zlib.error as error:
            fact = f"is damaged: its compressed pixels fail the checksum ({error})."
            raise ImageError(fact, where=self._where, fix="copy or export it again.") from None

    def require_all(self) -> None:
        if self._missing > 0:
            raise truncated(self._declared - self._missing, self._declared, self._where)


def check_png(data: bytes, where: str | PathLike[str]) -> PngFacts:
    """The facts of a PNG that is whole: checksums hold, all pixels and the end mark are there.

    Errors: ImageError; SafetyError for too many pixels.
    """
    fix = "copy or export it again."
    if len(data) < 33 or not data.startswith(_SIGNATURE) or data[12:16] != b"IHDR":
        raise ImageError(f"truncated: {len(data)} bytes hold no PNG header.", where=where, fix=fix)
    width, height, depth, colour_type = struct.unpack(">IIBB", data[16:26])
    if min(width, height) == 0 or colour_type not in _SAMPLES or depth not in (1, 2, 4, 8, 16):
        fact = f"the header declares {height} x {width} pixels of kind {colour_type} with {depth} bits."
        raise ImageError(fact, where=where, fix=fix)
    facts = PngFacts(width, height, depth, colour_type, is_interlaced=data[28] == 1)
    require_few_pixels((height, width), where)
    pixels = _PixelBytes(facts, where)
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
        if kind == b"IDAT":
            pixels.feed(data[at + 8 : end - 4])
        if kind == b"IEND":
            pixels.require_all()
            return facts
        at = end
    raise ImageError(f"truncated, got {len(data)} bytes without the end mark (IEND).", where=where, fix=fix)
