"""From the file's array to (D, H, W) slices that lie as a reader sees them, and back, without losing a voxel.

D runs along the plan's slice axis; rows and columns run as in a DICOM viewer, so that all cases of a set look alike
whatever order their files use. Only axes are swapped and flipped here: nothing is interpolated.

    slices along   D runs to   rows run to   columns run to
    S (axial)      S           P             L
    A (coronal)    P           I             L
    R (sagittal)   L           I             P
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from voxdino.core.errors import PlanError
from voxdino.core.geometry import Grid, Unit, canonical_transpose
from voxdino.core.records import Record
from voxdino.core.volume import LabelMap

SliceAxis = Literal["R", "A", "S"]

SAME_SPACING = 0.02  # spacings this near to each other count as one: nothing is resampled

DISPLAY_AXES: dict[SliceAxis, tuple[str, str, str]] = {  # world axes of D, H, W
    "S": ("S", "A", "R"),
    "A": ("A", "S", "R"),
    "R": ("R", "S", "A"),
}
_WORLD = ("R", "A", "S")
_RUNS_UP = {"S": (True, False, False), "A": (False, False, False), "R": (False, False, False)}  # or to L, P, I


class CaseGeometry(Record):
    """How a case lay in its file, and what was done to it.

    shape, affine, unit: the grid of the file.
    order, flips:        as `Grid.transposed` takes them, to (D, H, W); of 2 axes for pictures, which get D = 1.
    prepared_shape:      (D, H, W) as stored.   prepared_spacing: in `unit`, (D, H, W); D is 1 for pictures.
    """

    shape: tuple[int, ...]
    affine: tuple[tuple[float, ...], ...]
    unit: Unit
    order: tuple[int, ...]
    flips: tuple[bool, ...]
    prepared_shape: tuple[int, int, int]
    prepared_spacing: tuple[float, float, float]

    @property
    def original_grid(self) -> Grid:
        return Grid(self.shape, np.array(self.affine), self.unit)

    @property
    def native_shape(self) -> tuple[int, int, int]:
        """(D, H, W) before in-plane resampling: the size that `restore_labels` takes."""
        sizes = tuple(self.shape[axis] for axis in self.order)
        depth, rows, columns = sizes if len(sizes) == 3 else (1, *sizes)
        return depth, rows, columns


def slice_geometry(grid: Grid, slice_axis: SliceAxis | None) -> CaseGeometry:
    """Where the slices of a grid lie. slice_axis None: the grid is a picture.

    Errors: PlanError for a volume where the plan is for pictures, and the other way round.
    """
    if (grid.ndim == 3) != (slice_axis is not None):
        found, planned = ("a volume", "pictures") if grid.ndim == 3 else ("a picture", "volumes")
        fix = "use a plan made for this kind of image."
        raise PlanError(f"is {found}, but the plan is for {planned}.", fix=fix)
    if slice_axis is None:
        order: tuple[int, ...] = (0, 1)
        flips: tuple[bool, ...] = (False, False)
        spacing = (1.0, *grid.spacing)
    else:
        order, to_positive = canonical_transpose(grid, [_WORLD.index(world) for world in DISPLAY_AXES[slice_axis]])
        flips = tuple(flip == runs_up for flip, runs_up in zip(to_positive, _RUNS_UP[slice_axis], strict=True))
        spacing = tuple(grid.spacing[axis] for axis in order)
    depth, rows, columns = (1, *grid.shape) if grid.ndim == 2 else tuple(grid.shape[axis] for axis in order)
    return CaseGeometry(
        shape=grid.shape,
        affine=tuple(tuple(float(value) for value in row) for row in grid.affine),
        unit=grid.unit,
        order=order,
        flips=flips,
        prepared_shape=(depth, rows, columns),
        prepared_spacing=(spacing[0], spacing[1], spacing[2]),
    )


def to_slices(array: NDArray[Any], geometry: CaseGeometry) -> NDArray[Any]:
    """A view of (*spatial) in file order as (D, H, W); leading axes before the spatial ones stay where they are."""
    lead = array.ndim - len(geometry.order)
    view: NDArray[Any] = array.transpose(*range(lead), *(lead + axis for axis in geometry.order))
    view = np.flip(view, tuple(lead + axis for axis, flip in enumerate(geometry.flips) if flip))
    return view[..., None, :, :] if len(geometry.order) == 2 else view


def from_slices(array: NDArray[Any], geometry: CaseGeometry) -> NDArray[Any]:
    """The inverse of `to_slices`: (D, H, W) at native size as (*spatial) in file order, C-contiguous."""
    view: NDArray[Any] = array[0] if len(geometry.order) == 2 else array
    view = np.flip(view, tuple(axis for axis, flip in enumerate(geometry.flips) if flip))
    return np.ascontiguousarray(view.transpose(np.argsort(geometry.order)))


def restore_labels(labels: NDArray[Any], geometry: CaseGeometry) -> LabelMap:
    """A label map on the case's original grid from (D, H, W) at `geometry.native_shape`."""
    if labels.shape != geometry.native_shape:
        raise ValueError(f"labels of shape {labels.shape}, but the case's slices are {geometry.native_shape}")
    return LabelMap(from_slices(labels, geometry), geometry.original_grid)
