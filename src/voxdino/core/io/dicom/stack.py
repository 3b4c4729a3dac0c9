"""From the frames of a series to one grid: sorted by position, without gaps, straight or said to be tilted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxdino.core.errors import GeometryError
from voxdino.core.geometry import Grid, format_shape, require_right_angles
from voxdino.core.io.dicom.headers import Instance, Plane
from voxdino.core.io.dicom.pixels import Frames

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])

_UNEVEN = 0.01  # share of the distance by which slices may differ in theirs
ROUNDED_MM = 0.0101  # what two decimals of a millimetre round to
_TURNED = 1e-3  # of direction cosines, within one series
_STRAIGHT = 0.01  # voxels by which a whole stack may lean without being resampled
_SPLIT = "give the folder of one series, whose slices are parallel and of one size."
_COMPLETE = "export the whole series again."


@dataclass(frozen=True, repr=False)
class Stack:
    """The frames of one image in slice order, and where they lie.

    instances, indices: per slice, the file and the frame in it.
    grid:  of the image that is read; 3-D, or 2-D where the header has no place in space.
    shear: voxels (columns, rows) that each slice is shifted against the one before (gantry tilt); (0, 0) if straight.
    """

    path: Path
    instances: tuple[Instance, ...]
    indices: tuple[int, ...]
    grid: Grid
    shear: tuple[float, float]
    notes: tuple[str, ...]

    @property
    def planes(self) -> tuple[Plane, ...]:
        return tuple(file.planes[index] for file, index in zip(self.instances, self.indices, strict=True))

    def frames(self) -> list[Frames]:
        """What to read, file by file."""
        per_file: dict[int, list[tuple[int, int]]] = {}
        for target, (file, index) in enumerate(zip(self.instances, self.indices, strict=True)):
            per_file.setdefault(id(file), []).append((index, target))
        first = {id(file): file for file in self.instances}
        return [
            Frames(first[key], tuple(index for index, _ in pairs), tuple(target for _, target in pairs))
            for key, pairs in per_file.items()
        ]


def stack_frames(instances: Sequence[Instance], path: Path, notes: tuple[str, ...] = ()) -> Stack:
    """Sort the frames of a series along the normal of their planes.

    Errors: GeometryError for gaps, uneven distances, several frames in one place, planes that differ in size, spacing
    or direction, and for frames without position (unless it is a single one: a picture).
    """
    unique = {instance.sop_uid or str(instance.place.where): instance for instance in instances}
    if len(unique) < len(instances):
        notes = (*notes, f"{len(instances) - len(unique)} files are copies of others and left aside")
    instances = tuple(unique.values())
    _require_alike(instances, path)
    if any(instance.has_burned_in_text for instance in instances):
        notes = (*notes, "the header says that text is burned into the image; it is not removed")
    pairs = [(instance, index) for instance in instances for index in range(instance.num_frames)]
    planes = [instance.planes[index] for instance, index in pairs]
    placed = [plane.position is not None and plane.orientation is not None for plane in planes]
    if not any(placed) and len(planes) == 1:
        return _picture(instances[0], path, notes)
    if not all(placed):
        fact = f"{placed.count(False)} of {len(planes)} images have no position (ImagePositionPatient)."
        raise GeometryError(fact, where=path, fix="give the files of one volume, or single images one by one.")
    across, down = _directions(planes, path)
    spacing = _pixel_spacing(planes, path)
    normal = np.cross(across, down)
    positions = np.array([plane.position for plane in planes])  # (slices, 3)
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    _require_even(positions @ normal, path)
    step = _step(positions, normal, planes[0])
    if len(planes) == 1:
        thickness = planes[0].thickness
        told = f"{thickness:g} mm thick" if thickness else "of unknown thickness, taken as 1 mm"
        notes = (*notes, f"a single slice, {told}; give the folder for the whole series")
    grid, shear = _grid(instances[0], spacing, (across, down, normal), positions, step, path)
    if shear != (0.0, 0.0):
        angle = np.degrees(np.arctan2(np.linalg.norm(step - (step @ normal) * normal), step @ normal))
        notes = (*notes, f"gantry tilt of {angle:.3g} degrees: resampled to a grid with right angles")
    return Stack(
        path,
        tuple(pairs[place][0] for place in order),
        tuple(pairs[place][1] for place in order),
        grid,
        shear,
        notes,
    )


def _picture(instance: Instance, path: Path, notes: tuple[str, ...]) -> Stack:
    """A single image without a place in space: (rows, columns), in mm where the header says so."""
    spacing = instance.planes[0].spacing
    if spacing is None:
        notes = (*notes, "no PixelSpacing: sizes are in pixels")
    shape = (instance.rows, instance.columns)
    grid = Grid.from_spacing(shape, spacing, "px" if spacing is None else "mm")
    return Stack(path, (instance,), (0,), grid, (0.0, 0.0), notes)


def _require_alike(instances: Sequence[Instance], path: Path) -> None:
    sizes = {(one.columns, one.rows) for one in instances}
    if len(sizes) > 1:
        told = ", ".join(format_shape(size) for size in sorted(sizes)[:3])
        raise GeometryError(f"its images have different sizes: {told}.", where=path, fix=_SPLIT)
    kinds = {(one.samples, one.photometric == "PALETTE COLOR", one.is_inverted, one.is_float) for one in instances}
    if len(kinds) > 1:
        raise GeometryError("its images are of different kinds (colour, grey, inverted).", where=path, fix=_SPLIT)


def _directions(planes: Sequence[Plane], path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors along rows and along columns, LPS."""
    every = np.array([plane.orientation for plane in planes])  # (slices, 6)
    if np.abs(every - every[0]).max() > _TURNED:
        turned = len({tuple(np.round(one, 2)) for one in every})
        fact = f"the orientation varies: its slices lie in {max(2, turned)} different directions."
        raise GeometryError(fact, where=path, fix=_SPLIT)
    across, down = every.mean(axis=0).reshape(2, 3)
    lengths = np.linalg.norm(across), np.linalg.norm(down)
    if max(abs(length - 1) for length in lengths) > 10 * _TURNED or abs(across @ down) > _TURNED:
        fact = "its ImageOrientationPatient is not two unit vectors at right angles."
        raise GeometryError(fact, where=path, fix="correct the header, or export it again.")
    return across / lengths[0], down / lengths[1]


