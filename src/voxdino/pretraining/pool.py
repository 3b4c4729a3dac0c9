"""The image pool: any mix of data sets and folders as slices that a pretraining draws from, one after the other.

    sources ─► workdir/pool/<source>/cases/<id>.{image.b2nd, slices.npy, json} ─► index.npy, cases.jsonl, manifest.json

`build_pool` is resumable: a case is final once its record is written, the pool once its manifest is. `Pool` reads: the
index and all that belongs to it are memory-mapped, so that millions of slices take no memory.
"""

import json
import math
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from voxdino.core.arrays import ArrayFile
from voxdino.core.errors import ConfigError, DatasetError, InputError, PartialError, without_folders
from voxdino.core.geometry import Unit
from voxdino.core.records import Record
from voxdino.core.resample import resize_linear
from voxdino.core.safe_files import (
    MANIFEST_NAME,
    Manifest,
    digest_file,
    digest_json,
    lock_folder,
    sweep_temporary,
    write_bytes,
)
from voxdino.data.store import KEPT_ARRAY_BYTES, KEPT_BYTES, OPEN_FILES_PER_THREAD, padding_values
from voxdino.preparation.check import Progress
from voxdino.preparation.intensity import normalise
from voxdino.preparation.orientation import SliceAxis
from voxdino.preparation.workers import Fault, file_bytes, run_over_cases
from voxdino.pretraining.pool_cases import (
    AXES,
    CaseTask,
    MadeCase,
    PoolCase,
    PoolConfig,
    make_case,
    save_array,
    turn_slices,
)
from voxdino.pretraining.pool_sources import (
    FoundImages,
    PoolSource,
    choose_axes,
    find_images,
    require_apart,
    require_matches,
)

__all__ = [
    "Pool",
    "PoolConfig",
    "PoolSlice",
    "PoolSource",
    "PoolSummary",
    "SourceFacts",
    "build_pool",
]

POOL = "pool"
BUILD_AGAIN = "build the pool again: what is damaged or missing is made anew, the rest is kept."

_CASES = "cases"
_FACTS, _INDEX, _LINES, _PLACES, _DIGESTS = "pool.json", "index.npy", "cases.jsonl", "places.npy", "digests.npy"
_FILES = (_FACTS, _INDEX, _LINES, _PLACES, _DIGESTS)
_MOST_TOLD = 5  # bad cases told in one message
_CASES_IN_MEMORY = 4096  # records that a process keeps
_FEWEST_SLOTS = 20  # of a source per round, so that rounding does not change its weight
_ROUNDS = 6  # of the network that shuffles


class SourceFacts(Record):
    """What became of a source. All but num_cases and num_slices count cases that are not in the pool.

    num_duplicates: images that an earlier case of the pool has, file by file.   num_empty: no slice was kept.
    set_aside:      messages about cases that could not be read.                 notes: what else was not taken.
    """

    name: str
    weight: float
    num_cases: int
    num_slices: int
    num_duplicates: int
    num_empty: int
    set_aside: tuple[str, ...]
    notes: tuple[str, ...]


class PoolFacts(Record):
    """pool.json. made_of: digest of the sources and settings the pool was built of."""

    version: Literal[1] = 1
    made_of: str
    config: PoolConfig
    sources: tuple[SourceFacts, ...]


@dataclass(frozen=True)
class PoolSummary:
    """What a run of `build_pool` did: cases made anew, and cases that an earlier run had finished."""

    folder: Path
    sources: tuple[SourceFacts, ...]
    num_prepared: int
    num_kept: int
    elapsed_s: float

    @property
    def num_cases(self) -> int:
        return sum(source.num_cases for source in self.sources)

    @property
    def num_slices(self) -> int:
        return sum(source.num_slices for source in self.sources)


