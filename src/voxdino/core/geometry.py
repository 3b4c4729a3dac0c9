"""Where voxels lie in the patient: shape, affine, spacing, orientation, and whether two grids are the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from voxdino.core.errors import GeometryError

AXIS_LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))  # negative and positive end of each world axis
SHEAR_TOLERANCE = 1e-4  # of direction cosines; what headers with four digits round to

Unit = Literal["mm", "px"]


@dataclass(frozen=True, eq=False)
class Grid:
    """A regular grid of voxels: its size and the affine from voxel indices to world millimetres.

    shape:  voxels per axis, in array order; 3 axes for volumes, 2 for pictures.
    affine: (n + 1, n + 1) float64, index -> RAS+ millimetres (as NIfTI). Pictures: index -> (row, column).
    unit:   "px" when the file states no spacing; lengths are then in pixels.

    Errors: GeometryError for an empty shape, NaN, or a singular affine.
    """

    shape: tuple[int, ...]
    affine: NDArray[np.float64]
    unit: Unit = "mm"

    def __post_init__(self) -> None:
        shape = tuple(int(size) for size in self.shape)
        affine = np.array(self.affine, dtype=np.float64)
        ndim = len(shape)
        if ndim not in (2, 3):
            raise GeometryError(f"a grid has 2 or 3 axes, not {ndim}", fix="pick one frame, or split the axes.")
        if min(shape) < 1:
            raise GeometryError(f"a grid of {format_shape(shape)} voxels holds nothing", fix="write the image again.")
        if affine.shape != (ndim + 1, ndim + 1):
            raise GeometryError(f"an affine of shape {affine.shape} does not fit {ndim} axes", fix="check the header.")
        if not np.isfinite(affine).all():
            raise GeometryError("the affine holds NaN or infinity", fix="repair the header's orientation fields.")
        linear = affine[:ndim, :ndim]
        lengths = np.linalg.norm(linear, axis=0)
        if lengths.min() <= 0 or abs(np.linalg.det(linear / np.where(lengths > 0, lengths, 1))) < 1e-4:
            raise GeometryError("the affine is singular: some axes have no extent", fix="repair the header.")
        affine.setflags(write=False)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    @classmethod
    def from_spacing(cls, shape: Sequence[int], spacing: Sequence[float] | None = None, unit: Unit = "mm") -> "Grid":
        """An axis-aligned grid with its first voxel at the origin. spacing: one length per axis, 1 by default."""
        return cls(tuple(shape), np.diag([*(spacing or [1.0] * len(shape)), 1.0]), unit)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def spacing(self) -> tuple[float, ...]:
        """Length of one voxel along each array axis, in `unit`: the affine's column norms."""
        return tuple(float(length) for length in np.linalg.norm(self.affine[: self.ndim, : self.ndim], axis=0))

    @property
    def orientation(self) -> str:
        """The world direction each array axis runs to, e.g. "LPS"; nearest letters where the grid is oblique."""
        axes, signs = self.axes_to_world()
        return "".join(AXIS_LETTERS[axis][sign > 0] for axis, sign in zip(axes, signs, strict=True))

    @property
    def voxel_volume(self) -> float:
        """Volume of one voxel in cubic `unit` (area in 2-D)."""
        return float(abs(np.linalg.det(self.affine[: self.ndim, : self.ndim])))

    def axes_to_world(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """For each array axis, the world axis it runs along best and its sign: a permutation, also where oblique."""
        linear = self.affine[: self.ndim, : self.ndim]
        cosines = linear / np.linalg.norm(linear, axis=0)
        axes = max(
            permutations(range(self.ndim)),
            key=lambda world: sum(abs(cosines[w, array]) for array, w in enumerate(world)),
        )
        return axes, tuple(1 if cosines[w, array] > 0 else -1 for array, w in enumerate(axes))

    def transposed(self, order: Sequence[int], flips: Sequence[bool]) -> "Grid":
        """The grid after `array.transpose(order)` and then reversing the axes marked in `flips` (in the new order)."""
        ndim = self.ndim
        change = np.zeros((ndim + 1, ndim + 1))  # new index -> old index
        change[ndim, ndim] = 1.0
        shape = tuple(self.shape[axis] for axis in order)
        for new_axis, (old_axis, flip) in enumerate(zip(order, flips, strict=True)):
            change[old_axis, new_axis] = -1.0 if flip else 1.0
            change[old_axis, ndim] = shape[new_axis] - 1 if flip else 0.0
        return Grid(shape, self.affine @ change, self.unit)

    def resized(self, shape: Sequence[int]) -> "Grid":
        """The grid that covers the same box with other voxel counts (outer edges agree)."""
        ratio = np.array(self.shape) / np.array(shape)
        change = np.diag([*ratio, 1.0])
        change[: self.ndim, self.ndim] = (ratio - 1) / 2
        return Grid(tuple(shape), self.affine @ change, self.unit)

    def largest_offset(self, other: "Grid") -> float:
        """How far, in `unit`, the worst corner voxel of this grid lies from that voxel of `other` (equal shapes)."""
        corners = np.array(np.meshgrid(*[(0, size - 1) for size in self.shape], indexing="ij")).reshape(self.ndim, -1)
        homogeneous = np.vstack([corners, np.ones(corners.shape[1])])
        return float(np.linalg.norm(((self.affine - other.affine) @ homogeneous)[: self.ndim], axis=0).max())

    def same_as(self, other: "Grid", tolerance: float | None = None) -> bool:
        """Whether both grids agree: equal shapes, corners within `tolerance` (default: 1 % of a voxel)."""
        if self.shape != other.shape:
            return False
        allowed = 0.01 * min(*self.spacing, *other.spacing) if tolerance is None else tolerance
        return self.largest_offset(other) <= allowed

    def index_to_world(self, indices: NDArray[Any] | Sequence[Any]) -> NDArray[np.float64]:
        """World coordinates (N, n) of voxel indices (N, n)."""
        points = np.atleast_2d(np.asarray(indices, dtype=np.float64))
        return np.asarray(points @ self.affine[: self.ndim, : self.ndim].T + self.affine[: self.ndim, self.ndim])


def canonical_transpose(grid: Grid, world_order: Sequence[int]) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """The (order, flips) for `Grid.transposed` after which array axis i runs along +world_order[i].

    With world_order (2, 1, 0) a volume comes out with its slices along S, rows along A, columns along R.
    """
    axes, signs = grid.axes_to_world()
    order = tuple(axes.index(world) for world in world_order)
    return order, tuple(signs[axis] < 0 for axis in order)


def require_right_angles(grid: Grid) -> None:
    """GeometryError for a sheared grid: direction cosines off the nearest rotation by more than 1e-4."""
    cosines = grid.affine[: grid.ndim, : grid.ndim] / np.array(grid.spacing)
    left, _, right = np.linalg.svd(cosines)
    largest = float(np.abs(cosines - left @ right).max())
    if largest > SHEAR_TOLERANCE:
        fact = f"the affine is sheared: its axes are not at right angles (off by {largest:.2g})."
        raise GeometryError(fact, fix="resample the image to a grid with right angles.")


def format_shape(shape: Sequence[int]) -> str:
    """ "512 x 512 x 90": how messages print sizes."""
    return " x ".join(str(size) for size in shape)


def format_spacing(spacing: Sequence[float], unit: Unit = "mm") -> str:
    """ "0.8 x 0.8 x 5 mm": how messages print spacings."""
    return f"{' x '.join(f'{length:.4g}' for length in spacing)} {unit}"
