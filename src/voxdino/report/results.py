"""What lies in the folder of a run or of predictions: its record, its log and its scores, whichever there are."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from voxdino.core.errors import ConfigError, DatasetError
from voxdino.core.records import Record
from voxdino.core.safe_files import read_json
from voxdino.evaluation.classified import ClassScores
from voxdino.evaluation.scores import Scores

SCORES, RUN, LOG, FIRST_STAGE = "scores.json", "run.json", "log.jsonl", "stage1"


class RunFacts(Record):
    """The part of run.json that a report tells, of fine-tuning and of pretraining; other keys are left alone."""

    model_config = ConfigDict(extra="ignore")

    config: dict[str, Any]
    backbone: dict[str, str | None]
    num_parameters: dict[str, int] | int
    device: str
    python: str
    fold: int | None = None
    split: dict[str, tuple[str, ...]] | None = None
    pool: dict[str, Any] | None = None
    pretrained_on: tuple[str, ...] = ()
    outcome: dict[str, Any] | None = None


@dataclass(frozen=True)
class Result:
    """One run or one evaluation. path: what it is named after; log: rows of log.jsonl; first_log: of a first stage.

    scores: of segmentations; classes: of a classifier.
    """

    name: str
    path: Path
    folder: Path
    run: RunFacts | None
    log: tuple[dict[str, Any], ...]
    first_log: tuple[dict[str, Any], ...]
    scores: Scores | None
    classes: ClassScores | None = None


def read_results(paths: Sequence[Path]) -> list[Result]:
    """The results at `paths`, each a folder with run.json or scores.json, or a file of scores, under different names.

    Errors: DatasetError where a folder has neither; ConfigError where a record is damaged or of another kind.
    """
    results = [_read_result(path) for path in paths]
    names = _distinct([result.path.resolve() for result in results])
    return [replace(result, name=name) for result, name in zip(results, names, strict=True)]


def _distinct(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; a number behind a path that is given twice."""
    depths = range(1, max(len(path.parts) for path in paths) + 1)
    ends = [["/".join(path.parts[-depth:]) for path in paths] for depth in depths]
    names = next((names for names in ends if len(set(names)) == len(names)), ends[0])
    return [
        f"{name} ({names[:place].count(name) + 1})" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]


def _read_result(path: Path) -> Result:
    folder = path if path.is_dir() else path.parent
    scores_file = folder / SCORES if path.is_dir() else path
    has_run = path.is_dir() and (folder / RUN).is_file()
    if path.is_dir() and not has_run and not scores_file.is_file():
        fact = f"holds neither {RUN} nor {SCORES}."
        fix = "give the folder of a run, or score predictions first: voxdino evaluate."
        raise DatasetError(fact, where=path, fix=fix)
    value = read_json(scores_file) if not path.is_dir() or scores_file.is_file() else None
    of_classes = isinstance(value, dict) and "classes" in value
    return Result(
        name="",
        path=folder if scores_file.name == SCORES else path,
        folder=folder,
        run=RunFacts.from_json(read_json(folder / RUN), where=folder / RUN) if has_run else None,
        log=_read_log(folder / LOG) if has_run else (),
        first_log=_read_log(folder / FIRST_STAGE / LOG) if has_run else (),
        scores=None if value is None or of_classes else Scores.from_json(value, where=scores_file),
        classes=ClassScores.from_json(value, where=scores_file) if of_classes else None,
    )


def _read_log(path: Path) -> tuple[dict[str, Any], ...]:
    """Every whole row; the line that a kill cut is none. Errors: ConfigError for a line that is no row."""
    if not path.is_file():
        return ()
    rows = []
    for place, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ConfigError(f"line {place} is damaged.", where=path, fix="delete this line: it is only told there.")
        rows.append(row)
    return tuple(rows)
