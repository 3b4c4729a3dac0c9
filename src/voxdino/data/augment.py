"""Augmentation of batches, on the training device, seeded per sample.

Every sample draws from a generator of its own, so what happens to it depends on neither its neighbours in the batch nor
the number of workers. Intensity changes are the same for all channels of a sample: grey stays grey, and no hue or
saturation exists (papers: no colour jitter for CT and MR).
"""

import hashlib
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn import functional as F

from voxdino.core.records import Record

Generator = np.random.Generator


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= ends[0] <= ends[1]:
        raise ValueError("a range is written [low, high] with 0 <= low <= high")
    return ends


def _rising_above_zero(ends: tuple[float, float]) -> tuple[float, float]:
    if not 0 < ends[0] <= ends[1]:
        raise ValueError("a range of factors is written [low, high] with 0 < low <= high")
    return ends


def _shrinking(ends: tuple[float, float]) -> tuple[float, float]:
    if not 0 < ends[0] <= ends[1] <= 1:
        raise ValueError("a range of shares is written [low, high] with 0 < low <= high <= 1")
    return ends


Span = Annotated[tuple[float, float], AfterValidator(_rising)]
Factors = Annotated[tuple[float, float], AfterValidator(_rising_above_zero)]
Shares = Annotated[tuple[float, float], AfterValidator(_shrinking)]


class AugmentConfig(Record):
    """Strength and frequency of each change; a probability of 0 turns one off. Defaults follow nnU-Net's 2-D set, with
    rotation kept small: medical images come upright.

    flips:    axes that may be mirrored. "auto" is none for volumes, whose labels may name sides (left kidney, anterior
              hippocampus) and whose canonical orientation is knowledge; both for pictures, which have no up.
    spatial:  probability of one affine change; rotation, scaling: that it turns, that it enlarges or shrinks.
    tilt_degrees: slabs are turned about the two axes in plane as well, up to this far, and scaled along the slice axis
              too; not where slices are `THICK` times as far apart as voxels. 0: slices stay slices.
    inverted_gamma: gamma of the negative, which acts on bright parts as gamma does on dark ones; in `gamma_range`.
    """

    flips: Literal["auto", "none", "rows", "columns", "both"] = "auto"
    spatial: float = Field(default=0.5, ge=0, le=1)
    rotation: float = Field(default=1.0, ge=0, le=1)
    rotation_degrees: float = Field(default=20.0, ge=0, le=180)
    scaling: float = Field(default=1.0, ge=0, le=1)
    scale: Factors = (0.8, 1.25)
    translation: float = Field(default=0.05, ge=0, le=0.5)  # share of the crop
    tilt_degrees: float = Field(default=0.0, ge=0, le=180)
    gamma: float = Field(default=0.3, ge=0, le=1)
    inverted_gamma: float = Field(default=0.0, ge=0, le=1)
    gamma_range: Factors = (0.7, 1.5)
    brightness: float = Field(default=0.2, ge=0, le=1)
    brightness_range: Factors = (0.75, 1.25)
    contrast: float = Field(default=0.2, ge=0, le=1)
    contrast_range: Factors = (0.75, 1.25)
    noise: float = Field(default=0.15, ge=0, le=1)
    noise_sd: Span = (0.0, 0.15)  # in standard deviations of the normalised image
    blur: float = Field(default=0.15, ge=0, le=1)
    blur_sigma_voxels: Factors = (0.5, 1.0)
    low_resolution: float = Field(default=0.15, ge=0, le=1)
    low_resolution_range: Shares = (0.5, 1.0)

    def for_dimensions(self, ndim: int) -> "AugmentConfig":
        """With `flips` resolved for volumes (3) or pictures (2)."""
        flips = {2: "both", 3: "none"}[ndim] if self.flips == "auto" else self.flips
        return self.model_copy(update={"flips": flips})


THICK = 3.0  # nnU-Net's limit, from which on it changes slices in plane only

# nnU-Net's own 2-D set, with which MedDINOv3 trains (dossier 2.7). Widths it does not print are nnU-Net's.
NNUNET_2D = AugmentConfig(
    flips="both",
    spatial=1.0,
    rotation=0.2,
    rotation_degrees=180.0,
    scaling=0.2,
    scale=(0.7, 1.4),
    translation=0.0,
    noise=0.1,
    noise_sd=(0.0, 0.1),
    blur=0.2,
    blur_sigma_voxels=(0.5, 1.0),
    brightness=0.15,
    brightness_range=(0.75, 1.25),
    contrast=0.15,
    contrast_range=(0.75, 1.25),
    low_resolution=0.25,
    low_resolution_range=(0.5, 1.0),
    inverted_gamma=0.1,
    gamma=0.3,
    gamma_range=(0.7, 1.5),
)


