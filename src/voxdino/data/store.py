"""Prepared cases on disk, read a box at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from numpy.typing import NDArray

from voxdino.core.arrays import ARRAY_SUFFIX
from voxdino.core.errors import ConfigError, DatasetError, InputError
from voxdino.core.records import nearest
from voxdino.core.safe_files import Manifest
from voxdino.data.array_reader import ArrayReader
from voxdino.data.sampling import CaseExtent, Range
from voxdino.preparation.prepare import CaseRecord, ChannelScaling, normalise

IGNORED = -1  # label in memory of voxels that neither train nor count; files say 255, or 65535 where classes are many

PREPARE_AGAIN = "run `voxdino prepare DATASET` again: it makes what is damaged or missing, and keeps the rest."


@dataclass(frozen=True, eq=False)
class Crop:
    """What was cut from a case.

    image:   (C, D + 2 context, H, W) float32, normalised.
    label:   (D, H, W) int64 class indices; IGNORED beyond the volume.
    padding: (C,) the normalised value that fills the image beyond the volume.
    spacing: (slice, row, column) size of a voxel.
    """

    image: Float[np.ndarray, "C Dk H W"]
    label: Shaped[np.ndarray, "D H W"]
    padding: Float[np.ndarray, " C"]
    spacing: tuple[float, float, float]


class CaseStore:
    """The folder `prepared/` of a workdir. Safe to read from many threads; each keeps its own few open files.

    Every file is checked against the digest written when it was prepared before it is first used.

    Errors: DatasetError where the folder is missing, unfinished or names other cases, or a file is missing, changed or
    cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "manifest.json").is_file():
            raise DatasetError("no prepared cases here", where=folder, fix=PREPARE_AGAIN)
        self.folder = folder
        try:
            self.manifest = Manifest.read(folder)
        except InputError as error:
            raise DatasetError(error.fact, where=error.where, fix=PREPARE_AGAIN) from error
        self.ids = tuple(sorted(path.name.removesuffix(".json") for path in (folder / "cases").glob("*.json")))
        self._arrays = ArrayReader(compared="all", fix=PREPARE_AGAIN)
        self._record = lru_cache(maxsize=None)(self._read_record)

    def record(self, case_id: str) -> CaseRecord:
        """What `prepare` wrote about a case."""
        return self._record(case_id)

    def shape(self, case_id: str) -> tuple[int, int, int]:
        """(D, H, W) of the prepared case."""
        depth, rows, columns = self.record(case_id).geometry.prepared_shape
        return depth, rows, columns

    def extent(self, case_id: str) -> CaseExtent:
        """What the sampler needs of a case."""
        record = self.record(case_id)
        locations = {int(label): voxels for label, voxels in record.locations.items()}
        lesions = {int(label): components for label, components in record.lesions.items()}
        return CaseExtent(case_id, self.shape(case_id), locations, record.foreground_slices, lesions)

    def read_image(self, case_id: str, box: Sequence[Range]) -> NDArray[Any]:
        """(C, d, h, w) file values of a box inside the volume; not to be written to."""
        return self._read(case_id, "image", (slice(None), *(slice(*ends) for ends in box)))

    def read_label(self, case_id: str, box: Sequence[Range]) -> NDArray[Any]:
        """(d, h, w) int64 class indices of a box inside the volume; IGNORED where the label map says so."""
        stored = self._read(case_id, "label", tuple(slice(*ends) for ends in box))
        label = stored.astype(np.int64)
        label[stored == np.iinfo(stored.dtype).max] = IGNORED
        return label

    def cut(self, case_id: str, box: Sequence[Range], context: int = 0) -> Crop:
        """The box, which may reach beyond the volume, with `context` more slices on each side.

        Context slices are the real neighbours, also at the edge of a slab; only at the ends of the volume is the last
        slice repeated. In plane the image is filled with the smallest normalised value (air, darkness), the label with
        IGNORED.
        """
        shape, record = self.shape(case_id), self.record(case_id)
        (first, last), rows, columns = box
        wanted = np.clip(np.arange(first - context, last + context), 0, shape[0] - 1)
        low, high = int(wanted.min()), int(wanted.max()) + 1
        inside = [
            (max(start, 0), min(stop, size)) for (start, stop), size in zip((rows, columns), shape[1:], strict=True)
        ]
        assert all(start < stop for start, stop in inside), f"{case_id}: the box {box} lies outside {shape}"

        raw = self.read_image(case_id, [(low, high), *inside])[:, wanted - low]  # (C, D + 2 context, h, w)
        image = normalise(raw, record.scaling)
        padding = padding_values(record.scaling)
        margins = [
            (start - ends[0], ends[1] - stop) for ends, (start, stop) in zip((rows, columns), inside, strict=True)
        ]
        if any(margin for pair in margins for margin in pair):
            full = np.empty((*image.shape[:2], rows[1] - rows[0], columns[1] - columns[0]), dtype=np.float32)
            full[:] = padding[:, None, None, None]
            (top, bottom), (left, right) = margins
            full[:, :, top : full.shape[2] - bottom, left : full.shape[3] - right] = image
            image = full

        label = np.full([stop - start for start, stop in box], IGNORED, dtype=np.int64)
        real = [(max(start, 0), min(stop, size)) for (start, stop), size in zip(box, shape, strict=True)]
        target = tuple(slice(start - ends[0], stop - ends[0]) for ends, (start, stop) in zip(box, real, strict=True))
        label[target] = self.read_label(case_id, real)
        return Crop(image, label, padding, record.geometry.prepared_spacing)

    def _read_record(self, case_id: str) -> CaseRecord:
        if case_id not in self.ids:
            raise DatasetError(
                f"no prepared case {case_id!r}.{nearest(case_id, self.ids)}",
                where=self.folder,
                fix="run `voxdino prepare` again: splits and prepared cases must belong together.",
            )
        path = self.folder / "cases" / f"{case_id}.json"
        try:
            self.manifest.verify(self.folder, [f"cases/{case_id}.json"])
        except InputError as error:
            raise DatasetError(error.fact, where=path, fix=PREPARE_AGAIN) from error
        try:
            return CaseRecord.read(path)
        except ConfigError as error:  # undamaged, as its digest says: it was written so
            raise DatasetError(
                f"was prepared by another version of voxdino ({error.fact.rstrip('.')}).",
                where=path,
                fix="run `voxdino prepare DATASET` again: it makes all cases anew.",
            ) from error

    def _read(self, case_id: str, kind: str, index: tuple[slice, ...]) -> NDArray[Any]:
        return self._arrays.read(self.manifest, self.folder, f"cases/{case_id}.{kind}{ARRAY_SUFFIX}", index)


def padding_values(scaling: Sequence[ChannelScaling]) -> Float[np.ndarray, " C"]:
    """(C,) what each channel's lower bound becomes when normalised: air in CT, black in MR and pictures."""
    return np.array([(channel.lower - channel.mean) / channel.sd for channel in scaling], dtype=np.float32)
