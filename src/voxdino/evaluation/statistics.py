"""Means over cases with an honest interval: how far another sample of the same size could have moved them."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from statistics import NormalDist, fmean, stdev

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

NUM_RESAMPLES = 5000
MOST_KEPT = 500  # cases up to which the draws are kept for the next score: at most 20 MB each
FEW_CASES = (
    50  # below, intervals of a mean are too narrow more often than they say (André et al., MICCAI 2025 workshop)
)
FEWEST_GROUPS = 6  # see `groups_to_draw`


@dataclass(frozen=True)
class MeanInterval:
    """A mean over cases. low, high: its 95 % bootstrap interval; None for fewer than two defined values.

    num_cases: values that went in.  num_undefined: NaN values, left out of the mean and counted here.
    mean: None when no value is defined.
    """

    mean: float | None
    low: float | None
    high: float | None
    num_cases: int
    num_undefined: int


def mean_interval(
    values: Sequence[float], *, groups: Sequence[Hashable] | None = None, confidence: float = 0.95, seed: int = 0
) -> MeanInterval:
    """Mean of the defined values and its bootstrap interval over cases, the same for the same seed.

    groups: the patient of each value. Patients are then drawn whole, since their slices or scans resemble each other;
            with fewer than two there is no interval.

    The interval is BCa (bias-corrected and accelerated; Efron, "Better bootstrap confidence intervals", JASA 1987) at
    levels widened as Student's t asks of n cases (Hesterberg, "What teachers should know about the bootstrap", The
    American Statistician 2015): plain BCa held the mean of skewed Dice values in 89 of 100 samples of 10 cases, this in
    94. Where BCa is undefined (all resampled means on one side of the mean) it is the percentile interval so widened.
    No interval knows of what a sample may lack altogether: failures of 1 case in 50, tails heavier than of distances.
    """
    array = np.asarray(values, dtype=np.float64)
    is_defined = ~np.isnan(array)
    defined = array[is_defined]
    num_undefined = len(array) - len(defined)
    if len(defined) == 0:
        return MeanInterval(None, None, None, len(array), num_undefined)
    mean = float(defined.mean())
    if groups is None:
        sums, sizes = defined, np.ones(len(defined))
    else:
        kept = [group for group, is_kept in zip(groups, is_defined, strict=True) if is_kept]
        sums, sizes = sum_groups(defined, kept)
    if len(sums) == 1:
        return MeanInterval(mean, None, None, len(array), num_undefined)
    if np.ptp(defined) == 0:
        return MeanInterval(mean, mean, mean, len(array), num_undefined)
    low, high = _widened_bca(sums, sizes, (1 - confidence) / 2, seed)
    return MeanInterval(mean, low, high, len(array), num_undefined)


def sum_groups(
    values: Float[np.ndarray, "N"], groups: Sequence[Hashable]
) -> tuple[Float[np.ndarray, "G"], Float[np.ndarray, "G"]]:
    """Sum and number of the values of each group, groups in order of their first value."""
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    index = [places[group] for group in groups]
    return np.bincount(index, weights=values), np.bincount(index).astype(np.float64)


def owners_of(cases: Iterable[str], groups: Mapping[str, str]) -> tuple[str, ...]:
    """Whose each case is, as intervals and tests take it: its patient's, and where none is named, its own."""
    return tuple(f"group {groups[case]}" if case in groups else f"case {case}" for case in cases)


def groups_to_draw(
    groups: Sequence[str] | None, is_defined: Sequence[bool] | NDArray[np.bool_] | None = None
) -> tuple[str, ...] | None:
    """The group of each value, where intervals and tests are over groups; None where every value stands for itself.

    So it does where fewer than 6 groups have a value (is_defined; None: all have), unless each has one alone. All of g
    groups lie on one side of the truth with a chance of 2^(1 - g), where no resample of them and no change of signs
    reaches it: below 6 that is more than 5 %. What is said of so few is said of these groups alone (`few_groups`).
    """
    if groups is None:
        return None
    kept = groups if is_defined is None else [g for g, is_kept in zip(groups, is_defined, strict=True) if is_kept]
    return tuple(groups) if len(set(kept)) >= min(FEWEST_GROUPS, len(kept)) else None


def few_groups(num_groups: int, num_cases: int, what: str = "patients") -> str:
    """What a reader must know where `groups_to_draw` gives none."""
    words = f"{num_groups} {what} are too few to draw from: intervals and tests are over their {num_cases} cases"
    return f"{words} and speak of these alone."


