"""Many cases through one model: each written whole with its header, resumable, a bad one set aside and named."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

import numpy as np
from pydantic import Field

from voxdino.core.errors import (
    ImageError,
    InputError,
    PartialError,
    ResourceError,
    SafetyError,
    UsageError,
    VoxdinoError,
    without_folders,
)
from voxdino.core.geometry import Grid, format_shape
from voxdino.core.io import image_suffix, read_grid, read_label_map, reading, write_label_map
from voxdino.core.io.options import ReadOptions
from voxdino.core.memory import available_memory
from voxdino.core.records import Record
from voxdino.core.safe_files import (
    digest_file,
    format_bytes,
    lock_folder,
    require_file,
    require_inside,
    sweep_temporary,
)
from voxdino.core.volume import LabelMap
from voxdino.inference.cases import num_source_channels
from voxdino.inference.load import LoadedModel
from voxdino.inference.predictor import LOGIT_BYTES, PredictSettings, predict_volume
from voxdino.preparation.case import Case
from voxdino.preparation.check import Progress
from voxdino.preparation.dataset import read_case
from voxdino.preparation.plan import Plan

RECORD_NAME = "predictions.json"
RECORD_EVERY_S = 1.0  # cases done since the last record are predicted again after a kill, to the same bytes

# pictures become .png, which holds labels without loss; headers with a data file beside them become one file
_PICTURES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp", ".gif")
_OUTPUT_SUFFIXES = {".nii": ".nii", ".nrrd": ".nrrd", ".nhdr": ".nrrd", ".mha": ".mha", ".mhd": ".mha"}
_OUTPUT_SUFFIXES |= dict.fromkeys(_PICTURES, ".png")


class CasePrediction(Record):
    """One predicted case: what went in and what came out, by digest.

    output:  file name in the folder of predictions.
    volumes: label name -> ml (2-D: mm² or pixels, see unit).
    """

    inputs: dict[str, str]
    output: str
    output_digest: str
    volumes: dict[str, float]
    unit: str


class PredictRecord(Record):
    """predictions.json: which model, how, and what became of every case. failed: of the last call, id -> message."""

    model: str
    model_digest: str
    licence: str
    settings: PredictSettings
    read_options: ReadOptions
    cases: dict[str, CasePrediction] = Field(default={})
    failed: dict[str, str] = Field(default={})


class PredictSummary(Record):
    """What a call of `predict_cases` did. num_done: predicted now; num_kept: there already and still right."""

    folder: str
    num_done: int
    num_kept: int
    elapsed_s: float
    record: PredictRecord


def predict_cases(
    cases: Sequence[Case],
    model: LoadedModel,
    out_folder: Path,
    *,
    settings: PredictSettings | None = None,
    options: ReadOptions | None = None,
    strict: bool = False,
    overwrite: bool = False,
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> PredictSummary:
    """Predict every case into `out_folder`, one label map each, named after the case, on the image's own grid.

    The same call again goes on where the last one ended, and ends with the same bytes: a case is done when
    predictions.json holds the digests of its inputs and of its output, and both still agree.

    options:   how to read odd files; default: as the plan says.
    strict:    stop at the first bad case with its own error. Otherwise it is listed, the others go on, and a
               PartialError comes at the end (the case's own error where there is only one case).
    overwrite: replace the predictions of another model or of other settings.
    on_progress(done, total) is called after every case; on_note(text) for every prediction that was edited since it
    was made and has to go: it is kept as CASE.edited.*.

    Errors: UsageError where the folder holds other predictions; ResourceError for disk, lock and memory.
    """
    started = time.monotonic()
    if not cases:
        raise UsageError("there is no case to predict.", fix="give image files, a folder of them, or a data set.")
    settings, options = settings or PredictSettings(), options or model.plan.read_options
    fresh = PredictRecord(
        model=model.name,
        model_digest=model.digest,
        licence=model.card.licence,
        settings=settings,
        read_options=options,
    )
    with lock_folder(out_folder):
        sweep_temporary(out_folder)
        outputs = {case.id: output_file(case, out_folder) for case in cases}
        earlier = _earlier_record(out_folder, fresh, outputs, overwrite=overwrite)
        ledger = _Ledger(out_folder, fresh, earlier.cases if earlier else {}, on_note)
        for case in cases:
            require_memory_for(case, model.plan)
        num_kept, failed = 0, {}
        if earlier and _differences(earlier, fresh):
            for name in earlier.cases:
                ledger.forget(name)
        ledger.write()
        try:
            for position, case in enumerate(cases, start=1):
                try:
                    if ledger.has(case):
                        num_kept += 1
                    else:
                        ledger.forget(case.id)
                        outputs[case.id].unlink(missing_ok=True)
                        ledger.cases[case.id] = _predict_case(case, model, outputs[case.id], settings, options)
                except (InputError, SafetyError) as error:
                    if strict or len(cases) == 1:
                        raise
                    folders = {image.parent: "" for image in case.files} | {out_folder: ""}
                    failed[case.id] = without_folders(error, folders)
                if on_progress:
                    on_progress(position, len(cases))
                ledger.write_now_and_then()
        finally:
            record = ledger.write(failed)
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


def output_file(case: Case, out_folder: Path) -> Path:
    """Where a case's prediction goes: CASE.nii.gz for CASE_0000.nii.gz, CASE.mha for .mhd, CASE.png for any picture.

    Errors: SafetyError for an id that leads out of the folder, or onto an input of the case.
    """
    path = require_inside(out_folder, case.id + _OUTPUT_SUFFIXES.get(image_suffix(case.images[0]), ".nii.gz"))
    if any(path == image.resolve() for image in case.files):
        raise SafetyError("the prediction would replace this input.", where=path, fix="choose another output folder.")
    return path


def require_memory_for(case: Case, plan: Plan) -> None:
    """ResourceError, before any work, where the case's header says that it cannot fit into the free memory."""
    try:
        grid, num_channels = read_grid(case.images[0])
    except VoxdinoError:
        return  # reading the case will say what is wrong
    num_channels = max(num_channels, len(case.images))
    num_voxels = float(np.prod(grid.shape))
    growth = 1.0 if plan.in_plane_spacing is None else _in_plane_area(grid, plan) / np.prod(plan.in_plane_spacing)
    # as read and as prepared, at most 4 bytes a value; labels as made and as restored; logits, activations
    need = int(num_voxels * (4 * num_channels * (1 + growth) + 4) + 4 * LOGIT_BYTES)
    free = available_memory()
    if need > free:
        fact = f"{format_shape(grid.shape)} voxels need about {format_bytes(need)}, {format_bytes(free)} are free."
        raise ResourceError(fact, where=case.images[0], fix="close other programs, or use a machine with more memory.")


def _in_plane_area(grid: Grid, plan: Plan) -> float:
    """Area of a voxel in the plane of the plan's slices."""
    if plan.slice_axis is None or grid.ndim == 2:
        return float(np.prod(sorted(grid.spacing)[:2]))
    world, _ = grid.axes_to_world()
    return grid.voxel_volume / grid.spacing[world.index("RAS".index(plan.slice_axis))]


def _predict_case(
    case: Case, model: LoadedModel, output: Path, settings: PredictSettings, options: ReadOptions
) -> CasePrediction:
    try:
        if len(case.images) > 1:
            _require_channels(len(case.images), case, model.plan)
        digests = _digest_inputs(case)
        volume, _ = read_case(replace(case, label=None), options, None)
        _require_channels(volume.num_channels, case, model.plan)
        labels = predict_volume(model, volume, settings, case=case.id)
        write_label_map(output, labels, like=case.images[0])
    except VoxdinoError as error:
        error.where = error.where or case.id
        raise
    volumes, unit = measure_volumes(labels, model.plan)
    return CasePrediction(
        inputs=digests, output=output.name, output_digest=digest_file(output), volumes=volumes, unit=unit
    )


def _require_channels(found: int, case: Case, plan: Plan) -> None:
    """ImageError unless the image has the plan's channels: nobody knows which ones a surplus image holds.

    The labelled cases were checked with the plan, and a plan may be edited to use some of their channels only.
    """
    needed = num_source_channels(plan)
    if found < needed or (found > needed and case.label is None):
        names = ", ".join(dict.fromkeys(channel.name for channel in plan.channels))
        fact = f"has {found} channel{'s' * (found != 1)}, the model needs {needed} ({names})."
        raise ImageError(fact, where=case.images[0], fix="give exactly these channels, in this order.")


def _digest_inputs(case: Case) -> dict[str, str]:
    """File name -> SHA-256. Errors: ImageError for a file that is gone, no file, or cannot be read."""
    digests = {}
    for image in case.images:
        require_file(image, kind=ImageError)
        with reading(image):
            digests[image.name] = digest_file(image)
    return digests


def measure_volumes(labels: LabelMap, plan: Plan) -> tuple[dict[str, float], str]:
    """Volume of every label in a label map, and its unit: ml; in 2-D mm², or px where no spacing is known."""
    grid = labels.grid
    unit = "px" if grid.unit == "px" else "ml" if grid.ndim == 3 else "mm²"
    size = grid.voxel_volume / (1000 if unit == "ml" else 1)
    counts = {name: int(np.count_nonzero(labels.array == label)) for name, label in plan.labels.foreground}
    return {name: round(count * size, 4) for name, count in counts.items()}, unit


class _Ledger:
    """predictions.json as it grows: a case is in it only after its output is whole on disk."""

    def __init__(
        self,
        folder: Path,
        record: PredictRecord,
        cases: dict[str, CasePrediction],
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        self.folder, self.record, self.cases = folder, record, dict(cases)
        self._on_note = on_note
        self._written_at = 0.0

    def has(self, case: Case) -> bool:
        """Whether the case was predicted from the files as they are now, and the prediction is unchanged."""
        entry = self.cases.get(case.id)
        if entry is None:
            return False
        output = self.folder / entry.output
        try:
            inputs = _digest_inputs(case)
        except ImageError:
            return False  # predicting the case will say what is wrong
        return inputs == entry.inputs and output.is_file() and digest_file(output) == entry.output_digest

    def forget(self, case: str) -> None:
        """Drop a prediction that no longer belongs to its inputs, with its file; one that was edited is kept aside."""
        entry = self.cases.pop(case, None)
        if entry is None:
            return
        path = require_inside(self.folder, entry.output)
        if _is_edited(path, entry):
            suffix = image_suffix(path)
            stem = f"{path.name.removesuffix(suffix)}.edited"
            names = chain([f"{stem}{suffix}"], (f"{stem}-{n}{suffix}" for n in count(2)))
            aside = next(aside for name in names if not (aside := path.with_name(name)).exists())
            path.rename(aside)
            if self._on_note:
                self._on_note(f"{path.name} was edited after it was predicted: kept as {aside.name}")
        path.unlink(missing_ok=True)

    def write(self, failed: dict[str, str] | None = None) -> PredictRecord:
        update = {"cases": dict(sorted(self.cases.items())), "failed": failed or {}}
        self.record = self.record.model_copy(update=update)
        self.record.write(self.folder / RECORD_NAME)
        self._written_at = time.monotonic()
        return self.record

    def write_now_and_then(self) -> None:
        if time.monotonic() - self._written_at > RECORD_EVERY_S:
            self.write()


def _is_edited(path: Path, entry: CasePrediction) -> bool:
    """Whether a prediction was changed by hand; damaged files are nobody's work."""
    if not path.is_file() or digest_file(path) == entry.output_digest:
        return False
    try:
        read_label_map(path)
    except VoxdinoError:
        return False
    return True


def _differences(earlier: PredictRecord, fresh: PredictRecord) -> list[str]:
    """What keeps the predictions of one record from standing beside those of the other."""
    decisive = ("model_digest", "settings", "read_options")
    return [name for name in decisive if getattr(earlier, name) != getattr(fresh, name)]


def _earlier_record(
    folder: Path, fresh: PredictRecord, outputs: dict[str, Path], *, overwrite: bool
) -> PredictRecord | None:
    """The record in the folder. Errors: UsageError where predicting would replace what is not of this model."""
    path = folder / RECORD_NAME
    if path.is_file():
        earlier = PredictRecord.read(path)
        other = _differences(earlier, fresh)
        if overwrite or not other:
            return earlier
        names = {"model_digest": f"model ({earlier.model})", "read_options": "reading options"}
        told = ", ".join(names.get(name, name) for name in other)
        fact = f"holds predictions made with another {told}."
        raise UsageError(fact, where=folder, fix="choose another output folder, or --overwrite.")
    there = [output for output in outputs.values() if output.exists()]
    if there and not overwrite:
        fact = f"{len(there)} of the files to write exist and are no predictions recorded here, first {there[0].name}."
        raise UsageError(fact, where=folder, fix="choose another output folder, or --overwrite.")
    return None
