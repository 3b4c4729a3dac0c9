"""Distances between edge voxels, as MONAI and medpy take them: what the papers' own scripts report.

An edge voxel is a voxel of the mask with a face neighbour (in pictures: a side neighbour) outside of it; beyond the
border of the image everything is outside. All edge voxels count the same, whatever surface they stand for: a mask's
distances change with the grid it is stored on, which is why voxdino's own metrics use surface elements instead.
"""

import os
from dataclasses import dataclass

import edt
import numpy as np
from jaxtyping import Bool, Float


@dataclass(frozen=True, eq=False)
class EdgeDistances:
    """From each edge voxel of one mask to the nearest of the other, in the unit of the spacing, in no order."""

    from_prediction: Float[np.ndarray, "P"]
    from_reference: Float[np.ndarray, "R"]

    @property
    def pooled(self) -> Float[np.ndarray, "N"]:
        """Both directions together."""
        return np.concatenate([self.from_prediction, self.from_reference])


def edge_distances(
    prediction: Bool[np.ndarray, "*spatial"], reference: Bool[np.ndarray, "*spatial"], spacing: tuple[float, ...]
) -> EdgeDistances:
    """Distances between the edges of two masks that are not empty, 2-D or 3-D."""
    edges = [edge_voxels(mask) for mask in (prediction, reference)]
    return EdgeDistances(distances_to(edges[1], edges[0], spacing), distances_to(edges[0], edges[1], spacing))


def edge_voxels(mask: Bool[np.ndarray, "*spatial"]) -> Bool[np.ndarray, "*spatial"]:
    """The voxels of a mask that touch the outside with a face."""
    inner = mask.copy()
    for axis in range(mask.ndim):
        along, there = np.moveaxis(inner, axis, 0), np.moveaxis(mask, axis, 0)
        along[1:] &= there[:-1]
        along[:-1] &= there[1:]
        along[[0, -1]] = False
    return np.asarray(mask & ~inner)


def distances_to(
    target: Bool[np.ndarray, "*spatial"], where: Bool[np.ndarray, "*spatial"], spacing: tuple[float, ...]
) -> Float[np.ndarray, "N"]:
    """Euclidean distance to the nearest voxel of `target`, at the voxels of `where`; relative error below 2e-7."""
    shortest = min(spacing)  # squared distances in this unit are exact in float32 for the usual ratios of spacings
    relative = tuple(length / shortest for length in spacing)
    elsewhere = (~target).view(np.uint8)  # edt takes bytes 1.6 times as fast as truth values
    num_threads = len(os.sched_getaffinity(0))
    squared = edt.edtsq(elsewhere, anisotropy=relative, black_border=False, parallel=num_threads)
    return np.asarray(np.sqrt(squared[where].astype(np.float64)) * shortest)
