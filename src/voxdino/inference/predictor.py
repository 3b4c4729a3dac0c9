"""One volume through one model or several: slices in parts, tiles blended, labels on its own grid."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from voxdino.core.errors import UsageError
from voxdino.core.volume import LabelMap, Volume
from voxdino.inference.export import export_labels, resize_scores
from voxdino.inference.frame import Frame
from voxdino.inference.gate import Region, gate_for
from voxdino.inference.load import LoadedModel
from voxdino.inference.parts import LOGIT_BYTES, slice_bytes, slice_ranges
from voxdino.inference.probabilities import keep_probabilities
from voxdino.inference.settings import PredictSettings
from voxdino.preparation.orientation import CaseGeometry
from voxdino.preparation.slices import CaseSlices, slice_case

__all__ = ["PredictSettings", "Slab", "predict_slabs", "predict_volume"]

Slab = tuple[int, Float[Tensor, "d K h w"]]


def predict_volume(
    models: LoadedModel | Sequence[LoadedModel],
    volume: Volume,
    settings: PredictSettings | None = None,
    *,
    case: str = "case",
    within: Sequence[slice] | None = None,
    probabilities: Path | None = None,
) -> LabelMap:
    """Segment a volume (C, *spatial) in file values: a label map in file ids on the volume's own grid.

    models: several vote by the mean of their logits, which is the geometric mean of their probabilities.
    within: only inside this box of the file's array is anything but background; None: everywhere.
    probabilities: a file to write them to (see `keep_probabilities`); several models': of the mean of their logits.

    Memory beside model and input: one label per voxel, and a bounded number of logits, whatever the number of classes.
    Errors: GeometryError and ImageError for a volume that the plan cannot take, CheckpointError for NaN scores,
    UsageError for models that do not go together, ResourceError where not even one slice fits into memory.
    """
    together = [models] if isinstance(models, LoadedModel) else list(models)
    require_same_task(together)
    settings = settings or PredictSettings()
    voters, geometry = [], None
    for model in together:
        slices, geometry = slice_case(case, volume, model.plan)
        inside = None if within is None else region_of(within, geometry)
        voters.append(predict_slabs(model, slices, settings, within=inside, logit_bytes=LOGIT_BYTES // len(together)))
    assert geometry is not None, "a model is needed"
    slabs = voters[0] if len(voters) == 1 else mean_slabs(voters, geometry.native_shape[1:])
    if probabilities is not None:
        slabs = keep_probabilities(slabs, probabilities, geometry, together[0].plan.labels)
    labels = export_labels(slabs, geometry, together[0].plan.labels)
    if within is not None:
        outside = np.ones(labels.array.shape, dtype=bool)
        outside[tuple(within)] = False
        labels.array[outside] = together[0].plan.labels.ids[0]
    return labels


def require_same_task(models: Sequence[LoadedModel]) -> None:
    """UsageError unless the models give logits of the same labels in the same slices."""
    first, *others = models
    for other in others:
        for what in ("labels", "ndim", "slice_axis"):
            if getattr(other.plan, what) != getattr(first.plan, what):
                fact = f"{first.name} and {other.name} differ in {what.replace('_', ' ')}"
                raise UsageError(
                    f"{fact}: they cannot vote together.", where="--run", fix="give folds of one data set."
                )


def region_of(within: Sequence[slice], geometry: CaseGeometry) -> Region:
    """A box of the file's array in prepared slices, rows and columns, rounded outwards."""
    ends = []
    for axis, flip in zip(geometry.order, geometry.flips, strict=True):
        start, stop, _ = within[axis].indices(geometry.shape[axis])
        ends.append((geometry.shape[axis] - stop, geometry.shape[axis] - start) if flip else (start, stop))
    depth, *plane = ends if len(ends) == 3 else [(0, 1), *ends]
    sizes = zip(plane, geometry.native_shape[1:], geometry.prepared_shape[1:], strict=True)
    rows, columns = ((start * new // old, -(-stop * new // old)) for (start, stop), old, new in sizes)
    return depth, rows, columns


@torch.inference_mode()
def predict_slabs(
    model: LoadedModel,
    slices: CaseSlices,
    settings: PredictSettings,
    *,
    within: Region | None = None,
    logit_bytes: int = LOGIT_BYTES,
) -> Iterator[Slab]:
    """Logits of a case, a few slices at a time, as (first slice, (d, K, H, W) float32); every slice comes once.

    Context slices are the real neighbours; the first and last slice of the volume are repeated beyond its ends.
    Slices smaller than the plan's tile are padded to it in their middle, as crops are in training, and cropped back.
    A model that sees slabs gets overlapping ones, whose logits are blended along the slice axis.
    """
    gate = gate_for(model.plan, slices.scaling, settings.gate, within)
    plan, num_bytes = model.plan, slice_bytes(model.plan, slices.shape[2:])
    ranges = slice_ranges(
        plan, slices.shape[1], overlap=settings.overlap, slice_bytes=num_bytes, logit_bytes=logit_bytes
    )
    frame = Frame(model, slices, gate, settings)
    yield from frame.blended(ranges) if plan.slab > 1 else frame.logits(ranges)


@torch.inference_mode()
def mean_slabs(voters: Sequence[Iterator[Slab]], size: tuple[int, int]) -> Iterator[Slab]:
    """The running mean of several models' logits, slice by slice; brought to `size` where their sizes differ."""
    for position, voices in enumerate(zip(*(_one_by_one(voter) for voter in voters), strict=True)):
        if len({voice.shape for voice in voices}) > 1:
            voices = tuple(resize_scores(voice, size) for voice in voices)
        total = voices[0].clone()
        for voice in voices[1:]:
            total += voice
        yield position, total[None] / len(voters)


def _one_by_one(slabs: Iterator[Slab]) -> Iterator[Float[Tensor, "K h w"]]:
    for _, logits in slabs:
        yield from logits