def build_pool(
    sources: Sequence[PoolSource],
    workdir: str | PathLike[str],
    config: PoolConfig,
    *,
    num_workers: int | None = None,
    on_progress: Progress | None = None,
) -> PoolSummary:
    """Write workdir/pool: one folder of cases per source, an index of all slices; manifest.json when all is done.

    A case is kept when its record, its files, its sources and the settings agree; the rest is made anew. The result is
    the same whatever the number of workers. A bad case is set aside and named, the others go on. An image that is
    there twice, file by file, counts once. Folders of sources no longer named stay, and are not read.

    Memory: some KB per case while it is built.
    Errors: ConfigError for sources given twice, or a `leave_out` that matches nothing; DatasetError for a source
    without images, and when no slice is left; ResourceError (disk, memory, another run in the folder); PartialError at
    the end naming bad cases and sources that give no slice: the pool of all others is complete then, and can be used.
    """
    start = time.monotonic()
    folder = Path(workdir) / POOL
    require_apart(sources)
    found = [find_images(source, skip=Path(workdir)) for source in sources]
    require_matches(found)
    tasks = [task for one in found for task in _tasks(one, config, folder, num_workers)]
    made: dict[int, MadeCase] = {}
    faults: dict[int, Fault] = {}
    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(lock_folder(folder))
            (folder / MANIFEST_NAME).unlink(missing_ok=True)  # it says "complete"
            for place in (folder, *(folder / source.name / _CASES for source in sources)):
                sweep_temporary(place)

        outcomes = stack.enter_context(
            closing(
                run_over_cases(
                    make_case,
                    tasks,
                    [task.case.id for task in tasks],
                    num_workers=num_workers,
                    sizes=[file_bytes(task.case.images) for task in tasks],
                    workers_per_cpu=2,  # every file is synced to the disk
                    on_started=begin,
                )
            )
        )
        for outcome in outcomes:
            if outcome.value is not None:
                made[outcome.index] = outcome.value
            elif outcome.fault is not None:
                faults[outcome.index] = outcome.fault
            if on_progress is not None:
                on_progress(len(made) + len(faults), len(tasks))
        _remove_strangers(folder, sources, made)
        facts = _write_index(folder, found, config, tasks, made, faults)
    num_kept = sum(one.is_kept for one in made.values())
    _require_all(facts, folder)
    return PoolSummary(folder, facts, len(made) - num_kept, num_kept, time.monotonic() - start)


def _tasks(found: FoundImages, config: PoolConfig, folder: Path, num_workers: int | None) -> list[CaseTask]:
    source = found.source
    return [
        CaseTask(
            case=case,
            source=source.name,
            files={found.name_of(path): path for path in case.images},
            axis=axis,
            modality=source.modality,
            channels=found.channels,
            nan_policy=source.nan_policy,
            config=config,
            folder=folder / source.name / _CASES,
        )
        for case, axis in zip(found.cases, choose_axes(found, num_workers), strict=True)
    ]


def _remove_strangers(folder: Path, sources: Sequence[PoolSource], made: dict[int, MadeCase]) -> None:
    """Files of cases that no longer belong to their source."""
    known: dict[str, set[str]] = {source.name: set() for source in sources}
    for one in made.values():
        known[one.case.source].update((one.case.record_name, *one.case.files))
    for name, files in known.items():
        cases = folder / name / _CASES
        for path in cases.iterdir() if cases.is_dir() else ():
            if path.name not in files and path.suffix in (".json", ".npy", ".b2nd"):
                path.unlink(missing_ok=True)


def _write_index(
    folder: Path,
    found: Sequence[FoundImages],
    config: PoolConfig,
    tasks: Sequence[CaseTask],
    made: dict[int, MadeCase],
    faults: dict[int, Fault],
) -> tuple[SourceFacts, ...]:
    """Write what `Pool` reads, the manifest last; in the order of the sources, whatever order cases came in.

    Errors: DatasetError when no slice is left; nothing is written then.
    """
    seen: set[tuple[str, ...]] = set()
    rows: list[NDArray[np.int32]] = []
    lines: list[bytes] = []
    counts = {one.source.name: {"cases": 0, "slices": 0, "duplicates": 0, "empty": 0} for one in found}
    for _, one in sorted(made.items()):
        count, content = counts[one.case.source], tuple(one.case.source_digests.values())
        if not len(one.slices):
            count["empty"] += 1
        elif content in seen:
            count["duplicates"] += 1
        else:
            seen.add(content)
            rows.append(np.insert(one.slices, 0, len(lines), axis=1))
            lines.append(json.dumps(one.case.to_json(), ensure_ascii=False).encode() + b"\n")
            count["cases"] += 1
            count["slices"] += len(one.slices)
    roots = {one.source.name: one.root for one in found}
    messages: dict[str, list[str]] = {one.source.name: [] for one in found}
    for number, fault in sorted(faults.items()):
        name = tasks[number].source
        messages[name].append(_printable(without_folders(fault.error, {roots[name]: ""})))
    if not rows:
        told = next((one[0] for one in messages.values() if one), None)
        fact = f"no slice is left of {len(tasks)} cases: {len(faults)} could not be read, {len(made)} hold nothing"
        fact += f" above min_foreground {config.min_foreground:g}." + (f" First: {told}" if told else "")
        raise DatasetError(fact, where=folder, fix="see whether these are images; lower min_foreground.")
    facts = tuple(
        SourceFacts(
            name=(name := one.source.name),
            weight=one.source.weight,
            num_cases=counts[name]["cases"],
            num_slices=counts[name]["slices"],
            num_duplicates=counts[name]["duplicates"],
            num_empty=counts[name]["empty"],
            set_aside=tuple(messages[name]),
            notes=tuple(_printable(note) for note in one.notes),
        )
        for one in found
    )
    digests = sorted({bytes.fromhex(digest) for content in seen for digest in content})
    save_array(folder / _INDEX, np.concatenate(rows))
    save_array(folder / _PLACES, np.array([0, *accumulate(map(len, lines))], dtype=np.int64))
    save_array(folder / _DIGESTS, np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32))
    write_bytes(folder / _LINES, b"".join(lines))
    made_of = _made_of([one.source for one in found], config)
    PoolFacts(made_of=made_of, config=config, sources=facts).write(folder / _FACTS)
    Manifest.of(folder, _FILES).write(folder)
    return facts


