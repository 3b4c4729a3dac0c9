"""From the scores of single cases to means, intervals, counts and warnings."""

from collections.abc import Iterator, Mapping, Sequence
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
from voxdino.evaluation.statistics import (
    FEWEST_GROUPS,
    MeanInterval,
    few_groups,
    groups_to_draw,
    mean_interval,
    owners_of,
    pooled_interval,
    sum_groups,
    warn_of_few,
)

Values = NDArray[np.float64]
Patients = tuple[str, ...] | None  # of each case; None: every case stands for itself


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
    """All cases together.

    groups: case -> patient; intervals then are over patients (a case without one is its own), where `groups_to_draw`
    finds enough of them with a value.
    """
    names = [name for name, _ in structures(labels)]
    length_units = sorted({case.length_unit for case in scored}) or ["mm"]
    volume_units = sorted({case.volume_unit for case in scored}) or ["ml"]
    units = {"": "", "length": "/".join(length_units), "voxels": "voxels", "volume": "/".join(volume_units)}
    owners = None if groups is None else owners_of(_ids(scored), groups)
    drawn = groups_to_draw(owners)
    counts = tuple(_count(name, [case.rows[i].outcome for case in scored]) for i, name in enumerate(names))
    return Scores(
        voxdino_version=__version__,
        num_cases=len(scored),
        num_patients=None if drawn is None else len(set(drawn)),
        empty=measures.empty,
        tolerance=measures.tolerance,
        length_unit=units["length"],
        volume_unit=units["volume"],
        definitions={name: metric.definition_under(measures.empty) for name, metric in measures.table.items()},
        rules={name: metric.rule_under(measures.empty) for name, metric in measures.table.items()},
        summary=tuple(_summary(scored, names, measures, units, drawn)),
        counts=counts,
        warnings=(*_of_size(scored, names, owners), *_warnings(counts, units)),
        failed=tuple(failed),
        cases=tuple(row for case in scored for row in case.rows),
        lesions=_lesions(scored, names, units["volume"].replace("ml", "mm³"), measures.min_overlap, drawn),
        groups={case: groups[case] for case in _ids(scored) if case in groups} if groups else {},
    )


def _ids(scored: Sequence[ScoredCase]) -> list[str]:
    return [case.rows[0].case for case in scored]


def _summary(
    scored: Sequence[ScoredCase],
    names: Sequence[str],
    measures: Measures,
    units: Mapping[str, str],
    patients: Patients,
) -> list[Summary]:
    """Every metric of every structure, then of "mean" (sums of ml mean nothing, and have no such row)."""
    columns: dict[tuple[str, str], MeanInterval] = {}
    means: dict[tuple[str, str], MeanInterval] = {}
    for metric, of in measures.table.items():
        values = _values(scored, metric, len(names))
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


def _values(scored: Sequence[ScoredCase], metric: str, num_structures: int) -> Values:
    """(num_cases, num_structures), NaN where undefined."""
    rows = [[_number(row.values[metric]) for row in case.rows] for case in scored]
    return np.array(rows, dtype=np.float64).reshape(-1, num_structures)


def _interval(values: Values, patients: Patients) -> MeanInterval:
    """Mean of one column (num_cases, 1) of values; its interval is over cases, or over patients where given."""
    return mean_interval(values[:, 0].tolist(), groups=groups_to_draw(patients, ~np.isnan(values[:, 0])))


def _mean_of_means(values: Values, patients: Patients) -> MeanInterval:
    """Mean over the columns of each column's mean over its defined values (num_cases, n), patients resampled whole."""
    is_defined = ~np.isnan(values)
    drawn = groups_to_draw(patients, np.asarray(is_defined.any(axis=1)))
    counts = _sums_by(np.hstack([np.nan_to_num(values), is_defined]), drawn)

    def statistic(sums: Values) -> Values:
        total, number = np.hsplit(sums, 2)
        means = np.where(number > 0, total / np.maximum(number, 1), nan)
        return _mean_of_defined(means)

    mean, low, high = pooled_interval(counts, statistic)
    num_undefined = int((~is_defined.any(axis=1)).sum())
    return MeanInterval(mean=mean, low=low, high=high, num_cases=len(values), num_undefined=num_undefined)


def _sums_by(values: Values, patients: Patients) -> Values:
    """Rows of one patient added up; the rows themselves where every case is a patient of its own."""
    if not patients:
        return values
    return np.stack([sum_groups(column, patients)[0] for column in values.T], axis=1)


def _lesions(
    scored: Sequence[ScoredCase], names: Sequence[str], unit: str, min_overlap: float, patients: Patients
) -> tuple[LesionSummary, ...]:
    """Per structure, where lesions were counted; the cases of a patient as one."""
    summaries = []
    for place, name in enumerate(names):
        found = [case.rows[place].lesions for case in scored]
        drawn = groups_to_draw(patients, [lesions is not None for lesions in found])
        by_patient: dict[str, list[LesionScores]] = {}
        for owner, lesions in zip(drawn or _ids(scored), found, strict=True):
            if lesions is not None:
                by_patient.setdefault(owner, []).append(lesions)
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


def _of_size(scored: Sequence[ScoredCase], names: Sequence[str], owners: Patients) -> Iterator[str]:
    """What intervals are over, where that is not plain or not many."""
    drawn = groups_to_draw(owners)
    yield from warn_of_few(*((len(scored), "cases") if drawn is None else (len(set(drawn)), "patients")))
    if owners is not None and drawn is None:
        yield few_groups(len(set(owners)), len(scored))
    for place, name in enumerate(names if drawn else ()):
        metrics = list(scored[0].rows[place].values)
        few = [
            metric
            for metric in metrics
            if groups_to_draw(drawn, ~np.isnan(_values(scored, metric, len(names))[:, place])) is None
        ]
        if few:
            fact = f"fewer than {FEWEST_GROUPS} patients have {'any value' if few == metrics else ', '.join(few)}"
            yield f"{name}: {fact}; the intervals are over their cases and speak of these patients alone."


def _warnings(counts: Sequence[StructureCounts], units: Mapping[str, str]) -> list[str]:
    warnings = []
    for count in counts:
        if count.absent + count.false_alarm and not count.both + count.missed:
            warnings.append(f"{count.structure} is in no reference: nothing can be said about finding it.")
    for unit in units.values():
        if "/" in unit:
            warnings.append(f"cases in different units ({unit}) are averaged: score them apart.")
    return warnings
