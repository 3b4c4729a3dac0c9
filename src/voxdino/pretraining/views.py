"""The views of self-distillation: global and local crops of slices, changed in brightness and sharpness.

Cut on the images' device, straight from each slice, with antialiasing. A sample's views depend on its seed and the
configuration: not on its neighbours in the batch, nor on how many processes share it. What is done to scans is safe for
grey values that mean something: no hue, no saturation, no solarisation (dossier 2.10 and 7.7).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from voxdino.core.errors import ImageError
from voxdino.core.records import Record
from voxdino.data.augment import Factors, Shares, Span, coarsen
from voxdino.preparation.intensity import IMAGENET_MEAN, IMAGENET_SD

NUM_GLOBALS = 2
_NUM_BOXES = 10  # tries for a box of the wished area and aspect that fits into the image

Probability = Annotated[float, Field(ge=0, le=1)]


class ViewConfig(Record):
    """Sizes of the crops, strength and frequency of each change; a probability of 0 turns one off.

    global_scale, local_scale: share of the slice's area that a crop covers; aspect: its width / height.
    gram_size:       the regions of the global crops once more, larger, for the Gram teacher; None: none.
    gram_distorted:  these crops get the changes of intensity, and the global crops are made of them; else they are
                     clean and have the flips alone.
    flips:           axes that may be mirrored, half of the time. "auto": none for scans, whose anatomy knows its sides;
                     both for photographs.
    blur:            probability for the first global, the second global and the local crops.
    window:          probability that window and level move: values are multiplied by `window_gain`, `window_shift` (up
                     to so many standard deviations of the normalised image, either way) is added, and what leaves the
                     slice's own range is clipped.
    gamma:           a power, between nothing and the slice's largest value.
    noise_sd:        in standard deviations of the normalised image; neighbouring slices have noise of their own.
    photo_colour, photo_grey: colour jitter and greying, of photographs alone; hue in shares of a full turn.
    """

    global_size: int = Field(default=224, ge=1)
    local_size: int = Field(default=96, ge=1)
    num_locals: int = Field(default=8, ge=0)
    gram_size: int | None = Field(default=None, ge=1)
    gram_distorted: bool = False
    global_scale: Shares = (0.32, 1.0)
    local_scale: Shares = (0.05, 0.32)
    aspect: Factors = (0.75, 4 / 3)
    flips: Literal["auto", "none", "rows", "columns", "both"] = "auto"
    blur: tuple[Probability, Probability, Probability] = (1.0, 0.1, 0.5)
    blur_sigma_pixels: Factors = (0.1, 2.0)
    low_resolution: Probability = 0.15
    low_resolution_range: Shares = (0.5, 1.0)
    window: Probability = 0.5
    window_gain: Factors = (0.75, 1.25)
    window_shift: float = Field(default=0.25, ge=0)
    gamma: Probability = 0.3
    gamma_range: Factors = (0.7, 1.5)
    noise: Probability = 0.15
    noise_sd: Span = (0.0, 0.15)
    photo_colour: Probability = 0.0
    photo_saturation: Factors = (0.8, 1.2)
    photo_hue: float = Field(default=0.1, ge=0, le=0.5)
    photo_grey: Probability = 0.0

    @model_validator(mode="after")
    def _fits(self) -> "ViewConfig":
        if self.gram_size is not None and self.gram_size < self.global_size:
            raise ValueError(f"gram_size {self.gram_size} is below global_size {self.global_size}")
        return self


@dataclass(frozen=True)
class Views:
    """Views of B slices, as images of three planes.

    globals: (2 B, 3, G, G), the first crops of all slices, then the second ones.
    locals:  (L B, 3, l, l), in the same order.
    gram:    (2 B, 3, g, g), the regions of the globals, larger; None unless asked for.
    """

    globals: Float[Tensor, "twoB 3 G G"]
    locals: Float[Tensor, "LB 3 l l"]
    gram: Float[Tensor, "twoB 3 g g"] | None


@torch.no_grad()
def make_views(
    images: Sequence[Float[Tensor, "_ _ _ _"]],
    *,
    seeds: Sequence[int],
    paddings: Sequence[float],
    is_photo: Sequence[bool],
    config: ViewConfig,
) -> Views:
    """Cut and change the views of a batch of slices, which may differ in size and kind.

    images:   (C, D, H, W) each, normalised. One channel: one slice, shown three times, or a slice between its
              neighbours, one plane each. Three channels of one slice: colours.
    paddings: the normalised value of nothing, of each sample: the black end of gamma.
    Errors: ImageError for other numbers of channels and slices.
    """
    planes = [_planes(image) for image in images]
    table = draw_views([image.shape for image in images], seeds=seeds, is_photo=is_photo, config=config)
    ends = torch.stack([torch.stack(torch.aminmax(one)) for one in planes])  # (B, 2)
    nothing = torch.tensor(list(paddings), dtype=ends.dtype).to(ends.device)
    low, high = torch.minimum(ends[:, 0], nothing), ends[:, 1]
    kinds = [[place for place, one in enumerate(planes) if len(one) == number] for number in (1, 3)]

    def cut(views: slice, size: int, *, change: bool) -> Float[Tensor, "VB 3 S S"]:
        rows = table[views]
        result = low.new_empty(*rows.shape, 3, size, size)  # (V, B, ...)
        for places in filter(len, kinds if len(rows) else []):
            chosen = rows[:, places].ravel()
            crops = _resample([planes[place] for place in places], chosen, size)
            lowest, highest = (end[places].repeat(len(rows))[:, None, None, None] for end in (low, high))
            crops = torch.clamp(crops, lowest, highest)  # bicubic weights overshoot at edges
            if change:
                crops = _change(crops, chosen, lowest, highest, config)
            result[:, places] = crops.unflatten(0, (len(rows), len(places)))
        return result.flatten(0, 1)

    both = slice(0, NUM_GLOBALS)
    with torch.autocast(low.device.type, enabled=False):
        local_crops = cut(slice(NUM_GLOBALS, None), config.local_size, change=True)
        if config.gram_size is None or not config.gram_distorted:
            gram = None if config.gram_size is None else cut(both, config.gram_size, change=False)
            return Views(cut(both, config.global_size, change=True), local_crops, gram)
        gram = cut(both, config.gram_size, change=True)
        return Views(_resize(gram, config.global_size), local_crops, gram)


def _planes(image: Float[Tensor, "C D H W"]) -> Float[Tensor, "P H W"]:
    """One plane that is to be shown three times, or three."""
    num_channels, num_slices = image.shape[:2]
    if (num_channels, num_slices) in ((1, 1), (1, 3), (3, 1)):
        return image.flatten(0, 1)
    raise ImageError(
        f"a slice of {num_channels} channels with {num_slices - 1} neighbours cannot be shown as three planes",
        fix="give one channel, with or without the slices before and after it, or three colours of one slice.",
    )


# One row per view. sigma 0, resolution 1, gain 1, shift 0, gamma 1, noise_sd 0, saturation 1 and hue 0 change nothing.
_ROW = np.dtype(
    [(name, np.int64) for name in ("top", "left", "height", "width", "noise_seed")]
    + [(name, np.bool_) for name in ("flip_rows", "flip_columns", "is_colour")]
    + [(name, np.float64) for name in ("sigma", "resolution", "gain", "shift", "gamma", "noise_sd")]
    + [(name, np.float64) for name in ("saturation", "hue")]
)
_DRAWS = (
    *("top", "left", "flips", "blur", "sigma", "low_resolution", "resolution", "window", "gain", "shift", "gamma"),
    *("power", "noise", "noise_sd", "noise_seed", "colour", "saturation", "hue", "grey"),
)


def draw_views(
    shapes: Sequence[Sequence[int]], *, seeds: Sequence[int], is_photo: Sequence[bool], config: ViewConfig
) -> NDArray[Any]:
    """What every view of every sample will be: (V, B) records of box, flips and changes; V = 2 global + local crops.

    shapes: (C, D, H, W) of each slice. A view's draws do not depend on the number of views after it.
    """
    num_views = NUM_GLOBALS + config.num_locals
    drawn = [np.random.default_rng(seed).random((num_views, 2 * _NUM_BOXES + len(_DRAWS))) for seed in seeds]
    draws = np.stack(drawn, axis=1)  # (V, B, draws)
    named = dict(zip(_DRAWS, np.moveaxis(draws[..., 2 * _NUM_BOXES :], -1, 0), strict=True))
    is_first = np.arange(num_views)[:, None]
    is_local = is_first >= NUM_GLOBALS
    photos, channels = np.array(is_photo, dtype=bool), np.array([shape[0] for shape in shapes])
    table = np.zeros(draws.shape[:2], dtype=_ROW)
    scales = np.where(is_local[..., None], config.local_scale, config.global_scale)  # (V, 1, 2)
    sizes = np.array([tuple(shape[2:]) for shape in shapes])
    _draw_boxes(table, draws[..., : 2 * _NUM_BOXES], named, sizes, scales, config.aspect)
    _draw_flips(table, named["flips"], photos, config.flips)

    def where(name: str, probability: Any, values: NDArray[Any], otherwise: float) -> NDArray[Any]:
        return np.where(named[name] < probability, values, otherwise)

    blur = np.where(is_local, config.blur[2], np.where(is_first == 0, config.blur[0], config.blur[1]))
    table["sigma"] = where("blur", blur, _within(config.blur_sigma_pixels, named["sigma"]), 0.0)
    coarse = _within(config.low_resolution_range, named["resolution"])
    table["resolution"] = where("low_resolution", config.low_resolution, coarse, 1.0)
    table["gain"] = where("window", config.window, _within(config.window_gain, named["gain"]), 1.0)
    table["shift"] = where("window", config.window, config.window_shift * (2 * named["shift"] - 1), 0.0)
    table["gamma"] = where("gamma", config.gamma, _geometric(config.gamma_range, named["power"]), 1.0)
    table["noise_sd"] = where("noise", config.noise, _within(config.noise_sd, named["noise_sd"]), 0.0)
    table["noise_seed"] = (named["noise_seed"] * 2**53).astype(np.int64)
    table["is_colour"] = channels == 3
    jitter, grey = config.photo_colour * (photos & (channels == 3)), config.photo_grey * (photos & (channels == 3))
    table["hue"] = where("colour", jitter, config.photo_hue * (2 * named["hue"] - 1), 0.0)
    table["saturation"] = where("colour", jitter, _within(config.photo_saturation, named["saturation"]), 1.0)
    table["saturation"] = np.where(named["grey"] < grey, 0.0, table["saturation"])
    return table


def _draw_boxes(
    table: NDArray[Any],
    draws: Float[np.ndarray, "V B draws"],
    named: dict[str, NDArray[np.float64]],
    sizes: NDArray[np.int64],
    scales: Float[np.ndarray, "V 1 2"],
    aspects: tuple[float, float],
) -> None:
    """Random resized crops: area and aspect drawn until the box fits; else the largest box with an allowed aspect."""
    rows, columns = sizes[:, 0], sizes[:, 1]
    area = (rows * columns)[:, None] * (scales[..., :1] + (scales[..., 1:] - scales[..., :1]) * draws[..., ::2])
    aspect = _geometric(aspects, draws[..., 1::2])
    height = np.maximum(np.rint(np.sqrt(area / aspect)), 1)  # (V, B, tries)
    width = np.maximum(np.rint(np.sqrt(area * aspect)), 1)
    fits = (height <= rows[:, None]) & (width <= columns[:, None])
    first = fits.argmax(axis=-1)[..., None]
    any_fits = fits.any(axis=-1)
    largest_height = np.minimum(rows, np.maximum(np.rint(columns / aspects[0]), 1))
    largest_width = np.minimum(columns, np.maximum(np.rint(rows * aspects[1]), 1))
    table["height"] = np.where(any_fits, np.take_along_axis(height, first, -1)[..., 0], largest_height)
    table["width"] = np.where(any_fits, np.take_along_axis(width, first, -1)[..., 0], largest_width)
    table["top"] = np.floor(named["top"] * (rows - table["height"] + 1))
    table["left"] = np.floor(named["left"] * (columns - table["width"] + 1))


def _draw_flips(table: NDArray[Any], draws: NDArray[np.float64], photos: NDArray[np.bool_], flips: str) -> None:
    coins = (draws * 4).astype(np.int64)  # two fair ones
    both = photos if flips == "auto" else np.full_like(photos, flips == "both")
    table["flip_columns"] = ((coins & 1) > 0) & (both | (flips == "columns"))
    table["flip_rows"] = ((coins & 2) > 0) & (both | (flips == "rows"))


def _within(ends: tuple[float, float], draws: NDArray[np.float64]) -> NDArray[np.float64]:
    return ends[0] + (ends[1] - ends[0]) * draws


def _geometric(ends: tuple[float, float], draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """A factor and its inverse are equally likely."""
    return np.asarray(ends[0] * (ends[1] / ends[0]) ** draws)


def _resample(planes: Sequence[Float[Tensor, "P _ _"]], rows: NDArray[Any], size: int) -> Float[Tensor, "n P S S"]:
    """Boxes of the slices, brought to `size`, and mirrored. rows: crop by crop, the slices in turn."""
    crops = []
    for number, row in enumerate(rows):
        top, left, height, width = (int(row[name]) for name in ("top", "left", "height", "width"))
        box = planes[number % len(planes)][None, :, top : top + height, left : left + width]
        crops.append(_resize(box, size))
    result = torch.cat(crops)
    for name, dim in (("flip_rows", -2), ("flip_columns", -1)):
        if len(chosen := _places(rows[name], result.device)):
            result[chosen] = result[chosen].flip(dim)
    return result


def _resize(images: Float[Tensor, "n P _ _"], size: int) -> Float[Tensor, "n P S S"]:
    """Bicubic, averaging where it shrinks."""
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False)


def _places(chosen: NDArray[np.bool_], device: torch.device) -> Tensor:
    """Indices of the true ones, on the device."""
    return torch.from_numpy(np.flatnonzero(chosen)).to(device)


def _column(values: NDArray[Any], like: Tensor) -> Float[Tensor, "n 1 1 1"]:
    """One number per image, ready to be broadcast."""
    return like.new_tensor(values.tolist())[:, None, None, None]


def _change(
    images: Float[Tensor, "n P S S"],
    rows: NDArray[Any],
    low: Float[Tensor, "n 1 1 1"],
    high: Float[Tensor, "n 1 1 1"],
    config: ViewConfig,
) -> Float[Tensor, "n P S S"]:
    """Blur, low resolution, window and level, gamma, colour, noise, in that order; all planes of an image alike.

    low, high: between which values lie before noise is added. May change `images` in place.
    """
    images = _blur(images, rows["sigma"], config.blur_sigma_pixels[1])
    for place in np.flatnonzero(rows["resolution"] < 1):
        images[place] = coarsen(images[place][None], float(rows["resolution"][place]))[0]
    images = torch.clamp(images * _column(rows["gain"], images) + _column(rows["shift"], images), low, high)
    if len(chosen := _places(rows["gamma"] != 1, images.device)):
        base, extent = low[chosen], (high - low)[chosen].clamp(min=1e-6)
        powers = _column(rows["gamma"], images)[chosen]
        images[chosen] = ((images[chosen] - base) / extent).clamp(0, 1).pow(powers) * extent + base
    is_coloured = rows["is_colour"] & ((rows["saturation"] != 1) | (rows["hue"] != 0))
    if len(chosen := _places(is_coloured, images.device)):
        images[chosen] = _colour(images[chosen], rows[is_coloured])
    return _add_noise(images, rows)


def _blur(images: Float[Tensor, "n P S S"], sigmas: NDArray[np.float64], largest: float) -> Float[Tensor, "n P S S"]:
    """Gaussian blur of those with a sigma, borders replicated. largest: sets the kernels' length, for all alike."""
    if not len(chosen := _places(sigmas > 0, images.device)):
        return images
    radius = max(1, round(3 * largest))
    kernels = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigmas[sigmas > 0, None]) ** 2)
    kernels /= kernels.sum(axis=1, keepdims=True)
    part = images[chosen]
    weights = torch.from_numpy(kernels.astype(np.float32)).to(part)
    weights = weights.repeat_interleave(part.shape[1], dim=0)[:, None]  # (n P, 1, taps)
    flat = F.pad(part, (radius, radius, radius, radius), mode="replicate").flatten(0, 1)[None]  # (1, n P, ...)
    flat = F.conv2d(flat, weights[..., None], groups=len(weights))
    flat = F.conv2d(flat, weights[:, :, None], groups=len(weights))
    images[chosen] = flat.view(part.shape)
    return images


