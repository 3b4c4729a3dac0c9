"""From the probabilities of a classifier and the labels of its cases to scores with intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

import voxdino
from voxdino.core.errors import DatasetError, UsageError
from voxdino.core.labels import LabelKind
from voxdino.core.records import Record, nearest
from voxdino.evaluation.classification import CLASSIFICATION_METRICS, reliability_bins
from voxdino.evaluation.cohort import cohort_intervals
from voxdino.evaluation.scores import FailedCase, Share
from voxdino.evaluation.statistics import few_groups, groups_to_draw, owners_of, warn_of_few
from voxdino.preparation.classification import ClassificationSet, LabelledCase, label_texts
from voxdino.preparation.tables import read_table

TABLE = "probabilities.csv"  # as `voxdino predict` writes it: case,predicted,<a column for each class>
NAMED = ("case", "predicted")


class ClassSummary(Record):
    """One metric over all scored cases together."""

    metric: str
    definition: str
    score: Share


class ClassCounts(Record):
    """In how many cases a class is, and in how many the classifier says so."""

    name: str
    num_reference: int
    num_predicted: int


class Reliability(Record):
    """Answers of similar confidence: the mean of it, the share that was right, their number."""

    confidence: float
    accuracy: float
    num: int


class ClassifiedCase(Record):
    """reference, predicted: names of classes, "|" between several. probabilities: in the order of the classes."""

    case: str
    reference: str
    predicted: str
    probabilities: tuple[float, ...]


class ClassScores(Record):
    """scores.json of a classifier. num_patients: where the intervals are over patients, how many.

    failed: cases of the splits that were predicted (test, as a rule) that have no probabilities.
    groups: case -> patient, of the scored cases that one is named of.
    """

    voxdino_version: str
    kind: LabelKind
    classes: tuple[str, ...]
    num_cases: int
    num_patients: int | None
    definitions: dict[str, str]
    rules: dict[str, str]
    summary: tuple[ClassSummary, ...]
    counts: tuple[ClassCounts, ...]
    reliability: tuple[Reliability, ...]
    warnings: tuple[str, ...]
    failed: tuple[FailedCase, ...]
    cases: tuple[ClassifiedCase, ...]
    groups: dict[str, str] = Field(default={})


def is_classified(folder: Path) -> bool:
    """Whether the predictions in a folder are those of a classifier."""
    return (folder / TABLE).is_file()


def evaluate_classes(
    folder: Path,
    known: ClassificationSet,
    *,
    metrics: Sequence[str] | None = None,
    groups: Mapping[str, str] | None = None,
) -> ClassScores:
    """Score the probabilities.csv in `folder` against a labelled set.

    metrics: of CLASSIFICATION_METRICS; None: all.   groups: case id -> patient; None: those of the set, if it has some.
    Errors: DatasetError for a table that does not belong to the set; UsageError for an unknown metric.
    """
    names = tuple(CLASSIFICATION_METRICS) if metrics is None else tuple(dict.fromkeys(metrics))
    for name in names:
        if name not in CLASSIFICATION_METRICS:
            hint = nearest(name, CLASSIFICATION_METRICS)
            told = ", ".join(CLASSIFICATION_METRICS)
            raise UsageError(f"unknown metric of classification '{name}'.{hint}", fix=f"known: {told}.")
    said = _read(folder / TABLE, known)
    cases, missing = _pair(said, known, folder / TABLE)
    whose = groups if groups is not None else {case.id: case.group for case in cases if case.group}
    named = {case.id: whose[case.id] for case in cases if case.id in whose}
    owners = owners_of([case.id for case in cases], named) if named else None
    patients = groups_to_draw(owners)
    rows = np.array([case.labels for case in cases], dtype=np.int64)
    labels = rows if known.kind == "multi" else rows[:, 0]
    shares = np.array([said[case.id] for case in cases])
    intervals = cohort_intervals(labels, shares, names, groups=patients)
    answers = [_answer(said[case.id], known) for case in cases]
    num = len(cases) if patients is None else len(set(patients))
    return ClassScores(
        voxdino_version=voxdino.__version__,
        kind=known.kind,
        classes=known.class_names,
        num_cases=len(cases),
        num_patients=None if patients is None else num,
        definitions={name: CLASSIFICATION_METRICS[name].definition for name in names},
        rules={name: CLASSIFICATION_METRICS[name].rule for name in names},
        summary=tuple(
            ClassSummary(metric=name, definition=CLASSIFICATION_METRICS[name].definition, score=intervals[name])
            for name in names
        ),
        counts=_counts([label_texts(case, known) for case in cases], answers, known),
        reliability=tuple(
            Reliability(confidence=one.confidence, accuracy=one.accuracy, num=one.count)
            for one in reliability_bins(labels, shares)
        ),
        warnings=(
            *warn_of_few(num, "cases" if patients is None else "patients"),
            *((few_groups(len(set(owners)), num),) if owners is not None and patients is None else ()),
        ),
        failed=tuple(FailedCase(case=name, message="has no probabilities.") for name in missing),
        cases=tuple(
            ClassifiedCase(
                case=case.id,
                reference=label_texts(case, known),
                predicted=answer,
                probabilities=said[case.id],
            )
            for case, answer in zip(cases, answers, strict=True)
        ),
        groups=named,
    )


def _read(path: Path, known: ClassificationSet) -> dict[str, tuple[float, ...]]:
    """case -> probabilities in the order of the set's classes."""
    fix = "predict the cases of this set with a model that was trained on its classes."
    columns, rows = read_table(path, NAMED, required=NAMED)
    classes = [column for column in columns if column not in NAMED]
    if set(classes) != set(known.class_names):
        told = f"has the classes {', '.join(classes)}; the set has {', '.join(known.class_names)}."
        raise DatasetError(told, where=path, fix=fix)
    found: dict[str, tuple[float, ...]] = {}
    for line, row in rows:
        if row["case"] in found:
            raise DatasetError(f"line {line}: {row['case']} comes twice.", where=path, fix="give every case one row.")
        try:
            found[row["case"]] = tuple(float(row[name]) for name in known.class_names)
        except ValueError:
            raise DatasetError(f"line {line} has no number for every class.", where=path, fix=fix) from None
    return found


