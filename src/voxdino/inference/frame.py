"""The parts of a case that a model looks at, read ahead in a thread, and their logits, tile by tile on its device."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

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
from voxdino.inference.parts import Part, background_logits, padded, read_part
from voxdino.inference.second_look import second_look
from voxdino.inference.settings import PredictSettings
from voxdino.inference.tiles import Box, blend, gaussian_weight, tile_boxes
from voxdino.models.precision import autocast, uses_bf16
from voxdino.models.segmenter import Segmenter
from voxdino.preparation.intensity import ChannelScaling
from voxdino.preparation.slices import CaseSlices

TILES_AT_ONCE = {"cpu": 2}  # activations of few tiles stay in a CPU's cache: larger batches are slower there
_TILES_AT_ONCE = 32  # on devices that are the faster the more they have to do
_ROUNDED = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # by autocast, at every call


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
        self.tiles_at_once = settings.slices_at_once or TILES_AT_ONCE.get(model.device.type, _TILES_AT_ONCE)
        self._bf16 = uses_bf16(model.device, settings.amp)
        self._segmenter = rounded_weights(model.segmenter) if self._bf16 else model.segmenter

    def logits(self, ranges: Sequence[Ends]) -> Iterator[Float[Tensor, "d K H W"]]:
        """Of ranges of slices, in turn; the next one is read while this one is computed."""

        def read(position: int) -> tuple[Part, Tensor | None] | None:
            return self._read(*ranges[position]) if position < len(ranges) else None

        with ReadAhead(read, num_threads=1, depth=2) as parts:
            for _, part in zip(ranges, parts, strict=False):
                assert part is not None
                yield self._logits(*part)

    def _read(self, first: int, last: int) -> tuple[Part, Shaped[Tensor, "C n h w"] | None]:
        part = read_part(self.slices, self.model.plan, self._gate, first, last)
        if part.raw is None:
            return part, None
        raw = part.raw.astype(np.float32) if part.raw.dtype == np.uint16 else part.raw  # which torch hardly knows
        tensor = torch.from_numpy(raw)
        return part, tensor.pin_memory() if self.model.device.type == "cuda" else tensor

    def _logits(self, part: Part, raw: Shaped[Tensor, "C n h w"] | None) -> Float[Tensor, "d K H W"]:
        """Of whole slices; what lies outside the part is background."""
        device = self.model.device
        shape = (part.last - part.first, self._nothing.shape[1], *self.size)
        if raw is None:
            return self._nothing.expand(shape)
        raw, scaling = raw.to(device, non_blocking=True), self.slices.scaling
        size, places = padded(raw.shape[2:], self._tile)
        slab = torch.empty(len(scaling), raw.shape[1], *size, device=device)
        slab[:] = torch.from_numpy(padding_values(scaling)).to(device)[:, None, None, None]
        slab[:, :, places[0], places[1]] = normalise_tensor(raw, scaling)
        seen = self._until_it_fits(slab)[..., places[0], places[1]]
        if seen.shape[2:] == self.size:
            return seen
        whole = self._nothing.expand(shape).clone()
        whole[:, :, slice(*part.rows), slice(*part.columns)] = seen
        return whole

    def _until_it_fits(self, slab: Float[Tensor, "C Dk H W"]) -> Float[Tensor, "d K H W"]:
        while True:
            try:
                return self._tiled(slab)
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


def rounded_weights(segmenter: Segmenter) -> Segmenter:
    """The same model with the weights in bfloat16 that autocast would round at every call; all others are shared."""
    rounded = {
        id(weight): nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
        for module in segmenter.modules()
        if isinstance(module, _ROUNDED)
        for weight in module.parameters(recurse=False)
    }
    if not rounded:
        return segmenter
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*segmenter.parameters(), *segmenter.buffers())}
    return copy.deepcopy(segmenter, shared | rounded)