def _printable(text: str) -> str:
    """File names may hold bytes that are no text."""
    return text.encode("utf-8", "replace").decode()


def _made_of(sources: Sequence[PoolSource], config: PoolConfig) -> str:
    places = [{**source.to_json(), "path": str(Path(source.path).resolve())} for source in sources]
    return digest_json([places, config.to_json()])


def _require_all(sources: Sequence[SourceFacts], folder: Path) -> None:
    """Errors: PartialError for cases set aside, and for sources that give no slice."""
    bad = [f"{source.name}: {message}" for source in sources for message in source.set_aside]
    nothing = [source.name for source in sources if not source.num_slices]
    told = []
    if bad:
        more = f" | and {len(bad) - _MOST_TOLD} more, all in {_FACTS}" if len(bad) > _MOST_TOLD else ""
        told.append(f"{len(bad)} cases were set aside: {' | '.join(bad[:_MOST_TOLD])}{more}")
    if nothing:
        told.append(f"no slice was kept of: {', '.join(nothing)}")
    if told:
        fix = "correct them and build again; the pool of all others is complete."
        raise PartialError("; ".join(told), where=folder, fix=fix)


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
    their size (small ones also against their digest) when they are first used; `verify` reads all.

    Errors: DatasetError where the pool is missing, unfinished, damaged, or has changed since it was pickled.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFEST_NAME).is_file():
            raise DatasetError("no finished pool here.", where=folder, fix="build it; an unfinished one goes on.")
        try:
            manifest = Manifest.read(self.folder)
            manifest.verify(self.folder, _FILES)
            self.facts = PoolFacts.read(self.folder / _FACTS)
        except InputError as error:
            raise DatasetError(error.fact, where=error.where, fix=BUILD_AGAIN) from error
        self._index = np.load(self.folder / _INDEX, mmap_mode="r", allow_pickle=False)  # (slices, 3)
        self._places = np.load(self.folder / _PLACES, mmap_mode="r", allow_pickle=False)  # (cases + 1,)
        self._digests = np.load(self.folder / _DIGESTS, mmap_mode="r", allow_pickle=False)  # (files, 32)
        self._lines = np.memmap(self.folder / _LINES, dtype=np.uint8, mode="r")
        self._digest = digest_json(
            {
                "files": {name: manifest.files[name][0] for name in (_INDEX, _LINES)},
                "config": self.facts.config.to_json(),
                "sources": [[source.name, source.weight, source.num_slices] for source in self.facts.sources],
            }
        )
        self._deck = _Deck([(source.num_slices, source.weight) for source in self.facts.sources])
        self._case = lru_cache(maxsize=_CASES_IN_MEMORY)(self._read_case)
        self._local = threading.local()
        self._checked: set[Path] = set()
        self._kept: dict[Path, NDArray[Any]] = {}
        self._kept_bytes = 0

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

    def is_made_of(self, sources: Sequence[PoolSource], config: PoolConfig) -> bool:
        """Whether the pool was built of these settings; whether files changed since, only building again finds out."""
        return self.facts.made_of == _made_of(sources, config)

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

    def case_of(self, index: int) -> PoolCase:
        """The record of the case that a slice was cut from."""
        return self._case(int(self._index[index, 0]))

    def cases(self) -> Iterator[PoolCase]:
        """The records of all cases, one at a time."""
        return (self._read_case(number) for number in range(self.num_cases))

    def digests(self) -> Iterator[str]:
        """SHA-256 of every source file that is in the pool, in hex, ascending."""
        return (row.tobytes().hex() for row in self._digests)

    def holds(self, digest: str) -> bool:
        """Whether a file of this SHA-256 (hex) is in the pool."""
        wanted = bytes.fromhex(digest)
        place = bisect_left(range(len(self._digests)), wanted, key=lambda row: self._digests[row].tobytes())
        return place < len(self._digests) and self._digests[place].tobytes() == wanted

    def verify(self) -> None:
        """Read every file. Errors: DatasetError naming the first that is missing or not what was written."""
        for case in self.cases():
            for name, (digest, _) in case.files.items():
                self._require_digest(self._path(case, name), digest)

    def _path(self, case: PoolCase, name: str) -> Path:
        return self.folder / case.source / _CASES / name

    def _read_case(self, number: int) -> PoolCase:
        start, stop = (int(place) for place in self._places[number : number + 2])
        try:
            return PoolCase.from_json(json.loads(self._lines[start:stop].tobytes()), where=self.folder / _LINES)
        except ConfigError as error:  # undamaged, as its digest says: it was written so
            fact = f"was built by another version of voxdino ({error.fact.rstrip('.')})."
            raise DatasetError(fact, where=self.folder, fix=BUILD_AGAIN) from error

    def _cut(self, case: PoolCase, box: tuple[slice, ...]) -> NDArray[Any]:
        """File values (C, d, h, w) of a box; not to be written to. Small images are decompressed once and kept."""
        path = self._path(case, case.image_name)
        kept = self._kept.get(path)
        if kept is not None:
            return kept[box]
        try:
            file = self._open(path, case)
            num_bytes = math.prod(file.shape) * file.dtype.itemsize
            if num_bytes > KEPT_ARRAY_BYTES or self._kept_bytes + num_bytes > KEPT_BYTES:
                return file[box]
            self._require_digest(path, case.files[case.image_name][0])
            kept = file[:]
        except InputError as error:
            raise DatasetError(error.fact, where=error.where or path, fix=BUILD_AGAIN) from error
        kept.setflags(write=False)
        self._kept[path] = kept
        self._kept_bytes += num_bytes
        return kept[box]

    def _open(self, path: Path, case: PoolCase) -> ArrayFile:
        """This thread's handle: a blosc2 array must not be read by two threads at once."""
        if path not in self._checked:
            self._require_size(path, case.files[case.image_name][1])
            self._checked.add(path)
        if not hasattr(self._local, "open"):
            self._local.open = lru_cache(maxsize=OPEN_FILES_PER_THREAD)(ArrayFile)
        file: ArrayFile = self._local.open(path)
        return file

    def _require_size(self, path: Path, wanted: int) -> None:
        found = path.stat().st_size if path.is_file() else None
        if found != wanted:
            fact = "is missing." if found is None else f"is damaged: {found} bytes, {wanted} were written."
            raise DatasetError(fact, where=path, fix=BUILD_AGAIN)

    def _require_digest(self, path: Path, wanted: str) -> None:
        if not path.is_file():
            raise DatasetError("is missing.", where=path, fix=BUILD_AGAIN)
        if digest_file(path) != wanted:
            fact = "is damaged: its content is not what was written (checksum differs)."
            raise DatasetError(fact, where=path, fix=BUILD_AGAIN)


