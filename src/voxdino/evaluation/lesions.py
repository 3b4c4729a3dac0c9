"""Lesion by lesion: which of the reference are found, which of the prediction are there, and how that depends on size.

A lesion is a connected component of a structure (26 neighbours; in pictures and single slices 8).

- A lesion of the reference is found when the prediction marks one voxel of it, or the share `min_overlap` of it.
- A lesion of the prediction is true when one voxel of it, or that share, lies in the reference.
- One predicted lesion may find several, and one of the reference make several predicted ones true: neither merging nor
  splitting counts as a mistake.
- recall = found / reference, precision = true / predicted, F1 their harmonic mean.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from voxdino.evaluation.scores import LesionBin, LesionScores, LesionSummary, Share
from voxdino.evaluation.statistics import pooled_interval

VOLUME_EDGES = (10.0, 100.0, 1000.0, 10000.0)  # mm³ (2.7, 5.8, 12 and 27 mm across), mm² or pixels


@dataclass(frozen=True, eq=False)
class Lesions:
    """The lesions of one pair of masks.

    num_voxels, found: (R,) of each lesion of the reference.  num_true: predicted ones that are in the reference.
    """

    num_voxels: Int[np.ndarray, "R"]
    found: Bool[np.ndarray, "R"]
    num_predicted: int
    num_true: int

    @property
    def recall(self) -> float:
        """NaN where the reference has no lesion."""
        return float(self.found.mean()) if self.found.size else float("nan")

    @property
    def precision(self) -> float:
        """NaN where none is predicted."""
        return self.num_true / self.num_predicted if self.num_predicted else float("nan")

    @property
    def f1(self) -> float:
        """NaN where neither has a lesion; 0 where only one has, or none is found."""
        counts = [self.found.sum(), self.found.size, self.num_true, self.num_predicted]
        return float(_f1(np.array([counts], dtype=np.float64))[0])


def match_lesions(
    prediction: Bool[np.ndarray, "*spatial"], reference: Bool[np.ndarray, "*spatial"], *, min_overlap: float = 0.0
) -> Lesions:
    """Match the components of two masks, 2-D or 3-D. min_overlap: share of a lesion; 0: one voxel is enough."""
    num_voxels, found = _covered(reference, prediction, min_overlap)
    _, is_true = _covered(prediction, reference, min_overlap)
    return Lesions(num_voxels, found, len(is_true), int(is_true.sum()))


def _covered(
    mask: NDArray[np.bool_], by: NDArray[np.bool_], share: float
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Voxels of each component of `mask`, and whether `by` covers enough of it."""
    if not mask.any():
        return np.zeros(0, np.int64), np.zeros(0, bool)
    connectivity = 8 if mask.ndim == 2 else 26
    numbered = cc3d.connected_components(np.require(mask, requirements=["C", "W"]), connectivity=connectivity)
    num_voxels = np.bincount(numbered[mask])[1:]
    overlap = np.bincount(numbered[mask & by], minlength=len(num_voxels) + 1)[1:]
    return num_voxels, (overlap > 0) & (overlap >= share * num_voxels - 1e-9)


def lesion_scores(lesions: Lesions, voxel_size: float) -> LesionScores:
    """The record of a case. voxel_size: volume of a voxel (pictures: area)."""
    order = np.argsort(lesions.num_voxels, kind="stable")
    return LesionScores(
        volumes=tuple((lesions.num_voxels[order] * voxel_size).tolist()),
        found=tuple(lesions.found[order].tolist()),
        num_predicted=lesions.num_predicted,
        num_true=lesions.num_true,
    )


def summarise_lesions(structure: str, cases: Sequence[LesionScores], *, unit: str, min_overlap: float) -> LesionSummary:
    """All lesions of a structure over the cases, together and by size."""
    counts = np.array(
        [[sum(case.found), len(case.found), case.num_true, case.num_predicted] for case in cases], dtype=np.float64
    ).reshape(-1, 4)
    found, reference, num_true, predicted = counts.sum(axis=0).astype(int).tolist()
    volumes = np.sort([volume for case in cases for volume in case.volumes])
    terciles = np.quantile(volumes, (1 / 3, 2 / 3), method="lower") if volumes.size else np.zeros(0)
    return LesionSummary(
        structure=structure,
        unit=unit,
        min_overlap=min_overlap,
        num_reference=reference,
        num_found=found,
        num_predicted=predicted,
        num_true=num_true,
        recall=_share(counts, _recall),
        precision=_share(counts[:, 2:], _recall),
        f1=_share(counts, _f1),
        by_tercile=_bins(cases, np.unique(terciles).tolist()),
        by_volume=_bins(cases, list(VOLUME_EDGES)),
    )


def _bins(cases: Sequence[LesionScores], edges: Sequence[float]) -> tuple[LesionBin, ...]:
    """Recall between the edges, for the bins that hold any lesion."""
    bins = []
    for low, high in zip([None, *edges], [*edges, None], strict=True):
        lowest, highest = -np.inf if low is None else low, np.inf if high is None else high
        counts = np.zeros((len(cases), 2))
        for row, case in zip(counts, cases, strict=True):
            inside = (np.array(case.volumes) > lowest) & (np.array(case.volumes) <= highest)
            row[:] = np.array(case.found, dtype=bool)[inside].sum(), inside.sum()
        num_found, num = counts.sum(axis=0).astype(int).tolist()
        if num:
            bins.append(LesionBin(low=low, high=high, num=num, num_found=num_found, recall=_share(counts, _recall)))
    return tuple(bins)


def _share(counts: NDArray[np.float64], statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Share:
    value, low, high = pooled_interval(counts, statistic)
    return Share(value=value, low=low, high=high)


def _recall(sums: Float[np.ndarray, "n columns"]) -> Float[np.ndarray, "n"]:
    """First column by second; NaN where that is 0."""
    part, whole = sums[:, 0], sums[:, 1]
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _f1(sums: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n"]:
    """Of (found, reference, true, predicted): harmonic mean of recall and precision; NaN where there is no lesion."""
    recall, precision = (np.nan_to_num(_recall(part)) for part in (sums[:, :2], sums[:, 2:]))
    mean = 2 * recall * precision / np.maximum(recall + precision, 1e-12)
    return np.where(sums[:, 1] + sums[:, 3] > 0, mean, np.nan)
