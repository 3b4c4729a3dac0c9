"""The facts of a data set: what the files hold, per case and over the set. Facts only; decisions are the plan's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray

from voxdino.core.geometry import Grid, Unit
from voxdino.core.io import digest_image
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.core.records import Record
from voxdino.core.volume import LabelMap, Volume
from voxdino.preparation.case import Layout
from voxdino.preparation.distribution import Distribution, count_values

_SPECK_VOXELS = {2: 10, 3: 10}  # smaller components are slips of the pen, not structures to plan for
_MOST_SAMPLES = 2_000_000  # intensities kept over the whole set while it is surveyed


class Intensity(Record):
    """Intensities of one channel: percentiles 0.5, 50 and 99.5, mean and standard deviation, of `num_voxels`."""

    num_voxels: int
    lower: float
    median: float
    upper: float
    mean: float
    sd: float


class Structures(Record):
    """Connected components of one class. Extents are the middle one of a component's three box lengths (2-D: the
    shorter one), in mm or px: what a slice through it shows. Components under 10 voxels count, but are not measured.
    """

    num_components: int
    smallest: float | None
    percentile_5: float | None


class CaseFacts(Record):
    """Facts of one case.

    shape, spacing: in array order, spacing in `unit`.   orientation: of the array axes ("RAS"); "" for pictures.
    sources:        file (relative to the data set) -> SHA-256.
    num_voxels:     label id -> voxels, ids as text.     structures: foreground id -> its components.
    intensity:      per channel, over all voxels.        foreground: per channel, over labelled voxels.
    """

    id: str
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    orientation: str
    unit: Unit
    dtype: str
    sources: dict[str, str]
    num_voxels: dict[str, int]
    structures: dict[str, Structures]
    intensity: tuple[Intensity, ...]
    foreground: tuple[Intensity, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def along_world(self, values: Sequence[Any]) -> dict[str, Any]:
        """`values` (one per array axis) by axis: {"R": ..., "A": ..., "S": ...}; {"row": ..., "column": ...} in 2-D."""
        names = [_WORLD_AXIS[letter] for letter in self.orientation] or ["row", "column"]
        return dict(zip(names, values, strict=True))


_WORLD_AXIS = {"L": "R", "R": "R", "P": "A", "A": "A", "I": "S", "S": "S"}


class Fingerprint(Record):
    """The facts over a data set.

    labels:     what the label values mean: declared, or (folder + CSV) found in the files. None: no label was read.
    cases:      per case, sorted by id; cases with errors are left out.
    median_shape, median_spacing: over the cases, by world axis ("R", "A", "S"), or "row" and "column" of pictures.
    anisotropy: the coarsest median spacing over the next one.
    structures: per foreground id, over all components of the set.
    foreground: per channel, over the labelled voxels of all cases (percentiles from an even sample).
    """

    dataset: str
    layout: Layout
    channels: tuple[str, ...]
    num_channels: int
    labels: LabelSet | None
    read_options: ReadOptions
    cases: tuple[CaseFacts, ...]
    median_shape: dict[str, float]
    median_spacing: dict[str, float]
    anisotropy: float | None
    structures: dict[str, Structures]
    foreground: tuple[Intensity, ...]

    @property
    def ndim(self) -> int:
        return self.cases[0].ndim


@dataclass(frozen=True)
class Samples:
    """What a survey worker sends along with the facts of a case, to be pooled: not stored."""

    intensities: tuple[NDArray[np.float32], ...]  # per channel, labelled voxels
    extents: dict[str, NDArray[np.float32]]  # per foreground id, extents of the measured components


def describe_case(
    case_id: str,
    volume: Volume,
    label: LabelMap | None,
    sources: dict[str, Path],
    *,
    labels: LabelSet | None = None,
    num_samples: int = 1000,
) -> tuple[CaseFacts, Samples]:
    """The facts of one case that has been read, and what to pool over the set.

    labels:      what the values mean; None: 0 is background.
    num_samples: labelled voxels (evenly spaced in array order) whose intensities are kept for the set's percentiles.
    """
    grid = volume.grid
    ids = None if label is None else _foreground_ids(label.array, labels)
    is_foreground = None if ids is None else ids > 0
    foreground = [
        channel[is_foreground] if is_foreground is not None else channel.reshape(-1)[:0] for channel in volume.array
    ]
    structures, extents = ({}, {}) if ids is None else _measure_structures(ids, grid)
    facts = CaseFacts(
        id=case_id,
        shape=grid.shape,
        spacing=grid.spacing,
        orientation=grid.orientation if grid.ndim == 3 else "",
        unit=grid.unit,
        dtype=str(volume.array.dtype),
        sources={name: digest_image(path) for name, path in sources.items()},
        num_voxels={} if label is None else voxels_per_value(label.array),
        structures=structures,
        intensity=tuple(measure_intensity(channel) for channel in volume.array),
        foreground=tuple(measure_intensity(values) for values in foreground if values.size),
    )
    return facts, Samples(intensities=tuple(_thin(values, num_samples) for values in foreground), extents=extents)


def measure_intensity(values: NDArray[Any]) -> Intensity:
    """Percentiles, mean and sd of all values of a non-empty array."""
    distribution = Distribution.of(values)
    lower, median, upper = distribution.percentiles((0.5, 50.0, 99.5))
    mean, sd = distribution.mean_and_sd()
    return Intensity(num_voxels=values.size, lower=lower, median=median, upper=upper, mean=mean, sd=sd)


def voxels_per_value(labels: NDArray[Any]) -> dict[str, int]:
    """Value (as text) -> voxels."""
    values, counts = count_values(labels)
    return {str(value): count for value, count in zip(values.tolist(), counts.tolist(), strict=True)}


def _foreground_ids(array: NDArray[Any], labels: LabelSet | None) -> NDArray[Any]:
    """The label map with background and ignored voxels as 0."""
    nothing = [] if labels is None else [i for i in (labels.ids[0], labels.ignore_id) if i]
    return np.where(np.isin(array, nothing), array.dtype.type(0), array) if nothing else array


def _measure_structures(
    ids_map: NDArray[Any], grid: Grid
) -> tuple[dict[str, Structures], dict[str, NDArray[np.float32]]]:
    """Per id but 0: its connected components, and their extents."""
    ndim = grid.ndim
    if not ids_map.any():
        return {}, {}
    labels = np.require(ids_map[bounding_box(ids_map)], requirements=["C", "W"])  # cc3d takes no read-only array
    components = cc3d.connected_components(labels, connectivity=26 if ndim == 3 else 8)
    statistics = cc3d.statistics(components, no_slice_conversion=True)
    sizes = statistics["voxel_counts"][1:]
    corners = statistics["bounding_boxes"][1:].reshape(len(sizes), -1, 2)[:, :ndim]
    lengths = np.sort((corners[..., 1].astype(np.int64) - corners[..., 0] + 1) * np.array(grid.spacing), axis=1)
    extents = lengths[:, ndim - 2]  # middle of three, shorter of two
    ids = np.zeros(len(sizes) + 1, dtype=labels.dtype)
    ids[components.reshape(-1)] = labels.reshape(-1)
    structures, measured = {}, {}
    for value in np.unique(ids[1:]).tolist():
        of_class = ids[1:] == value
        kept = np.sort(extents[of_class & (sizes >= _SPECK_VOXELS[ndim])]).astype(np.float32)
        measured[str(value)] = kept
        structures[str(value)] = summarise_extents(int(of_class.sum()), kept)
    return structures, measured


def summarise_extents(num_components: int, extents: NDArray[np.float32]) -> Structures:
    """extents: of the measured components, in any order."""
    return Structures(
        num_components=num_components,
        smallest=float(extents.min()) if extents.size else None,
        percentile_5=float(np.percentile(extents, 5)) if extents.size else None,
    )


def bounding_box(array: NDArray[Any]) -> tuple[slice, ...]:
    """The smallest box that holds every value that is not 0 (there is one)."""
    box = []
    for axis in range(array.ndim):
        others = tuple(other for other in range(array.ndim) if other != axis)
        hit = np.flatnonzero(array.any(axis=others))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)


def _thin(values: NDArray[Any], most: int) -> NDArray[np.float32]:
    step = max(1, -(-values.size // most))
    return values[::step].astype(np.float32)


def medians_by_axis(cases: Sequence[CaseFacts], values: Sequence[Sequence[int | float]]) -> dict[str, float]:
    """Medians over the cases of values per array axis, by axis (`CaseFacts.along_world`)."""
    by_axis = [case.along_world(value) for case, value in zip(cases, values, strict=True)]
    return {axis: float(np.median([value[axis] for value in by_axis])) for axis in by_axis[0]} if by_axis else {}


def samples_per_case(num_cases: int) -> int:
    """How many intensities of each case are pooled."""
    return max(200, min(20_000, _MOST_SAMPLES // max(num_cases, 1)))


def pool_intensity(cases: Sequence[CaseFacts], samples: Sequence[NDArray[np.float32]], channel: int) -> Intensity:
    """Intensity of the labelled voxels of a set: mean and sd exact from the cases' own, percentiles from samples."""
    parts = [case.foreground[channel] for case in cases if case.foreground]
    weights = np.array([part.num_voxels for part in parts], dtype=np.float64)
    means = np.array([part.mean for part in parts])
    mean = float(np.average(means, weights=weights))
    variance = float(np.average(np.array([part.sd for part in parts]) ** 2 + (means - mean) ** 2, weights=weights))
    lower, median, upper = Distribution.of(np.concatenate(list(samples))).percentiles((0.5, 50.0, 99.5))
    sd = float(np.sqrt(variance))
    return Intensity(num_voxels=int(weights.sum()), lower=lower, median=median, upper=upper, mean=mean, sd=sd)
