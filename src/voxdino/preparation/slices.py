"""One case as the slices its plan asks for, made when they are asked for: no second copy of a volume in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxdino.core.errors import VoxdinoError
from voxdino.core.geometry import Grid
from voxdino.core.resample import resize_linear
from voxdino.core.volume import Volume
from voxdino.preparation.intensity import ChannelScaling, scale_case
from voxdino.preparation.orientation import SAME_SPACING, CaseGeometry, slice_geometry, to_slices
from voxdino.preparation.plan import Plan

_FEW_LEVELS = 255  # integer images with a smaller range are not rounded when resampled


@dataclass(frozen=True)
class CaseSlices:
    """Prepared slices of a case.

    native:  (C, D, H, W) values of the file in the smallest type that holds them, a view in the file's own order.
    size:    (rows, columns) of a prepared slice.
    scaling: of each of the model's channels.
    """

    native: NDArray[Any] = field(repr=False)
    size: tuple[int, int]
    scaling: tuple[ChannelScaling, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, D, rows, columns) as prepared."""
        return (*self.native.shape[:2], *self.size)

    def read(self, indices: slice | Sequence[int]) -> NDArray[Any]:
        """(C, d, rows, columns) of some slices, C-contiguous; a slice comes out the same whatever comes with it."""
        chosen = self.native[:, indices]
        if self.size == chosen.shape[2:]:
            return np.ascontiguousarray(chosen)
        resized = resize_linear(chosen, self.size, (2, 3))
        return np.rint(resized).astype(chosen.dtype) if self._is_rounded else resized

    @cached_property
    def _is_rounded(self) -> bool:
        """Whole numbers stay whole where that costs less than 1/500 of their range."""
        native = self.native
        return native.dtype.kind in "ui" and int(native.max()) - int(native.min()) >= _FEW_LEVELS


def slice_case(case_id: str, volume: Volume, plan: Plan) -> tuple[CaseSlices, CaseGeometry]:
    """The slices of a case at the plan's in-plane spacing, and the way back to its file.

    Errors: PlanError for a picture under a plan for volumes (or the reverse), ImageError for missing channels.
    """
    try:
        geometry = planned_geometry(volume.grid, plan)
        array = smallest_lossless(volume.array)
        scaling = scale_case(array, plan.channels)
    except VoxdinoError as error:
        error.where = error.where or (case_id if volume.source is None else str(volume.source))
        raise
    rows, columns = geometry.prepared_shape[1:]
    return CaseSlices(to_slices(array, geometry), (rows, columns), scaling), geometry


def planned_geometry(grid: Grid, plan: Plan) -> CaseGeometry:
    """Where the slices of a grid lie, at the plan's in-plane spacing. Errors: PlanError, as `slice_geometry`."""
    geometry = slice_geometry(grid, plan.slice_axis)
    size = _planned_size(geometry, plan)
    depth, rows, columns = geometry.prepared_shape
    if size == (rows, columns):
        return geometry
    spacing = geometry.prepared_spacing
    return geometry.model_copy(
        update={
            "prepared_shape": (depth, *size),
            "prepared_spacing": (spacing[0], spacing[1] * rows / size[0], spacing[2] * columns / size[1]),
        }
    )


def _planned_size(geometry: CaseGeometry, plan: Plan) -> tuple[int, int]:
    """(rows, columns) at the plan's in-plane spacing; the native ones where that is the same."""
    _, rows, columns = geometry.prepared_shape
    if plan.in_plane_spacing is None:
        return rows, columns
    ratios = [own / new for own, new in zip(geometry.prepared_spacing[1:], plan.in_plane_spacing, strict=True)]
    if all(abs(ratio - 1) <= SAME_SPACING for ratio in ratios):
        return rows, columns
    return max(1, round(rows * ratios[0])), max(1, round(columns * ratios[1]))


def smallest_lossless(array: NDArray[Any]) -> NDArray[Any]:
    """The same values in the smallest of uint8, int16, uint16, float32; the last rounds what none of them holds."""
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind == "f":
        array = array.astype(np.float32, copy=False)
        planes = (array[..., index] for index in range(array.shape[-1]))  # no second float copy of the whole
        if not all((plane == np.rint(plane)).all() for plane in planes):
            return array
    lowest, highest = array.min(), array.max()
    for dtype in (np.uint8, np.int16, np.uint16):
        limits = np.iinfo(dtype)
        if limits.min <= lowest and highest <= limits.max:
            return array.astype(dtype, copy=False)
    return array.astype(np.float32, copy=False)
