"""The image pool: any mix of data sets and folders as slices that a pretraining draws from, one after the other.

    sources ─► workdir/pool/<source>/cases/<id>.{image.b2nd, slices.npy, json} ─► index.npy, cases.jsonl, manifest.json

`pool_build.build_pool` is resumable: a case is final once its record is written, the pool once its manifest is. `Pool`
reads: the index and all that belongs to it are memory-mapped, so that millions of slices take no memory.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from voxdino.core.errors import ConfigError, DatasetError, InputError
from voxdino.core.geometry import Unit
from voxdino.core.resample import resize_linear
from voxdino.core.safe_files import MANIFEST_NAME, Manifest, digest_json
from voxdino.data.array_reader import ArrayReader
from voxdino.data.store import padding_values
from voxdino.preparation.intensity import normalise
from voxdino.preparation.orientation import SliceAxis
from voxdino.pretraining.pool_build import CASES, DIGESTS, FACTS, FILES, INDEX, LINES, PLACES, PoolFacts
from voxdino.pretraining.pool_cases import PoolCase
from voxdino.pretraining.pool_draws import Deck
from voxdino.pretraining.pool_slices import AXES, PoolConfig, turn_slices

BUILD_AGAIN = "build the pool again: what is damaged or missing is made anew, the rest is kept."

_CASES_IN_MEMORY = 4096  # records that a process keeps


@dataclass(frozen=True, eq=False)
class PoolSlice:
    """A slice with its neighbours.

    image:   (C, 1 + 2 context, H, W) normalised; the channels of a scan are grey images of their own, those of a photo
             one colour image.
    spacing: (row, column) in `unit`.   padding: (C,) the normalised value of nothing: air, black.
    axis:    world axis across the slice; None: a picture.   place: number of the slice along it.
    """

    image: Float[np.ndarray, "C k H W"]
    spacing: tuple[float, float]
    unit: Unit
    padding: Float[np.ndarray, " C"]
    source: str
    case: str
    axis: SliceAxis | None
    place: int
    is_photo: bool


class Pool:
    """A finished pool. Safe to read from many threads, and picklable: every process opens the files by itself.

    The index and what belongs to it are checked against their digests when the pool is opened; image files against
    their size (small ones also against their digest) when they are first used.

    Errors: DatasetError where the pool is missing, unfinished, damaged, or has changed since it was pickled.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFEST_NAME).is_file():
            raise DatasetError("no finished pool here.", where=folder, fix="build it; an unfinished one goes on.")
        try:
            manifest = Manifest.read(self.folder)
            manifest.verify(self.folder, FILES)
            self.facts = PoolFacts.read(self.folder / FACTS)
        except InputError as error:
            raise DatasetError(error.fact, where=error.where, fix=BUILD_AGAIN) from error
        self._index = np.load(self.folder / INDEX, mmap_mode="r", allow_pickle=False)  # (slices, 3)
        self._places = np.load(self.folder / PLACES, mmap_mode="r", allow_pickle=False)  # (cases + 1,)
        self._digests = np.load(self.folder / DIGESTS, mmap_mode="r", allow_pickle=False)  # (files, 32)
        self._lines = np.memmap(self.folder / LINES, dtype=np.uint8, mode="r")
        self._digest = digest_json(
            {
                "files": {name: manifest.files[name][0] for name in (INDEX, LINES)},
                "config": self.facts.config.to_json(),
                "sources": [[source.name, source.weight, source.num_slices] for source in self.facts.sources],
            }
        )
        self._deck = Deck([(source.num_slices, source.weight) for source in self.facts.sources])
        self._case = lru_cache(maxsize=_CASES_IN_MEMORY)(self._read_case)
        self._images = ArrayReader(compared="kept", fix=BUILD_AGAIN)

    def __len__(self) -> int:
        """Slices."""
        return len(self._index)

    def __reduce__(self) -> tuple[Callable[[Path, str], "Pool"], tuple[Path, str]]:
        return _reopen, (self.folder, self._digest)

    @property
    def num_cases(self) -> int:
        return len(self._places) - 1

    @property
    def config(self) -> PoolConfig:
        return self.facts.config

    def sources(self) -> dict[str, dict[str, int]]:
        """{"name": {"cases": 200, "slices": 7100}}."""
        return {source.name: {"cases": source.num_cases, "slices": source.num_slices} for source in self.facts.sources}

    def digest(self) -> str:
        """Of all that is read and drawn: slices, images, scaling, weights. Not of where the files came from."""
        return self._digest

    def draw(self, number: int, seed: int) -> int:
        """The slice of draw `number` (from 0), a function of (seed, number) alone.

        A slice's chance is the weight of its source. Drawing is without replacement: a source's slices all come once
        before any comes again.
        """
        return self._deck.draw(number, seed)

    def read(self, index: int, *, context: int = 0) -> PoolSlice:
        """A slice with `context` neighbours on each side; at the ends of a volume the last slice is repeated.

        Slices of a plane other than the one the volume was stored in are resized here to `config.in_plane_spacing`.
        Errors: IndexError; DatasetError for a file that is missing or changed.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"slice {index} of a pool of {len(self)}")
        number, code, place = (int(value) for value in self._index[index])
        case, axis = self._case(number), AXES[code]
        order, flips = turn_slices(case.slice_axis, axis)
        size = case.shape[1 + order[0]]
        wanted = np.clip(np.arange(place - context, place + context + 1), 0, size - 1)
        if flips[0]:
            wanted = size - 1 - wanted
        low, high = int(wanted.min()), int(wanted.max()) + 1
        box = tuple(slice(low, high) if stored == order[0] else slice(None) for stored in range(3))
        raw = self._cut(case, (slice(None), *box)).transpose(0, *(1 + stored for stored in order))
        raw = np.flip(raw[:, wanted - low], tuple(2 + side for side in range(2) if flips[1 + side]))
        image = normalise(raw, case.scaling)  # (C, 1 + 2 context, H, W)
        rows, columns = (case.spacing[stored] for stored in order[1:])
        side = self.config.in_plane_spacing
        if axis != case.slice_axis and side is not None and case.unit != "px":
            shape = [max(1, round(n * own / side)) for n, own in zip(image.shape[2:], (rows, columns), strict=True)]
            rows, columns = rows * image.shape[2] / shape[0], columns * image.shape[3] / shape[1]
            image = resize_linear(image, shape, (2, 3))
        return PoolSlice(
            image=image,
            spacing=(rows, columns),
            unit=case.unit,
            padding=padding_values(case.scaling),
            source=case.source,
            case=case.id,
            axis=axis,
            place=place,
            is_photo=case.is_photo,
        )

    def cases(self) -> Iterator[PoolCase]:
        """The records of all cases, one at a time."""
        return (self._read_case(number) for number in range(self.num_cases))

    def digests(self) -> Iterator[str]:
        """SHA-256 of every source file that is in the pool, in hex, ascending."""
        return (row.tobytes().hex() for row in self._digests)

    def _read_case(self, number: int) -> PoolCase:
        start, stop = (int(place) for place in self._places[number : number + 2])
        try:
            return PoolCase.from_json(json.loads(self._lines[start:stop].tobytes()), where=self.folder / LINES)
        except ConfigError as error:  # undamaged, as its digest says: it was written so
            fact = f"was built by another version of voxdino ({error.fact.rstrip('.')})."
            raise DatasetError(fact, where=self.folder, fix=BUILD_AGAIN) from error

    def _cut(self, case: PoolCase, box: tuple[slice, ...]) -> NDArray[Any]:
        """File values (C, d, h, w) of a box; not to be written to."""
        return self._images.read(Manifest(case.files), self.folder / case.source / CASES, case.image_name, box)


def _reopen(folder: Path, digest: str) -> Pool:
    pool = Pool(folder)
    if pool.digest() != digest:
        raise DatasetError("the pool has changed since it was opened.", where=folder, fix="start the run again.")
    return pool
