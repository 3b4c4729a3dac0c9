"""The record of a prepared case, cases/<id>.json: what it was made of, how, and where its structures are."""

import base64
import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from voxdino.core.labels import LabelSet
from voxdino.preparation.distribution import count_values
from voxdino.preparation.fingerprint import bounding_box
from voxdino.preparation.intensity import ChannelScaling
from voxdino.preparation.made_record import MadeRecord
from voxdino.preparation.orientation import CaseGeometry

_MOST_LOCATIONS = 2000  # voxels remembered per class and case
_MOST_LESIONS = 200  # connected components remembered per class and case
_MOST_PLACES = 16  # voxels remembered per component
_BLOCK = 1 << 22  # voxels looked at together when locations are drawn


@dataclass(frozen=True, eq=False)
class Lesion:
    """A connected component of one class: 26 neighbours, in a picture 8.

    box:    first voxel and one past the last along z, y and x.
    voxels: (n, 3) of its voxels (z, y, x), at most 16, evenly drawn in array order.
    """

    num_voxels: int
    box: tuple[tuple[int, int], ...]
    voxels: Int[np.ndarray, "n 3"]


class CaseRecord(MadeRecord):
    """What `prepare` wrote about a case: cases/<id>.json.

    files:          file beside this one -> SHA-256.
    num_voxels:     class index (as text) -> voxels.
    foreground_slices: all slices that hold any foreground, ascending.
    num_lesions:     class index (as text) -> connected components of it, all there are.
    packed_locations: see `locations`; positions in the flat label map, differences as zlib'ed uint32, base64.
    packed_lesions:  see `lesions`; zlib'ed int64, base64: how many, their voxels, their boxes, positions.
    """

    id: str
    preparation_digest: str
    geometry: CaseGeometry
    scaling: tuple[ChannelScaling, ...]
    source_digests: dict[str, str]
    files: dict[str, str]
    num_voxels: dict[str, int]
    foreground_slices: tuple[int, ...]
    num_lesions: dict[str, int]
    packed_locations: dict[str, str]
    packed_lesions: dict[str, str]
    checksum: str = ""

    @property
    def file_digests(self) -> dict[str, str]:
        return self.files

    @property
    def locations(self) -> dict[str, NDArray[np.int64]]:
        """Per foreground class index (as text): (n, 3) voxels (z, y, x), at most 2000, evenly drawn."""
        return {name: _unpack(text, self.geometry.prepared_shape) for name, text in self.packed_locations.items()}

    @property
    def lesions(self) -> dict[str, tuple[Lesion, ...]]:
        """Per foreground class index (as text): its connected components, at most 200.

        Where a class has more, they are sorted by size, cut into 200 equal parts, and one is drawn from each: sizes are
        represented as they occur.
        """
        shape = self.geometry.prepared_shape
        return {name: _unpack_lesions(text, shape) for name, text in self.packed_lesions.items()}


def foreground_slices(label: NDArray[Any], labels: LabelSet) -> tuple[int, ...]:
    """Indices of the slices of (D, H, W) class indices that hold any foreground, ascending."""
    return tuple(z for z, one in enumerate(label) if ((one != 0) & (one != labels.ignore_index)).any())


def pack_locations(case_id: str, label: NDArray[Any], labels: LabelSet) -> dict[str, str]:
    """Per foreground class, up to 2000 of its voxels: one drawn from each of 2000 equal parts, in array order."""
    rng = _rng(case_id)
    ranks: dict[int, NDArray[np.int64]] = {}  # class -> which of its voxels, counted in array order
    for index, count in zip(*(numbers.tolist() for numbers in count_values(label)), strict=True):
        if index not in (0, labels.ignore_index):
            ranks[index] = _one_of_each_part(count, _MOST_LOCATIONS, rng)
    return {str(index): _pack(places) for index, places in _at_ranks(label, ranks).items()}


