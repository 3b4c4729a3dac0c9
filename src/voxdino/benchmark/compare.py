"""Numbers of one cell with their intervals, and of two cells whether they differ, on the same cases."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from voxdino.benchmark.result import CellResult
from voxdino.evaluation.classification import CLASSIFICATION_METRICS, Answers, classification_scores
from voxdino.evaluation.cohort import cohort_intervals, interval, owner_index, resamples
from voxdino.evaluation.comparison import holm, paired_test, smallest_detectable_difference
from voxdino.evaluation.scores import Share
from voxdino.evaluation.statistics import groups_to_draw, mean_interval
from voxdino.report.page import Interval

NUM_PERMUTATIONS = 1999


def groups_of(result: CellResult, metric: str) -> tuple[str, ...] | None:
    """Whose each case is, for intervals and tests; None: every case stands for itself (`groups_to_draw`)."""
    return groups_to_draw(result.groups, ~np.isnan(_column(result, metric)) if result.scores else None)


def interval_of(result: CellResult, metric: str) -> Interval:
    """A metric of a cell over its test cases with a 95 % interval over cases, or over patients (`groups_of`).

    Of segmentation the mean over cases (`mean_interval`); of classification the bootstrap of `cohort_intervals`.
    """
    groups = groups_of(result, metric)
    if result.scores:
        found = mean_interval(_column(result, metric).tolist(), groups=groups)
        return Interval(mean=found.mean, low=found.low, high=found.high, num_undefined=found.num_undefined)
    shares = cohort_intervals(labels_of(result), np.array(result.probabilities), [metric], groups=groups)
    return _shown(shares[metric])


def value_of(result: CellResult, metric: str) -> float | None:
    """The metric of a cell without an interval."""
    if result.scores:
        column = _column(result, metric)
        return float(np.nanmean(column)) if not np.isnan(column).all() else None
    value = _metric(result, metric)
    return None if np.isnan(value) else value


@dataclass(frozen=True)
class Comparison:
    """Two encoders on one task. difference: of the first less the second, with its interval; p: of none; p_holm:
    adjusted for all comparisons of the table; detectable: the smallest difference this sample could show (None where
    the metric is not a mean over cases).
    """

    task: str
    first: str
    second: str
    difference: Interval
    p: float
    p_holm: float
    detectable: float | None


def compare(results: Iterable[Sequence[CellResult]], metrics: Iterable[str]) -> list[Comparison]:
    """Every pair of encoders of each task, on the cases that both have; Holm's correction over all of them."""
    found = [
        _compared(first, second, metric)
        for of_task, metric in zip(results, metrics, strict=True)
        for first, second in combinations(of_task, 2)
    ]
    adjusted = holm([one.p for one in found])
    return [Comparison(**{**vars(one), "p_holm": p}) for one, p in zip(found, adjusted, strict=True)]


def _compared(first: CellResult, second: CellResult, metric: str) -> Comparison:
    first, second = _in_common(first, second)
    if first.scores:
        a, b = _column(first, metric), _column(second, metric)
        groups = groups_to_draw(first.groups, ~np.isnan(a - b))
        mean = mean_interval((a - b).tolist(), groups=groups)
        difference = Interval(mean=mean.mean, low=mean.low, high=mean.high, num_undefined=mean.num_undefined)
        p = paired_test(a.tolist(), b.tolist(), groups=groups)
        detectable = smallest_detectable_difference((a - b).tolist(), groups=groups)
    else:
        difference, p = _cohort_difference(first, second, metric)
        detectable = None
    return Comparison(first.cell.task, first.cell.encoder, second.cell.encoder, difference, p, p, detectable)


def _in_common(first: CellResult, second: CellResult) -> tuple[CellResult, CellResult]:
    """Both on the cases that both have, in the first one's order."""
    if first.cases == second.cases:
        return first, second
    both = set(first.cases) & set(second.cases)
    return _part(first, [case for case in first.cases if case in both]), _part(
        second, [case for case in first.cases if case in both]
    )


def _part(result: CellResult, cases: Sequence[str]) -> CellResult:
    places = [result.cases.index(case) for case in cases]

    def pick(values: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(values[place] for place in places)

    changes = {
        "cases": tuple(cases),
        "groups": result.groups and pick(result.groups),
        "labels": result.labels and pick(result.labels),
        "probabilities": result.probabilities and pick(result.probabilities),
        "scores": {metric: pick(values) for metric, values in result.scores.items()},
    }
    return result.model_copy(update=changes)


def _column(result: CellResult, metric: str) -> Float[np.ndarray, " N"]:
    return np.array([np.nan if value is None else value for value in result.scores[metric]])


def labels_of(result: CellResult) -> Int[np.ndarray, " N"] | Int[np.ndarray, "N K"]:
    """Classes, or 0 and 1 for each label."""
    rows = np.array(result.labels)
    return rows if result.is_multi else rows[:, 0]


def _metric(result: CellResult, metric: str) -> float:
    return classification_scores(labels_of(result), np.array(result.probabilities), [metric])[metric]


def _cohort_difference(first: CellResult, second: CellResult, metric: str) -> tuple[Interval, float]:
    """Paired bootstrap of the difference; p under exchange of the two methods' words on each case (or patient).

    For metrics that read the order of probabilities alone (AUROC): what is exchanged are ranks within each method and
    class, since the methods' scales may differ. p is 1 where the metric is undefined.
    """
    is_there, owners = _is_there(first), groups_of(first, metric) or first.cases
    a, b = (_ranks(np.array(one.probabilities)) for one in (first, second))
    is_single = not first.is_multi

    def difference(one: Float[np.ndarray, "N K"], other: Float[np.ndarray, "N K"], there: NDArray[np.bool_]) -> float:
        compute = CLASSIFICATION_METRICS[metric].compute
        x, y = (compute(Answers(there, there, ranks, is_single)) for ranks in (one, other))
        return x - y

    found = difference(a, b, is_there)
    if np.isnan(found):
        return Interval(mean=None, low=None, high=None), 1.0
    drawn = [difference(a[i], b[i], is_there[i]) for i in resamples(owners)]
    exchanges = (exchanged[:, None] for exchanged in _exchanges(owners))
    others = (difference(np.where(e, b, a), np.where(e, a, b), is_there) for e in exchanges)
    as_far = sum(abs(other) >= abs(found) - 1e-12 for other in others)
    return _shown(interval(found, drawn)), (as_far + 1) / (NUM_PERMUTATIONS + 1)


def _is_there(result: CellResult) -> Bool[np.ndarray, "N K"]:
    labels = labels_of(result)
    wanted = np.int64(1) if labels.ndim == 2 else np.arange(len(result.probabilities[0]))
    there: NDArray[np.bool_] = np.equal(labels if labels.ndim == 2 else labels[:, None], wanted)
    return there


def _shown(found: Share) -> Interval:
    return Interval(mean=found.value, low=found.low, high=found.high)


def _ranks(shares: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    """Of each column, as shares of the number of cases; equal values share the smaller one."""
    return np.stack([np.searchsorted(np.sort(column), column) / len(column) for column in shares.T], axis=1)


@lru_cache(maxsize=8)
def _exchanges(owners: tuple[str, ...]) -> list[Bool[np.ndarray, " N"]]:
    rng = np.random.default_rng(1)
    index = owner_index(owners)
    return [rng.random(index.max() + 1)[index] < 0.5 for _ in range(NUM_PERMUTATIONS)]
