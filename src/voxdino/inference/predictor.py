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
from voxdino.inference.tiles import blend, gaussian_weight, tile_boxes
from voxdino.models.precision import autocast, uses_bf16
from voxdino.models.segmenter import Segmenter
from voxdino.preparation.prepare import ChannelScaling, normalise, prepare_case

LOGIT_BYTES = 128 << 20  # of logits held at once

Slab = tuple[int, Float[Tensor, "d K h w"]]


class PredictSettings(Record):
    """How to predict; none of it changes what the model is.

    overlap:        share of a tile's length that neighbouring tiles share.
    mirror:         average the logits of the four in-plane mirror images: four times the work, a little more accurate
                    where training mirrored too.
    slices_at_once: most slices per forward pass; fewer where memory ends.
    amp:            bfloat16 arithmetic. "auto": where the hardware has it.
    """

    overlap: float = Field(default=0.5, ge=0, lt=1)
    mirror: bool = False
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
    """
    plan = model.plan
    depth, size = image.shape[1], (image.shape[2], image.shape[3])
    padded = tuple(max(length, tile) for length, tile in zip(size, plan.tile, strict=True))
    slice_bytes = 4 * plan.labels.num_outputs * padded[0] * padded[1]
    num_slices = max(1, min(settings.slices_at_once, LOGIT_BYTES // slice_bytes, depth))
    before = tuple((long - short) // 2 for long, short in zip(padded, size, strict=True))
    fill = padding_values(scaling)
    first = 0
    while first < depth:
        last = min(first + num_slices, depth)
        context = plan.context_slices
        neighbours = np.clip(np.arange(first - context, last + context), 0, depth - 1)
        slab = np.empty((len(scaling), len(neighbours), *padded), np.float32)
        slab[:] = fill[:, None, None, None]
        inside = tuple(slice(start, start + length) for start, length in zip(before, size, strict=True))
        slab[:, :, inside[0], inside[1]] = normalise(image[:, neighbours], scaling)
        try:
            logits = _logits_of_slab(model, torch.from_numpy(slab)[None], settings)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            if num_slices == 1:
                what = f"one slice of {format_shape(padded)} voxels does not fit into the memory of {model.device}."
                raise ResourceError(what, fix="predict on another device (--device cpu).") from error
            num_slices = (num_slices + 1) // 2
            continue
        yield first, logits[..., inside[0], inside[1]]
        first = last


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
            return _logits_of_tile(model.segmenter, slab, settings.mirror)
        num_slices = slab.shape[2] - 2 * model.plan.context_slices
        out = torch.zeros((num_slices, model.plan.labels.num_outputs, *size), device=model.device)
        tiles = ((box, _logits_of_tile(model.segmenter, slab[..., box[0], box[1]], settings.mirror)) for box in boxes)
        return blend(tiles, gaussian_weight(tile), out)


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
