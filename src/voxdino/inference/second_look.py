"""A second, magnified look at small candidates: what spans one token in the first pass spans several in the second.

Candidates are the connected components where the probability of an output is at least 0.2, up to half a look across:
large structures are seen well enough. Each is cut out with its surroundings, as much as fills the network's usual input
at the higher magnification, predicted again, and both predictions are averaged, with a soft edge.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil

import cc3d
import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

THRESHOLD = 0.2  # of the probability; far below one half, since what was missed is looked for

Run = Callable[[Tensor, float], Tensor]  # crops (B, C, D + 2 k, h, w), magnification -> logits (B, K, D, h, w)


def second_look(
    logits: Float[Tensor, "D K H W"],
    image: Float[Tensor, "1 C Dk H W"],
    run: Run,
    *,
    magnify: float,
    tile: tuple[int, int],
    regions: bool = False,
    whole_slabs: bool = False,
    at_once: int = 8,
) -> Float[Tensor, "D K H W"]:
    """The logits of a first pass, averaged with those of magnified looks where small candidates are.

    image:       what the logits are of, normalised, with its context slices.
    run:         the model on crops, whose in-plane magnification is that many times the usual one.
    tile:        (rows, columns) of the first pass; a look takes 1/magnify of it.
    regions:     outputs are regions (sigmoid); else classes (softmax), output 0 is background.
    whole_slabs: a look takes all slices, for models that see them together; else each slice for itself, so that it does
                 not matter which slices come in one call.
    at_once:     most slices per call of `run`.

    There are never more looks at a slice (a slab) than would cover it once; those at the highest probability come
    first. Without a candidate the logits come back as they are. They are never changed in place.
    """
    size = tuple(min(max(1, round(t / magnify)), n) for t, n in zip(tile, logits.shape[2:], strict=True))
    looks = [
        look
        for first, last, masks in _layers(logits, regions, whole_slabs)
        for look in _place(masks, first, last, size)
    ]
    if not looks:
        return logits
    num_slices = looks[0].last - looks[0].first
    context = (image.shape[2] - logits.shape[0]) // 2
    weights = [look.weight(logits.shape[2:]).to(logits.device) for look in looks]
    total = logits.new_zeros(logits.shape[0], 1, *logits.shape[2:])
    for look, weight in zip(looks, weights, strict=True):
        total[look.slices] += weight
    blended = logits.clone()
    portion = max(1, at_once // num_slices)
    for start in range(0, len(looks), portion):
        group = looks[start : start + portion]
        crops = torch.cat([image[look.slices_of_image(context)] for look in group])
        seen = run(crops, magnify).to(logits.dtype).transpose(1, 2)  # (B, D, K, h, w)
        for look, weight, again in zip(group, weights[start:], seen, strict=False):
            share = 0.5 * weight / total[look.slices].clamp(min=1)
            blended[look.slices] += share * (again - logits[look.slices])
    return blended


@dataclass(frozen=True)
class _Look:
    """A box: slices first to last, and (start, length) of rows and of columns."""

    first: int
    last: int
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def slices(self) -> tuple[slice, ...]:
        """Its place in (D, K, H, W)."""
        return (slice(self.first, self.last), slice(None), *self._in_plane())

    def slices_of_image(self, context: int) -> tuple[slice, ...]:
        """Its place in (1, C, D + 2 context, H, W), context slices included."""
        return (slice(None), slice(None), slice(self.first, self.last + 2 * context), *self._in_plane())

    def _in_plane(self) -> tuple[slice, slice]:
        (row, height), (column, width) = self.rows, self.columns
        return slice(row, row + height), slice(column, column + width)

    def weight(self, size: torch.Size) -> Float[Tensor, "h w"]:
        """1 in the middle half, falling to the edges, but not to those of the image."""
        rows, columns = (_taper(*ends, whole) for ends, whole in zip((self.rows, self.columns), size, strict=True))
        return rows[:, None] * columns


def _taper(start: int, length: int, whole: int) -> Float[Tensor, "L"]:
    ramp = ((torch.arange(length, dtype=torch.float32) + 0.5) / (length / 4)).clamp(max=1)
    left = torch.ones(length) if start == 0 else ramp
    right = torch.ones(length) if start + length == whole else ramp.flip(0)
    return left * right


def _layers(
    logits: Tensor, regions: bool, whole_slabs: bool
) -> Iterator[tuple[int, int, list[Float[np.ndarray, "D H W"]]]]:
    """What is looked at together: first and last slice, probabilities of the outputs that reach the threshold."""
    depth = len(logits)
    for first, last in [(0, depth)] if whole_slabs else [(z, z + 1) for z in range(depth)]:
        part = logits[first:last].float()
        part = part.sigmoid() if regions else part.softmax(dim=1)[:, 1:]
        reached = (part >= THRESHOLD).any((0, 2, 3)).nonzero().flatten().tolist()
        yield first, last, [part[:, output].cpu().numpy() for output in reached]


def _place(probs: list[NDArray[np.float32]], first: int, last: int, size: tuple[int, ...]) -> list[_Look]:
    """Looks of `size` at the candidates, the most probable first; one look may serve several candidates."""
    if not probs:
        return []
    shape = probs[0].shape[1:]
    candidates = [one for prob in probs for one in _candidates(prob, prob >= THRESHOLD)]
    quarter = tuple(ceil(length / 4) for length in size)
    most = ceil(shape[0] * shape[1] / (size[0] * size[1]))
    looks: list[_Look] = []
    for _, box in sorted(candidates, key=lambda one: (-one[0], one[1])):
        if any(2 * (stop - start) > length for (start, stop), length in zip(box, size, strict=True)):
            continue
        if any(_holds(look, box, quarter, shape) for look in looks):
            continue
        starts = [
            min(max((start + stop - length) // 2, 0), whole - length)
            for (start, stop), length, whole in zip(box, size, shape, strict=True)
        ]
        looks.append(_Look(first, last, (starts[0], size[0]), (starts[1], size[1])))
        if len(looks) == most:
            break
    return looks


def _candidates(
    prob: Float[np.ndarray, "D H W"], mask: Bool[np.ndarray, "D H W"]
) -> Iterator[tuple[float, tuple[tuple[int, int], ...]]]:
    """Per component (26 neighbours): its highest probability, and its box (rows, columns)."""
    numbered = cc3d.connected_components(np.ascontiguousarray(mask), connectivity=26)
    boxes = cc3d.statistics(numbered, no_slice_conversion=True)["bounding_boxes"].astype(int)[1:]  # ends included
    peaks = np.zeros(len(boxes) + 1, np.float32)
    np.maximum.at(peaks, numbered[mask], prob[mask])
    for peak, (_, _, top, bottom, left, right) in zip(peaks[1:].tolist(), boxes.tolist(), strict=True):
        yield peak, ((top, bottom + 1), (left, right + 1))


def _holds(look: _Look, box: tuple[tuple[int, int], ...], quarter: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """The box lies where the look has its full weight."""
    for (first, length), (start, stop), edge, whole in zip((look.rows, look.columns), box, quarter, shape, strict=True):
        low = 0 if first == 0 else first + edge
        high = whole if first + length == whole else first + length - edge
        if start < low or stop > high:
            return False
    return True
