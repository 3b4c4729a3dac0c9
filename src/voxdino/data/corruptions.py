"""Faults that occur in scanners and archives, at five strengths: how much does a model's result suffer from them?

Each takes an image (C, *spatial), 2-D or 3-D, in any units, a strength from 1 to 5 and a generator, and returns a
changed copy. The same generator state gives the same image. Amplitudes are shares of the image's own range (from its
0.5 to its 99.5 percentile); lengths are in voxels. Strength 1 is barely visible, strength 5 hides small structures.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from numpy.typing import NDArray
from PIL import Image as PillowImage
from torch import Tensor

from voxdino.core.errors import ConfigError
from voxdino.core.safe_files import digest_bytes

STRENGTHS = (1, 2, 3, 4, 5)

Picture = Float[np.ndarray, "C *spatial"]
Corruption = Callable[[Picture, int, np.random.Generator], Picture]

_BITS = 255.0  # grey levels of a JPEG above black


def noise(image: Picture, strength: int, rng: np.random.Generator) -> Picture:
    """Gaussian noise, independent in every voxel and channel."""
    sd = _at(strength, (0.02, 0.04, 0.08, 0.12, 0.18)) * _range(image)[1]
    return _as_image(image + sd * rng.standard_normal(image.shape))


def rician(image: Picture, strength: int, rng: np.random.Generator) -> Picture:
    """Noise of MR magnitude images: Gaussian in both parts of the signal, so that air becomes bright."""
    low, extent = _range(image)
    sd = _at(strength, (0.02, 0.04, 0.08, 0.12, 0.18)) * extent
    real, imaginary = (sd * rng.standard_normal(image.shape) for _ in range(2))
    return _as_image(np.hypot(image - low + real, imaginary) + low)


def low_dose(image: Picture, strength: int, rng: np.random.Generator) -> Picture:
    """Few quanta: Poisson noise, stronger where the image is brighter. In image space: without a CT's streaks."""
    low, extent = _range(image)
    quanta = _at(strength, (800.0, 300.0, 120.0, 50.0, 20.0))  # at the bright end of the range
    counts = rng.poisson(np.maximum(image - low, 0) / extent * quanta)
    return _as_image(np.minimum(image - low, 0) + counts / quanta * extent + low)


def blur(image: Picture, strength: int, rng: np.random.Generator) -> Picture:
    """A wider point spread: Gaussian along every axis, borders repeated."""
    return _as_image(_smoothed(image, _at(strength, (0.5, 0.8, 1.2, 1.8, 2.5))).numpy())


def bias_field(image: Picture, strength: int, rng: np.random.Generator) -> Picture:
    """Uneven sensitivity of MR coils: a smooth gain, the same for all channels."""
    low, _ = _range(image)
    amplitude = _at(strength, (0.1, 0.2, 0.3, 0.45, 0.6))
    coarse = torch.from_numpy(rng.uniform(-1, 1, (1, 1, *(3,) * (image.ndim - 1))))
    field = F.interpolate(coarse, size=image.shape[1:], mode=_mode(image), align_corners=True)[0].numpy()
    return _as_image((image - low) * np.exp(amplitude * field) + low)


def ghosting(image: Picture, strength: int, rng: np.random.Generator) -> Picture:
    """Periodic motion in MR: every n-th line of k-space is weaker, which puts faint copies along one axis."""
    share = _at(strength, (0.15, 0.3, 0.45, 0.6, 0.8))
    axis, period = int(rng.integers(1, image.ndim)), int(rng.integers(2, 5))
    lines = np.arange(image.shape[axis])
    weights = np.where((lines % period == period - 1) & (lines > 0), 1 - share, 1.0)
    weights = np.minimum(weights, weights[-lines % len(lines)])  # of both signs of a frequency: the image stays real
    shape = [-1 if place == axis else 1 for place in range(image.ndim)]
    return _as_image(np.fft.ifft(np.fft.fft(image, axis=axis) * weights.reshape(shape), axis=axis).real)


def contrast(image: Picture, strength: int, rng: np.random.Generator) -> Picture:
    """A flat image: differences from the mean of each channel are reduced."""
    factor = _at(strength, (0.8, 0.6, 0.45, 0.3, 0.2))
    mean = image.mean(axis=tuple(range(1, image.ndim)), keepdims=True)
    return _as_image(mean + factor * (image - mean))


