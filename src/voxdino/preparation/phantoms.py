"""CT-like phantoms: an abdomen of deformed organs on oblique, anisotropic grids, to try voxdino without any data.

Anatomy is drawn in patient millimetres (x right, y anterior, z superior) from ellipsoids and tubes, bent by a smooth
random displacement, sampled finer than the voxels and averaged (partial volume), with noise as of a low-dose scan. It
teaches nothing about real patients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxdino.core.geometry import Grid
from voxdino.core.io import write_label_map, write_volume
from voxdino.core.safe_files import write_json
from voxdino.core.volume import LabelMap, Volume

LABELS = {"background": 0, "liver": 1, "spleen": 2, "kidney": 3, "lesion": 4}
LIVER, SPLEEN, KIDNEY, LESION = 1, 2, 3, 4

# array axes of a scan, as order and flips of (x, y, z): left-posterior-superior, posterior-inferior-right, ...
ORIENTATIONS = (
    ((0, 1, 2), (True, True, False)),
    ((0, 1, 2), (False, False, False)),
    ((1, 2, 0), (True, True, False)),
    ((0, 1, 2), (True, False, False)),
    ((2, 1, 0), (False, True, True)),
    ((0, 2, 1), (False, True, False)),
)
FINER = 2  # samples per voxel and axis

Field = NDArray[np.float32]
Mask = NDArray[np.bool_]
Number = float | int
Point = tuple[Number, Number, Number]  # right, anterior, superior, in mm


def draw_phantoms(folder: Path, *, num_cases: int = 12, seed: int = 0) -> Path:
    """Write a data set of phantoms in nnU-Net layout to `folder`; the same seed writes the same files.

    Slices of about 64 to 96 voxels at 3.4 to 4.4 mm, 16 to 24 of them, 5 to 8 mm thick. Returns `folder`.
    """
    for index in range(num_cases):
        case = f"phantom_{index:03d}"
        image, label = draw_phantom(np.random.default_rng([seed, index]), ORIENTATIONS[index % len(ORIENTATIONS)])
        write_volume(folder / "imagesTr" / f"{case}_0000.nii.gz", image)
        write_label_map(folder / "labelsTr" / f"{case}.nii.gz", label)
    write_json(
        folder / "dataset.json",
        {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": num_cases, "file_ending": ".nii.gz"},
    )
    return folder


def draw_phantom(
    rng: np.random.Generator, orientation: tuple[Sequence[int], Sequence[bool]] = ORIENTATIONS[0]
) -> tuple[Volume, LabelMap]:
    """One phantom: (1, *spatial) int16 Hounsfield units and its labels, with array axes as `orientation` says."""
    grid = _random_grid(rng)
    canvas = _Canvas.of(grid, rng)
    _draw_abdomen(canvas, rng)
    order, flips = orientation
    placed = grid.transposed(order, flips)

    def place(array: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(np.flip(array.transpose(order), tuple(np.flatnonzero(flips))))

    hounsfield = np.clip(canvas.average() + _noise(grid.shape, rng), -1024, 3071)
    image = place(np.round(hounsfield).astype(np.int16))
    return Volume(image[None], placed), LabelMap(place(canvas.majority()).astype(np.uint8), placed)


def _random_grid(rng: np.random.Generator) -> Grid:
    """A grid over the abdomen in RAS order, tilted by up to 10 degrees, its centre near the patient's."""
    in_plane, thickness = rng.uniform(3.4, 4.4), rng.uniform(5.0, 8.0)
    spacing = np.array([in_plane, in_plane, thickness])
    shape = np.round(np.array([352.0, 268.0, 126.0]) / spacing).astype(int)
    rotation = np.eye(3)
    for axis, degrees in enumerate(rng.uniform(-10, 10, 3) * (0.6, 0.6, 1.0)):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[[i, j], [i, j]] = np.cos(np.radians(degrees))
        turn[i, j], turn[j, i] = -np.sin(np.radians(degrees)), np.sin(np.radians(degrees))
        rotation = rotation @ turn
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing
    affine[:3, 3] = rng.uniform((-4, -8, -16), (4, 0, -8)) - affine[:3, :3] @ ((shape - 1) / 2)
    return Grid(tuple(int(size) for size in shape), affine)


