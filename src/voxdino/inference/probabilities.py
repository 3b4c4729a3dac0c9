"""Probabilities of a whole volume on its own grid: float16, compressed in chunks on the disk, slice by slice."""

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from voxdino.core.labels import LabelSet
from voxdino.core.safe_files import write_atomic
from voxdino.inference.export import BYTES_AT_ONCE, resize_scores
from voxdino.preparation.orientation import CaseGeometry

Slab = tuple[int, Float[Tensor, "d K h w"]]


def keep_probabilities(slabs: Iterable[Slab], path: Path, geometry: CaseGeometry, labels: LabelSet) -> Iterator[Slab]:
    """Pass slabs of logits on, writing their probabilities to `path` as they come by.

    The file is a blosc2 array (K, *spatial) of float16 in the axis order of the image: softmax over the classes, or for
    regions a sigmoid of each, at the original size, where the label map decides too. Its metadata say what the
    channels are ("names", "ids") and where the voxels lie ("affine", RAS+ millimetres).

    Memory: one slice. The file appears when the last slab is taken; where the slabs end early, there is none.
    Errors: ResourceError when the disk is full.
    """
    shape = (labels.num_outputs, *geometry.shape)
    slice_axis = 1 + geometry.order[0] if len(geometry.order) == 3 else None
    chunks = tuple(1 if axis in (0, slice_axis) else size for axis, size in enumerate(shape))
    with write_atomic(path) as temporary:
        temporary.touch()  # where that cannot be, the system says why
        settings = blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=1, nthreads=1)
        with _storing():
            file = blosc2.empty(shape, np.float16, urlpath=str(temporary), mode="w", chunks=chunks, cparams=settings)
            file.schunk.vlmeta.update(_describe(geometry, labels))
        for first, logits in slabs:
            for number, scores in enumerate(logits, start=first):
                for classes, probabilities in slice_probabilities(scores, geometry.native_shape[1:], labels):
                    with _storing():
                        file[_place(classes, number, geometry)] = _turned(probabilities, geometry)
            yield first, logits


@contextmanager
def _storing() -> Iterator[None]:
    """blosc2 says of a full disk only that it could not; said here as the system says it."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(errno.ENOSPC, str(error)) from error


def slice_probabilities(
    logits: Float[Tensor, "K h w"], size: tuple[int, int], labels: LabelSet
) -> Iterator[tuple[slice, Float[Tensor, "k H W"]]]:
    """(which classes, their probabilities at `size`) of one slice, a few classes at a time."""
    at_once = max(1, BYTES_AT_ONCE // (4 * size[0] * size[1]))
    groups = [slice(start, min(start + at_once, len(logits))) for start in range(0, len(logits), at_once)]
    if labels.regions:
        for group in groups:
            yield group, torch.sigmoid(resize_scores(logits[group], size))
        return
    total = torch.full(size, -torch.inf, device=logits.device)
    for group in groups:
        total = torch.logaddexp(total, torch.logsumexp(resize_scores(logits[group], size), dim=0))
    for group in groups:
        yield group, torch.exp(resize_scores(logits[group], size) - total)


def _place(classes: slice, number: int, geometry: CaseGeometry) -> tuple[slice, ...]:
    """Where slice `number` of the plan's order lies in the file's array."""
    place = [classes, *(slice(None) for _ in geometry.shape)]
    if len(geometry.order) == 3:
        axis = geometry.order[0]
        at = geometry.shape[axis] - 1 - number if geometry.flips[0] else number
        place[1 + axis] = slice(at, at + 1)
    return tuple(place)


def _turned(probabilities: Float[Tensor, "k H W"], geometry: CaseGeometry) -> NDArray[np.float16]:
    """A slice's classes as the file's array has them."""
    array: NDArray[Any] = probabilities.to(torch.float16).cpu().numpy()
    flips = geometry.flips[-2:]
    array = np.flip(array, tuple(1 + axis for axis, flip in enumerate(flips) if flip))
    if len(geometry.order) == 3:
        array = np.moveaxis(array[:, None], (1, 2, 3), [1 + axis for axis in geometry.order])
    return np.ascontiguousarray(array)


def _describe(geometry: CaseGeometry, labels: LabelSet) -> dict[str, Any]:
    names = [region.name for region in labels.regions] or list(labels.names)
    ids = list(labels.region_ids) if labels.regions else list(labels.ids)
    return {"names": names, "ids": ids, "affine": [list(row) for row in geometry.affine], "unit": geometry.unit}
