"""DICOM SEG: BINARY, FRACTIONAL and LABELMAP, frames placed by their own positions onto the image's grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.filereader import dcmread

from voxdino.core.errors import GeometryError, ImageError, LabelError
from voxdino.core.geometry import Grid
from voxdino.core.io.dicom.headers import Instance, Plane, open_file, parsing, read_instance
from voxdino.core.io.dicom.painting import Palette
from voxdino.core.io.dicom.pixels import Frames, read_frames
from voxdino.core.io.dicom.places import Place
from voxdino.core.io.dicom.stack import LPS_TO_RAS, ROUNDED_MM
from voxdino.core.memory import require_memory
from voxdino.core.volume import Volume

_OFF = 0.1  # voxels by which a corner may miss the grid: rounded decimals
_HALF = 0.5  # share from which a voxel belongs to a fractional segment
_AGAIN = "export it again."


def read_segmentation(place: Place, like: Grid | None, chosen: Sequence[tuple[str, int]]) -> Volume:
    """The label map of a SEG file on `like`, or on the grid that its frames span. chosen: see `Palette`.

    FRACTIONAL: voxels with half of the maximum or more. LABELMAP: slices without a frame hold the padding value.
    Errors: GeometryError where a frame does not lie in a slice of the grid; LabelError for overlaps.
    """
    header, instance = _open(place)
    notes: tuple[str, ...] = ()
    if like is None:
        like = _own_grid(instance, place.where)
    kind = str(header.get("SegmentationType", ""))
    names = {int(item.SegmentNumber): str(item.get("SegmentLabel", "")) for item in header.get("SegmentSequence") or ()}
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP") or not names:
        raise ImageError(f"is a segmentation of the unknown type '{kind[:16]}'.", where=place.where, fix=_AGAIN)
    if kind == "LABELMAP":
        names.setdefault(0, "background")
        names.update(dict.fromkeys((instance.padding or ())[:1], "padding"))
    palette = Palette(names, chosen, place.where)
    require_memory(int(np.prod(like.shape)), "needs a label map", where=place.where)
    canvas = palette.canvas(like.shape)
    if kind == "LABELMAP" and instance.padding is not None and instance.padding[0] in palette.labels:
        canvas[:] = palette.labels[instance.padding[0]]
        notes += (f"{canvas.flat[0]} (the padding value) stands where the file has no frame",)
    if kind == "FRACTIONAL":
        notes += ("fractional segments: voxels with half of the maximum or more count",)
    segments = _segments_of(header, kind, instance)
    placed = place_planes(instance, like, place.where)
    rank = {number: place for place, number in enumerate(palette.labels)}
    order = sorted(range(instance.num_frames), key=lambda index: rank.get(segments[index], 0))
    order = [index for index in order if kind == "LABELMAP" or segments[index] in rank]
    most = float(header.get("MaximumFractionalValue") or 1)
    table = np.zeros(max(1 << instance.bits_allocated, max(names) + 1), canvas.dtype)  # stored value -> label
    for number, label in palette.labels.items():
        table[number] = label  # what was not chosen stays background

    def paint(index: int, _: Instance, stored: NDArray[Any]) -> None:
        view = placed[index].view(canvas)
        if kind == "LABELMAP":
            _require_declared(stored, names, place.where)
            view[...] = table[stored.T]
        else:
            palette.paint(view, (_HALF * most if kind == "FRACTIONAL" else 1) <= stored.T, segments[index])

    read_frames([Frames(instance, tuple(order), tuple(order))], paint)
    return Volume(canvas[None], like, notes, place.path)


def spanned_grid(place: Place) -> Grid:
    """The smallest grid that holds all frames of a SEG file. Errors: GeometryError, ImageError."""
    with parsing(place.where):
        return _own_grid(_open(place)[1], place.where)


def _open(place: Place) -> tuple[Dataset, Instance]:
    """Header and frames of a SEG file, each of which has a place in space."""
    with open_file(place) as file:
        header = dcmread(file, stop_before_pixels=True, force=True)
        instance = read_instance(place, header, file.tell())
    if any(plane.position is None or plane.orientation is None or plane.spacing is None for plane in instance.planes):
        raise GeometryError("its frames have no place in space.", where=place.where, fix=_AGAIN)
    return header, instance


def _segments_of(header: Dataset, kind: str, instance: Instance) -> list[int]:
    """The segment number of every frame; -1 for those of a LABELMAP, which hold all."""
    if kind == "LABELMAP":
        return [-1] * instance.num_frames
    shared = header.SharedFunctionalGroupsSequence[0].get("SegmentIdentificationSequence")
    return [
        int((frame.get("SegmentIdentificationSequence") or shared)[0].ReferencedSegmentNumber)
        for frame in header.PerFrameFunctionalGroupsSequence
    ]


def _require_declared(stored: NDArray[Any], names: dict[int, str], where: Path) -> None:
    unknown = sorted(set(np.unique(stored).tolist()) - names.keys())
    if unknown:
        fact = f"holds the value {unknown[0]}, which is none of its segments."
        raise LabelError(fact, where=where, fix=_AGAIN)


@dataclass(frozen=True)
class PlacedPlane:
    """Where a frame lies in a volume: its slice, its box there, and how it is turned.

    slice_axis, index: the slice.   axes: array axes along which the frame's columns and rows count up (or down, flips).
    starts, sizes:     the box along `axes`.
    """

    slice_axis: int
    index: int
    axes: tuple[int, int]
    flips: tuple[bool, bool]
    starts: tuple[int, int]
    sizes: tuple[int, int]

    def view(self, volume: NDArray[Any]) -> NDArray[Any]:
        """The part (columns, rows) of a volume that the frame covers, writable."""
        box: list[Any] = [slice(None)] * 3
        box[self.slice_axis] = self.index
        for axis, start, size in zip(self.axes, self.starts, self.sizes, strict=True):
            box[axis] = slice(start, start + size)
        part = volume[tuple(box)]
        part = part if self.axes[0] < self.axes[1] else part.T
        turned: NDArray[Any] = part[:: -1 if self.flips[0] else 1, :: -1 if self.flips[1] else 1]
        return turned


def place_planes(instance: Instance, grid: Grid, where: Path) -> list[PlacedPlane]:
    """Place every frame into a slice of `grid`.

    Frames of a tilted gantry go to the nearest voxels of the straight grid.
    Errors: GeometryError where frames lie between slices or voxels, are turned, of other spacing, or stick out.
    """
    if grid.ndim != 3:
        raise GeometryError("is a segmentation in space, its image a picture.", where=where, fix="give its own image.")
    inverse = np.linalg.inv(grid.affine).astype(np.float64)
    found = [_in_voxels(plane, inverse) for plane in instance.planes]
    corner = np.array([instance.columns - 1, instance.rows - 1])
    origins = np.array([origin for origin, _ in found])  # (frames, 3)
    linear = found[0][1]  # (3, 2): one step along a row, along a column
    turns = np.rint(linear)
    is_turn = (np.abs(turns).sum(axis=0) == 1).all() and (np.abs(turns).sum(axis=1) <= 1).all()
    misses = max(float(np.abs((one - turns) * corner).max()) for _, one in found)
    if not is_turn or misses > 2 * _OFF:
        fact = "its frames have another direction or spacing than the image."
        raise GeometryError(fact, where=where, fix="resample the segmentation onto the image, or give its own image.")
    slice_axis = int(np.flatnonzero(np.abs(turns).sum(axis=1) == 0)[0])
    off = origins - np.rint(origins)
    in_plane = np.delete(off, slice_axis, axis=1)
    leans = np.ptp(np.delete(origins, slice_axis, axis=1), axis=0).max() > _OFF  # the gantry was tilted
    if np.abs(off[:, slice_axis]).max() > _OFF or (not leans and np.abs(in_plane).max() > _OFF):
        fact = f"its frames lie between the voxels of the image: up to {np.abs(off).max():.2g} voxels off."
        raise GeometryError(fact, where=where, fix="resample the segmentation onto the image, or give its own image.")
    axes = (int(np.abs(turns[:, 0]).argmax()), int(np.abs(turns[:, 1]).argmax()))
    flips = (bool(turns[axes[0], 0] < 0), bool(turns[axes[1], 1] < 0))
    placed = []
    for origin in np.rint(origins).astype(int):
        starts = tuple(int(origin[a]) - (int(c) if flip else 0) for a, c, flip in zip(axes, corner, flips, strict=True))
        sizes = (instance.columns, instance.rows)
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        inside = min(starts) >= 0 and all(end <= grid.shape[axis] for end, axis in zip(ends, axes, strict=True))
        if not inside or not 0 <= origin[slice_axis] < grid.shape[slice_axis]:
            fact = "has frames outside of the image."
            raise GeometryError(fact, where=where, fix="give the image that it was drawn on.")
        placed.append(PlacedPlane(slice_axis, int(origin[slice_axis]), axes, flips, (starts[0], starts[1]), sizes))
    return placed


def _in_voxels(plane: Plane, inverse: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A plane's first pixel in voxel indices, and (3, 2) one step along a row and along a column."""
    assert plane.position is not None and plane.orientation is not None and plane.spacing is not None
    steps = LPS_TO_RAS @ plane.orientation.reshape(2, 3).T * (plane.spacing[1], plane.spacing[0])
    origin = inverse[:3, :3] @ (LPS_TO_RAS @ plane.position) + inverse[:3, 3]
    return origin, inverse[:3, :3] @ steps


