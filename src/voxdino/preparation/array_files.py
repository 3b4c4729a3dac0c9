"""Arrays of .npz files: sizes from their headers, values without pickle, bounded by the memory there is."""

import zipfile
import zlib
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxdino.core.errors import DatasetError, VoxdinoError
from voxdino.core.memory import require_memory
from voxdino.core.safe_files import require_file

KEPT_ARRAYS = 4

_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def array_facts(path: str | PathLike[str]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of every array, without reading one. Errors: DatasetError for a file that is no .npz."""
    require_file(path, kind=DatasetError)
    facts = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as file:
                    shape, _, dtype = _READ_HEADER[np.lib.format.read_magic(file)](file)
                facts[name.removesuffix(".npy")] = (shape, dtype)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        raise _unreadable(path, error) from error
    return facts


def open_array(path: str | PathLike[str], name: str) -> NDArray[Any]:
    """An array of the file, not to be written to; the last few are kept in memory.

    Errors: DatasetError for arrays of Python objects and damaged files; SafetyError for more than the free memory.
    """
    file = Path(path)
    size = require_file(file, kind=DatasetError)
    return _read(file, name, file.stat().st_mtime_ns, size)


@lru_cache(maxsize=KEPT_ARRAYS)
def _read(path: Path, name: str, changed: int, size: int) -> NDArray[Any]:
    """changed, size: of the file; another one of the same name is read anew."""
    shape, dtype = array_facts(path)[name]
    num_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
    require_memory(num_bytes, f"{name} is an array of {' x '.join(map(str, shape))}", where=path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            array: NDArray[Any] = arrays[name]
    except VoxdinoError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(path, error) from error
    array.flags.writeable = False
    return array


def _unreadable(path: str | PathLike[str], error: Exception) -> DatasetError:
    fix = "download it again; give a set of MedMNIST, such as pneumoniamnist.npz."
    return DatasetError(f"cannot be read as .npz ({str(error)[:120]})", where=path, fix=fix)
