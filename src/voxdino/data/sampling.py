"""Which crop is a sample: draws that depend on nothing but (seed, epoch, index), so resuming repeats them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from voxdino.core.records import Record
from voxdino.preparation.case_record import Lesion

Range = tuple[int, int]  # first voxel and one past the last, along one axis
Slice = tuple[str, int]  # case id, index of the slice


class Quotas(Record):
    """How samples are shared out; what is left over is drawn anywhere in the case (or pool).

    foreground: share of samples centred near a voxel of a class drawn evenly over the classes the case has. Default
                0.5: a third (nnU-Net) leaves few structure pixels where they are small against the crop.
    empty:      share of samples from slices without any foreground, which teach where to stop along the slice axis.
    by:         what a foreground sample is centred near. "voxel": any voxel of the class, so that large structures come
                most often. "lesion": a connected component of the class, drawn evenly, then a voxel of it, so that a
                lesion of ten voxels comes as often as one of ten thousand (as does a slip of the annotator's pen).

    A pool of cached features has fixed crops: there both are shares of slices with and without foreground, and "lesion"
    takes the records that hold a lesion drawn evenly. Slabs of cached slices, which nearly always hold both, have no
    share of empty ones.
    """

    foreground: float = Field(default=0.5, ge=0, le=1)
    empty: float = Field(default=0.1, ge=0, le=1)
    by: Literal["voxel", "lesion"] = "voxel"


@dataclass(frozen=True, eq=False)
class CaseExtent:
    """What the sampler knows of a case.

    shape:             (D, H, W) prepared voxels.
    locations:         class index -> (n, 3) voxels (z, y, x) of that class, drawn evenly (of large structures not all).
    foreground_slices: indices of all slices that hold any foreground, ascending.
    lesions:           class index -> its connected components (of very many a fair share).
    """

    case_id: str
    shape: tuple[int, int, int]
    locations: Mapping[int, NDArray[Any]]
    foreground_slices: tuple[int, ...]
    lesions: Mapping[int, Sequence[Lesion]] = field(default_factory=dict)

    def empty_slices(self) -> NDArray[Any]:
        """Indices of the other slices, ascending."""
        return np.setdiff1d(np.arange(self.shape[0]), self.foreground_slices)

    def candidates(
        self, quotas: Quotas, rng: np.random.Generator, *, depth: int | None = None
    ) -> Mapping[int, NDArray[Any]]:
        """Per class, the voxels that a foreground sample may lie around: all known ones, or those of a drawn lesion.

        depth: only voxels of that slice; a class none of whose lesions is known to have any keeps its locations there.
        """

        def inside(voxels: NDArray[Any]) -> NDArray[Any]:
            return voxels if depth is None else voxels[voxels[:, 0] == depth]

        found = {label: inside(voxels) for label, voxels in self.locations.items()}
        for label in sorted(self.lesions) if quotas.by == "lesion" else ():
            lesions = [voxels for lesion in self.lesions[label] if len(voxels := inside(lesion.voxels))]
            if lesions:
                found[label] = lesions[int(rng.integers(len(lesions)))]
        return found


@dataclass(frozen=True)
class Draw:
    """One sample: a case and the box cut from it, in prepared voxels; the box may reach beyond the volume.

    epoch, index: seed the augmentation together with the case and its slice; epoch 0 is the plain, unaugmented view.
    """

    case_id: str
    epoch: int
    index: int
    box: tuple[Range, Range, Range]


class Sampler:
    """Draws training samples from cases.

    crop: (rows, columns) of a sample; slab: slices of a sample.
    """

    def __init__(
        self, cases: Sequence[CaseExtent], crop: tuple[int, int], slab: int, quotas: Quotas, seed: int
    ) -> None:
        assert cases, "no case to draw from"
        self.cases = {case.case_id: case for case in cases}
        self.crop, self.slab, self.quotas, self.seed = crop, slab, quotas, seed
        self._ids = sorted(self.cases)  # the order of the folder listing must not matter
        self._empty = {case.case_id: case.empty_slices() for case in cases}
        self._order = lru_cache(maxsize=8)(self._shuffled)

    def draw(self, epoch: int, index: int) -> Draw:
        """Sample `index` of `epoch`. Cases take turns in a new random order each round."""
        turn, place = divmod(index, len(self._ids))
        case = self.cases[self._ids[self._order(epoch, turn)[place]]]
        rng = np.random.default_rng([self.seed, 1, epoch, index])
        kind = rng.random()
        wanted = case.candidates(self.quotas, rng) if kind < self.quotas.foreground else {}
        if (voxel := _foreground_voxel(wanted, rng)) is not None:
            return Draw(case.case_id, epoch, index, self._around(case, voxel, rng))
        empty = self._empty[case.case_id]
        if kind >= 1 - self.quotas.empty and len(empty):
            depth = int(rng.choice(empty))
        else:
            depth = int(rng.integers(case.shape[0]))
        first = _clip_start(depth - self.slab // 2, case.shape[0], self.slab)
        rows, columns = (_anywhere(case.shape[axis + 1], self.crop[axis], rng) for axis in (0, 1))
        return Draw(case.case_id, epoch, index, ((first, first + self.slab), rows, columns))

    def view(self, case_id: str, depth: int, epoch: int) -> Draw:
        """The sample of one given slice in view `epoch`: for pools of cached features and for validation.

        A slice that fits the crop lies in its middle in view 0 and anywhere inside it in the others. Of a larger slice,
        a quota of views is centred near foreground of that slice where it has any.
        """
        case = self.cases[case_id]
        rng = np.random.default_rng([self.seed, 2, epoch, self._ids.index(case_id), depth])
        here = case.candidates(self.quotas, rng, depth=depth)
        rows, columns = place_view(case.shape, here, self.crop, self.quotas.foreground, rng, plain=epoch == 0)
        return Draw(case_id, epoch, 0, ((depth, depth + 1), rows, columns))

    def _around(self, case: CaseExtent, voxel: NDArray[Any], rng: np.random.Generator) -> tuple[Range, Range, Range]:
        first = _clip_start(int(voxel[0]) - int(rng.integers(self.slab)), case.shape[0], self.slab)
        rows, columns = (_near(int(voxel[axis + 1]), case.shape[axis + 1], self.crop[axis], rng) for axis in (0, 1))
        return (first, first + self.slab), rows, columns

    def _shuffled(self, epoch: int, turn: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, 0, epoch, turn]).permutation(len(self._ids))


class PoolSampler:
    """Draws samples from a pool of records; sample n depends on nothing but (seed, n).

    The quotas are spread evenly, so every batch has them. Within a kind (foreground, empty, any) all records are drawn
    once, in random order, before any comes again. By lesion, the classes take turns in the foreground kind, and so do
    the lesions of a class, in random order; of a lesion's records any may come.

    lesions: per class, per lesion, the places of the records that hold it (`records_of_lesions`); used by lesion only.
    """

    def __init__(
        self,
        has_foreground: Sequence[bool],
        quotas: Quotas,
        seed: int,
        lesions: Sequence[Sequence[NDArray[np.int64]]] = (),
    ) -> None:
        held = np.asarray(has_foreground, dtype=bool)
        self._kinds = (np.flatnonzero(held), np.flatnonzero(~held), np.arange(len(held)))
        self._foreground = quotas.foreground if held.any() else 0.0
        left = 1 - self._foreground
        self._empty = min(1.0, quotas.empty / left) if left and not held.all() else 0.0  # of what foreground leaves
        self._seed = seed
        self._lesions = [of_class for of_class in lesions if of_class] if quotas.by == "lesion" else []
        self._order = lru_cache(maxsize=12)(self._shuffled)

    def draw(self, number: int) -> int:
        """The place in the pool of sample `number`."""
        chosen, num_foreground = _is_chosen(number, self._foreground)
        if chosen and self._lesions:
            return self._take_lesion(num_foreground)
        if chosen:
            return self._take(0, num_foreground)
        number -= num_foreground
        chosen, num_empty = _is_chosen(number, self._empty)
        return self._take(1, num_empty) if chosen else self._take(2, number - num_empty)

    def _take(self, kind: int, number: int) -> int:
        turn, place = divmod(number, len(self._kinds[kind]))
        return int(self._kinds[kind][self._order(kind, turn)[place]])

    def _take_lesion(self, number: int) -> int:
        turn, label = divmod(number, len(self._lesions))
        lesions = self._lesions[label]
        turn, place = divmod(turn, len(lesions))
        order = np.random.default_rng([self._seed, 10, label, turn]).permutation(len(lesions))
        return int(np.random.default_rng([self._seed, 11, number]).choice(lesions[order[place]]))

    def _shuffled(self, kind: int, turn: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, 5, kind, turn]).permutation(len(self._kinds[kind]))


def _is_chosen(number: int, share: float) -> tuple[bool, int]:
    """Whether `number` belongs to an evenly spread share of all numbers, and how many before it do."""
    num_before, num_after = (int(count * share + 1e-9) for count in (number, number + 1))  # 0.29 * 100 is below 29
    return num_after > num_before, num_before


def choose_slices(extents: Sequence[CaseExtent], *, background_share: float, margin: int, seed: int) -> list[Slice]:
    """The slices worth caching, in random order so that any part from the start is a fair sample of all.

    All slices with foreground, those up to `margin` slices away (where the structures end is the hard question), and
    `background_share` of the others. Cases without any foreground are background throughout.
    """
    chosen: list[Slice] = []
    for extent in sorted(extents, key=lambda extent: extent.case_id):
        depth = extent.shape[0]
        near = np.zeros(depth, dtype=bool)
        for index in extent.foreground_slices:
            near[max(0, index - margin) : index + margin + 1] = True
        far = np.flatnonzero(~near)
        rng = np.random.default_rng([seed, 3, len(chosen)])
        kept = rng.permutation(far)[: int(np.ceil(background_share * len(far)))]
        chosen += [(extent.case_id, int(index)) for index in sorted([*np.flatnonzero(near), *kept])]
    order = np.random.default_rng([seed, 4]).permutation(len(chosen))
    return [chosen[place] for place in order]


def records_of_lesions(cases: Sequence[CaseExtent], draws: Sequence[Draw]) -> list[list[NDArray[np.int64]]]:
    """Per class, per lesion of any case: the places in `draws` (one per record) whose box meets that of the lesion.

    Lesions that no record holds are left out.
    """
    places: dict[str, list[int]] = {}
    for place, draw in enumerate(draws):
        places.setdefault(draw.case_id, []).append(place)
    found: dict[int, list[NDArray[np.int64]]] = {}
    for case in sorted(cases, key=lambda case: case.case_id):
        mine = np.array(places.get(case.case_id, []), dtype=np.int64)
        boxes = np.array([draws[place].box for place in mine]).reshape(-1, 3, 2)
        for label, lesions in case.lesions.items():
            for lesion in lesions:
                box = np.array(lesion.box)
                meets = ((boxes[:, :, 0] < box[:, 1]) & (boxes[:, :, 1] > box[:, 0])).all(axis=1)
                if meets.any():
                    found.setdefault(label, []).append(mine[meets])
    return [found[label] for label in sorted(found)]


def place_view(
    shape: tuple[int, int, int],
    locations: Mapping[int, NDArray[Any]],
    crop: tuple[int, int],
    foreground: float,
    rng: np.random.Generator,
    *,
    plain: bool,
) -> tuple[Range, Range]:
    """Rows and columns of one view. plain: slices that fit the crop lie in its middle, else anywhere inside it.

    foreground: share of views of larger slices that are centred near one of the `locations`.
    """
    voxel = _foreground_voxel(locations, rng) if rng.random() < foreground else None
    ranges = []
    for axis in (0, 1):
        size, length = shape[axis + 1], crop[axis]
        if size <= length and plain:
            start = -((length - size) // 2)
            ranges.append((start, start + length))
        elif voxel is not None:
            ranges.append(_near(int(voxel[axis + 1]), size, length, rng))
        else:
            ranges.append(_anywhere(size, length, rng))
    return ranges[0], ranges[1]


def _foreground_voxel(locations: Mapping[int, NDArray[Any]], rng: np.random.Generator) -> NDArray[Any] | None:
    """A voxel of a class drawn evenly over the classes present; None where there is no foreground."""
    present = sorted(label for label, voxels in locations.items() if len(voxels))
    if not present:
        return None
    voxels = locations[present[int(rng.integers(len(present)))]]
    return np.asarray(voxels[int(rng.integers(len(voxels)))])


def _anywhere(size: int, crop: int, rng: np.random.Generator) -> Range:
    """Any crop that lies in the axis; where the crop is longer, any that holds the whole axis."""
    low, high = min(0, size - crop), max(0, size - crop)
    start = int(rng.integers(low, high + 1))
    return start, start + crop


def _near(voxel: int, size: int, crop: int, rng: np.random.Generator) -> Range:
    """A crop with the voxel in its middle half, moved inside the axis where it would leave it."""
    quarter = crop // 4
    start = _clip_start(voxel - crop // 2 + int(rng.integers(-quarter, quarter + 1)), size, crop)
    if size <= crop:  # the voxel is inside wherever the crop lies: use all positions
        return _anywhere(size, crop, rng)
    return start, start + crop


def _clip_start(start: int, size: int, length: int) -> int:
    return min(max(start, min(0, size - length)), max(0, size - length))