def _reopen(folder: Path, digest: str) -> Pool:
    pool = Pool(folder)
    if pool.digest() != digest:
        raise DatasetError("the pool has changed since it was opened.", where=folder, fix="start the run again.")
    return pool


class _Deck:
    """Draws from sources of different sizes and weights: numbers only, so that it takes no memory.

    In a round, source s has num_slices x weight slots (weights against the largest), and the slots of all sources are
    shuffled. Its slots are filled with its own slices in shuffled order, lap after lap, across rounds.
    """

    def __init__(self, sources: Sequence[tuple[int, float]]) -> None:
        """sources: (slices, weight) of each; one at least has slices."""
        self._sizes = [size for size, _ in sources]
        self._first = [0, *accumulate(self._sizes)]
        largest = max(weight for size, weight in sources if size)
        shares = [size * weight / largest for size, weight in sources]
        fewest = min(share for share in shares if share)
        laps = 1 if all(share == round(share) for share in shares) else max(1, math.ceil(_FEWEST_SLOTS / fewest))
        self._slots = [round(share * laps) for share in shares]
        self._edges = [0, *accumulate(self._slots)]

    def draw(self, number: int, seed: int) -> int:
        lap, place = divmod(number, self._edges[-1])
        slot = _shuffled(place, self._edges[-1], f"{seed} round {lap}")
        source = bisect_right(self._edges, slot) - 1
        size = self._sizes[source]
        lap, place = divmod(lap * self._slots[source] + slot - self._edges[source], size)
        return self._first[source] + _shuffled(place, size, f"{seed} source {source} {lap}")


def _shuffled(place: int, size: int, key: str) -> int:
    """Where `place` of range(size) goes in a random order that `key` names: a Feistel network, walked until inside."""
    bits = max(1, (size - 1).bit_length() + 1 >> 1)
    mask = (1 << bits) - 1
    while True:
        left, right = place >> bits, place & mask
        for turn in range(_ROUNDS):
            mixed = blake2b(f"{key} {turn} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(mixed, "little") & mask
        place = left << bits | right
        if place < size:
            return place
