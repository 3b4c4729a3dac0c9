"""Prepared cases: slices in one orientation, file values kept, compressed for crop reads; and the way back.

`prepare_case` is the one road for training and for prediction. `prepare` runs it over a data set in parallel: every
case is final once its record is written, and a run that was killed is continued by the same command.
"""

import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxdino.core.arrays import ARRAY_SUFFIX, write_array
from voxdino.core.errors import DatasetError, PartialError
from voxdino.core.locks import lock_folder
from voxdino.core.resample import resize_nearest
from voxdino.core.safe_files import MANIFEST_NAME, Manifest, digest_file, sweep_temporary
from voxdino.core.shards import Shard
from voxdino.core.volume import LabelMap, Volume
from voxdino.preparation.case import Case, Dataset
from voxdino.preparation.case_record import CaseRecord, foreground_slices, pack_lesions, pack_locations
from voxdino.preparation.check import Progress
from voxdino.preparation.dataset import read_case
from voxdino.preparation.fingerprint import Fingerprint, voxels_per_value
from voxdino.preparation.intensity import ChannelScaling, normalise
from voxdino.preparation.made_record import source_digest, valid_record
from voxdino.preparation.orientation import CaseGeometry, restore_labels, to_slices
from voxdino.preparation.plan import Plan
from voxdino.preparation.slices import slice_case, smallest_lossless
from voxdino.preparation.workers import Fault, OverCases, file_bytes, run_over_cases

__all__ = [
    "CaseGeometry",
    "CaseRecord",
    "ChannelScaling",
    "PrepareSummary",
    "PreparedCase",
    "normalise",
    "prepare",
    "prepare_case",
    "restore_labels",
    "smallest_lossless",
]

PREPARED = "prepared"
CASES = "cases"

_MOST_TOLD = 5  # bad cases told in one message
_CHUNK_BYTES = 256 * 1024  # whole slices are added to a chunk up to this size


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """One case ready for the model.

    image: (C, D, H, W) values of the file, in the smallest type that holds them; all channels of the file.
    label: (D, H, W) class indices, or None.
    """

    id: str
    image: NDArray[Any]
    label: NDArray[Any] | None
    geometry: CaseGeometry
    scaling: tuple[ChannelScaling, ...]


@dataclass(frozen=True)
class PrepareSummary:
    """What a run of `prepare` did: cases made anew, and cases that an earlier run had finished."""

    folder: Path
    num_prepared: int
    num_kept: int
    elapsed_s: float


def prepare_case(case_id: str, volume: Volume, label: LabelMap | None, plan: Plan) -> PreparedCase:
    """Bring one case into the plan's shape: slices first, in-plane spacing of the plan, class indices.

    Errors: PlanError for a picture under a plan for volumes (or the reverse), ImageError for missing channels,
    LabelError for undeclared labels.
    """
    slices, geometry = slice_case(case_id, volume, plan)
    indices = None
    if label is not None:
        indices = to_slices(plan.labels.to_indices(label.array, where=label.source or case_id), geometry)
        indices = np.ascontiguousarray(resize_nearest(indices, slices.size, (1, 2)))
    return PreparedCase(
        case_id,
        slices.read(slice(None)),
        indices,
        geometry,
        slices.scaling,
    )


def prepare(
    dataset: Dataset,
    plan: Plan,
    workdir: Path,
    *,
    num_workers: int | None = None,
    strict: bool = False,
    shard: Shard | None = None,
    over_cases: OverCases = run_over_cases,
    on_progress: Progress | None = None,
) -> PrepareSummary:
    """Write workdir/prepared: cases/<id>.image.b2nd, <id>.label.b2nd and <id>.json; manifest.json when all is done.

    A case is kept when its record, its files, its sources and the plan agree; everything else is made again. The
    result is the same whatever the number of workers. A bad case is set aside, the others go on.

    strict: the first bad case ends the run with its own error.   over_cases: where the work is done.
    shard:  prepare this part of the cases only, beside calls with the others; a call without it then keeps what they
            made and writes manifest.json.
    Errors: PartialError at the end naming the bad cases (the others are complete and usable); DatasetError when every
    case is bad; ResourceError (disk, memory, another run in the folder).
    """
    start = time.monotonic()
    folder = Path(workdir) / PREPARED
    known = _surveyed_digests(Path(workdir), plan)
    plan = plan.model_copy(update={"reasons": {}})
    cases = dataset.cases if shard is None else shard.of(dataset.cases)
    items = [
        _Item(case, {dataset.name_of(path): path for path in case.files}, known.get(case.id), plan, folder / CASES)
        for case in cases
    ]
    names = [case.id for case in cases]
    sizes = [file_bytes(case.files) for case in cases]
    done: dict[int, _Written] = {}
    faults: dict[int, Fault] = {}
    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(lock_folder(folder, part="" if shard is None else str(shard)))
            (folder / MANIFEST_NAME).unlink(missing_ok=True)  # it says "complete"
            sweep_temporary(folder)
            sweep_temporary(folder / CASES)

        outcomes = stack.enter_context(
            closing(
                over_cases(
                    _prepare_one,
                    items,
                    names,
                    num_workers=num_workers,
                    sizes=sizes,
                    workers_per_cpu=2,  # every file is synced to the disk
                    on_started=begin,
                )
            )
        )
        for outcome in outcomes:
            if outcome.value is not None:
                done[outcome.index] = outcome.value
            elif outcome.fault is not None and strict:
                outcome.fault.error.add_note(outcome.fault.details)  # shown with --debug
                raise outcome.fault.error
            elif outcome.fault is not None:
                faults[outcome.index] = outcome.fault
            if on_progress is not None:
                on_progress(len(done) + len(faults), len(items))
        files = {name: entry for _, written in sorted(done.items()) for name, entry in written.files.items()}
        if shard is None:
            _remove_strangers(folder / CASES, files)
        if shard is None and done:
            Manifest(files).write(folder)
    failed = [str(fault.error) for _, fault in sorted(faults.items())]
    if items and not done:
        fact = f"none of the {len(items)} cases could be prepared. First: {failed[0] if failed else 'no case.'}"
        raise DatasetError(fact, where=dataset.root, fix="see voxdino check for all of them.")
    if failed:
        more = f" and {len(failed) - _MOST_TOLD} more" if len(failed) > _MOST_TOLD else ""
        raise PartialError(
            f"{len(failed)} of {len(items)} cases were set aside: {' | '.join(failed[:_MOST_TOLD])}{more}",
            where=dataset.root,
            fix="correct them and run again; the others are prepared.",
        )
    num_kept = sum(written.is_kept for written in done.values())
    return PrepareSummary(folder, len(done) - num_kept, num_kept, time.monotonic() - start)