@dataclass
class _Canvas:
    """Hounsfield units and labels on a grid FINER times finer than the scan's, painted from back to front.

    x, y, z: patient coordinates of every sample after the smooth displacement, in mm.
    """

    x: Field
    y: Field
    z: Field
    hounsfield: Field
    labels: NDArray[np.uint8]

    def __post_init__(self) -> None:
        others = ((1, 2), (0, 2), (0, 1))
        self.lows = [c.min(axis=axes) for c, axes in zip((self.x, self.y, self.z), others, strict=True)]
        self.highs = [c.max(axis=axes) for c, axes in zip((self.x, self.y, self.z), others, strict=True)]

    @classmethod
    def of(cls, grid: Grid, rng: np.random.Generator) -> "_Canvas":
        fine = grid.resized([size * FINER for size in grid.shape])
        steps = [np.arange(size, dtype=np.float32) for size in fine.shape]
        i, j, k = np.meshgrid(*steps, indexing="ij", sparse=True)
        world = [(a * i + b * j + c * k + d).astype(np.float32) for a, b, c, d in fine.affine[:3].astype(np.float32)]
        moved = [coordinate + shift for coordinate, shift in zip(world, _displacement(world, rng), strict=True)]
        return cls(moved[0], moved[1], moved[2], np.full(fine.shape, -1000, np.float32), np.zeros(fine.shape, np.uint8))

    def ellipsoid(self, centre: Point, radii: Point, turn: Number = 0) -> Field:
        """Squared distance from the centre in radii (inside where < 1), turned about z by `turn` degrees.

        Infinite far outside (beyond 1.4), where it is not computed.
        """
        cos, sin = float(np.cos(np.radians(turn))), float(np.sin(np.radians(turn)))
        reach = 1.2 * max(radii[:2])
        box = self._near(centre, (reach, reach, 1.2 * radii[2]))
        dx, dy = self.x[box] - centre[0], self.y[box] - centre[1]
        u, v = (cos * dx + sin * dy) / radii[0], (cos * dy - sin * dx) / radii[1]
        w = (self.z[box] - centre[2]) / radii[2]
        result = np.full(self.x.shape, np.inf, np.float32)
        result[box] = u * u + v * v + w * w
        return result

    def _near(self, centre: Point, reach: Point) -> tuple[slice, ...]:
        """A box of samples outside of which no point lies within `reach` of the centre along every axis."""
        box = []
        for axis, (place, distance, low, high) in enumerate(zip(centre, reach, self.lows, self.highs, strict=True)):
            found = np.flatnonzero((low < place + distance) & (high > place - distance))
            size = self.x.shape[axis]
            box.append(slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(size, size))
        return tuple(box)

    def tube(self, start: Point, end: Point, radius: Number) -> Mask:
        """Within `radius` mm of the segment from start to end."""
        axis = [b - a for a, b in zip(start, end, strict=True)]
        middle = [(a + b) / 2 for a, b in zip(start, end, strict=True)]
        reach = [abs(a) / 2 + radius for a in axis]
        box = self._near((middle[0], middle[1], middle[2]), (reach[0], reach[1], reach[2]))
        offset = [place[box] - a for a, place in zip(start, (self.x, self.y, self.z), strict=True)]
        length = sum(a * a for a in axis)
        along = np.clip((axis[0] * offset[0] + axis[1] * offset[1] + axis[2] * offset[2]) / length, 0, 1)
        across = [(o - a * along) ** 2 for a, o in zip(axis, offset, strict=True)]
        result = np.zeros(self.x.shape, np.bool_)
        result[box] = across[0] + across[1] + across[2] < radius**2
        return result

    def paint(self, where: Mask, hounsfield: Number, label: int = 0) -> None:
        self.hounsfield[where] = hounsfield
        self.labels[where] = label

    def average(self) -> Field:
        """Hounsfield units of the scan's voxels: the mean of their samples."""
        return np.asarray(_blocks(self.hounsfield).mean(axis=(1, 3, 5)), np.float32)

    def majority(self) -> NDArray[np.uint8]:
        """The label that fills most of each voxel."""
        votes = [_blocks(self.labels == label).sum(axis=(1, 3, 5), dtype=np.uint8) for label in LABELS.values()]
        return np.asarray(np.argmax(votes, axis=0), np.uint8)


