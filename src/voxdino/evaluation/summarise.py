"""From the scores of single cases to means, intervals, counts and warnings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
from numpy.typing import NDArray

from voxdino import __version__
from voxdino.core.labels import LabelSet
from voxdino.evaluation.lesions import summarise_lesions
from voxdino.evaluation.measure import Measures, structures
from voxdino.evaluation.scores import (
    FailedCase,
    LesionScores,
    LesionSummary,
    Outcome,
    Scores,
    StructureCounts,
    StructureScores,
    Summary,
)
from voxdino.evaluation.statistics import MeanInterval, mean_interval, owners_of, pooled_interval, warn_of_few

Values = NDArray[np.float64]


@dataclass(frozen=True)
class ScoredCase:
    """The rows of one case, one per structure, and the units of its grid."""

    rows: tuple[StructureScores, ...]
    length_unit: str
    volume_unit: str


def summarise(
    scored: Sequence[ScoredCase],
    failed: Sequence[FailedCase],
    labels: LabelSet,
    measures: Measures,
    groups: Mapping[str, str] | None = None,
) -> Scores:
    """All cases together. groups: case -> patient; intervals then are over patients (a case without one is its own)."""
    names = [name for name, _ in structures(labels)]
    length_units = sorted({case.length_unit for case in scored}) or ["mm"]
    volume_units = sorted({case.volume_unit for case in scored}) or ["ml"]
    units = {"": "", "length": "/".join(length_units), "voxels": "voxels", "volume": "/".join(volume_units)}
    patients = _patients(scored, groups)
    counts = tuple(_count(name, [case.rows[i].outcome for case in scored]) for i, name in enumerate(names))
    return Scores(
        voxdino_version=__version__,
        num_cases=len(scored),
        num_patients=None if groups is None else len(set(patients.tolist())),
        empty=measures.empty,
        tolerance=measures.tolerance,
        length_unit=units["length"],
        volume_unit=units["volume"],
        definitions={name: metric.definition_under(measures.empty) for name, metric in measures.table.items()},
        rules={name: metric.rule_under(measures.empty) for name, metric in measures.table.items()},
        summary=tuple(_summary(scored, names, measures, units, None if groups is None else patients)),
        counts=counts,
        warnings=tuple(_warnings(len(set(patients.tolist())), counts, units, groups is not None)),
        failed=tuple(failed),
        cases=tuple(row for case in scored for row in case.rows),
        lesions=_lesions(scored, names, units["volume"].replace("ml", "mm³"), measures.min_overlap, patients),
        groups={case: groups[case] for case in _ids(scored) if case in groups} if groups else {},
    )


def _patients(scored: Sequence[ScoredCase], groups: Mapping[str, str] | None) -> NDArray[np.int64]:
    """(num_cases,) the number of each case's patient."""
    owners = owners_of(_ids(scored), groups or {})
    return np.unique(owners, return_inverse=True)[1].astype(np.int64) if owners else np.zeros(0, np.int64)


def _ids(scored: Sequence[ScoredCase]) -> list[str]:
    return [case.rows[0].case for case in scored]


def _summary(
    scored: Sequence[ScoredCase],
    names: Sequence[str],
    measures: Measures,
    units: Mapping[str, str],
    patients: NDArray[np.int64] | None,
) -> list[Summary]:
    """Every metric of every structure, then of "mean" (sums of ml mean nothing, and have no such row)."""
    columns: dict[tuple[str, str], MeanInterval] = {}
    means: dict[tuple[str, str], MeanInterval] = {}
    for metric, of in measures.table.items():
        rows = [[_number(row.values[metric]) for row in case.rows] for case in scored]
        values = np.array(rows, dtype=np.float64).reshape(-1, len(names))
        columns |= {(name, metric): _interval(values[:, [i]], patients) for i, name in enumerate(names)}
        if of.paper:
            means["mean", metric] = _mean_of_means(values, patients)
        elif of.better:
            means["mean", metric] = _interval(_mean_of_defined(values)[:, None], patients)
    ordered = {(name, metric): columns[name, metric] for name in names for metric in measures.metrics} | means
    return [
        Summary(
            structure=name,
            metric=metric,
            definition=measures.table[metric].definition_under(measures.empty),
            unit=units[measures.table[metric].unit],
            **vars(interval),
        )
        for (name, metric), interval in ordered.items()
    ]


