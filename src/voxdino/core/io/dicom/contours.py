"""RTSTRUCT: closed planar contours filled into a label map, holes left open (even-odd rule within a region)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.filereader import dcmread

from voxdino.core.errors import GeometryError, ImageError
from voxdino.core.geometry import Grid
from voxdino.core.io.dicom.headers import open_file
from voxdino.core.io.dicom.painting import Palette
from voxdino.core.io.dicom.places import Place
from voxdino.core.volume import Volume

_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_FLAT = 0.1  # voxels by which a contour may leave its slice
_AGAIN = "export it again."


def read_structures(place: Place, like: Grid, chosen: Sequence[tuple[str, int]]) -> Volume:
    """The label map of an RTSTRUCT file on `like`: a voxel belongs to a region whose contours enclose its centre.

    Contours within one another are holes. Open lines and points enclose nothing. chosen: see `Palette`.
    Errors: GeometryError for contours that do not lie in the image's slices; LabelError for overlaps.
    """
    with open_file(place) as file:
        header = dcmread(file, force=True)
    names = {int(item.ROINumber): str(item.get("ROIName", "")) for item in header.get("StructureSetROISequence") or ()}
    if not names:
        raise ImageError("holds no region.", where=place.where, fix=_AGAIN)
    if like.ndim != 3:
        raise GeometryError("holds contours in space, its image is a picture.", where=place.where, fix="give a volume.")
    palette = Palette(names, chosen, place.where)
    canvas = palette.canvas(like.shape)
    inverse = np.linalg.inv(like.affine).astype(np.float64)
    found: dict[int, list[NDArray[np.float64]]] = {}
    num_open = 0
    for item in header.get("ROIContourSequence") or ():
        for contour in item.get("ContourSequence") or ():
            if contour.get("ContourGeometricType") in _CLOSED:
                found.setdefault(int(item.ReferencedROINumber), []).append(_in_voxels(contour, inverse, place))
            else:
                num_open += 1
    every = [points for contours in found.values() for points in contours]
    axis = _slice_axis(every, place)
    for number in palette.labels:
        _fill(canvas, found.get(number, []), axis, number, palette, place)
    notes = (f"{num_open} open contours or points enclose nothing and are left out",) if num_open else ()
    return Volume(canvas[None], like, notes, place.path)


def _in_voxels(contour: Dataset, inverse: NDArray[np.float64], place: Place) -> NDArray[np.float64]:
    """The points (N, 3) of a contour in voxel indices."""
    values = np.array([float(value) for value in contour.get("ContourData") or ()])
    if len(values) % 3 or not np.isfinite(values).all():
        raise ImageError("a contour's points are not three finite numbers each.", where=place.where, fix=_AGAIN)
    points = values.reshape(-1, 3) * (-1, -1, 1)  # LPS -> RAS
    result: NDArray[np.float64] = points @ inverse[:3, :3].T + inverse[:3, 3]
    return result


def _slice_axis(contours: Sequence[NDArray[np.float64]], place: Place) -> int:
    """The array axis across which all contours are flat."""
    if not contours:
        return 2
    spread = np.max([np.ptp(points, axis=0) for points in contours if len(points)], axis=0)
    axis = int(spread.argmin())
    if spread[axis] > _FLAT:
        fact = f"its contours do not lie in the slices of the image: they leave them by {spread[axis]:.2g} voxels."
        raise GeometryError(fact, where=place.where, fix="give the image that they were drawn on.")
    return axis


def _fill(
    canvas: NDArray[np.unsignedinteger],
    contours: Sequence[NDArray[np.float64]],
    axis: int,
    number: int,
    palette: Palette,
    place: Place,
) -> None:
    """Paint one region. The contours of a slice are taken together: what an even number of them enclose is a hole."""
    slices: dict[int, NDArray[np.bool_]] = {}
    others = [a for a in range(3) if a != axis]
    for points in contours:
        index = int(np.rint(points[:, axis].mean()))
        if abs(points[:, axis].mean() - index) > _FLAT or not 0 <= index < canvas.shape[axis]:
            fact = f"a contour of '{palette.names[number]}' lies outside of the image's slices, or between them."
            raise GeometryError(fact, where=place.where, fix="give the image that it was drawn on.")
        shape = (canvas.shape[others[0]], canvas.shape[others[1]])
        mask = slices.setdefault(index, np.zeros(shape, bool))
        mask ^= inside(points[:, others], shape)
    for index, mask in slices.items():
        view = canvas[(slice(None),) * axis + (index,)]
        palette.paint(view, mask, number)


def inside(points: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Which pixel centres (i, j) a closed polygon encloses, by the even-odd rule.

    points: (N, 2) corners in pixel indices. A centre on an edge belongs to the side of growing indices.
    """
    crossings = np.zeros((shape[0] + 1, shape[1]), np.uint8)  # [i, j]: edges that begin to count at pixel i of line j
    for (i0, j0), (i1, j1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if j0 > j1:
            i0, j0, i1, j1 = i1, j1, i0, j0
        lines = np.arange(max(0, int(np.ceil(j0))), min(shape[1], int(np.ceil(j1))))
        if lines.size:
            where = i0 + (lines - j0) * (i1 - i0) / (j1 - j0)
            crossings[np.clip(np.ceil(where), 0, shape[0]).astype(int), lines] ^= 1
    return np.bitwise_xor.accumulate(crossings[:-1], axis=0).astype(bool)
