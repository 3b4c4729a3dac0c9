"""The parts of a case that a model looks at, read ahead in a thread, and their logits, tile by tile on its device."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from voxdino.core.errors import ResourceError
from voxdino.core.geometry import format_shape
from voxdino.core.memory import is_out_of_memory
from voxdino.data.loader import ReadAhead
from voxdino.data.store import padding_values
from voxdino.inference.gate import Ends, Gate
from voxdino.inference.load import LoadedModel
from voxdino.inference.parts import Part, background_logits, in_plane, padded, read_part, slab_weight
from voxdino.inference.rounded import rounded_weights
from voxdino.inference.second_look import second_look
from voxdino.inference.settings import PredictSettings
from voxdino.inference.tiles import Box, Seen, blend, blend_slabs, gaussian_weight, shares, tile_boxes
from voxdino.models.precision import autocast, uses_bf16
from voxdino.models.segmenter import Segmenter
from voxdino.preparation.intensity import ChannelScaling
from voxdino.preparation.plan import Plan
from voxdino.preparation.slices import CaseSlices

PIXELS_AT_ONCE = {"cpu": 4 * 224**2}  # whose activations stay in a CPU's cache: larger batches are slower there
TILES_AT_ONCE = 32  # at most, and on devices that are the faster the more they have to do

T = TypeVar("T")


class Frame:
    """A case and a model: which parts there are, and their logits.

    tiles_at_once: crops of one slice in a pass of the network; halved, for good, where memory ends.
    """

    def __init__(self, model: LoadedModel, slices: CaseSlices, gate: Gate, settings: PredictSettings) -> None:
        self.model, self.slices, self.settings = model, slices, settings
        self._gate = gate
        self.size = slices.shape[2:]
        self._tile, self._context = model.plan.tile, model.plan.context_slices
        self._weight = torch.from_numpy(gaussian_weight(self._tile)).to(model.device)
        self._nothing = torch.from_numpy(background_logits(model.plan.labels)).to(model.device)[None, :, None, None]
        self.tiles_at_once = settings.slices_at_once or tiles_at_once(model.plan, model.device)
        self._bf16 = uses_bf16(model.device, settings.amp)
        self._segmenter = rounded_weights(model.segmenter, model.device) if self._bf16 else model.segmenter
        self._classifier: Float[Tensor, "K C1"] | None = None  # where it comes last, after blending
        if model.plan.slab > 1 and settings.second_look is None and has_fewer_features(model.segmenter):
            self._classifier = classifier_matrix(model.segmenter)
            self._segmenter = without_classifier(self._segmenter)

    def logits(self, ranges: Sequence[Ends]) -> Iterator[tuple[int, Float[Tensor, "d K H W"]]]:
        """Of ranges of slices, in turn, as (first slice, logits)."""
        for part, raw in self._parts(ranges):
            yield part.first, self._logits(part, raw)

    def blended(self, ranges: Sequence[Ends]) -> Iterator[tuple[int, Float[Tensor, "1 K H W"]]]:
        """Of every slice, as (position, logits), from slabs that overlap.

        Only one slab is held, to which tiles are added as they come. Where there are fewer features under the
        classifier than classes, they are what is blended, and each slice is classified once it is done: both are
        weighted sums, so the order does not matter. So the number of classes does not matter for the memory.
        """
        depth, num_outputs = ranges[0][1] - ranges[0][0], self._nothing.shape[1]
        channels = num_outputs + 1 if self._classifier is None else self._classifier.shape[1]
        held = torch.zeros(depth, channels, *self.size, device=self.model.device)
        seen = ((part.first, self._seen(part, raw)) for part, raw in self._parts(ranges))
        for position, values in blend_slabs(seen, slab_weight(ranges), held):
            yield position, self._classified(values)

    def _classified(self, values: Float[Tensor, "C1 H W"]) -> Float[Tensor, "1 K H W"]:
        """Logits of a slice, from what `blend_slabs` gives; what was not seen is background."""
        if self._classifier is None:
            logits = values[None, :-1].clone()
        else:
            logits = torch.einsum("kc,chw->khw", self._classifier, values)[None]
        return logits.addcmul_(self._nothing, 1 - values[-1])

    def _parts(self, ranges: Sequence[Ends]) -> Iterator[tuple[Part, Shaped[Tensor, "C n h w"] | None]]:
        """In turn; the next one is read while this one is computed."""

        def read(position: int) -> tuple[Part, Tensor | None] | None:
            return self._read(*ranges[position]) if position < len(ranges) else None

        with ReadAhead(read, num_threads=1, depth=2) as parts:
            for _, part in zip(ranges, parts, strict=False):
                assert part is not None
                yield part

    def _read(self, first: int, last: int) -> tuple[Part, Shaped[Tensor, "C n h w"] | None]:
        part = read_part(self.slices, self.model.plan, self._gate, first, last)
        if part.raw is None:
            return part, None
        raw = part.raw.astype(np.float32) if part.raw.dtype == np.uint16 else part.raw  # which torch hardly knows
        tensor = torch.from_numpy(raw)
        return part, tensor.pin_memory() if self.model.device.type == "cuda" else tensor

    def _logits(self, part: Part, raw: Shaped[Tensor, "C n h w"] | None) -> Float[Tensor, "d K H W"]:
        """Of whole slices; what lies outside the part is background."""
        shape = (part.last - part.first, self._nothing.shape[1], *self.size)
        if raw is None:
            return self._nothing.expand(shape)
        slab, places = self._normalised(raw)
        seen = self._until_it_fits(partial(self._tiled, slab), slab)[..., places[0], places[1]]
        if seen.shape[2:] == self.size:
            return seen
        whole = self._nothing.expand(shape).clone()
        whole[:, :, slice(*part.rows), slice(*part.columns)] = seen
        return whole

    def _seen(self, part: Part, raw: Shaped[Tensor, "C n h w"] | None) -> Iterator[Seen]:
        """What the tiles of a slab show, one after the other."""
        if raw is None:
            return
        slab, places = self._normalised(raw)
        size = (slab.shape[2], slab.shape[3])
        if self.settings.second_look is None:
            boxes = tile_boxes(size, self._tile, self.settings.overlap)
            tiles = self._tile_by_tile(slab, boxes)
            weight = self._weight
        else:  # which looks at the logits of a whole slab
            boxes = [(slice(0, size[0]), slice(0, size[1]))]
            tiles = iter([(boxes[0], self._until_it_fits(partial(self._tiled, slab), slab))])
            weight = torch.ones(size, device=slab.device)
        for (box, values), share in zip(tiles, shares(boxes, weight, slab.new_zeros(size)), strict=True):
            there, here = in_plane(part, places, box)
            yield there, values[..., here[0], here[1]], share[here]

    def _tile_by_tile(
        self, slab: Float[Tensor, "C Dk H W"], boxes: Sequence[Box]
    ) -> Iterator[tuple[Box, Float[Tensor, "d X h w"]]]:
        """As many at a time as memory holds; none is computed twice."""
        done = 0
        while done < len(boxes):
            group = self._until_it_fits(partial(self._next_tiles, slab, boxes[done:]), slab)
            done += len(group)
            yield from group

    def _next_tiles(
        self, slab: Float[Tensor, "C Dk H W"], boxes: Sequence[Box]
    ) -> list[tuple[Box, Float[Tensor, "d X h w"]]]:
        at_once = max(1, self.tiles_at_once // (slab.shape[1] - 2 * self._context))
        with autocast(slab.device, self._bf16):
            return list(self._tiles(slab, boxes[:at_once], at_once))

    def _normalised(self, raw: Shaped[Tensor, "C n h w"]) -> tuple[Float[Tensor, "C n H W"], tuple[slice, ...]]:
        """A part on the device as the network sees it, a tile at least, and where in it the part lies."""
        device, scaling = self.model.device, self.slices.scaling
        size, places = padded(raw.shape[2:], self._tile)
        slab = torch.empty(len(scaling), raw.shape[1], *size, device=device)
        slab[:] = torch.from_numpy(padding_values(scaling)).to(device)[:, None, None, None]
        slab[:, :, places[0], places[1]] = normalise_tensor(raw.to(device, non_blocking=True), scaling)
        return slab, places

    def _until_it_fits(self, work: Callable[[], T], slab: Float[Tensor, "C Dk H W"]) -> T:
        """What `work` gives, tried again with fewer tiles at once where memory ends."""
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.tiles_at_once == 1:
                    raise self._too_large(slab) from error
            self.tiles_at_once = (self.tiles_at_once + 1) // 2
            if slab.device.type == "cuda":
                torch.cuda.empty_cache()

    def _tiled(self, slab: Float[Tensor, "C Dk H W"]) -> Float[Tensor, "d K H W"]:
        """Logits of all slices but the context ones, from one tile or from many blended."""
        size = (slab.shape[2], slab.shape[3])
        boxes = tile_boxes(size, self._tile, self.settings.overlap)
        depth, seen_with = slab.shape[1] - 2 * self._context, 2 * self._context
        step = depth if self.model.plan.slab > 1 else min(depth, self.tiles_at_once)
        with autocast(slab.device, self._bf16):
            if len(boxes) == 1 and step == depth:
                return self._again(next(self._tiles(slab, boxes, 1))[1], slab)
            out = torch.zeros((depth, self._nothing.shape[1], *size), device=slab.device)
            for start in range(0, depth, step):
                part = slab[:, start : start + step + seen_with]
                per_pass = max(1, self.tiles_at_once // (part.shape[1] - seen_with))
                blend(self._tiles(part, boxes, per_pass), self._weight, out[start : start + step])
            return self._again(out, slab)

    def _tiles(
        self, part: Float[Tensor, "C n H W"], boxes: Sequence[Box], per_pass: int
    ) -> Iterator[tuple[Box, Float[Tensor, "d K h w"]]]:
        for start in range(0, len(boxes), per_pass):
            group = boxes[start : start + per_pass]
            crops = torch.stack([part[:, :, rows, columns] for rows, columns in group])
            yield from zip(group, logits_of_crops(self._segmenter, crops, self.settings.mirror), strict=True)

    def _again(self, logits: Float[Tensor, "d K H W"], slab: Float[Tensor, "C Dk H W"]) -> Float[Tensor, "d K H W"]:
        """With a second look at small candidates, where that is wanted."""
        if self.settings.second_look is None:
            return logits
        return second_look(
            logits,
            slab[None],
            lambda crops, magnify: self._segmenter(crops, magnify=magnify).logits.float(),
            magnify=self.settings.second_look,
            tile=self._tile,
            regions=bool(self.model.plan.labels.regions),
            whole_slabs=self.model.plan.slab > 1,
            at_once=self.tiles_at_once,
        )

    def _too_large(self, slab: Tensor) -> ResourceError:
        depth = slab.shape[1] - 2 * self._context
        whole = self.model.plan.slab > 1
        what = f"a slab of {depth} slices" if whole else "one slice"
        fix = "predict on another device (--device cpu)" + (", or train with a smaller slab." if whole else ".")
        fact = f"{what} of {format_shape(slab.shape[2:])} voxels does not fit into the memory of {slab.device}."
        return ResourceError(fact, fix=fix)


def tiles_at_once(plan: Plan, device: torch.device) -> int:
    """Crops of one slice in a pass of the network."""
    num_pixels = math.prod(plan.tile) * plan.magnification**2
    return int(min(max(PIXELS_AT_ONCE.get(device.type, math.inf) // num_pixels, 1), TILES_AT_ONCE))


def normalise_tensor(raw: Shaped[Tensor, "Csrc n h w"], scaling: Sequence[ChannelScaling]) -> Float[Tensor, "C n h w"]:
    """As `normalise` does it in training, bit for bit, on the device."""
    channels = (raw[rule.source].float().clamp(rule.lower, rule.upper) for rule in scaling)
    return torch.stack([c.sub_(rule.mean).div_(rule.sd) for c, rule in zip(channels, scaling, strict=True)])


def logits_of_crops(
    segmenter: Segmenter, crops: Float[Tensor, "B C Dk h w"], mirror: bool
) -> Float[Tensor, "B d K h w"]:
    """float32 logits of the crops' slices; with `mirror`, the mean over their in-plane mirror images."""
    logits: Tensor = segmenter(crops).logits.float()  # (B, K, d, h, w)
    if mirror:
        for axes in ((-1,), (-2,), (-2, -1)):
            logits = logits + segmenter(crops.flip(axes)).logits.float().flip(axes)
        logits = logits / 4
    return logits.transpose(1, 2)


def has_fewer_features(segmenter: Segmenter) -> bool:
    """Whether the classifier, a convolution of single voxels, makes more logits than it gets features."""
    last = segmenter.classifier
    return isinstance(last, nn.Conv2d | nn.Conv3d) and last.in_channels < last.out_channels


def held_channels(segmenter: Segmenter, num_outputs: int, settings: PredictSettings) -> int:
    """Values per voxel of a slab that `Frame.blended` holds."""
    if settings.second_look is not None:
        return 4 * num_outputs + 1  # a whole slab's logits beside those that are blended, old and new
    last: Any = segmenter.classifier
    return 1 + (last.in_channels if has_fewer_features(segmenter) else num_outputs)


def classifier_matrix(segmenter: Segmenter) -> Float[Tensor, "K C1"]:
    """From features, with a 1 behind them, to logits."""
    last: Any = segmenter.classifier
    return torch.cat((last.weight.flatten(1), last.bias[:, None]), dim=1).float()


def without_classifier(segmenter: Segmenter) -> Segmenter:
    """The same model, giving what its classifier would get in place of logits; all weights are shared."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*segmenter.parameters(), *segmenter.buffers())}
    return copy.deepcopy(segmenter, shared | {id(segmenter.classifier): nn.Identity()})