def _pixel_spacing(planes: Sequence[Plane], path: Path) -> tuple[float, float]:
    """(between rows, between columns) in mm."""
    found = [plane.spacing for plane in planes if plane.spacing is not None]
    if len(found) < len(planes):
        fact = "has no PixelSpacing: nobody knows how large its voxels are."
        raise GeometryError(fact, where=path, fix="export it with PixelSpacing, that at the patient.")
    if np.ptp(np.array(found), axis=0).max() > _TURNED * min(found[0]):
        raise GeometryError("its images differ in PixelSpacing.", where=path, fix=_SPLIT)
    return found[0]


def _require_even(places: NDArray[np.float64], path: Path) -> None:
    """places: of the sorted slices along their normal, mm."""
    distances = np.diff(places)
    if not len(distances):
        return
    step = float(np.median(distances))
    if step < ROUNDED_MM:
        per_place = len(places) / max(1, int((distances > ROUNDED_MM).sum()) + 1)
        fact = f"holds {per_place:.3g} images in each place (phases, echoes or diffusion weights)."
        raise GeometryError(fact, where=path, fix="export one of them as a series of its own.")
    odd = np.flatnonzero(np.abs(distances - step) > max(_UNEVEN * step, ROUNDED_MM))
    if not len(odd):
        return
    first = odd[0]
    low, high = f"{places[first]:.6g}", f"{places[first + 1]:.6g}"
    if distances[first] < ROUNDED_MM:
        fact = f"two different images lie in the same place (z = {low})."
        raise GeometryError(fact, where=path, fix="remove the one that does not belong to the series.")
    missing = distances[odd] / step - 1
    if (np.abs(missing - np.rint(missing)) < 0.1).all() and (missing > 0.5).all():
        count = int(np.rint(missing).sum())
        fact = f"gap between z = {low} and z = {high} mm: {count} slice{'s are' if count > 1 else ' is'} missing"
        fact += "." if len(odd) == 1 else f" here and in {len(odd) - 1} more places."
        raise GeometryError(fact, where=path, fix=_COMPLETE)
    fact = f"unequal distances between slices: {distances.min():.4g} to {distances.max():.4g} mm "
    fact += f"(first at z = {low} to {high} mm)."
    raise GeometryError(fact, where=path, fix="resample it to equal distances, or export it again.")


def _step(positions: NDArray[np.float64], normal: NDArray[np.float64], plane: Plane) -> NDArray[np.float64]:
    """From one slice to the next, LPS mm."""
    if len(positions) == 1:
        return normal * (plane.thickness or 1.0)
    step: NDArray[np.float64] = (positions[-1] - positions[0]) / (len(positions) - 1)
    return step


def _grid(
    instance: Instance,
    spacing: tuple[float, float],
    directions: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    positions: NDArray[np.float64],
    step: NDArray[np.float64],
    path: Path,
) -> tuple[Grid, tuple[float, float]]:
    """The grid (columns, rows, slices), and the shear that its slices have."""
    across, down, normal = directions
    num = len(positions)
    expected = positions[0] + np.arange(num)[:, None] * step
    scatter = (positions - expected) @ np.stack([across / spacing[1], down / spacing[0]], axis=1)  # voxels
    if np.abs(scatter).max() > 0.1 + 2 * ROUNDED_MM / min(spacing):
        fact = f"its slices do not lie in one line: up to {np.abs(scatter).max():.2g} voxels beside it."
        raise GeometryError(fact, where=path, fix="export it again, or resample it.")
    affine = np.eye(4)
    affine[:3, :3] = LPS_TO_RAS @ np.stack([across * spacing[1], down * spacing[0], step], axis=1)
    affine[:3, 3] = LPS_TO_RAS @ positions[0]
    grid = Grid((instance.columns, instance.rows, num), affine)
    try:
        require_right_angles(grid)
    except GeometryError:
        shear = (float(step @ across / spacing[1]), float(step @ down / spacing[0]))
        straight = affine.copy()
        straight[:3, 2] = LPS_TO_RAS @ normal * (step @ normal)
        grid = Grid(grid.shape, straight)
        if max(map(abs, shear)) * (num - 1) > _STRAIGHT:
            return widened(grid, shear), shear
    return grid, (0.0, 0.0)


def widened(grid: Grid, shear: tuple[float, float]) -> Grid:
    """The straight grid that holds all slices, each shifted by `shear` voxels against the one before."""
    last = np.array(shear) * (grid.shape[2] - 1)
    first = np.floor(np.minimum(last, 0) + 1e-6)
    size = np.ceil(np.maximum(last, 0) - 1e-6) - first
    affine = grid.affine.copy()
    affine[:3, 3] += grid.affine[:3, :2] @ first
    shape = (grid.shape[0] + int(size[0]), grid.shape[1] + int(size[1]), grid.shape[2])
    return replace(grid, shape=shape, affine=affine)
