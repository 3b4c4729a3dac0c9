"""The distribution of voxel values: percentiles, mean and sd, exact and independent of the order of the voxels.

Small integers (CT, pictures, most MR) are counted once, which is many times faster than sorting them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 20  # values counted at a time: NumPy makes 8-byte copies of what it counts


def count_values(array: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct values of a non-empty integer array, ascending, and how often each occurs."""
    flat = array.reshape(-1)
    if flat.dtype.itemsize > 2:
        values, counts = np.unique(flat, return_counts=True)
        return values.astype(np.int64), counts
    smallest = int(flat.min())
    every = np.zeros(int(flat.max()) - smallest + 1, dtype=np.int64)
    for start in range(0, flat.size, _BLOCK):
        every += np.bincount(flat[start : start + _BLOCK].astype(np.int64) - smallest, minlength=every.size)
    present = np.flatnonzero(every)
    return present + smallest, every[present]


@dataclass(frozen=True, eq=False)
class Distribution:
    """values: ascending and distinct, with `counts` of each; or, where counts is None, all of them in any order."""

    values: NDArray[Any]
    counts: NDArray[np.int64] | None

    @classmethod
    def of(cls, array: NDArray[Any]) -> "Distribution":
        """Of all values of a non-empty array."""
        if array.dtype.kind not in "ui" or array.dtype.itemsize > 2:
            return cls(array.reshape(-1).astype(np.float32, copy=False), None)
        values, counts = count_values(array)
        return cls(values.astype(np.float32), counts)

    def percentiles(self, which: Sequence[float]) -> tuple[float, ...]:
        """Linearly interpolated, as `np.percentile` gives them."""
        if self.counts is None:
            return tuple(float(value) for value in np.percentile(self.values, which))
        edges = np.cumsum(self.counts)
        ranks = (edges[-1] - 1) * np.asarray(which) / 100
        low, high = (
            self.values[np.searchsorted(edges, rounded(ranks), side="right")] for rounded in (np.floor, np.ceil)
        )
        return tuple(float(value) for value in low + (high - low).astype(np.float64) * (ranks - np.floor(ranks)))

    def mean_and_sd(self) -> tuple[float, float]:
        """In float64; the sd of a constant is 0."""
        if self.counts is None:
            return float(self.values.mean(dtype=np.float64)), float(self.values.std(dtype=np.float64))
        values = self.values.astype(np.float64)
        mean = float(np.average(values, weights=self.counts))
        return mean, float(np.sqrt(np.average((values - mean) ** 2, weights=self.counts)))

    def clipped(self, lower: float, upper: float) -> "Distribution":
        return Distribution(np.clip(self.values, lower, upper), self.counts)

    def share_of_smallest(self) -> float:
        """How much of the whole has the smallest value."""
        if self.counts is not None:
            return float(self.counts[0] / self.counts.sum())
        return float(np.count_nonzero(self.values == self.values.min()) / self.values.size)

    def without_smallest(self) -> "Distribution":
        """Of the values above the smallest one; may be empty."""
        keep = self.values > self.values.min()
        return Distribution(self.values[keep], None if self.counts is None else self.counts[keep])