# Luminance and two axes of colour (the YIQ of television); its first row is the grey of a colour.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def _colour(images: Float[Tensor, "n 3 S S"], rows: NDArray[Any]) -> Float[Tensor, "n 3 S S"]:
    """Saturation and hue of photographs that are normalised as ImageNet; grey keeps its value."""
    angle, saturation = 2 * np.pi * rows["hue"], rows["saturation"]
    turned = np.zeros((len(rows), 3, 3))
    turned[:, 0, 0] = 1
    turned[:, 1, 1] = turned[:, 2, 2] = saturation * np.cos(angle)
    turned[:, 2, 1] = saturation * np.sin(angle)
    turned[:, 1, 2] = -turned[:, 2, 1]
    mixing = torch.from_numpy((np.linalg.inv(_YIQ) @ turned @ _YIQ).astype(np.float32)).to(images)
    mean, sd = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_SD))
    rgb = (images * sd + mean).clamp(0, 1)
    mixed = (mixing[..., None, None] * rgb[:, None]).sum(dim=2)  # (n, 3, S, S)
    return (mixed.clamp(0, 1) - mean) / sd


def _add_noise(images: Float[Tensor, "n P S S"], rows: NDArray[Any]) -> Float[Tensor, "n P S S"]:
    """Gaussian noise, each image from a seed of its own; one field for all colours, one for each slice."""
    generator = torch.Generator(device=images.device)
    for place in np.flatnonzero(rows["noise_sd"] > 0):
        num_fields = 1 if rows["is_colour"][place] else images.shape[1]
        generator.manual_seed(int(rows["noise_seed"][place]))
        field = torch.randn(num_fields, *images.shape[2:], generator=generator, device=images.device)
        images[place] += field * float(rows["noise_sd"][place])
    return images
