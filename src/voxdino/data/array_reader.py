"""Boxes of array files, read from many threads; every file is checked before it is first used."""

import threading
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from voxdino.core.arrays import ArrayFile
from voxdino.core.errors import DatasetError, InputError
from voxdino.core.safe_files import Manifest

OPEN_FILES_PER_THREAD = 64
KEPT_ARRAY_BYTES = 2 << 20  # arrays up to this size are decompressed once and kept: their crops are nearly all of them
KEPT_BYTES = 512 << 20  # of such arrays, together


class ArrayReader:
    """Safe to use from many threads, each of which keeps its own few open files; small arrays are read once and kept.

    compared: files whose content is compared with their digest: "all"; or "kept", those that are read whole anyway, for
              files so large and many that reading them once more would cost more than the training: of the others the
              size is compared.
    fix:      what messages tell to do about a file that is not as it was written.
    """

    def __init__(self, *, compared: Literal["all", "kept"], fix: str) -> None:
        self._compared, self._fix = compared, fix
        self._checked: set[Path] = set()
        self._kept: dict[Path, NDArray[Any]] = {}
        self._kept_bytes = 0
        self._local = threading.local()

    def read(self, manifest: Manifest, folder: Path, name: str, index: tuple[slice, ...]) -> NDArray[Any]:
        """What `index` takes of the array folder/name, which `manifest` lists; not to be written to.

        Errors: DatasetError where the file is missing, is not what the manifest says, or cannot be read.
        """
        path = folder / name
        kept = self._kept.get(path)
        if kept is not None:
            return kept[index]
        try:
            file = self._open(manifest, folder, name)
            num_bytes = int(np.prod(file.shape)) * file.dtype.itemsize
            if num_bytes > KEPT_ARRAY_BYTES or self._kept_bytes + num_bytes > KEPT_BYTES:
                return file[index]
            if self._compared == "kept":
                manifest.verify(folder, [name])
            kept = file[...]
        except InputError as error:
            raise DatasetError(error.fact, where=error.where or path, fix=self._fix) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise DatasetError(f"cannot be read ({error}).", where=path, fix=self._fix) from error
        kept.setflags(write=False)
        self._kept[path] = kept
        self._kept_bytes += num_bytes
        return kept[index]

    def _open(self, manifest: Manifest, folder: Path, name: str) -> ArrayFile:
        """This thread's handle: a blosc2 array must not be read by two threads at once.

        Two threads that come to a file at the same time may both check it.
        """
        path = folder / name
        if path not in self._checked:
            if self._compared == "all":
                manifest.verify(folder, [name])
            else:
                manifest.require_sizes(folder, [name])
            self._checked.add(path)
        if not hasattr(self._local, "open"):
            self._local.open = lru_cache(maxsize=OPEN_FILES_PER_THREAD)(ArrayFile)
        file: ArrayFile = self._local.open(path)
        return file
