"""One volume through a model: prepared as for training, slices in batches, tiles blended, labels on its own grid."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from voxdino.core.errors import ResourceError
from voxdino.core.geometry import format_shape
from voxdino.core.records import Record
from voxdino.core.volume import LabelMap, Volume
from voxdino.data.store import padding_values
from voxdino.inference.export import export_labels
from voxdino.inference.load import LoadedModel
from voxdino.inference.second_look import second_look
from voxdino.inference.tiles import blend, gaussian_weight, slab_starts, tile_boxes
from voxdino.models.precision import autocast, uses_bf16
from voxdino.models.segmenter import Segmenter
from voxdino.preparation.prepare import ChannelScaling, normalise, prepare_case

LOGIT_BYTES = 128 << 20  # of logits held at once

WHOLE = 1.5  # times the slab of training: so long a volume is predicted whole

Slab = tuple[int, Float[Tensor, "d K h w"]]


class PredictSettings(Record):
    """How to predict; none of it changes what the model is.

    overlap:        share of a tile's length that neighbouring tiles share.
    mirror:         average the logits of the four in-plane mirror images: four times the work, a little more accurate
                    where training mirrored too.
    second_look:    look again at small candidates, so many times magnified (see `second_look`); None: once is enough.
    slices_at_once: most slices per forward pass; fewer where memory ends.
    amp:            bfloat16 arithmetic. "auto": where the hardware has it.
    """

    overlap: float = Field(default=0.5, ge=0, lt=1)
    mirror: bool = False
    second_look: float | None = Field(default=None, gt=1)
    slices_at_once: int = Field(default=8, ge=1)
    amp: Literal["auto", "bf16", "off"] = "auto"


def predict_volume(
    model: LoadedModel, volume: Volume, settings: PredictSettings | None = None, *, case: str = "case"
) -> LabelMap:
    """Segment a volume (C, *spatial) in file values: a label map in file ids on the volume's own grid.

    Memory beside model and input: the prepared image, one label per voxel, and a bounded number of logits, whatever
    the number of classes. Errors: GeometryError and ImageError for a volume that the plan cannot take, CheckpointError
    for NaN scores, ResourceError where not even one slice fits into memory.
    """
    prepared = prepare_case(case, volume, None, model.plan)
    slabs = predict_slabs(model, prepared.image, prepared.scaling, settings or PredictSettings())
    return export_labels(slabs, prepared.geometry, model.plan.labels)


@torch.inference_mode()
def predict_slabs(
    model: LoadedModel, image: NDArray[np.generic], scaling: Sequence[ChannelScaling], settings: PredictSettings
) -> Iterator[Slab]:
    """Logits of a prepared image (C, D, H, W), a few slices at a time, as (first slice, (d, K, H, W) float32).

    Context slices are the real neighbours; the first and last slice of the volume are repeated beyond its ends.
    Slices smaller than the plan's tile are padded to it in their middle, as crops are in training, and cropped back.
    A model that sees slabs gets overlapping ones, whose logits are blended along the slice axis.
    """
    frame = _Frame(model, image, scaling)
    if model.plan.slab > 1:
        slab = predicted_slab(model.plan.slab, frame.depth)
        yield from _blended(frame, slab, settings)
        return
    num_slices = max(1, min(settings.slices_at_once, LOGIT_BYTES // frame.slice_bytes, frame.depth))
    first = 0
    while first < frame.depth:
        last = min(first + num_slices, frame.depth)
        try:
            logits = frame.logits(first, last, settings)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            if num_slices == 1:
                raise frame.too_large("one slice", "predict on another device (--device cpu).") from error
            num_slices = (num_slices + 1) // 2
            continue
        yield first, logits
        first = last


def predicted_slab(slab: int, num_slices: int) -> int:
    """Slices of a volume that are predicted together: all where they are not many more than in training."""
    return num_slices if num_slices <= WHOLE * slab else slab


def _blended(frame: "_Frame", slab: int, settings: PredictSettings) -> Iterator[Slab]:
    """Overlapping slabs, blended; slices are given out once no later slab reaches them."""
    starts = slab_starts(frame.depth, slab, overlap=settings.overlap)
    weight = gaussian_weight((slab,)).to(frame.model.device)[:, None, None, None]
    held: Tensor | None = None  # (slices from `first` on, K, H, W), and the sum of their weights
    total = torch.zeros(0, 1, 1, 1, device=frame.model.device)
    first = 0
    for number, start in enumerate(starts):
        try:
            logits = frame.logits(start, start + slab, settings)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            fix = "predict on another device (--device cpu), or train with a smaller slab."
            raise frame.too_large(f"a slab of {slab} slices", fix) from error
        missing = start + slab - first - (0 if held is None else len(held))
        fresh = torch.zeros(missing, *logits.shape[1:], device=logits.device)
        held = fresh if held is None else torch.cat((held, fresh))
        total = torch.cat((total, torch.zeros(missing, 1, 1, 1, device=logits.device)))
        held[start - first :] += logits * weight
        total[start - first :] += weight
        end = starts[number + 1] if number + 1 < len(starts) else frame.depth
        yield first, held[: end - first] / total[: end - first]
        held, total, first = held[end - first :], total[end - first :], end


class _Frame:
    """A prepared image whose slices can be asked for, padded to the plan's tile and cropped back."""

    def __init__(self, model: LoadedModel, image: NDArray[np.generic], scaling: Sequence[ChannelScaling]) -> None:
        self.model, self._image, self._scaling = model, image, scaling
        self.depth, size = image.shape[1], image.shape[2:]
        self._padded = tuple(max(length, tile) for length, tile in zip(size, model.plan.tile, strict=True))
        before = ((long - short) // 2 for long, short in zip(self._padded, size, strict=True))
        self._rows, self._columns = (slice(start, start + length) for start, length in zip(before, size, strict=True))
        self.slice_bytes = 4 * model.plan.labels.num_outputs * self._padded[0] * self._padded[1]

    def logits(self, first: int, last: int, settings: PredictSettings) -> Float[Tensor, "d K H W"]:
        """Of the slices from first to last."""
        context = self.model.plan.context_slices
        wanted = np.clip(np.arange(first - context, last + context), 0, self.depth - 1)
        slab = np.empty((len(self._scaling), len(wanted), *self._padded), np.float32)
        slab[:] = padding_values(self._scaling)[:, None, None, None]
        slab[:, :, self._rows, self._columns] = normalise(self._image[:, wanted], self._scaling)
        logits = _logits_of_slab(self.model, torch.from_numpy(slab)[None], settings)
        return logits[..., self._rows, self._columns]

    def too_large(self, what: str, fix: str) -> ResourceError:
        fact = f"{what} of {format_shape(self._padded)} voxels does not fit into the memory of {self.model.device}."
        return ResourceError(fact, fix=fix)


def _logits_of_slab(
    model: LoadedModel, slab: Float[Tensor, "1 C Dk H W"], settings: PredictSettings
) -> Float[Tensor, "d K H W"]:
    """Logits of all slices but the context ones, from one tile or from many blended."""
    slab = slab.to(model.device)
    size = (slab.shape[3], slab.shape[4])
    tile = model.plan.tile
    boxes = tile_boxes(size, tile, settings.overlap)
    with autocast(model.device, uses_bf16(model.device, settings.amp)):
        if len(boxes) == 1:
            logits = _logits_of_tile(model.segmenter, slab, settings.mirror)
        else:
            num_slices = slab.shape[2] - 2 * model.plan.context_slices
            out = torch.zeros((num_slices, model.plan.labels.num_outputs, *size), device=model.device)
            tiles = (
                (box, _logits_of_tile(model.segmenter, slab[..., box[0], box[1]], settings.mirror)) for box in boxes
            )
            logits = blend(tiles, gaussian_weight(tile), out)
        if settings.second_look is None:
            return logits
        return second_look(
            logits,
            slab,
            lambda crops, magnify: model.segmenter(crops, magnify=magnify).logits.float(),
            magnify=settings.second_look,
            tile=tile,
            regions=bool(model.plan.labels.regions),
            whole_slabs=model.plan.slab > 1,
            at_once=settings.slices_at_once,
        )


def _logits_of_tile(segmenter: Segmenter, tile: Float[Tensor, "1 C Dk h w"], mirror: bool) -> Float[Tensor, "d K h w"]:
    """float32 logits of a tile's slices; with `mirror`, the mean over its in-plane mirror images."""
    logits: Tensor = segmenter(tile).logits.float()  # (1, K, d, h, w)
    if mirror:
        for axes in ((-1,), (-2,), (-2, -1)):
            logits = logits + segmenter(tile.flip(axes)).logits.float().flip(axes)
        logits = logits / 4
    return logits[0].transpose(0, 1)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
