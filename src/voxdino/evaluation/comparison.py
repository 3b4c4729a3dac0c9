"""Is one method better than another? Paired tests over the same cases, ranks over tasks, and what a sample could show.

No number here assumes a normal distribution of scores, except `smallest_detectable_difference`, which says so.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import erfc, sqrt
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from voxdino.core.errors import InputError
from voxdino.evaluation.statistics import rows_per_block, sum_groups, t_quantile

NUM_PERMUTATIONS = 9999
MOST_EXACT_RANKS = 500  # differences up to which Wilcoxon's distribution is computed exactly: 0.1 s
MOST_EXACT_FLIPS = 13  # differences up to which all 2^n signs are tried
MOST_KEPT = 500  # differences up to which the drawn signs are kept for the next test: at most 40 MB each

Test = Literal["wilcoxon", "permutation"]


def paired_test(
    a: Sequence[float],
    b: Sequence[float],
    *,
    method: Test = "wilcoxon",
    groups: Sequence[Hashable] | None = None,
) -> float:
    """Two-sided p of the hypothesis that the differences a - b of the same cases lie evenly around 0.

    method: "wilcoxon" (signed ranks; exact up to 500 differences with ties or without, zeros left out, else the normal
            approximation with ties and continuity; Wilcoxon, Biometrics Bulletin 1945), or "permutation" (the mean
            difference under all changes of sign, beyond 13 differences under 9999 drawn ones; Fisher 1935).
    groups: the patient of each case; the differences of a patient count as one, their mean.

    Cases with a NaN in either are left out; p is 1 where no difference is left. Errors: InputError for unequal lengths.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape:
        fact = f"{len(first)} scores against {len(second)}: paired tests need the same cases."
        raise InputError(fact, fix="score both methods on the same cases.")
    differences = _by_group(first - second, groups)
    if not differences.any():
        return 1.0
    return _wilcoxon(differences) if method == "wilcoxon" else _permutation(differences)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in the order given (Holm, Scandinavian Journal of Statistics 1979)."""
    order = np.argsort(ps, kind="stable")
    adjusted = np.empty(len(ps))
    adjusted[order] = np.maximum.accumulate(np.asarray(ps, np.float64)[order] * np.arange(len(ps), 0, -1))
    return [min(1.0, float(p)) for p in adjusted]


@dataclass(frozen=True)
class RankTable:
    """Ranks of methods over tasks, 1 is best, ties share their mean rank.

    num_tasks:           tasks in which every method has a score; the others do not count.
    p_value:             of the hypothesis that all methods are alike (Friedman's test, by permutation).
    critical_difference: mean ranks closer than this cannot be told apart at 5 %.
    """

    mean_ranks: tuple[float, ...]
    num_tasks: int
    p_value: float
    critical_difference: float


def rank_table(scores: Float[np.ndarray, "T M"], *, better: Literal["higher", "lower"] = "higher") -> RankTable:
    """Compare M methods over T tasks (Demšar, "Statistical comparisons of classifiers", JMLR 2006).

    scores: one per task and method, NaN where there is none. Errors: InputError for fewer than two methods, or no task
    in which all have a score.
    """
    complete = scores[~np.isnan(scores).any(axis=1)]
    num_tasks, num_methods = complete.shape
    if num_methods < 2 or num_tasks == 0:
        fact = f"{num_methods} methods with {num_tasks} tasks in common cannot be ranked."
        raise InputError(fact, fix="give two or more methods scores on the same tasks.")
    ranks = np.array([_mean_ranks(row if better == "lower" else -row) for row in complete])
    spread = np.var(ranks.mean(axis=0))
    rng = np.random.default_rng(0)
    drawn = (rng.permuted(ranks, axis=1).mean(axis=0).var() for _ in range(NUM_PERMUTATIONS))
    as_far = sum(value >= spread - 1e-12 for value in drawn)
    return RankTable(
        mean_ranks=tuple(float(rank) for rank in ranks.mean(axis=0)),
        num_tasks=num_tasks,
        p_value=float(as_far + 1) / (NUM_PERMUTATIONS + 1),
        critical_difference=critical_difference(num_methods, num_tasks),
    )


def critical_difference(num_methods: int, num_tasks: int, *, level: float = 0.05) -> float:
    """How far the mean ranks of two of `num_methods` must lie apart to differ at `level` (Nemenyi's test)."""
    quantile = _range_quantile(1 - level, num_methods)
    return quantile * sqrt(num_methods * (num_methods + 1) / (12 * num_tasks))


def smallest_detectable_difference(
    differences: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.05,
    power: float = 0.8,
) -> float | None:
    """The mean difference that a sample of this size and spread shows at `level` with probability `power`.

    By the paired t-test, so for means that are near normal. A difference that was not found may still be as large as
    this. In the unit of the differences, NaN left out; None for fewer than two.

    groups: the patient of each difference; those of a patient count as one, their mean, as in `paired_test`.
    """
    defined = _by_group(np.asarray(differences, np.float64), groups)
    if len(defined) < 2:
        return None
    dof = len(defined) - 1
    steps = t_quantile(1 - level / 2, dof) + t_quantile(power, dof)
    return float(steps * defined.std(ddof=1) / sqrt(len(defined)))


def _by_group(differences: Float[np.ndarray, " N"], groups: Sequence[Hashable] | None) -> Float[np.ndarray, " G"]:
    """The defined differences, or the mean of those of each group."""
    is_defined = ~np.isnan(differences)
    defined: Float[np.ndarray, " G"] = differences[is_defined]
    if groups is not None:
        kept = [group for group, is_kept in zip(groups, is_defined, strict=True) if is_kept]
        sums, sizes = sum_groups(defined, kept)
        defined = sums / sizes
    return defined


def _wilcoxon(differences: Float[np.ndarray, "N"]) -> float:
    nonzero = differences[differences != 0]
    num = len(nonzero)
    ranks = _mean_ranks(np.abs(nonzero))
    positive = ranks[nonzero > 0].sum()
    if num > MOST_EXACT_RANKS:
        deviation = sqrt((ranks**2).sum() / 4)
        away = max(0.0, abs(positive - ranks.sum() / 2) - 0.5)
        return float(erfc(away / deviation / sqrt(2)))
    doubled = np.rint(2 * ranks).astype(int)  # mean ranks are whole or halves
    chance = np.zeros(doubled.sum() + 1)  # of each doubled sum of positive ranks, when every sign is a coin's
    chance[0] = 1.0
    for rank in doubled:
        chance[rank:] = chance[rank:] / 2 + chance[: len(chance) - rank] / 2
        chance[:rank] /= 2
    place = round(2 * positive)
    return float(min(1.0, 2 * min(chance[: place + 1].sum(), chance[place:].sum())))


def _permutation(differences: Float[np.ndarray, "N"]) -> float:
    num = len(differences)
    size = np.abs(differences).sum()
    found = abs(differences.sum())
    if num <= MOST_EXACT_FLIPS:
        signs = 1.0 - 2 * (np.arange(2**num)[:, None] >> np.arange(num) & 1)
        return float((np.abs(signs @ differences) >= found - 1e-12 * size).mean())
    blocks = _kept_signs(num) if num <= MOST_KEPT else _draw_signs(num)
    negative = np.concatenate([block @ differences for block in blocks])  # the sum of those that change sign
    as_far = (np.abs(differences.sum() - 2 * negative) >= found - 1e-12 * size).sum()
    return float((as_far + 1) / (NUM_PERMUTATIONS + 1))


@lru_cache(maxsize=2)
def _kept_signs(num: int) -> tuple[NDArray[np.float64], ...]:
    return tuple(_draw_signs(num))


def _draw_signs(num: int) -> Iterator[NDArray[np.float64]]:
    """Blocks of rows with 1 where a difference changes its sign, else 0."""
    rng = np.random.default_rng(0)
    for rows in rows_per_block(NUM_PERMUTATIONS, num):
        yield rng.integers(2, size=(rows, num)).astype(np.float64)


def _mean_ranks(values: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Ranks from 1, ascending; equal values share their mean rank."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _range_quantile(probability: float, num: int) -> float:
    """Of the range of `num` standard normal values: P(range < q) = num ∫ φ(z) (Φ(z) - Φ(z - q))^(num - 1) dz."""
    z = np.linspace(-8, 8, 4001)
    density = np.exp(-(z**2) / 2) / sqrt(2 * np.pi)
    below = (np.cumsum(density) - density / 2) * (z[1] - z[0])
    ranges = np.linspace(0, 8, 801)
    inside = below - np.interp(z - ranges[:, None], z, below, left=0.0)
    chance = num * (density * inside ** (num - 1)).sum(axis=1) * (z[1] - z[0])
    return float(np.interp(probability, chance, ranges))