def warn_of_few(num_cases: int, what: str = "cases") -> tuple[str, ...]:
    """The warning that belongs beside every interval over so many cases or patients; nothing from FEW_CASES on."""
    if num_cases >= FEW_CASES:
        return ()
    return (f"{num_cases} {what}: intervals over fewer than {FEW_CASES} tend to be too narrow.",)


def seeds_summary(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n - 1) over repeated runs with other seeds; no deviation of a single run."""
    return fmean(values), stdev(values) if len(values) > 1 else None


@cache
def t_quantile(probability: float, dof: int) -> float:
    """The value below which Student's t with `dof` degrees of freedom lies with `probability`; to about six digits.

    For T = sqrt(dof) tan(angle) the density of the angle is proportional to cos(angle)^(dof - 1).
    """
    widest = min(np.pi / 2, 12 / np.sqrt(dof))
    angles = np.linspace(0, widest, 20_001)
    density = np.cos(angles) ** (dof - 1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    angle = np.interp(abs(2 * probability - 1), below / below[-1], angles)
    return float(np.copysign(np.sqrt(dof) * np.tan(angle), probability - 0.5))


def pooled_interval(
    counts: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float | None, float | None, float | None]:
    """A statistic of summed counts and its percentile bootstrap interval over cases: value, low, high.

    counts:    (num_cases, n).  statistic: (m, n) sums -> (m,) values, NaN where undefined.
    None where the value is undefined; no interval for fewer than two cases. Resamples without a value are left out.
    """
    num_cases = len(counts)
    value = float(statistic(counts.sum(axis=0, keepdims=True))[0])
    if np.isnan(value):
        return None, None, None
    if num_cases < 2:
        return value, None, None
    drawn = [statistic(counted @ counts) for counted in _resamples(num_cases, seed)]
    low, high = np.nanquantile(np.concatenate(drawn), [(1 - confidence) / 2, (1 + confidence) / 2])
    return value, float(low), float(high)


def _widened_bca(
    sums: Float[np.ndarray, "G"], sizes: Float[np.ndarray, "G"], tail: float, seed: int
) -> tuple[float, float]:
    """Ends of the BCa interval of sum(sums) / sum(sizes), its levels widened for the number of groups."""
    num = len(sums)
    drawn = np.concatenate([counted @ np.stack([sums, sizes], axis=1) for counted in _resamples(num, seed)])
    means = drawn[:, 0] / drawn[:, 1]
    mean = sums.sum() / sizes.sum()
    rounding = 1e-12 * np.abs(sums).sum() / sizes.sum()  # sums in another order differ in their last digits
    share_below = ((means < mean - rounding).mean() + (means <= mean + rounding).mean()) / 2
    widened = np.sqrt(num / (num - 1)) * t_quantile(1 - tail, num - 1)
    shifts = np.array([-widened, widened])
    normal = NormalDist()
    if 0 < share_below < 1:
        bias = normal.inv_cdf(share_below)
        leave_one_out = (sums.sum() - sums) / (sizes.sum() - sizes)
        skew = leave_one_out.mean() - leave_one_out
        acceleration = (skew**3).sum() / (6 * (skew**2).sum() ** 1.5)
        shifts = bias + (bias + shifts) / (1 - acceleration * (bias + shifts))
    low, high = np.quantile(means, [normal.cdf(shift) for shift in shifts])
    return float(low), float(high)


def _resamples(num: int, seed: int) -> Iterable[Float[np.ndarray, "R {num}"]]:
    """Blocks of rows that say how often each of `num` cases is drawn; NUM_RESAMPLES rows in all."""
    return _kept_resamples(num, seed) if num <= MOST_KEPT else _draw_resamples(num, seed)


@lru_cache(maxsize=4)
def _kept_resamples(num: int, seed: int) -> tuple[NDArray[np.float64], ...]:
    return tuple(_draw_resamples(num, seed))


def _draw_resamples(num: int, seed: int) -> Iterator[NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    for rows in rows_per_block(NUM_RESAMPLES, num):
        yield rng.multinomial(num, np.full(num, 1 / num), size=rows).astype(np.float64)


def rows_per_block(num_rows: int, row_length: int, budget: int = 1_000_000) -> list[int]:
    """Split rows into blocks of at most `budget` numbers, so that memory stays bounded for any number of cases."""
    rows = max(1, budget // row_length)
    return [min(rows, num_rows - start) for start in range(0, num_rows, rows)]
