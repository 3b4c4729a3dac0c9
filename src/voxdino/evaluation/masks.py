"""One structure in two masks, as predicted and as in the reference: what every metric is computed from."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from jaxtyping import Bool

from voxdino.core.errors import GeometryError
from voxdino.core.geometry import format_shape
from voxdino.evaluation.lesions import Lesions, match_lesions
from voxdino.evaluation.surface import SurfaceDistances, surface_distances


@dataclass(frozen=True, eq=False)
class MaskPair:
    """Two masks on one grid, cropped to the box that holds both (`pair_masks` makes it).

    prediction, reference: (*spatial), 2-D or 3-D.
    spacing:      length of a voxel along each axis, in mm (pixels where the file states none).
    voxel_volume: volume of a voxel in the unit that volumes are reported in (ml; in 2-D mm² or pixels).
    tolerance:    the distance up to which surfaces count as the same in NSD, in the unit of the spacing.
    min_overlap:  share of a lesion that must be marked for it to count as found; 0: one voxel.
    """

    prediction: Bool[np.ndarray, "*spatial"]
    reference: Bool[np.ndarray, "*spatial"]
    spacing: tuple[float, ...]
    voxel_volume: float
    tolerance: float
    min_overlap: float = 0.0

    @cached_property
    def surfaces(self) -> SurfaceDistances | None:
        """Distances between both surfaces; None where a mask is empty and has no surface."""
        if not (self.prediction.any() and self.reference.any()):
            return None
        return surface_distances(self.prediction, self.reference, self.spacing)

    @cached_property
    def lesions(self) -> Lesions:
        """Connected components of both masks, matched."""
        return match_lesions(self.prediction, self.reference, min_overlap=self.min_overlap)


def pair_masks(
    prediction: Bool[np.ndarray, "..."],
    reference: Bool[np.ndarray, "..."],
    spacing: tuple[float, ...],
    *,
    tolerance: float = 1.0,
    min_overlap: float = 0.0,
) -> MaskPair:
    """Crop both masks to the box that holds them. A volume of one slice is scored as the picture it is.

    Errors: GeometryError for masks of different shapes.
    """
    if prediction.shape != reference.shape:
        raise GeometryError(
            f"a prediction of {format_shape(prediction.shape)} voxels, a reference of {format_shape(reference.shape)}",
            fix="bring both onto one grid.",
        )
    voxel_volume = prod(spacing) / (1000 if len(spacing) == 3 else 1)  # mm³ -> ml
    if prediction.ndim == 3 and 1 in prediction.shape:
        thin = prediction.shape.index(1)
        prediction, reference = prediction.squeeze(thin), reference.squeeze(thin)
        spacing = spacing[:thin] + spacing[thin + 1 :]
    box = bounding_box(prediction | reference)
    return MaskPair(prediction[box], reference[box], spacing, voxel_volume, tolerance, min_overlap)


def bounding_box(mask: Bool[np.ndarray, "*spatial"]) -> tuple[slice, ...]:
    """The smallest box that holds the mask; an empty mask gives empty slices."""
    box: list[slice] = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        found = np.flatnonzero(mask[tuple(box)].any(axis=others))
        box.append(slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0))
    return tuple(box)