def _pair(
    said: Mapping[str, tuple[float, ...]], known: ClassificationSet, table: Path
) -> tuple[list[LabelledCase], list[str]]:
    """Labelled cases that have probabilities, and the ids of those of the same splits that have none."""
    by_id = {case.id: case for cases in known.splits.values() for case in cases}
    strange = [name for name in said if name not in by_id]
    if strange:
        fact = f"{len(strange)} of {len(said)} cases are none of the set's, among them {strange[0]}."
        raise DatasetError(f"{fact}{nearest(strange[0], by_id)}", where=table, fix="give the set that was predicted.")
    wanted = [case for cases in known.splits.values() for case in cases if any(one.id in said for one in cases)]
    labelled = [case for case in wanted if case.labels]
    cases = [case for case in labelled if case.id in said]
    if not cases:
        raise DatasetError("holds no case that has a label.", where=table, fix="predict labelled cases.")
    return cases, [case.id for case in labelled if case.id not in said]


def _answer(shares: tuple[float, ...], known: ClassificationSet) -> str:
    """By the rule of the metrics: the largest; of several labels all above 0.5."""
    if known.kind == "multi":
        return "|".join(name for name, share in zip(known.class_names, shares, strict=True) if share > 0.5)
    return known.class_names[int(np.argmax(shares))]


def _counts(references: Sequence[str], answers: Sequence[str], known: ClassificationSet) -> tuple[ClassCounts, ...]:
    there, said = ([text.split("|") for text in texts] for texts in (references, answers))
    return tuple(
        ClassCounts(name=name, num_reference=sum(name in t for t in there), num_predicted=sum(name in s for s in said))
        for name in known.class_names
    )
