"""Byte sources that images are read from: plain files, and gzip read to its end so that the checksum counts."""

import zlib
from os import PathLike
from typing import BinaryIO, Protocol, runtime_checkable

from voxdino.core.errors import ImageError

_COMPRESSED_BLOCK = 1 << 18
_PLAIN_BLOCK = 1 << 18
_GZIP = 31  # zlib's wbits for a gzip stream
MAX_PADDING = 512  # zero bytes some writers append; more is data that the header does not know


@runtime_checkable
class Source(Protocol):
    """Bytes in order. `complete` is False when the file ended before its own end mark."""

    complete: bool

    def some(self, most: int) -> bytes: ...


class PlainSource:
    """The bytes of an uncompressed file."""

    complete = True

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def some(self, most: int) -> bytes:
        """Up to `most` bytes; none at the end."""
        return self._file.read(min(most, _PLAIN_BLOCK))


class GzipSource:
    """The decompressed bytes of a gzip (or, by `wbits`, zlib) stream, a bounded block at a time.

    Errors: ImageError where the stream is damaged or its checksum differs.
    """

    def __init__(self, file: BinaryIO, where: str | PathLike[str], *, wbits: int = _GZIP) -> None:
        self._file = file
        self._where = where
        self._wbits = wbits
        self._inflater = zlib.decompressobj(wbits=wbits)
        self._compressed = b""
        self.complete = False

    def some(self, most: int) -> bytes:
        """Up to `most` bytes; none at the end, and then `complete` says whether it was the true end."""
        while not self.complete:
            if self._inflater.eof:
                if not self._start_next_member():
                    break
                continue
            compressed = self._compressed or self._file.read(_COMPRESSED_BLOCK)
            try:
                data = self._inflater.decompress(compressed, min(most, _PLAIN_BLOCK))
            except zlib.error as error:
                fact = f"is damaged: its compressed data fails the checksum ({error})."
                raise ImageError(fact, where=self._where, fix="copy or download it again.") from None
            self._compressed = self._inflater.unconsumed_tail
            if data:
                return data
            if not compressed and not self._inflater.eof:
                break  # the file ended inside the stream
        return b""

    def _start_next_member(self) -> bool:
        """Go on with the next gzip member, if there is one. False and `complete` at the end of the file."""
        rest = self._inflater.unused_data or self._file.read(_COMPRESSED_BLOCK)
        while rest and not (rest := rest.lstrip(b"\0")):  # zero padding after a member is allowed
            rest = self._file.read(_COMPRESSED_BLOCK)
        if not rest:
            self.complete = True
            return False
        if self._wbits != _GZIP or not rest.startswith(b"\x1f\x8b"[: len(rest)]):
            fact = "is damaged: other data follows the compressed image."
            raise ImageError(fact, where=self._where, fix="copy or download it again.")
        self._inflater = zlib.decompressobj(wbits=_GZIP)
        self._compressed = rest
        return True


def take(source: Source, num_bytes: int) -> bytearray:
    """The next `num_bytes`, fewer where the source ends before."""
    buffer = bytearray()
    while len(buffer) < num_bytes and (block := source.some(num_bytes - len(buffer))):
        buffer += block
    return buffer


def fill(source: Source, view: memoryview) -> int:
    """Fill `view` (bytes) from the source; returns how many bytes came."""
    position = 0
    while position < len(view) and (block := source.some(len(view) - position)):
        view[position : position + len(block)] = block
        position += len(block)
    return position


def require_end(source: Source, num_bytes: int, where: str | PathLike[str]) -> None:
    """After all `num_bytes` declared ones were read: nothing but a little zero padding may follow.

    Reads to the end of the stream, so a gzip checksum is always verified. Errors: ImageError.
    """
    rest = take(source, MAX_PADDING + 1)
    if len(rest) > MAX_PADDING or any(rest):
        fact = f"holds more data than the {num_bytes} bytes its header declares."
        raise ImageError(fact, where=where, fix="the header is wrong: export the file again.")
    if not source.complete:
        fact = f"truncated, got {num_bytes} of {num_bytes} bytes, but the checksum at the end is missing."
        raise ImageError(fact, where=where, fix="copy or download it again.")


def truncated(got: int, declared: int, where: str | PathLike[str]) -> ImageError:
    """The error for a file that ends too early."""
    return ImageError(f"truncated, got {got} of {declared} bytes.", where=where, fix="copy or download it again.")
