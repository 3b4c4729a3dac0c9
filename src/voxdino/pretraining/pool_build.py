"""Building a pool: the cases of all sources over several processes, an index of their slices, the manifest last."""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from voxdino.core.errors import DatasetError, PartialError, without_folders
from voxdino.core.locks import lock_folder
from voxdino.core.records import Record
from voxdino.core.safe_files import MANIFEST_NAME, Manifest, sweep_temporary, write_bytes
from voxdino.preparation.check import Progress
from voxdino.preparation.workers import Fault, file_bytes, run_over_cases
from voxdino.pretraining.pool_cases import CaseTask, MadeCase, make_case, save_array
from voxdino.pretraining.pool_slices import PoolConfig
from voxdino.pretraining.pool_sources import (
    FoundImages,
    PoolSource,
    choose_axes,
    find_images,
    require_apart,
    require_matches,
)

POOL = "pool"
CASES = "cases"
FACTS, INDEX, LINES, PLACES, DIGESTS = "pool.json", "index.npy", "cases.jsonl", "places.npy", "digests.npy"
FILES = (FACTS, INDEX, LINES, PLACES, DIGESTS)

_MOST_TOLD = 5  # bad cases told in one message


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
    """pool.json."""

    version: Literal[1] = 1
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
            for place in (folder, *(folder / source.name / CASES for source in sources)):
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
            folder=folder / source.name / CASES,
        )
        for case, axis in zip(found.cases, choose_axes(found, num_workers), strict=True)
    ]


def _remove_strangers(folder: Path, sources: Sequence[PoolSource], made: dict[int, MadeCase]) -> None:
    """Files of cases that no longer belong to their source."""
    known: dict[str, set[str]] = {source.name: set() for source in sources}
    for one in made.values():
        known[one.case.source].update((one.case.record_name, *one.case.files))
    for name, files in known.items():
        cases = folder / name / CASES
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
    counts = {one.source.name: {"cases": 0, "slices": 0, "duplicates": 0, "empty": 0, "ct": 0} for one in found}
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
            count["ct"] += "ct" in one.case.kinds
    roots = {one.source.name: one.root for one in found}
    guesses = {
        one.source.name: f"{number} of {counts[one.source.name]['cases']} cases are taken for CT "
        "(Hounsfield units), as names and values say; --modality ct or other decides for all"
        for one in found
        if one.source.modality == "auto" and (number := counts[one.source.name]["ct"])
    }
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
            notes=tuple(_printable(note) for note in (*one.notes, *filter(None, [guesses.get(name)]))),
        )
        for one in found
    )
    digests = sorted({bytes.fromhex(digest) for content in seen for digest in content})
    save_array(folder / INDEX, np.concatenate(rows))
    save_array(folder / PLACES, np.array([0, *accumulate(map(len, lines))], dtype=np.int64))
    save_array(folder / DIGESTS, np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32))
    write_bytes(folder / LINES, b"".join(lines))
    PoolFacts(config=config, sources=facts).write(folder / FACTS)
    Manifest.of(folder, FILES).write(folder)
    return facts


def _printable(text: str) -> str:
    """File names may hold bytes that are no text."""
    return text.encode("utf-8", "replace").decode()


def _require_all(sources: Sequence[SourceFacts], folder: Path) -> None:
    """Errors: PartialError for cases set aside, and for sources that give no slice."""
    bad = [f"{source.name}: {message}" for source in sources for message in source.set_aside]
    nothing = [source.name for source in sources if not source.num_slices]
    told = []
    if bad:
        more = f" | and {len(bad) - _MOST_TOLD} more, all in {FACTS}" if len(bad) > _MOST_TOLD else ""
        told.append(f"{len(bad)} cases were set aside: {' | '.join(bad[:_MOST_TOLD])}{more}")
    if nothing:
        told.append(f"no slice was kept of: {', '.join(nothing)}")
    if told:
        fix = "correct them and build again; the pool of all others is complete."
        raise PartialError("; ".join(told), where=folder, fix=fix)
