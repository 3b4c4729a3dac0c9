"""predictions.json: what was predicted from which files by which model, and what is still right of it."""

import time
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path

from pydantic import Field

from voxdino.core.errors import ImageError, UsageError, VoxdinoError
from voxdino.core.io import digest_image, image_suffix, read_label_map, reading
from voxdino.core.io.options import ReadOptions
from voxdino.core.records import Record
from voxdino.core.safe_files import digest_file, require_file, require_inside
from voxdino.core.shards import Shard, file_of, files_of_shards
from voxdino.inference.outputs import OutputSettings
from voxdino.inference.settings import PredictSettings
from voxdino.preparation.case import Case

RECORD_NAME = "predictions.json"
RECORD_EVERY_S = 1.0  # cases done since the last record are predicted again after a kill, to the same bytes
_RECORD_SHARE = 0.02  # of the time, at most, goes into records: those of a large cohort take seconds


class CasePrediction(Record):
    """One predicted case: what went in and what came out, by digest.

    output:  file name in the folder of predictions.
    volumes: label name -> ml (2-D: mm² or pixels, see unit).
    beside:  files that belong to it (probabilities), name -> digest.
    """

    inputs: dict[str, str]
    output: str
    output_digest: str
    volumes: dict[str, float]
    unit: str
    beside: dict[str, str] = Field(default={})


class PredictRecord(Record):
    """predictions.json: which model, how, and what became of every case. failed: of the last call, id -> message."""

    model: str
    model_digest: str
    licence: str
    settings: PredictSettings
    read_options: ReadOptions
    output: OutputSettings = OutputSettings()
    cases: dict[str, CasePrediction] = Field(default={})
    failed: dict[str, str] = Field(default={})

    def list_volumes(self) -> list[tuple[str, dict[str, float], str]]:
        """(case, label -> volume, unit) of every case."""
        return [(name, case.volumes, case.unit) for name, case in self.cases.items()]


class Ledger:
    """predictions.json as it grows: a case is in it only after its output is whole on disk."""

    def __init__(
        self,
        folder: Path,
        record: PredictRecord,
        cases: dict[str, CasePrediction],
        on_note: Callable[[str], None] | None = None,
        *,
        name: str = RECORD_NAME,
    ) -> None:
        self.folder, self.record, self.cases, self._name = folder, record, dict(cases), name
        self._on_note = on_note
        self._unrecorded: dict[str, Path] = {}
        self._next_at = 0.0

    def has(self, case: Case) -> bool:
        """Whether the case was predicted from the files as they are now, and the prediction is unchanged."""
        entry = self.cases.get(case.id)
        if entry is None:
            return False
        try:
            inputs = digest_inputs(case)
        except ImageError:
            return False  # predicting the case will say what is wrong
        files = {entry.output: entry.output_digest, **entry.beside}
        return inputs == entry.inputs and all(
            (self.folder / name).is_file() and digest_file(self.folder / name) == digest
            for name, digest in files.items()
        )

    def forget(self, case: str) -> None:
        """Drop a prediction that no longer belongs to its inputs, with its file; one that was edited is kept aside."""
        entry = self.cases.pop(case, None)
        if entry is None:
            return
        path = require_inside(self.folder, entry.output)
        if path.is_file() and digest_file(path) != entry.output_digest:
            self._put_aside(path, "{} was edited after it was predicted: kept as {}")
        for name in (entry.output, *entry.beside):
            require_inside(self.folder, name).unlink(missing_ok=True)

    def clear(self, case: str, output: Path) -> None:
        """As `forget`, and nothing stays at `output`: a label map that no run recorded is kept aside."""
        self.forget(case)
        if output.is_file():
            note = "{} is not recorded: kept as {}, unless the prediction is the same"
            if aside := self._put_aside(output, note):
                self._unrecorded[case] = aside
            output.unlink(missing_ok=True)

    def settle(self, case: str, output_digest: str) -> None:
        """What was kept aside goes where it is the prediction itself: of a run killed before it recorded it."""
        aside = self._unrecorded.pop(case, None)
        if aside is not None and digest_file(aside) == output_digest:
            aside.unlink()

    def _put_aside(self, path: Path, note: str) -> Path | None:
        """Rename a label map; None for a damaged file, which is nobody's work."""
        try:
            read_label_map(path)
        except VoxdinoError:
            return None
        suffix = image_suffix(path)
        stem = f"{path.name.removesuffix(suffix)}.edited"
        names = chain([f"{stem}{suffix}"], (f"{stem}-{n}{suffix}" for n in count(2)))
        aside = next(aside for name in names if not (aside := path.with_name(name)).exists())
        path.rename(aside)
        if self._on_note:
            self._on_note(note.format(path.name, aside.name))
        return aside

    def write(self, failed: dict[str, str] | None = None) -> PredictRecord:
        update = {"cases": dict(sorted(self.cases.items())), "failed": failed or {}}
        self.record = self.record.model_copy(update=update)
        started = time.monotonic()
        self.record.write(self.folder / self._name)
        ended = time.monotonic()
        self._next_at = ended + max(RECORD_EVERY_S, (ended - started) / _RECORD_SHARE)
        return self.record

    def write_now_and_then(self) -> None:
        if time.monotonic() > self._next_at:
            self.write()


def differences(earlier: PredictRecord, fresh: PredictRecord) -> list[str]:
    """What keeps the predictions of one record from standing beside those of the other."""
    decisive = ("model_digest", "settings", "read_options", "output")
    return [name for name in decisive if getattr(earlier, name) != getattr(fresh, name)]


def earlier_cases(
    folder: Path, fresh: PredictRecord, outputs: dict[str, Path], *, overwrite: bool
) -> tuple[dict[str, CasePrediction], dict[str, CasePrediction]]:
    """The cases of the records in the folder, those of shards too: made as these will be, and made otherwise.

    Errors: UsageError where predicting would replace what is not of this model.
    """
    paths = [path for path in (folder / RECORD_NAME, *shard_records(folder)) if path.is_file()]
    if not paths and not overwrite and (there := [output for output in outputs.values() if output.exists()]):
        fact = f"{len(there)} of the files to write exist and are no predictions recorded here, first {there[0].name}."
        raise UsageError(fact, where=folder, fix="choose another output folder, or --overwrite.")
    alike: dict[str, CasePrediction] = {}
    otherwise: dict[str, CasePrediction] = {}
    for path in paths:
        record = PredictRecord.read(path)
        other = differences(record, fresh)
        if other and not overwrite:
            names = {
                "model_digest": f"model ({record.model})",
                "read_options": "reading options",
                "output": "format or other files beside it",
            }
            told = ", ".join(names.get(name, name) for name in other)
            fact = f"holds predictions made with another {told}."
            raise UsageError(fact, where=folder, fix="choose another output folder, or --overwrite.")
        (otherwise if other else alike).update(record.cases)
    return alike, {name: case for name, case in otherwise.items() if name not in alike}


def record_name(shard: Shard | None) -> str:
    """predictions.json; of a shard predictions.2of8.json."""
    return file_of(Path(RECORD_NAME), shard).name


def shard_records(folder: Path) -> list[Path]:
    """The records of shards in a folder of predictions."""
    return files_of_shards(folder / RECORD_NAME)


def digest_inputs(case: Case) -> dict[str, str]:
    """File name -> SHA-256. Errors: ImageError for a file that is gone, no file, or cannot be read."""
    digests = {}
    for image in case.images:
        if not image.is_dir():
            require_file(image, kind=ImageError)
        with reading(image):
            digests[image.name] = digest_image(image)
    return digests
