"""From two label maps to one structure in two masks, as predicted and as in the reference: what metrics start from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from jaxtyping import Bool, Integer
from numpy.typing import NDArray

from voxdino.core.errors import GeometryError
from voxdino.core.geometry import format_shape
from voxdino.evaluation.edges import EdgeDistances, edge_distances
from voxdino.evaluation.lesions import Lesions, match_lesions
from voxdino.evaluation.surface import SurfaceDistances, surface_distances

Box = tuple[slice, ...]

_BITS = 64  # structures that one pass finds


@dataclass(frozen=True, eq=False)
class MaskPair:
    """Two masks on one grid, cropped to the box that holds both (`pair_masks` makes it).

    prediction, reference: (*spatial), 2-D or 3-D.
    spacing:      length of a voxel along each axis, in mm (pixels where the file states none).
    voxel_volume: volume of a voxel in the unit that volumes are reported in (ml; in 2-D mm² or pixels).
    diagonal:     of the whole image, in the unit of the spacing.
    tolerance:    the distance up to which surfaces count as the same in NSD, in the unit of the spacing.
    min_overlap:  share of a lesion that must be marked for it to count as found; 0: one voxel.
    """

    prediction: Bool[np.ndarray, "*spatial"]
    reference: Bool[np.ndarray, "*spatial"]
    spacing: tuple[float, ...]
    voxel_volume: float
    diagonal: float
    tolerance: float
    min_overlap: float = 0.0

    @property
    def are_both_filled(self) -> bool:
        return bool(self.prediction.any() and self.reference.any())

    @cached_property
    def surfaces(self) -> SurfaceDistances | None:
        """Distances between both surfaces; None where a mask is empty and has no surface."""
        return surface_distances(self.prediction, self.reference, self.spacing) if self.are_both_filled else None

    @cached_property
    def edges(self) -> EdgeDistances | None:
        """Distances between the masks' edge voxels, in the unit of the spacing; None where a mask is empty."""
        return edge_distances(self.prediction, self.reference, self.spacing) if self.are_both_filled else None

    @cached_property
    def edges_in_voxels(self) -> EdgeDistances | None:
        """The same in voxels, as if all sides of a voxel were 1."""
        unit = (1.0,) * self.prediction.ndim
        return edge_distances(self.prediction, self.reference, unit) if self.are_both_filled else None

    @cached_property
    def lesions(self) -> Lesions:
        """Connected components of both masks, matched."""
        return match_lesions(self.prediction, self.reference, min_overlap=self.min_overlap)


@dataclass(frozen=True, eq=False)
class MapPair:
    """Two label maps on one grid (`pair_maps` makes it).

    prediction, reference: (*spatial) class indices, 2-D or 3-D.  The others: as in MaskPair.
    """

    prediction: Integer[np.ndarray, "*spatial"]
    reference: Integer[np.ndarray, "*spatial"]
    spacing: tuple[float, ...]
    voxel_volume: float

    def masks(self, members: Sequence[int], box: Box, *, tolerance: float = 1.0, min_overlap: float = 0.0) -> MaskPair:
        """The structure that unites the class indices `members`, within the box that holds it in both maps."""
        prediction, reference = (union_mask(indices[box], members) for indices in (self.prediction, self.reference))
        diagonal = float(np.linalg.norm(np.multiply(self.prediction.shape, self.spacing)))
        return MaskPair(prediction, reference, self.spacing, self.voxel_volume, diagonal, tolerance, min_overlap)

    def boxes(self, structures: Sequence[Sequence[int]]) -> list[Box]:
        """For each structure (its class indices) the smallest box that holds it in both maps, found in one pass.

        A structure that is in neither gives empty slices.
        """
        boxes: list[Box] = []
        for first in range(0, len(structures), _BITS):
            boxes += self._boxes(structures[first : first + _BITS])
        return boxes

    def _boxes(self, structures: Sequence[Sequence[int]]) -> list[Box]:
        """Of up to 64 structures: each is a bit, and the bits of a row, column or plane are united."""
        bits = np.zeros(max(map(max, structures)) + 2, np.uint64)  # the last stands for all indices above
        for place, members in enumerate(structures):
            bits[list(members)] |= np.uint64(1 << place)
        shape = self.prediction.shape
        planes = (array.reshape(-1, *shape[-2:]) for array in (self.prediction, self.reference))
        found = [np.zeros(size, np.uint64) for size in (self.prediction.size // prod(shape[-2:]), *shape[-2:])]
        for z, (claimed, there) in enumerate(zip(*planes, strict=True)):
            marked = np.take(bits, claimed, mode="clip") | np.take(bits, there, mode="clip")  # (H, W)
            columns = np.bitwise_or.reduce(marked, axis=0)
            found[0][z] = np.bitwise_or.reduce(columns)
            found[1] |= np.bitwise_or.reduce(marked, axis=1)
            found[2] |= columns
        axes = found[-len(shape) :]
        masks = [np.uint64(1 << place) for place in range(len(structures))]
        return [tuple(_range(along & mask) for along in axes) for mask in masks]

    def resized(self, num_pixels: int) -> "MapPair":
        """Both maps of a picture at num_pixels x num_pixels, nearest pixel, lengths in these pixels.

        Errors: GeometryError for a volume.
        """
        if self.prediction.ndim != 2:
            fact = f"this column is computed on pictures of {num_pixels} x {num_pixels} pixels, and here is a volume."
            raise GeometryError(fact, fix="leave that paper's columns out.")
        places = np.ix_(*(np.arange(num_pixels) * size // num_pixels for size in self.prediction.shape))
        return MapPair(self.prediction[places], self.reference[places], (1.0, 1.0), 1.0)


def pair_maps(
    prediction: Integer[np.ndarray, "..."], reference: Integer[np.ndarray, "..."], spacing: tuple[float, ...]
) -> MapPair:
    """Two label maps side by side. A volume of one slice becomes the picture it is; volumes stay those of its voxels.

    Maps in Fortran order (NIfTI) are turned, so that a plane of the first axis lies together in memory.

    Errors: GeometryError for maps of different shapes.
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
    if reference.flags.f_contiguous and not reference.flags.c_contiguous:
        prediction, reference, spacing = prediction.T, reference.T, spacing[::-1]
    return MapPair(prediction, reference, spacing, voxel_volume)


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
    maps = pair_maps(prediction.view(np.uint8), reference.view(np.uint8), spacing)
    (box,) = maps.boxes([(1,)])
    return maps.masks((1,), box, tolerance=tolerance, min_overlap=min_overlap)


def union_mask(indices: NDArray[np.integer], members: Sequence[int]) -> NDArray[np.bool_]:
    """Where `indices` holds one of the class indices `members`."""
    mask: NDArray[np.bool_] = indices == members[0]
    for member in members[1:]:
        mask |= indices == member
    return mask


def _range(is_there: NDArray[np.uint64]) -> slice:
    """From the first to the last position that is not 0."""
    found = np.flatnonzero(is_there)
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)
