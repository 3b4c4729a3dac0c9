"""Many cases through one model or several: each written whole with its header, resumable, a bad one named."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from voxdino.core.errors import (
    ImageError,
    InputError,
    PartialError,
    SafetyError,
    UsageError,
    VoxdinoError,
    without_folders,
)
from voxdino.core.io.options import ReadOptions
from voxdino.core.io.writers import Origin, require_referable
from voxdino.core.locks import lock_folder
from voxdino.core.memory import available_memory
from voxdino.core.records import Record
from voxdino.core.safe_files import digest_file, require_inside, sweep_temporary
from voxdino.core.shards import Shard
from voxdino.core.volume import LabelMap, Volume
from voxdino.inference.cases import num_source_channels
from voxdino.inference.ledger import (
    RECORD_NAME,
    CasePrediction,
    Ledger,
    PredictRecord,
    digest_inputs,
    earlier_cases,
    record_name,
    shard_records,
)
from voxdino.inference.memory import memory_faults, needed_bytes, require_memory_for
from voxdino.inference.outputs import OutputSettings, require_outputs, write_prediction
from voxdino.inference.segmenting import Segmenting
from voxdino.inference.settings import PredictSettings
from voxdino.preparation.case import Case
from voxdino.preparation.check import Progress
from voxdino.preparation.dataset import read_case
from voxdino.preparation.plan import Plan

__all__ = ["RECORD_NAME", "CasePrediction", "PredictRecord", "PredictSummary", "output_file", "predict_cases"]


CaseEnd = tuple[Case, CasePrediction | VoxdinoError | None]  # None: its prediction was there already
Spreading = Callable[
    [Sequence[tuple[Case, CasePrediction | None]], PredictRecord, Path, Segmenting], Generator[CaseEnd, None, None]
]


class PredictSummary(Record):
    """What a call of `predict_cases` did. num_done: predicted now; num_kept: there already and still right."""

    folder: str
    num_done: int
    num_kept: int
    elapsed_s: float
    record: PredictRecord


def predict_cases(
    cases: Sequence[Case],
    model: Segmenting,
    out_folder: Path,
    *,
    settings: PredictSettings | None = None,
    options: ReadOptions | None = None,
    output: OutputSettings | None = None,
    strict: bool = False,
    overwrite: bool = False,
    shard: Shard | None = None,
    spread: Spreading | None = None,
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> PredictSummary:
    """Predict every case into `out_folder`, one label map each, named after the case, on the image's own grid.

    The same call again goes on where the last one ended, and ends with the same bytes: a case is done when
    predictions.json holds the digests of its inputs and of its output, and both still agree.

    options:   how to read odd files; default: as the plan says.
    output:    in which format, and what else; default: label maps in the images' own.
    strict:    stop at the first bad case with its own error. Otherwise it is listed, the others go on, and a
               PartialError comes at the end (the case's own error where there is only one case).
    overwrite: replace the predictions of another model or of other settings.
    shard:     these cases are one of several parts, predicted at the same time: the record is predictions.IofN.json.
               A call without it, afterwards, keeps what they made and leaves one predictions.json.
    spread:    who computes, in place of this process.
    on_progress(done, total) is called after every case; on_note(text) with the memory that the largest case needs, and
    for every label map that was edited since it was made, or that no run recorded, and has to go: it is kept as
    CASE.edited.*.

    Errors: UsageError where the folder holds other predictions or lies in a scan's own; ResourceError for disk,
    lock and memory.
    """
    started = time.monotonic()
    if not cases:
        raise UsageError("there is no case to predict.", fix="give image files, a folder of them, or a data set.")
    team, settings, output = model, settings or PredictSettings(), output or OutputSettings()
    options = options or team.plan.read_options
    cases = [replace(case, series=case.series or options.series) for case in cases]
    fresh = PredictRecord(
        model=team.name,
        model_digest=team.digest,
        licence=team.licence,
        settings=settings,
        read_options=options,
        output=output,
    )
    require_outputs(cases, output)
    _require_outside(out_folder, cases)
    with lock_folder(out_folder, part="" if shard is None else str(shard)):
        sweep_temporary(out_folder)
        outputs = {case.id: output_file(case, out_folder, output) for case in cases}
        alike, otherwise = earlier_cases(out_folder, fresh, outputs, overwrite=overwrite)
        mine = {name: case for name, case in {**alike, **otherwise}.items() if shard is None or name in outputs}
        ledger = Ledger(out_folder, fresh, mine, on_note, name=record_name(shard))
        told = "" if spread else require_memory_for(cases, team, settings)
        if on_note and told:
            on_note(told)
        for name in otherwise:
            ledger.forget(name)
        ledger.write()
        failed: dict[str, str] = {}
        num_kept = 0
        try:
            if spread is None:
                ends = _ends(cases, _Work(team, fresh, ledger), outputs)
            else:
                ends = spread([(case, ledger.cases.get(case.id)) for case in cases], fresh, out_folder, team)
            with closing(ends):  # workers end before others may write here
                for position, (case, end) in enumerate(ends, start=1):
                    if isinstance(end, CasePrediction):
                        ledger.cases[case.id] = end
                    elif end is None:
                        num_kept += 1
                    elif strict or len(cases) == 1:
                        raise end
                    else:
                        ledger.cases.pop(case.id, None)
                        folders = {image.parent: "" for image in case.files} | {out_folder: ""}
                        failed[case.id] = without_folders(end, folders)
                    if on_progress:
                        on_progress(position, len(cases))
                    ledger.write_now_and_then()
        finally:
            record = ledger.write(failed)
        if shard is None:
            for path in shard_records(out_folder):  # what is right of it is in predictions.json now
                path.unlink(missing_ok=True)
    if failed:
        raise PartialError(
            f"{len(failed)} of {len(cases)} cases failed: {'; '.join(failed.values())}",
            where=out_folder,
            fix="correct these files and run the same command again; the other cases are done.",
        )
    return PredictSummary(
        folder=str(out_folder),
        num_done=len(cases) - num_kept,
        num_kept=num_kept,
        elapsed_s=round(time.monotonic() - started, 2),
        record=record,
    )


def predict_one(
    case: Case, earlier: CasePrediction | None, team: Segmenting, how: PredictRecord, folder: Path
) -> CasePrediction | None:
    """As `predict_cases` for one case, where others keep the ledger; None where `earlier` still holds.

    Errors: those of the case; ResourceError where memory cannot hold it.
    """
    require_memory_for([case], team, how.settings)
    ledger = Ledger(folder, how, {} if earlier is None else {case.id: earlier})
    work = _Work(team, how, ledger)
    [(_, end)] = _ends([case], work, {case.id: output_file(case, folder, how.output)})
    if isinstance(end, VoxdinoError):
        raise end
    return end


def _ends(cases: Sequence[Case], work: "_Work", outputs: dict[str, Path]) -> Generator[CaseEnd, None, None]:
    """How each case ended, in turn: its prediction, what was wrong with it, or None where it was there already."""
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        ahead: deque[Future[_Fetched]] = deque()
        unwritten: tuple[Case, Future[CasePrediction]] | None = None
        for number, case in enumerate(cases):
            if not ahead:
                ahead.append(reader.submit(work.fetch, case))
            following = cases[number + 1] if number + 1 < len(cases) else None
            if following and work.needed_bytes(case) + work.needed_bytes(following) < available_memory():
                ahead.append(reader.submit(work.fetch, following))
            end: VoxdinoError | None = None
            made: tuple[dict[str, str], LabelMap] | None = None
            try:
                made = work.compute(case, ahead.popleft(), outputs[case.id])
            except (InputError, SafetyError) as error:
                end = error
            if unwritten is not None:
                yield unwritten[0], _written(unwritten[1])
                unwritten = None
            if made is None:
                yield case, end
            else:
                unwritten = case, writer.submit(work.write, case, *made, outputs[case.id])
        if unwritten is not None:
            yield unwritten[0], _written(unwritten[1])


def _written(writing: "Future[CasePrediction]") -> CasePrediction | VoxdinoError:
    try:
        return writing.result()
    except (InputError, SafetyError) as error:
        return error


def output_file(case: Case, out_folder: Path, output: OutputSettings | None = None) -> Path:
    """Where a case's prediction goes: CASE.nii.gz for CASE_0000.nii.gz, CASE.mha for .mhd, CASE.png for any picture.

    Errors: SafetyError for an id that leads out of the folder, or onto an input of the case.
    """
    path = require_inside(out_folder, case.id + (output or OutputSettings()).suffix_of(case))
    if any(path == image.resolve() for image in case.files):
        raise SafetyError("the prediction would replace this input.", where=path, fix="choose another output folder.")
    return path


@dataclass(frozen=True)
class _Fetched:
    """A case as read: digests of its files, and its volume; both None where its prediction is there and still right."""

    digests: dict[str, str] | None
    volume: Volume | None


class _Work:
    """Three things at a time: the next case is read, one is computed, the one before is written.

    What a step raises comes out where its result is asked for, always in the order of the cases.
    """

    def __init__(self, team: Segmenting, how: PredictRecord, ledger: Ledger) -> None:
        self._team, self._how, self._ledger = team, how, ledger

    def needed_bytes(self, case: Case) -> int:
        return needed_bytes(case, self._team, self._how.settings)[0]

    def fetch(self, case: Case) -> _Fetched:
        if self._ledger.has(case):
            return _Fetched(None, None)
        with _named(case):
            if len(case.images) > 1:
                _require_channels(len(case.images), case, self._team.plan)
            digests = digest_inputs(case)
            require_referable(self._how.output.format_of(case), Origin(case.images[0], case.series))
            volume, _ = read_case(replace(case, label=None), self._how.read_options, None)
            _require_channels(volume.num_channels, case, self._team.plan)
        return _Fetched(digests, volume)

    def compute(self, case: Case, fetching: "Future[_Fetched]", output: Path) -> tuple[dict[str, str], LabelMap] | None:
        """Digests and label map; None where the prediction is there. An earlier one, which is not right, goes first."""
        fetched: _Fetched | None = None
        try:
            fetched = fetching.result()
        finally:
            if fetched is None or fetched.volume is not None:
                self._ledger.clear(case.id, output)
        if fetched.digests is None or fetched.volume is None:
            return None
        beside = self._how.output.probabilities_file(output, case)
        with _named(case, beside), memory_faults(case, self._team, self._how.settings):
            labels = self._team.segment(fetched.volume, self._how.settings, case=case.id, probabilities=beside)
        return fetched.digests, labels

    def write(self, case: Case, digests: dict[str, str], labels: LabelMap, output: Path) -> CasePrediction:
        how, classes = self._how, self._team.plan.labels
        beside = how.output.probabilities_file(output, case)
        with _named(case, beside):
            write_prediction(output, labels, case, how.output, classes=classes, model=(how.model, how.model_digest))
        digest = digest_file(output)
        self._ledger.settle(case.id, digest)
        volumes, unit = measure_volumes(labels, self._team.plan)
        return CasePrediction(
            inputs=digests,
            output=output.name,
            output_digest=digest,
            volumes=volumes,
            unit=unit,
            beside={} if beside is None else {beside.name: digest_file(beside)},
        )


def _require_outside(out_folder: Path, cases: Sequence[Case]) -> None:
    """Errors: UsageError for a folder in a scan, whose content would not be the same in the next run."""
    out = out_folder.resolve()
    for scan in dict.fromkeys(image for case in cases for image in case.images if image.is_dir()):
        if out.is_relative_to(scan.resolve()):
            fact = f"lies in the folder of a scan to predict ({scan.name})."
            raise UsageError(fact, where=out_folder, fix="choose a folder outside it.")


@contextmanager
def _named(case: Case, beside: Path | None = None) -> Iterator[None]:
    """Errors say which case; probabilities of a case that fails do not stay."""
    try:
        yield
    except VoxdinoError as error:
        if beside is not None:
            beside.unlink(missing_ok=True)
        error.where = error.where or case.id
        raise


def _require_channels(found: int, case: Case, plan: Plan) -> None:
    """ImageError unless the image has the plan's channels: nobody knows which ones a surplus image holds.

    The labelled cases were checked with the plan, and a plan may be edited to use some of their channels only.
    """
    needed = num_source_channels(plan)
    if found < needed or (found > needed and case.label is None):
        names = ", ".join(dict.fromkeys(channel.name for channel in plan.channels))
        fact = f"has {found} channel{'s' * (found != 1)}, the model needs {needed} ({names})."
        raise ImageError(fact, where=case.images[0], fix="give exactly these channels, in this order.")


def measure_volumes(labels: LabelMap, plan: Plan) -> tuple[dict[str, float], str]:
    """Volume of every label in a label map, and its unit: ml; in 2-D mm², or px where no spacing is known."""
    grid = labels.grid
    unit = "px" if grid.unit == "px" else "ml" if grid.ndim == 3 else "mm²"
    size = grid.voxel_volume / (1000 if unit == "ml" else 1)
    counts = {name: int(np.count_nonzero(labels.array == label)) for name, label in plan.labels.foreground}
    return {name: round(count * size, 4) for name, count in counts.items()}, unit
