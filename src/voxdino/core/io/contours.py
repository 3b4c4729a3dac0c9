"""Closed polygons around the voxels of a mask, along the voxels' edges, holes joined to their outside."""

import numpy as np
from jaxtyping import Bool, Float

_STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))  # right, down, left, up: (row, column) in image axes, clockwise

Vertex = tuple[int, int]


def trace_polygons(mask: Bool[np.ndarray, "R C"]) -> list[Float[np.ndarray, "N 2"]]:
    """The polygons of a mask as (row, column) positions of their corners, in voxels, centres at whole numbers.

    They run along voxel edges, so area and centroid are exactly the mask's, and a voxel is inside where its centre is.
    Voxels that touch at a corner only are polygons of their own. A hole is joined to the polygon around it by a channel
    of no width that runs along voxel edges (the keyhole of DICOM PS3.3 C.8.8.6): inside and outside stay the same under
    either rule of filling.
    """
    loops = _boundary_loops(mask)
    holes = sorted((loop for loop in loops if _signed_area(loop) < 0), key=lambda loop: min(c for _, c in loop))
    polygons = [loop for loop in loops if _signed_area(loop) > 0]
    if holes:
        _join_holes(polygons, holes)
    return [_corners(loop) - 0.5 for loop in polygons]


def _boundary_loops(mask: Bool[np.ndarray, "R C"]) -> list[list[Vertex]]:
    """Every boundary between mask and not, as lattice vertices; the mask lies to the right of the way along it."""
    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    outgoing: dict[Vertex, list[int]] = {}
    neighbours = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])  # above, right, below, left
    starts = ((0, 0), (0, 1), (1, 1), (1, 0))  # of the voxel's edge on that side
    for step, (neighbour, start) in enumerate(zip(neighbours, starts, strict=True)):
        for row, column in (np.argwhere(inside & ~neighbour) + start).tolist():
            outgoing.setdefault((row, column), []).append(step)
    loops = []
    while outgoing:
        vertex = next(iter(outgoing))
        step = outgoing[vertex][0]
        loop: list[Vertex] = []
        while vertex in outgoing:
            ways = outgoing[vertex]
            # where two voxels touch at a corner there are two ways: turning right stays with the same voxel
            step = next(way for turn in (1, 0, 3) if (way := (step + turn) % 4) in ways) if loop else step
            ways.remove(step)
            if not ways:
                del outgoing[vertex]
            loop.append(vertex)
            vertex = (vertex[0] + _STEPS[step][0], vertex[1] + _STEPS[step][1])
            if vertex == loop[0] and _closes(outgoing.get(vertex, []), step):
                break
        loops.append(loop)
    return loops


def _closes(ways: list[int], step: int) -> bool:
    """Whether a loop that arrives at its start by `step` ends there: not if the way on to the right is still open."""
    return (step + 1) % 4 not in ways


def _join_holes(polygons: list[list[Vertex]], holes: list[list[Vertex]]) -> None:
    """Insert each hole into the polygon that it meets first on the way left from its leftmost edge.

    Holes come sorted by their leftmost column, so that whatever one meets is an outside already or joined to one.
    """
    owner = {vertex: index for index, loop in enumerate(polygons) for vertex in loop}
    waiting = {vertex: -1 for loop in holes for vertex in loop}
    for hole in holes:
        first = min(range(len(hole)), key=lambda at: (hole[at][1], hole[at][0]))
        row, column = hole[first]
        column -= 1
        while (row, column) not in owner:
            assert (row, column) not in waiting, "a hole on the left is joined before"
            column -= 1
        index = owner[row, column]
        polygon = polygons[index]
        at = polygon.index((row, column))
        around = [*hole[first:], *hole[:first], hole[first]]
        polygon[at:at] = [(row, column), *around]
        for vertex in hole:
            waiting.pop(vertex, None)
            owner[vertex] = index


def _signed_area(loop: list[Vertex]) -> float:
    """Positive for an outside, which runs clockwise as seen in the image; negative for a hole."""
    points = np.array(loop, dtype=np.float64)
    row, column = points[:, 0], points[:, 1]
    return float(np.sum(column * np.roll(row, -1) - row * np.roll(column, -1)) / 2)


def _corners(loop: list[Vertex]) -> Float[np.ndarray, "N 2"]:
    """The vertices at which the way turns."""
    points = np.array(loop, dtype=np.float64)
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    turns = (np.sign(before) != np.sign(after)).any(axis=1)
    corners: Float[np.ndarray, "N 2"] = points[turns]
    return corners
