"""Scores of all cases together (AUROC and its like) with intervals: cases, or whole patients, are drawn again."""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Integer
from numpy.typing import NDArray

from voxdino.evaluation.classification import CLASSIFICATION_METRICS, Answers, read_answers
from voxdino.evaluation.scores import Share

NUM_RESAMPLES = 1000
_TAILS = (0.025, 0.975)
_NORMAL_95, _MOST_LOGIT = 1.959964, 700.0
_ON_LOGIT_SCALE = ("auroc",)


def cohort_intervals(
    labels: Integer[np.ndarray, "..."],
    probabilities: Float[np.ndarray, "N K"],
    metrics: Sequence[str],
    *,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Share]:
    """Each metric with its 95 % bootstrap interval over cases; always the same for the same cases.

    Percentiles; of AUROC see `logit_interval`.

    groups: the patient of each case; patients are then drawn whole. With fewer than two of them there is no interval.
    Resamples in which a metric is undefined are left out. Errors: those of `classification_scores`.
    """
    answers = read_answers(labels, probabilities)
    owners = tuple(range(len(answers.probabilities))) if groups is None else tuple(groups)
    computes = {metric: CLASSIFICATION_METRICS[metric].compute for metric in metrics}
    drawn: dict[str, list[float]] = {metric: [] for metric in metrics}
    for places in resamples(owners):
        part = _part(answers, places)
        for metric, compute in computes.items():
            drawn[metric].append(compute(part))
    return {
        metric: (logit_interval if metric in _ON_LOGIT_SCALE else interval)(compute(answers), drawn[metric])
        for metric, compute in computes.items()
    }


def interval(value: float, drawn: Sequence[float]) -> Share:
    """A value and the percentiles of what it was in resamples."""
    if np.isnan(value):
        return Share(value=None, low=None, high=None)
    if np.isnan(drawn).all():
        return Share(value=float(value), low=None, high=None)
    low, high = np.nanquantile(drawn, _TAILS)
    return Share(value=float(value), low=float(low), high=float(high))


def logit_interval(value: float, drawn: Sequence[float]) -> Share:
    """A share with the interval that is normal on the logit scale, of the spread of what it was in resamples.

    Near 1 percentiles are too narrow: of an AUROC of 0.96 of 50 cases they hold the truth 86 times in 100, this one
    94 (see the test of coverage). A value of exactly 0 or 1 has no logit and keeps its percentiles.
    """
    if not 0 < value < 1 or np.isnan(drawn).all():
        return interval(value, drawn)
    logit = np.log(value / (1 - value))
    reach = _NORMAL_95 * np.nanstd(drawn) / (value * (1 - value))
    low, high = 1 / (1 + np.exp(-np.clip([logit - reach, logit + reach], -_MOST_LOGIT, _MOST_LOGIT)))
    return Share(value=float(value), low=min(float(low), float(value)), high=max(float(high), float(value)))


@lru_cache(maxsize=2)
def resamples(owners: tuple[Hashable, ...]) -> tuple[NDArray[np.int64], ...]:
    """Places of the cases of as many drawn owners as there are, again and again; none for a single owner."""
    index = owner_index(owners)
    order = np.argsort(index, kind="stable")
    places = np.split(order, np.flatnonzero(np.diff(index[order])) + 1)
    if len(places) < 2:
        return ()
    rng = np.random.default_rng(0)
    draws = (rng.integers(len(places), size=len(places)) for _ in range(NUM_RESAMPLES))
    return tuple(np.concatenate([places[i] for i in draw]) for draw in draws)


def owner_index(owners: Sequence[Hashable]) -> NDArray[np.int64]:
    """(N,) the number of the owner of each case, in order of their first one."""
    numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
    return np.array([numbers[owner] for owner in owners], dtype=np.int64)


def _part(answers: Answers, places: NDArray[np.int64]) -> Answers:
    return replace(
        answers,
        is_there=answers.is_there[places],
        is_said=answers.is_said[places],
        probabilities=answers.probabilities[places],
    )