def sample_seed(seed: int, epoch: int, index: int, case_id: str, depth: int) -> int:
    """63 bits that name a sample; the same on every machine (Python's hash() is not)."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{index}/{case_id}/{depth}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def augment(
    image: Float[Tensor, "B C Dk H W"],
    label: Int[Tensor, "B D H W"],
    *,
    seeds: Sequence[int],
    padding: Float[Tensor, "B C"],
    spacing: Float[Tensor, "B 3"],
    config: AugmentConfig,
    ignore_index: int,
) -> tuple[Float[Tensor, "B C Dk H W"], Int[Tensor, "B D H W"]]:
    """Changed copies of a batch; all slices of a sample (and its context) change alike.

    padding: the normalised value of nothing, per sample and channel, for what turns in from outside.
    spacing: (slice, row, column) size of a voxel, so that a rotation turns the anatomy and does not shear it.
    """
    assert config.flips != "auto", "resolve with for_dimensions first"
    generators = [np.random.default_rng(seed) for seed in seeds]
    affine = torch.stack(
        [draw_affine(rng, config, label.shape[1:], sp) for rng, sp in zip(generators, spacing.cpu(), strict=True)]
    )
    image, label = warp(image, label, affine.to(image.device), padding, ignore_index)
    changed = [change_intensity(image[i], generators[i], config) for i in range(len(image))]
    return torch.stack(changed), label


def draw_affine(rng: Generator, config: AugmentConfig, shape: Sequence[int], spacing: Tensor) -> Float[Tensor, "3 4"]:
    """Output -> input map in the (x, y, z) in [-1, 1] coordinates of `F.affine_grid`, of a slab of (D, H, W) voxels."""
    turn, scale, shift = 0.0, 1.0, (0.0, 0.0)
    draws = rng.random(6)  # always six: the later draws do not depend on whether this one changes anything
    own = rng.spawn(1)[0]  # a stream of their own
    rotates, scales = own.random(2) < (config.rotation, config.scaling)
    tilts = np.deg2rad(config.tilt_degrees) * (2 * own.random(2) - 1) * rotates
    thick = shape[0] == 1 or float(spacing[0]) > THICK * float(spacing[1:].max())
    in_3d = config.tilt_degrees > 0 and not thick and draws[0] < config.spatial
    if draws[0] < config.spatial:
        turn = np.deg2rad(config.rotation_degrees) * (2 * draws[1] - 1) * rotates
        scale = _between(config.scale, draws[2], geometric=True) if scales else 1.0
        shift = tuple(2 * config.translation * (2 * draw - 1) for draw in draws[3:5])
    extent = np.array([n * float(size) for n, size in zip(shape, spacing, strict=True)])[::-1]  # x, y, z
    rotation = _turn(turn, 0, 1) / np.array([scale, scale, scale if in_3d else 1.0])[:, None]
    if in_3d:
        rotation = rotation @ _turn(tilts[0], 1, 2) @ _turn(tilts[1], 0, 2)
    linear = rotation * extent[None, :] / extent[:, None]
    flips = int(draws[5] * 4)  # two fair coins
    if config.flips in ("columns", "both") and flips & 1:
        linear[:, 0] *= -1
    if config.flips in ("rows", "both") and flips & 2:
        linear[:, 1] *= -1
    return torch.tensor(np.column_stack([linear, (*shift, 0.0)]), dtype=torch.float32)


def _turn(angle: float, one: int, other: int) -> NDArray[np.float64]:
    """A rotation by `angle` in the plane of two axes."""
    matrix = np.eye(3)
    matrix[[one, other], [one, other]] = np.cos(angle)
    matrix[one, other], matrix[other, one] = -np.sin(angle), np.sin(angle)
    return matrix


def warp(image: Tensor, label: Tensor, affine: Tensor, padding: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Resample the samples whose affine is not the identity: linear for images, nearest for labels.

    affine: of the label's slices; the image's, with context beyond them, move with it.
    """
    identity = torch.eye(3, 4, device=affine.device)
    moved = (affine != identity).flatten(1).any(1).nonzero().flatten()
    if not len(moved):
        return image, label
    affine, base = affine[moved], padding[moved, :, None, None, None]
    image, label = image.clone(), label.clone()
    if stays_in_plane(affine):
        grid = F.affine_grid(affine[:, :2, [0, 1, 3]], [len(moved), 1, *image.shape[-2:]], align_corners=False)
        flat = (image[moved] - base).flatten(1, 2)  # (b, C * Dk, H, W)
        warped = F.grid_sample(flat, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        image[moved] = warped.view(len(moved), *image.shape[1:]) + base
        old = label[moved].float()
    else:
        longer = torch.tensor([1.0, 1.0, image.shape[2] / label.shape[1]], device=affine.device)
        stretched = torch.cat((affine[..., :3] * longer / longer[:, None], affine[..., 3:] / longer[:, None]), dim=2)
        grid = F.affine_grid(stretched, [len(moved), 1, *image.shape[-3:]], align_corners=False)
        image[moved] = F.grid_sample(image[moved] - base, grid, padding_mode="zeros", align_corners=False) + base
        grid = F.affine_grid(affine, [len(moved), 1, *label.shape[-3:]], align_corners=False)
        old = label[moved].float().unsqueeze(1)
    nearest = F.grid_sample(old, grid, mode="nearest", padding_mode="border", align_corners=False)
    outside = (grid.abs() > 1).any(-1)
    nearest = nearest.view(len(moved), *label.shape[1:]).to(label.dtype)
    outside = outside.view(len(moved), -1, *label.shape[2:])  # one slice, or all
    label[moved] = torch.where(outside, ignore_index, nearest)
    return image, label


def stays_in_plane(affine: Float[Tensor, "B 3 4"]) -> bool:
    """Every slice of every sample stays the slice it was."""
    apart = affine.new_tensor([[False, False, True, False]] * 2 + [[True, True, False, True]]).bool()
    return not affine[:, apart].any() and bool((affine[:, 2, 2] == 1).all())


def change_intensity(image: Float[Tensor, "C Dk H W"], rng: Generator, config: AugmentConfig) -> Tensor:
    """Blur, low resolution, noise, brightness, contrast, gammas, each with its probability, in that order."""
    chance, strength = rng.random(6), rng.random(6)
    noise_seed = int(rng.integers(2**62))
    inverted = rng.random(2)
    if chance[0] < config.blur:
        image = _blur(image, _between(config.blur_sigma_voxels, strength[0]))
    if chance[1] < config.low_resolution:
        image = coarsen(image, _between(config.low_resolution_range, strength[1]))
    if chance[2] < config.noise:
        generator = torch.Generator(device=image.device).manual_seed(noise_seed)
        field = torch.randn(image.shape[1:], generator=generator, device=image.device)  # one field for all channels
        image = image + field * _between(config.noise_sd, strength[2])
    if chance[3] < config.brightness:
        low = image.amin()
        image = (image - low) * _between(config.brightness_range, strength[3]) + low
    if chance[4] < config.contrast:
        low, mean, high = image.amin(), image.mean(), image.amax()
        image = ((image - mean) * _between(config.contrast_range, strength[4]) + mean).clamp(low, high)
    if inverted[0] < config.inverted_gamma:
        image = -_raise(-image, _between(config.gamma_range, inverted[1], geometric=True))
    if chance[5] < config.gamma:
        image = _raise(image, _between(config.gamma_range, strength[5], geometric=True))
    return image


def _raise(image: Float[Tensor, "C Dk H W"], power: float) -> Tensor:
    """Gamma: to the power, within the image's own range."""
    low, extent = image.amin(), (image.amax() - image.amin()).clamp(min=1e-6)
    return ((image - low) / extent).pow(power) * extent + low


def _blur(image: Float[Tensor, "C Dk H W"], sigma: float) -> Tensor:
    """Gaussian blur in plane, borders replicated."""
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    flat = image.flatten(0, 1).unsqueeze(1)  # (C * Dk, 1, H, W)
    flat = F.pad(flat, (radius, radius, radius, radius), mode="replicate")
    flat = F.conv2d(F.conv2d(flat, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return flat.view(image.shape)


def coarsen(image: Float[Tensor, "C Dk H W"], factor: float) -> Tensor:
    """Sample in plane at `factor` of the resolution and bring back: a thicker scanner grid."""
    size = [max(1, round(length * factor)) for length in image.shape[-2:]]
    coarse = F.interpolate(image, size=size, mode="nearest-exact")
    return F.interpolate(coarse, size=image.shape[-2:], mode="bilinear", align_corners=False)


def _between(ends: tuple[float, float], draw: float, *, geometric: bool = False) -> float:
    low, high = ends
    return float(low * (high / low) ** draw) if geometric else float(low + (high - low) * draw)
