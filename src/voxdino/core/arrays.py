"""Arrays on disk, compressed in chunks (blosc2), so that a random crop reads only the chunks it touches."""

from os import PathLike
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray

from voxdino.core.errors import InputError
from voxdino.core.safe_files import require_file, write_atomic

ARRAY_SUFFIX = ".b2nd"

_FIX = "remove it and run `voxdino prepare` again."


def write_array(path: str | PathLike[str], array: NDArray[Any], *, chunk: tuple[int, ...] | None = None) -> None:
    """Write an array atomically. chunk: its read unit, one length per axis (cut to the array); None: blosc2 decides.

    Lossless. Errors: ResourceError when the disk is full.
    """
    chunks = None if chunk is None else tuple(min(c, s) for c, s in zip(chunk, array.shape, strict=True))
    settings = blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=1, nthreads=1)
    with write_atomic(path) as temporary:
        blosc2.asarray(np.ascontiguousarray(array), urlpath=str(temporary), mode="w", chunks=chunks, cparams=settings)


class ArrayFile:
    """A file of `write_array`, memory-mapped: slicing decompresses only the chunks that the slice touches.

    Errors: InputError when the file is missing or damaged.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        require_file(path)
        try:
            self._array = blosc2.open(str(path), mode="r", mmap_mode="r", dparams=blosc2.DParams(nthreads=1))
        except (RuntimeError, OSError, ValueError) as error:
            raise InputError("is damaged, or no array file of ours.", where=path, fix=_FIX) from error
        if not isinstance(self._array, blosc2.NDArray):
            raise InputError("holds no array.", where=path, fix=_FIX)

    @classmethod
    def open(cls, path: str | PathLike[str]) -> "ArrayFile":
        return cls(path)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self._array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = np.dtype(self._array.dtype)
        return dtype

    def __getitem__(self, box: Any) -> NDArray[Any]:
        """A copy of the slice, as NumPy would give it."""
        try:
            return np.asarray(self._array[box])
        except RuntimeError as error:
            raise InputError("is damaged: a chunk does not decompress.", where=self.path, fix=_FIX) from error
