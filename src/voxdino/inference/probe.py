"""A drawn image and what a model makes of it, kept with the model: it tells when preparation or model have changed."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from voxdino.core.errors import CheckpointError
from voxdino.core.geometry import Grid
from voxdino.core.records import Record
from voxdino.core.volume import Volume
from voxdino.inference.cases import num_source_channels
from voxdino.inference.gate import Gate
from voxdino.inference.parts import normalised_slab, read_part
from voxdino.preparation.orientation import DISPLAY_AXES
from voxdino.preparation.plan import Plan
from voxdino.preparation.slices import slice_case

PROBE_NAME = "probe.json"

_NUM_KEPT = 64  # values kept of input and logits each
_DEPTH = 4  # most slices; a slab may have many more
_FINER = 1.25  # the drawn image's pixels are so much larger than the plan's: resampling is probed too
_INPUT_TOLERANCE = 1e-3  # normalised values
_LOGIT_TOLERANCE = 0.02  # of the logits' range: devices differ by rounding (TF32, bfloat16 kernels)
_UNSCALED = (0.0, 1000.0)  # values drawn for channels that are scaled case by case


class Probe(Record):
    """probe.json: some of the normalised values of the drawn image, and some of the logits."""

    input: tuple[float, ...]
    logits: tuple[float, ...]

    @classmethod
    def of(cls, crop: NDArray[np.float32], logits: NDArray[np.float32]) -> "Probe":
        return cls(input=_some(crop), logits=_some(logits))

    def require_same(self, crop: NDArray[np.float32], logits: NDArray[np.float32], where: str | PathLike[str]) -> None:
        """CheckpointError unless the image is still prepared as it was, and the model says of it what it said."""
        fix = "use the version of voxdino that wrote the model, or train (export) it again."
        if not _close(self.input, _some(crop), _INPUT_TOLERANCE):
            raise CheckpointError("images are prepared otherwise now than for this model.", where=where, fix=fix)
        span = max(self.logits) - min(self.logits)
        if not _close(self.logits, _some(logits), _LOGIT_TOLERANCE * max(span, 1e-3)):
            raise CheckpointError("gives other logits for its probe than when it was written.", where=where, fix=fix)


def probe_crop(plan: Plan) -> Float[np.ndarray, "1 C Dk h w"]:
    """One tile of the drawn image, prepared by `plan` as a case is."""
    slices, _ = slice_case("probe", _draw(plan), plan)
    depth = 1 if plan.slab == 1 else slices.shape[1]
    part = read_part(slices, plan, Gate(), 0, depth)
    assert part.raw is not None
    slab, _ = normalised_slab(part.raw, slices.scaling, plan.tile)
    rows, columns = plan.tile
    return np.ascontiguousarray(slab[None, :, :, :rows, :columns])


def _draw(plan: Plan) -> Volume:
    """Noise that spans the channels' ranges, a little beyond them, on a grid with the plan's axes the other way."""
    rng = np.random.default_rng(0)
    finer = 1.0 if plan.in_plane_spacing is None else _FINER
    plane = [max(1, round(length / finer)) for length in plan.tile]
    in_plane = [length * finer for length in plan.in_plane_spacing or (1.0, 1.0)]
    ranges = [_UNSCALED] * num_source_channels(plan)
    for channel in plan.channels:
        if channel.lower is not None and channel.upper is not None:
            ranges[channel.source] = channel.lower, channel.upper
    if plan.slice_axis is None:
        grid = Grid.from_spacing(plane, in_plane, "mm" if plan.in_plane_spacing else "px")
    else:
        shape = (min(plan.slab, _DEPTH), *plane)
        affine = np.zeros((4, 4))
        affine[3, 3] = 1
        spacing = (plan.slice_spacing or 1.0, *in_plane)
        for axis, (world, length) in enumerate(zip(DISPLAY_AXES[plan.slice_axis], spacing, strict=True)):
            affine["RAS".index(world), axis] = length
        grid = Grid(shape, affine)
    drawn = [low + (high - low) * (1.2 * rng.random(grid.shape) - 0.1) for low, high in ranges]
    return Volume(np.rint(np.stack(drawn)).astype(np.float32), grid)


def _some(values: NDArray[Any]) -> tuple[float, ...]:
    """Values from all over, rounded as they are kept."""
    flat = values.reshape(-1)
    chosen = flat[np.linspace(0, flat.size - 1, min(_NUM_KEPT, flat.size)).astype(int)]
    return tuple(float(f"{value:.6g}") for value in chosen)


def _close(kept: Sequence[float], found: Sequence[float], tolerance: float) -> bool:
    return len(kept) == len(found) and all(abs(a - b) <= tolerance for a, b in zip(kept, found, strict=True))