@dataclass(frozen=True)
class _Item:
    case: Case
    sources: dict[str, Path]
    surveyed: dict[str, str] | None  # digests of the sources when the facts were taken
    plan: Plan
    folder: Path


@dataclass(frozen=True)
class _Written:
    """files: as a manifest lists them."""

    files: dict[str, tuple[str, int]]
    is_kept: bool


def _prepare_one(item: _Item) -> _Written:
    case, folder = item.case, item.folder
    record_path = folder / f"{case.id}.json"
    sources = {name: source_digest(path) for name, path in item.sources.items()}
    if item.surveyed is not None and sources != item.surveyed:
        changed = next((name for name in sources if sources[name] != item.surveyed.get(name)), case.id)
        fix = "run voxdino prepare again: it checks and plans anew."
        raise DatasetError("changed since the data set was checked.", where=item.sources.get(changed), fix=fix)
    digest = item.plan.preparation_digest()
    if (record := valid_record(CaseRecord, record_path, digest, sources)) is not None:
        return _Written(_listed(folder, record_path, record), is_kept=True)
    volume, label = read_case(case, item.plan.read_options, None)
    prepared = prepare_case(case.id, volume, label, item.plan)
    record_path.unlink(missing_ok=True)  # a record stands for whole files
    arrays = {f"{case.id}.image{ARRAY_SUFFIX}": prepared.image}
    if prepared.label is not None:
        arrays[f"{case.id}.label{ARRAY_SUFFIX}"] = prepared.label
    for name, array in arrays.items():
        write_array(folder / name, array, chunk=_chunk(array, item.plan))
    num_lesions, lesions = (
        ({}, {}) if prepared.label is None else pack_lesions(case.id, prepared.label, item.plan.labels)
    )
    record = CaseRecord(
        id=case.id,
        preparation_digest=digest,
        geometry=prepared.geometry,
        scaling=prepared.scaling,
        source_digests=sources,
        files={name: digest_file(folder / name) for name in arrays},
        num_voxels={} if prepared.label is None else voxels_per_value(prepared.label),
        foreground_slices=() if prepared.label is None else foreground_slices(prepared.label, item.plan.labels),
        num_lesions=num_lesions,
        packed_locations={} if prepared.label is None else pack_locations(case.id, prepared.label, item.plan.labels),
        packed_lesions=lesions,
    ).sealed()
    record.write(record_path)
    return _Written(_listed(folder, record_path, record), is_kept=False)


def _listed(folder: Path, record_path: Path, record: CaseRecord) -> dict[str, tuple[str, int]]:
    digests = {**record.files, record_path.name: digest_file(record_path)}
    return {f"{CASES}/{name}": (digest, (folder / name).stat().st_size) for name, digest in digests.items()}


def _chunk(array: NDArray[Any], plan: Plan) -> tuple[int, ...]:
    """What a crop reads at once: all channels, the crop's rows and columns, slices while the chunk stays small."""
    rows, columns = (min(size, crop) for size, crop in zip(array.shape[-2:], plan.crop, strict=True))
    channels = array.shape[:-3]
    slice_bytes = int(np.prod(channels, initial=1)) * rows * columns * array.dtype.itemsize
    depth = min(array.shape[-3], max(plan.slab + 2 * plan.context_slices, _CHUNK_BYTES // slice_bytes))
    return (*channels, depth, rows, columns)


def _surveyed_digests(workdir: Path, plan: Plan) -> dict[str, dict[str, str]]:
    """Per case, the digests its sources had when the plan's facts were taken; none where those facts are not here."""
    path = workdir / "fingerprint.json"
    if not path.exists():
        return {}
    fingerprint = Fingerprint.read(path)
    if fingerprint.digest() != plan.fingerprint_digest:
        return {}
    return {case.id: case.sources for case in fingerprint.cases}


def _remove_strangers(folder: Path, files: dict[str, tuple[str, int]]) -> None:
    """Files of cases that no longer belong to the data set: whoever reads the folder must not meet them."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if f"{CASES}/{path.name}" not in files and path.name.endswith((ARRAY_SUFFIX, ".json")):
            path.unlink(missing_ok=True)
