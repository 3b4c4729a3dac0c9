"""The record of a prepared case, cases/<id>.json: what it was made of, how, and where its structures are."""

import base64
import hashlib
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxdino.core.labels import LabelSet
from voxdino.core.records import Record
from voxdino.core.safe_files import digest_json
from voxdino.preparation.distribution import count_values
from voxdino.preparation.intensity import ChannelScaling
from voxdino.preparation.orientation import CaseGeometry

_MOST_LOCATIONS = 2000  # voxels remembered per class and case
_BLOCK = 1 << 22  # voxels looked at together when locations are drawn


class CaseRecord(Record):
    """What `prepare` wrote about a case: cases/<id>.json.

    source_digests: source file -> SHA-256.         files: file beside this one -> SHA-256.
    num_voxels:     class index (as text) -> voxels.
    foreground_slices: all slices that hold any foreground, ascending.
    checksum:       of all the rest; see `is_whole`.
    packed_locations: see `locations`; positions in the flat label map, differences as zlib'ed uint32, base64.
    """

    id: str
    preparation_digest: str
    geometry: CaseGeometry
    scaling: tuple[ChannelScaling, ...]
    source_digests: dict[str, str]
    files: dict[str, str]
    num_voxels: dict[str, int]
    foreground_slices: tuple[int, ...]
    packed_locations: dict[str, str]
    checksum: str = ""

    def sealed(self) -> "CaseRecord":
        """With its checksum."""
        return self.model_copy(update={"checksum": self._content_digest()})

    @property
    def is_whole(self) -> bool:
        """Nothing has changed since it was sealed."""
        return self.checksum == self._content_digest()

    def _content_digest(self) -> str:
        return digest_json(self.model_dump(mode="json", exclude={"checksum"}))

    @property
    def locations(self) -> dict[str, NDArray[np.int64]]:
        """Per foreground class index (as text): (n, 3) voxels (z, y, x), at most 2000, evenly drawn."""
        return {name: _unpack(text, self.geometry.prepared_shape) for name, text in self.packed_locations.items()}


def foreground_slices(label: NDArray[Any], labels: LabelSet) -> tuple[int, ...]:
    """Indices of the slices of (D, H, W) class indices that hold any foreground, ascending."""
    return tuple(z for z, one in enumerate(label) if ((one != 0) & (one != labels.ignore_index)).any())


def pack_locations(case_id: str, label: NDArray[Any], labels: LabelSet) -> dict[str, str]:
    """Per foreground class, up to 2000 of its voxels: one drawn from each of 2000 equal parts, in array order."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(case_id.encode()).digest()[:8], "little"))
    ranks: dict[int, NDArray[np.int64]] = {}  # class -> which of its voxels, counted in array order
    for index, count in zip(*(numbers.tolist() for numbers in count_values(label)), strict=True):
        if index not in (0, labels.ignore_index):
            num_drawn = min(count, _MOST_LOCATIONS)
            drawn = ((np.arange(num_drawn) + rng.random(num_drawn)) * (count / num_drawn)).astype(np.int64)
            ranks[index] = np.minimum(drawn, count - 1)
    places: dict[int, list[NDArray[np.int64]]] = {index: [] for index in ranks}
    num_seen = dict.fromkeys(ranks, 0)
    flat = label.reshape(-1)
    for begin in range(0, flat.size, _BLOCK):
        block = flat[begin : begin + _BLOCK]
        found = np.flatnonzero(block)
        found = found[np.argsort(block[found], kind="stable")]  # by class, in array order within
        classes, starts, counts = np.unique(block[found], return_index=True, return_counts=True)
        for index, start, count in zip(classes.tolist(), starts.tolist(), counts.tolist(), strict=True):
            if index in ranks:
                first, last = np.searchsorted(ranks[index], (num_seen[index], num_seen[index] + count))
                places[index].append(begin + found[start + ranks[index][first:last] - num_seen[index]])
                num_seen[index] += count
    return {str(index): _pack(np.concatenate(parts)) for index, parts in places.items()}


def _pack(places: NDArray[np.int64]) -> str:
    steps = np.diff(places, prepend=0).astype("<u4")
    return base64.b64encode(zlib.compress(steps.tobytes(), 6)).decode("ascii")


def _unpack(text: str, shape: tuple[int, int, int]) -> NDArray[np.int64]:
    steps = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<u4")
    return np.stack(np.unravel_index(np.cumsum(steps, dtype=np.int64), shape), axis=1)