def _blocks(array: NDArray[Any]) -> NDArray[Any]:
    a, b, c = (size // FINER for size in array.shape)
    return array.reshape(a, FINER, b, FINER, c, FINER)


def _displacement(world: Sequence[Field], rng: np.random.Generator, reach_mm: float = 6.0) -> list[Field]:
    """A smooth random displacement of about `reach_mm`, one field per axis: three waves of 130 to 300 mm each."""
    fields: list[Field] = []
    for _ in range(3):
        total: Field = np.zeros((), np.float32)
        for _ in range(3):
            direction = rng.standard_normal(3)
            wave = direction / np.linalg.norm(direction) * (2 * np.pi / rng.uniform(130, 300))
            phase = np.float32(wave[0]) * world[0] + np.float32(wave[1]) * world[1] + np.float32(wave[2]) * world[2]
            total = total + np.float32(reach_mm * rng.uniform(0.3, 0.8)) * np.sin(
                phase + np.float32(rng.uniform(0, 6.3))
            )
        fields.append(np.asarray(total, np.float32))
    return fields


def _noise(shape: Sequence[int], rng: np.random.Generator, sd: float = 13.0) -> Field:
    """Noise of `sd` Hounsfield units, correlated between neighbours in the slice as after a reconstruction filter."""
    noise = rng.standard_normal(tuple(shape), dtype=np.float32)
    for axis in (0, 1):
        noise = noise + 0.45 * (np.roll(noise, 1, axis) + np.roll(noise, -1, axis))
    return np.asarray(noise * (sd / noise.std()), np.float32)


def _draw_abdomen(canvas: _Canvas, rng: np.random.Generator) -> None:
    """Paint the whole phantom: body wall, viscera, labelled organs, lungs, spine, vessels."""
    x, y, z = canvas.x, canvas.y, canvas.z
    vary = partial(_vary, rng)
    width, height = vary(156), vary(108)
    fat, muscle = rng.uniform(0.08, 0.16), 0.08  # thickness of the layers, in body radii
    radius = np.sqrt((np.abs(x) / width) ** 2 + (np.abs(y) / height) ** 2)
    inner = radius < 1 - fat - muscle
    canvas.paint(radius < 1, -105)
    canvas.paint(radius < 1.0 - fat, 52)
    canvas.paint(inner, -95)
    wall = (radius > 1 - fat - 0.75 * muscle) & (radius < 1 - fat - 0.1 * muscle)
    slope = (z + 60 * y / height) / 32  # ribs run down to the front
    canvas.paint(wall & (slope % 1 < 0.36) & (y < 0.62 * height), vary(420))

    _draw_bowel(canvas, rng, inner)
    stomach = canvas.ellipsoid((-52, 34, 24), (vary(44), vary(34), vary(38)), 25)
    canvas.paint(inner & (stomach < 1), 48)
    canvas.paint(inner & (stomach < 0.8), 12)
    canvas.paint(inner & (stomach < 0.8) & (y > vary(48)), -960)  # air rises to the front of a lying patient

    heart = canvas.ellipsoid((-22, 28, 84), (vary(62), vary(48), 40), 20)
    canvas.paint(inner & (heart < 1), vary(125))
    dome = 80 - 64 * radius**2 - 10 * (x < 0)
    lungs = inner & (z > dome) & (np.abs(x) > 14) & (heart > 1.1)
    right_lobe = canvas.ellipsoid((66, 6, 14), (vary(66), vary(70), vary(62)), rng.uniform(-8, 8))
    left_lobe = canvas.ellipsoid((8, 42, 26), (vary(56), vary(32), vary(34)), rng.uniform(-25, 0))
    liver = inner & ((right_lobe < 1) | (left_lobe < 1)) & ~lungs
    liver_hu = rng.uniform(98, 118)
    canvas.paint(liver, liver_hu, LIVER)
    spleen = canvas.ellipsoid((-100, -30, 22), (vary(25), vary(44), vary(42)), rng.uniform(8, 24))
    canvas.paint(inner & (spleen < 1) & ~lungs, rng.uniform(118, 136), SPLEEN)
    _draw_liver_contents(canvas, rng, liver & (radius < 0.86 - fat), liver, liver_hu)
    canvas.paint(inner & (canvas.ellipsoid((46, 44, -22), (vary(13, 0.3), vary(18, 0.3), 20)) < 1), 8)  # gall bladder
    canvas.paint(lungs, -840)

    for side in (-1, 1):
        centre = (side * vary(64), vary(-42), vary(-16 if side < 0 else -26, 0.3))
        radii = (vary(24), vary(29), vary(48))
        kidney = canvas.ellipsoid(centre, radii, side * 28)
        sinus = canvas.ellipsoid((centre[0] - side * 17, centre[1] + 4, centre[2]), (14, 9, 20), side * 28)
        canvas.paint(inner & (kidney < 1.3), -95)  # the fat around it
        canvas.paint(inner & (kidney < 1), vary(175), KIDNEY)
        canvas.paint(inner & (kidney < 0.45), vary(135), KIDNEY)
        canvas.paint(inner & (sinus < 1), -40)
        canvas.paint(canvas.ellipsoid((side * 34, -50, -30), (14, 17, 90)) < 1, 58)  # psoas
        canvas.paint((canvas.ellipsoid((side * 36, -84, 0), (32, 21, 400)) < 1) & (radius < 1 - fat), 56)

    _draw_spine(canvas, rng)
    canvas.paint(canvas.tube((-14, -30, -200), (-10, -32, 200), vary(10)), vary(185))  # aorta
    canvas.paint(canvas.tube((20, -30, -200), (22, -26, 200), vary(11)), vary(140))  # inferior vena cava


def _draw_bowel(canvas: _Canvas, rng: np.random.Generator, inner: Mask) -> None:
    for _ in range(26):
        centre = (rng.uniform(-108, 100), rng.uniform(-20, 72), rng.uniform(-95, 4))
        loop = canvas.ellipsoid(centre, _three(rng.uniform(11, 24, 3)), rng.uniform(0, 180))
        canvas.paint(inner & (loop < 1), 45)
        canvas.paint(inner & (loop < 0.62), rng.uniform(5, 70))
        if rng.random() < 0.35:
            canvas.paint(inner & (loop < 0.62) & (canvas.y > centre[1] + 2), -930)


def _draw_liver_contents(canvas: _Canvas, rng: np.random.Generator, depth: Mask, liver: Mask, liver_hu: float) -> None:
    """Vessels, and three to five lesions of 9 to 17 mm radius, inside the liver."""
    hilum = np.array([38.0, 2.0, 8.0])
    for _ in range(9):
        away = rng.standard_normal(3) * (30, 26, 22) + (26, 8, 12)
        canvas.paint(
            liver & canvas.tube(_three(hilum), _three(hilum + away), rng.uniform(2.5, 5)), liver_hu + 45, LIVER
        )
    inside = np.argwhere(depth[::FINER, ::FINER, ::FINER])
    for _ in range(int(rng.integers(3, 6))):
        at = tuple(inside[rng.integers(len(inside))] * FINER)
        centre = (float(canvas.x[at]), float(canvas.y[at]), float(canvas.z[at]))
        size = rng.uniform(9, 17)
        lesion = canvas.ellipsoid(centre, _three(size * rng.uniform(0.8, 1.25, 3)), rng.uniform(0, 180))
        core = rng.uniform(28, 52)
        canvas.paint(liver & (lesion < 1), core + 14, LESION)
        canvas.paint(liver & (lesion < 0.6), core, LESION)


def _draw_spine(canvas: _Canvas, rng: np.random.Generator) -> None:
    rim, marrow = rng.uniform(420, 560), rng.uniform(150, 210)
    body = canvas.ellipsoid((0, -56, 0), (23, 17, 1e4))
    disc = np.cos(canvas.z * (2 * np.pi / 34)) > 0.8
    canvas.paint(body < 1, rim)
    canvas.paint(body < 0.76, marrow)
    canvas.paint((body < 1) & disc, 85)
    arch = canvas.ellipsoid((0, -82, 0), (15, 14, 1e4))
    canvas.paint((np.abs(canvas.y + 80) < 5) & (np.abs(canvas.x) < 36) & ~disc, rim)  # transverse processes
    canvas.paint((np.abs(canvas.x) < 4.5) & (np.abs(canvas.y + 100) < 16) & ~disc, rim)  # spinous process
    canvas.paint(arch < 1, rim)
    canvas.paint(arch < 0.42, 25)  # the canal


def _vary(rng: np.random.Generator, value: Number, share: float = 0.08) -> float:
    return float(value * rng.uniform(1 - share, 1 + share))


def _three(values: NDArray[np.float64]) -> Point:
    return float(values[0]), float(values[1]), float(values[2])