def _own_grid(instance: Instance, where: Path) -> Grid:
    """The smallest grid that holds all frames, slices without one included. Errors: GeometryError."""
    first = instance.planes[0]
    assert first.orientation is not None and first.spacing is not None
    across, down = first.orientation.reshape(2, 3)
    normal = np.cross(across, down)
    positions = np.array([plane.position for plane in instance.planes])
    positions = positions[np.argsort(positions @ normal, kind="stable")]
    places = positions @ normal
    distances = np.diff(places)
    apart = distances[distances > ROUNDED_MM]
    step = float(apart.min()) if apart.size else first.thickness or 1.0
    if first.thickness and apart.size and _largest_rest(apart / first.thickness) < _OFF:
        step = first.thickness  # every second slice drawn on, say
    number = (places[-1] - places[0]) / step
    if _largest_rest((places - places[0]) / step) > _OFF:
        raise GeometryError("its frames lie at unequal distances.", where=where, fix="name the image it belongs to.")
    affine = np.eye(4)
    affine[:3, :3] = LPS_TO_RAS @ np.stack([across * first.spacing[1], down * first.spacing[0], normal * step], axis=1)
    affine[:3, 3] = LPS_TO_RAS @ positions[0]
    return Grid((instance.columns, instance.rows, int(np.rint(number)) + 1), affine)


def _largest_rest(values: NDArray[np.float64]) -> float:
    """How far the values are from whole numbers."""
    return float(np.abs(values - np.rint(values)).max())