def pack_lesions(case_id: str, label: NDArray[Any], labels: LabelSet) -> tuple[dict[str, int], dict[str, str]]:
    """Per foreground class of (D, H, W) class indices: how many components it has, and `CaseRecord.packed_lesions`."""
    foreground = np.where(label == labels.ignore_index, label.dtype.type(0), label)
    if not foreground.any():
        return {}, {}
    box = bounding_box(foreground)
    foreground = np.ascontiguousarray(foreground[box])
    components = cc3d.connected_components(foreground, connectivity=26)
    statistics = cc3d.statistics(components, no_slice_conversion=True)
    sizes = statistics["voxel_counts"].astype(np.int64)
    corner = np.array([axis.start for axis in box])
    boxes = statistics["bounding_boxes"].astype(np.int64).reshape(-1, 3, 2) + corner[:, None] + [0, 1]
    rng = _rng(f"{case_id}: lesions")
    chosen: dict[int, NDArray[np.int64]] = {}
    classes = _class_of_each(components, foreground, len(sizes))
    num_lesions = {int(index): int((classes == index).sum()) for index in np.unique(classes[1:])}
    for index, number in num_lesions.items():
        ids = np.flatnonzero(classes == index)
        by_size = ids[np.argsort(sizes[ids], kind="stable")]
        chosen[index] = np.sort(by_size[_one_of_each_part(number, _MOST_LESIONS, rng)])
    kept = np.concatenate(list(chosen.values()))
    ranks = {
        place: _one_of_each_part(int(sizes[kept[place - 1]]), _MOST_PLACES, rng) for place in range(1, len(kept) + 1)
    }
    number_of = np.zeros(len(sizes), dtype=components.dtype)
    number_of[kept] = np.arange(1, len(kept) + 1)
    flat = components.reshape(-1)
    for begin in range(0, flat.size, _BLOCK):  # only what is kept keeps a number
        flat[begin : begin + _BLOCK] = number_of[flat[begin : begin + _BLOCK]]
    found = _at_ranks(components, ranks)
    packed, place = {}, 0
    for index, ids in chosen.items():
        inside = np.concatenate([found[place + one] for one in range(1, len(ids) + 1)])
        voxels = np.stack(np.unravel_index(inside, foreground.shape), axis=1) + corner
        places = np.ravel_multi_index(tuple(voxels.T), label.shape)
        packed[str(index)] = _as_text(np.concatenate([[len(ids)], sizes[ids], boxes[ids].reshape(-1), places]), "<i8")
        place += len(ids)
    return {str(index): number for index, number in num_lesions.items()}, packed


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def _one_of_each_part(count: int, most: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Distinct ascending numbers below `count`: all of them, or one drawn from each of `most` equal parts."""
    num_drawn = min(count, most)
    edges = np.arange(num_drawn + 1) * count // max(num_drawn, 1)
    return edges[:-1] + (rng.random(num_drawn) * np.diff(edges)).astype(np.int64)


def _at_ranks(groups: NDArray[Any], ranks: Mapping[int, NDArray[np.int64]]) -> dict[int, NDArray[np.int64]]:
    """Flat positions of the voxels of each group that are number ranks[group] (ascending) of it in array order."""
    places: dict[int, list[NDArray[np.int64]]] = {index: [] for index in ranks}
    num_seen = dict.fromkeys(ranks, 0)
    flat = groups.reshape(-1)
    for begin in range(0, flat.size, _BLOCK):
        block = flat[begin : begin + _BLOCK]
        found = np.flatnonzero(block)
        found = found[np.argsort(block[found], kind="stable")]  # by group, in array order within
        present, starts, counts = np.unique(block[found], return_index=True, return_counts=True)
        for index, start, count in zip(present.tolist(), starts.tolist(), counts.tolist(), strict=True):
            if index in ranks:
                first, last = np.searchsorted(ranks[index], (num_seen[index], num_seen[index] + count))
                places[index].append(begin + found[start + ranks[index][first:last] - num_seen[index]])
                num_seen[index] += count
    return {index: np.concatenate(parts) for index, parts in places.items()}


def _class_of_each(components: NDArray[Any], foreground: NDArray[Any], num: int) -> NDArray[np.int64]:
    """(num,) the class of each component; 0 for number 0, the background."""
    classes = np.zeros(num, dtype=np.int64)
    numbers, values = components.reshape(-1), foreground.reshape(-1)
    for begin in range(0, numbers.size, _BLOCK):
        classes[numbers[begin : begin + _BLOCK]] = values[begin : begin + _BLOCK]
    return classes


def _pack(places: NDArray[np.int64]) -> str:
    return _as_text(np.diff(places, prepend=0), "<u4")


def _unpack(text: str, shape: tuple[int, int, int]) -> NDArray[np.int64]:
    return np.stack(np.unravel_index(np.cumsum(_from_text(text, "<u4"), dtype=np.int64), shape), axis=1)


def _unpack_lesions(text: str, shape: tuple[int, int, int]) -> tuple[Lesion, ...]:
    numbers = _from_text(text, "<i8")
    num = int(numbers[0])
    sizes, boxes = numbers[1 : num + 1].tolist(), numbers[num + 1 : 7 * num + 1].reshape(num, 3, 2).tolist()
    voxels = np.stack(np.unravel_index(numbers[7 * num + 1 :], shape), axis=1)
    parts = np.split(voxels, np.cumsum([min(size, _MOST_PLACES) for size in sizes])[:-1])
    ends = [tuple((first, last) for first, last in box) for box in boxes]
    return tuple(Lesion(*one) for one in zip(sizes, ends, parts, strict=True))


def _as_text(numbers: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(zlib.compress(numbers.astype(dtype).tobytes(), 6)).decode("ascii")


def _from_text(text: str, dtype: str) -> NDArray[Any]:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=dtype)
