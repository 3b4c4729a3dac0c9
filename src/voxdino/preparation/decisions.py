"""What a ViT needs to know of a data set, decided from its facts; every function returns (value, reason).

In medical images resolution decides (dossier 2.1, 7.6): a token covers a patch of pixels, and a structure smaller than
a token is invisible. So slices are magnified until the smallest structures span enough tokens, as far as one can pay.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from voxdino.core.geometry import format_shape, format_spacing
from voxdino.preparation.fingerprint import CaseFacts, Fingerprint
from voxdino.preparation.intensity import is_photo
from voxdino.preparation.orientation import DISPLAY_AXES, SAME_SPACING, SliceAxis

TOKENS_ACROSS_STRUCTURE = 3.0  # tokens that the smallest structures should span
TOKENS_ACROSS_SLICE = 12.0  # tokens per side below which a ViT has too little to look around in
MAX_TOKENS = {"cpu": 256, "cuda": 1024}  # per crop: what a step may cost

_ANISOTROPIC = 1.5  # ratio of spacings from which on the coarse axis is taken for the scanner's slice axis
_CLEARLY_FEWER = 0.8  # share of the axial slices below which another axis is worth leaving the usual view
_SNAP = 0.1  # magnifications this near to 1 become 1


def choose_slice_axis(fingerprint: Fingerprint, *, is_ct: bool) -> tuple[SliceAxis | None, str]:
    """The axis that slices are stacked along: the coarsest; else the one with the fewest slices."""
    if fingerprint.ndim == 2:
        return None, "the images are pictures."
    spacing, sizes = fingerprint.median_spacing, fingerprint.median_shape
    axes: tuple[SliceAxis, ...] = ("S", "A", "R")
    coarsest = max(axes, key=lambda axis: spacing[axis])
    finest_other = max(spacing[axis] for axis in axes if axis != coarsest)
    if spacing[coarsest] > _ANISOTROPIC * finest_other:
        return coarsest, (
            f"slices are {spacing[coarsest]:.3g} {fingerprint.cases[0].unit} apart along {coarsest}, "
            f"{spacing[coarsest] / finest_other:.1f} times the next spacing: that is how they were taken."
        )
    counts = ", ".join(f"{sizes[axis]:.0f} along {axis}" for axis in axes)
    fewest = min(axes, key=lambda axis: sizes[axis])
    if is_ct and min(sizes.values()) > 1:
        return "S", f"voxels are nearly isotropic and the images are CT: the axial view ({counts})."
    if sizes[fewest] < _CLEARLY_FEWER * sizes["S"]:
        return fewest, f"voxels are nearly isotropic; the fewest images to encode ({counts})."
    return "S", f"voxels are nearly isotropic; no axis has clearly fewer slices than the axial view ({counts})."


def choose_spacing(fingerprint: Fingerprint, axis: SliceAxis | None) -> tuple[tuple[float, float] | None, str]:
    """The in-plane (row, column) spacing all scans are brought to; None where lengths are pixels.

    It is set also where all cases have the same: a scan predicted later may not.
    """
    if axis is None or fingerprint.cases[0].unit == "px":
        return None, "pictures keep their pixels." if axis is None else "the files state no spacing."
    spacings = np.array([in_plane(case, case.spacing, axis) for case in fingerprint.cases])
    median = np.median(spacings, axis=0)
    told = format_spacing(median.tolist(), fingerprint.cases[0].unit)
    spread = float((spacings.max(axis=0) / spacings.min(axis=0)).max() - 1)
    if spread <= SAME_SPACING:
        why = f"all cases have {told} in-plane (within {spread:.1%}); scans that differ are brought to it."
    else:
        why = (
            f"in-plane spacing runs from {spacings.min():.3g} to {spacings.max():.3g} over the set; "
            f"all come to the median, {told}."
        )
    return (float(median[0]), float(median[1])), why


def find_slice_spacing(fingerprint: Fingerprint, axis: SliceAxis | None) -> tuple[float | None, str]:
    """The usual distance of slices."""
    if axis is None or fingerprint.cases[0].unit == "px":
        return None, "pictures." if axis is None else "the files state no spacing."
    return float(fingerprint.median_spacing[axis]), "the median over the cases; slices stay as they were taken."


def choose_magnification(
    fingerprint: Fingerprint,
    axis: SliceAxis | None,
    spacing: tuple[float, float] | None,
    patch_size: int,
    max_tokens: int,
) -> tuple[float, str]:
    """Network pixels per prepared voxel.

    Wanted: the smallest structures (5th percentile of the smallest class) span 3 tokens, a slice 12 a side. Paid for:
    a whole slice costs at most `max_tokens`; native resolution is kept all the same, in several tiles.
    """
    rows, columns = slice_sizes(fingerprint, axis, spacing)[1]
    fits = patch_size * math.sqrt(max_tokens / (rows * columns))
    for_slice = TOKENS_ACROSS_SLICE * patch_size / math.sqrt(rows * columns)
    wanted, why = (
        for_slice,
        f"a slice of {rows} x {columns} spans {TOKENS_ACROSS_SLICE:.0f} tokens at x {for_slice:.2f}",
    )
    smallest = smallest_structure(fingerprint)
    if smallest is not None:
        name, extent = smallest
        voxels = extent / in_plane_length(fingerprint, axis, spacing)
        for_structure = TOKENS_ACROSS_STRUCTURE * patch_size / voxels
        wanted = max(wanted, for_structure)
        why = (
            f"the smallest structures ('{name}', 5th percentile {extent:.3g} {fingerprint.cases[0].unit} = "
            f"{voxels:.1f} voxels) span {TOKENS_ACROSS_STRUCTURE:.0f} tokens of {patch_size} px at "
            f"x {for_structure:.2f}; {why}"
        )
    value = min(max(wanted, min(1.0, fits)), max(1.0, fits))
    value = 1.0 if abs(value - 1) <= _SNAP else math.floor(value * 100) / 100 if value > 1 else round(value, 3)
    return value, f"{why}; {max_tokens} tokens a slice allow x {fits:.2f}."


def choose_crop(
    fingerprint: Fingerprint,
    axis: SliceAxis | None,
    spacing: tuple[float, float] | None,
    magnification: float,
    patch_size: int,
    max_tokens: int,
) -> tuple[tuple[int, int], str]:
    """Size of a training crop in prepared voxels (rows, columns): the whole slice where it fits into `max_tokens`."""
    median, usual, largest = slice_sizes(fingerprint, axis, spacing)

    def tokens(size: Sequence[int]) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(n * magnification / patch_size - 1e-6)) for n in size)
        return rows, columns

    for size, what in ((largest, "the largest slice"), (usual, "19 of 20 slices"), (median, "the median slice")):
        rows, columns = tokens(size)
        if rows * columns <= max_tokens * 1.1:  # so that rounding up to whole patches does not cut a slice in two
            return size, f"{what} fits whole: {rows} x {columns} tokens (at most {max_tokens})."
    rows, columns = tokens(usual)
    side = math.isqrt(max_tokens)
    rows = min(rows, side) if rows <= columns else min(rows, max_tokens // min(columns, side))
    columns = min(columns, max_tokens // rows)
    crop = (
        min(usual[0], int(rows * patch_size / magnification)),
        min(usual[1], int(columns * patch_size / magnification)),
    )
    return crop, f"{rows} x {columns} tokens (at most {max_tokens}) of slices of {format_shape(usual)} voxels."


def choose_input_builder(fingerprint: Fingerprint, axis: SliceAxis | None) -> tuple[str, str]:
    """How channels and slices become the three-channel image a backbone reads (a name in INPUT_BUILDERS)."""
    if is_photo(fingerprint):
        return "rgb", "colour pictures."
    if fingerprint.num_channels > 1:
        return "channels", f"{fingerprint.num_channels} channels."
    if axis is not None and fingerprint.median_shape[axis] > 1:
        return "neighbours", "one channel of a volume: the slices above and below fill the other two colours (2.5-D)."
    return "repeat", "one channel, no neighbouring slices."


def smallest_structure(fingerprint: Fingerprint) -> tuple[str, float] | None:
    """(class name, extent) of the class whose 5th percentile of component extents is smallest."""
    if fingerprint.labels is None:
        return None
    measured = [
        (name, found.percentile_5)
        for name, value in fingerprint.labels.foreground
        if (found := fingerprint.structures.get(str(value))) is not None and found.percentile_5 is not None
    ]
    return min(measured, key=lambda item: item[1]) if measured else None


def in_plane(case: CaseFacts, values: Sequence[Any], axis: SliceAxis | None) -> tuple[Any, Any]:
    """The (row, column) entries of values per array axis."""
    if axis is None:
        return values[0], values[1]
    by_world = case.along_world(values)
    _, row, column = DISPLAY_AXES[axis]
    return by_world[row], by_world[column]


def in_plane_length(fingerprint: Fingerprint, axis: SliceAxis | None, spacing: tuple[float, float] | None) -> float:
    """Side of a prepared voxel in-plane (geometric mean of row and column, median over the set)."""
    if spacing is None:
        pairs = [in_plane(case, case.spacing, axis) for case in fingerprint.cases]
        return float(np.median([math.sqrt(row * column) for row, column in pairs]))
    return math.sqrt(spacing[0] * spacing[1])


def slice_sizes(
    fingerprint: Fingerprint, axis: SliceAxis | None, spacing: tuple[float, float] | None
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(rows, columns) of prepared slices: median, 95th percentile and maximum over the cases, each axis by itself."""
    sizes = np.array([in_plane(case, case.shape, axis) for case in fingerprint.cases], dtype=np.float64)
    if spacing is not None:
        own = np.array([in_plane(case, case.spacing, axis) for case in fingerprint.cases])
        sizes = np.maximum(1, np.round(sizes * own / np.array(spacing)))
    median, usual, largest = (np.percentile(sizes, p, axis=0, method="higher").astype(int) for p in (50, 95, 100))
    return (
        (int(median[0]), int(median[1])),
        (int(usual[0]), int(usual[1])),
        (int(largest[0]), int(largest[1])),
    )