def _interval(values: Values, patients: NDArray[np.int64] | None) -> MeanInterval:
    """Mean of one column (num_cases, 1) of values; its interval is over cases, or over patients where given."""
    return mean_interval(values[:, 0].tolist(), groups=None if patients is None else patients.tolist())


def _mean_of_means(values: Values, patients: NDArray[np.int64] | None) -> MeanInterval:
    """Mean over the columns of each column's mean over its defined values (num_cases, n), patients resampled whole."""
    is_defined = ~np.isnan(values)
    counts = _sums_by(np.hstack([np.nan_to_num(values), is_defined]), patients)

    def statistic(sums: Values) -> Values:
        total, number = np.hsplit(sums, 2)
        means = np.where(number > 0, total / np.maximum(number, 1), nan)
        return _mean_of_defined(means)

    mean, low, high = pooled_interval(counts, statistic)
    num_undefined = int((~is_defined.any(axis=1)).sum())
    return MeanInterval(mean=mean, low=low, high=high, num_cases=len(values), num_undefined=num_undefined)


def _sums_by(values: Values, patients: NDArray[np.int64] | None) -> Values:
    """Rows of one patient added up; the rows themselves where every case is a patient of its own."""
    if patients is None:
        return values
    sums = np.zeros((patients.max(initial=-1) + 1, values.shape[1]))
    np.add.at(sums, patients, values)
    return sums


def _lesions(
    scored: Sequence[ScoredCase], names: Sequence[str], unit: str, min_overlap: float, patients: NDArray[np.int64]
) -> tuple[LesionSummary, ...]:
    """Per structure, where lesions were counted; the cases of a patient as one."""
    summaries = []
    for place, name in enumerate(names):
        by_patient: dict[int, list[LesionScores]] = {}
        for patient, case in zip(patients.tolist(), scored, strict=True):
            lesions = case.rows[place].lesions
            if lesions is not None:
                by_patient.setdefault(patient, []).append(lesions)
        if by_patient:
            together = [_merged(cases) for cases in by_patient.values()]
            summaries.append(summarise_lesions(name, together, unit=unit, min_overlap=min_overlap))
    return tuple(summaries)


def _merged(cases: Sequence[LesionScores]) -> LesionScores:
    return LesionScores(
        volumes=tuple(volume for case in cases for volume in case.volumes),
        found=tuple(found for case in cases for found in case.found),
        num_predicted=sum(case.num_predicted for case in cases),
        num_true=sum(case.num_true for case in cases),
    )


def _number(value: float | None) -> float:
    return nan if value is None else value


def _mean_of_defined(values: Values) -> Values:
    """Mean over the structures of each row (num_rows, num_structures); NaN where none is defined."""
    num_defined = (~np.isnan(values)).sum(axis=1)
    total = np.nansum(values, axis=1)
    return np.where(num_defined > 0, total / np.maximum(num_defined, 1), nan)


def _count(name: str, outcomes: Sequence[Outcome]) -> StructureCounts:
    return StructureCounts(
        structure=name,
        both=outcomes.count("both"),
        missed=outcomes.count("missed"),
        false_alarm=outcomes.count("false alarm"),
        absent=outcomes.count("absent"),
    )


def _warnings(num: int, counts: Sequence[StructureCounts], units: Mapping[str, str], by_patient: bool) -> list[str]:
    warnings = list(warn_of_few(num, "patients" if by_patient else "cases"))
    for count in counts:
        if count.absent + count.false_alarm and not count.both + count.missed:
            warnings.append(f"{count.structure} is in no reference: nothing can be said about finding it.")
    for unit in units.values():
        if "/" in unit:
            warnings.append(f"cases in different units ({unit}) are averaged: score them apart.")
    return warnings