def resolution(image: Picture, strength: int, rng: np.random.Generator) -> Picture:
    """Larger voxels along every axis: smoothed, sampled coarsely, interpolated back to the grid."""
    factor = _at(strength, (1.5, 2.0, 3.0, 4.0, 6.0))
    size = [max(1, round(length / factor)) for length in image.shape[1:]]
    coarse = F.interpolate(_smoothed(image, 0.35 * factor)[None], size=size, mode=_mode(image))
    return _as_image(F.interpolate(coarse, size=image.shape[1:], mode=_mode(image))[0].numpy())


def jpeg(image: Picture, strength: int, rng: np.random.Generator) -> Picture:
    """Lossy storage: the error of 8-bit JPEG, slice by slice; values beyond the range keep theirs."""
    quality = int(_at(strength, (50.0, 30.0, 18.0, 10.0, 5.0)))
    low, extent = _range(image)
    levels = np.clip((image - low) / extent * _BITS, 0, _BITS).round().astype(np.uint8)
    slices = levels[:, None] if levels.ndim == 3 else levels  # (C, D, H, W)
    stored = np.empty_like(slices)
    for depth in range(slices.shape[1]):
        if len(slices) == 3:
            stored[:, depth] = np.moveaxis(_through_jpeg(np.moveaxis(slices[:, depth], 0, -1), quality), -1, 0)
        else:
            for channel in range(len(slices)):
                stored[channel, depth] = _through_jpeg(slices[channel, depth], quality)
    error = (stored.reshape(levels.shape).astype(np.float32) - levels) / _BITS * extent
    return _as_image(image + error)


CORRUPTIONS: dict[str, Corruption] = {
    corruption.__name__: corruption
    for corruption in (noise, rician, low_dose, blur, bias_field, ghosting, contrast, resolution, jpeg)
}


def corrupted(image: Shaped[np.ndarray, "C *spatial"], name: str, strength: int, *, of: str) -> NDArray[Any]:
    """An image in file values after a fault of CORRUPTIONS, as a file of its type holds it: whole numbers are rounded,
    and what lies beyond the type is at its end.

    of: whose image it is; it has the same fault every time, and at every strength the same pattern.
    Errors: ConfigError for a strength that is none.
    """
    rng = np.random.default_rng(int(digest_bytes(f"{name} {of}".encode())[:16], 16))
    changed = CORRUPTIONS[name](image.astype(np.float32), strength, rng)
    if image.dtype.kind not in "iu":
        return changed.astype(image.dtype)
    ends = np.iinfo(image.dtype)
    return np.rint(changed.astype(np.float64)).clip(ends.min, ends.max).astype(image.dtype)


def _at(strength: int, values: tuple[float, ...]) -> float:
    if strength not in STRENGTHS:
        raise ConfigError(f"a corruption has strengths from 1 to 5, not {strength}", fix="choose one of them.")
    return values[strength - 1]


def _range(image: Picture) -> tuple[float, float]:
    """Its low end and its width; 1 for a constant image, so that nothing is divided by 0."""
    low, high = np.percentile(image, (0.5, 99.5))
    if high <= low:  # few voxels differ
        low, high = float(image.min()), float(image.max())
    return float(low), float(high - low) or 1.0


def _smoothed(image: Picture, sigma: float) -> Float[Tensor, "C *spatial"]:
    """Gaussian along every axis, borders repeated."""
    radius = max(1, round(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    lines = torch.from_numpy(image).float()
    for axis in range(1, image.ndim):
        moved = lines.movedim(axis, -1)
        flat = F.pad(moved.reshape(-1, 1, moved.shape[-1]), (radius, radius), mode="replicate")
        lines = F.conv1d(flat, (kernel / kernel.sum()).view(1, 1, -1)).reshape(moved.shape).movedim(-1, axis)
    return lines


def _as_image(values: NDArray[Any]) -> Picture:
    return np.ascontiguousarray(values, dtype=np.float32)


def _mode(image: Picture) -> str:
    return "trilinear" if image.ndim == 4 else "bilinear"


def _through_jpeg(pixels: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """8-bit pixels (H, W) or (H, W, 3) as they come back."""
    buffer = io.BytesIO()
    PillowImage.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="JPEG", quality=quality)
    return np.asarray(PillowImage.open(buffer))
