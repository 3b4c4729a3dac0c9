"""The voxels of a file: sizes are believed only where file and memory allow, then read to the last byte."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxdino.core.errors import ImageError
from voxdino.core.geometry import format_shape
from voxdino.core.io.streams import Source, fill, require_end, truncated
from voxdino.core.memory import require_memory
from voxdino.core.safe_files import format_bytes

_MAX_RATIO = 1040  # deflate cannot do better


def require_plausible(
    stored_shape: tuple[int, ...],
    dtype: np.dtype[Any],
    path: Path,
    *,
    offset: int,
    file_size: int,
    compressed: bool,
    extra_bytes: int = 0,
    limit: int | None = None,
) -> None:
    """Compare what a header declares with memory and with the file, before anything is allocated.

    stored_shape: all axes, components included. offset: bytes before the voxels. extra_bytes: a second copy's size.
    Errors: SafetyError over the memory (or `limit`), ImageError where the file cannot hold that much.
    """
    num_bytes = math.prod(stored_shape) * dtype.itemsize
    what = f"declares {format_shape(stored_shape)} voxels in a file of {format_bytes(file_size)}"
    require_memory(num_bytes + extra_bytes, what, where=path, limit=limit)
    if compressed and num_bytes > _MAX_RATIO * file_size:
        fact = f"{what}, which cannot hold them: truncated, or the header is wrong."
        raise ImageError(fact, where=path, fix="copy or export it again.")
    if not compressed and file_size < offset + num_bytes:
        raise truncated(file_size, offset + num_bytes, path)


def read_payload(source: Source, num_values: int, dtype: np.dtype[Any], path: Path, *, offset: int) -> NDArray[Any]:
    """All values, flat and writable, in native byte order; no second copy is made. Errors: ImageError."""
    buffer = np.empty(num_values * dtype.itemsize, dtype=np.uint8)
    got = fill(source, buffer.data)
    declared = offset + len(buffer)
    if got < len(buffer):
        raise truncated(offset + got, declared, path)
    require_end(source, declared, path)
    array = buffer.view(dtype)
    return array if array.dtype.isnative else array.byteswap(inplace=True).view(dtype.newbyteorder("="))
