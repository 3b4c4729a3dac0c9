"""Means over cases with an honest interval: how far another sample of the same size could have moved them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 5000
FEW_CASES = (
    50  # below, intervals of a mean are too narrow more often than they say (André et al., MICCAI 2025 workshop)
)


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


def mean_interval(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> MeanInterval:
    """Mean of the defined values and its bootstrap interval over cases, the same for the same seed.

    The interval is BCa (bias-corrected and accelerated; Efron, "Better bootstrap confidence intervals", JASA 1987).
    Where that is undefined (all resampled means on one side of the mean) it is the plain percentile interval.
    """
    array = np.asarray(values, dtype=np.float64)
    defined = array[~np.isnan(array)]
    num_undefined = len(array) - len(defined)
    if len(defined) == 0:
        return MeanInterval(None, None, None, len(array), num_undefined)
    mean = float(defined.mean())
    if len(defined) == 1:
        return MeanInterval(mean, None, None, len(array), num_undefined)
    if np.ptp(defined) == 0:
        return MeanInterval(mean, mean, mean, len(array), num_undefined)
    low, high = _bca(defined, (1 - confidence) / 2, np.random.default_rng(seed))
    return MeanInterval(mean, low, high, len(array), num_undefined)


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
    rng = np.random.default_rng(seed)
    drawn = [
        statistic(rng.multinomial(num_cases, np.full(num_cases, 1 / num_cases), size=rows) @ counts)
        for rows in _rows_per_block(NUM_RESAMPLES, num_cases)
    ]
    low, high = np.nanquantile(np.concatenate(drawn), [(1 - confidence) / 2, (1 + confidence) / 2])
    return value, float(low), float(high)


def _bca(values: NDArray[np.float64], tail: float, rng: np.random.Generator) -> tuple[float, float]:
    """Ends of the BCa interval of the mean that leaves out `tail` on each side."""
    num = len(values)
    means = np.concatenate(
        [values[rng.integers(num, size=(rows, num))].mean(axis=1) for rows in _rows_per_block(NUM_RESAMPLES, num)]
    )
    mean = values.mean()
    share_below = ((means < mean).sum() + 0.5 * (means == mean).sum()) / len(means)
    levels = np.array([tail, 1 - tail])
    if 0 < share_below < 1:
        normal = NormalDist()
        bias = normal.inv_cdf(share_below)
        leave_one_out = (values.sum() - values) / (num - 1)
        skew = leave_one_out.mean() - leave_one_out
        acceleration = (skew**3).sum() / (6 * (skew**2).sum() ** 1.5)
        shifts = [bias + normal.inv_cdf(level) for level in levels]
        levels = np.array([normal.cdf(bias + shift / (1 - acceleration * shift)) for shift in shifts])
    low, high = np.quantile(means, levels)
    return float(low), float(high)


def _rows_per_block(num_rows: int, row_length: int, budget: int = 1_000_000) -> list[int]:
    """Split rows into blocks of at most `budget` numbers, so that memory stays bounded for any number of cases."""
    rows = max(1, budget // row_length)
    return [min(rows, num_rows - start) for start in range(0, num_rows, rows)]
