"""What patch tokens see, as pictures of fixed images over the course of a training (drawn with Pillow)."""

from collections.abc import Sequence
from os import PathLike

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from voxdino.core.safe_files import write_atomic
from voxdino.models.backbones.base import Backbone

GAP = 4  # white pixels between the parts of a picture
SHOWN = (0.005, 0.995)  # quantiles of an image that become black and white
SPANNED = (0.01, 0.99)  # quantiles of a principal component that become 0 and full colour
# Cosine similarity 0 (and below), 1/4, ... 1: dark to bright, in equal steps of lightness.
SIMILARITY_COLOURS = ((0, 0, 8), (75, 20, 110), (170, 45, 90), (240, 125, 40), (252, 255, 200))
MARK = (0, 255, 120)  # of the chosen tokens in the image


def draw_pca(backbone: Backbone, images: Float[Tensor, "B P H W"], path: str | PathLike[str]) -> None:
    """A PNG of images, one below the other, each with the first three principal components of its patch tokens as RGB.

    One basis for all images of the picture: the same colour means the same direction. The tokens are those of the last
    tap, after the final norm. Directions have a fixed sign, so that the same tokens have the same colours.

    images: as the backbone reads them, sides a multiple of its patch; shown are their first three planes.
    """
    colours = principal_colours(_tokens(backbone, images))
    rows = [
        [_to_bytes(image), _enlarge(colour, image.shape[1:])] for image, colour in zip(images, colours, strict=True)
    ]
    _write(rows, path)


def draw_similarity(
    backbone: Backbone,
    images: Float[Tensor, "B P H W"],
    points: Sequence[tuple[int, int]],
    path: str | PathLike[str],
) -> None:
    """A PNG of images, one below the other, each with the cosine similarity of its patch tokens to chosen ones.

    points: (row, column) pixels; the token that covers each is marked in the image and has a map beside it.
    """
    tokens = F.normalize(_tokens(backbone, images), dim=-1)  # (B, h, w, E)
    patch, size = backbone.patch_size, images.shape[2:]
    assert all(0 <= row < size[0] and 0 <= column < size[1] for row, column in points), f"{points} in {tuple(size)}"
    rows = []
    for image, grid in zip(images, tokens, strict=True):
        shown = _to_bytes(image)
        parts = []
        for row, column in points:
            chosen = grid[row // patch, column // patch]
            parts.append(_enlarge(similarity_colours(grid @ chosen), size))
            _frame(shown, row // patch * patch, column // patch * patch, patch)
        rows.append([shown, *parts])
    _write(rows, path)


def principal_colours(tokens: Float[Tensor, "B h w E"]) -> UInt8[np.ndarray, "B h w 3"]:
    """The first three principal components of all tokens together, each spread over 0 to 255.

    A component without any extent (fewer than three directions) is black.
    """
    flat = tokens.detach().cpu().double().flatten(0, 2)
    centred = flat - flat.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending
    directions = vectors.flip(1)[:, :3]
    if directions.shape[1] < 3:
        directions = F.pad(directions, (0, 3 - directions.shape[1]))
    strongest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    components = centred @ (directions * torch.where(strongest < 0, -1.0, 1.0))
    low, high = torch.quantile(components[:: max(1, len(flat) // 100_000)], torch.tensor(SPANNED).double(), dim=0)
    extent = high - low
    there = extent > 1e-6 * values.clamp(min=0).sum().div(len(flat)).sqrt()
    shares = torch.where(there, (components - low) / torch.where(there, extent, 1.0), 0.0)
    return np.asarray((shares.clamp(0, 1) * 255).round().to(torch.uint8).reshape(*tokens.shape[:3], 3).numpy())


def similarity_colours(similarity: Float[Tensor, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Dark for 0 and below, bright for 1."""
    stops = np.linspace(0, 1, len(SIMILARITY_COLOURS))
    shares = similarity.detach().cpu().double().clamp(0, 1).numpy()
    channels = [np.interp(shares, stops, levels) for levels in np.array(SIMILARITY_COLOURS).T]
    return np.asarray(np.stack(channels, axis=-1).round().astype(np.uint8))


@torch.no_grad()
def _tokens(backbone: Backbone, images: Tensor) -> Tensor:
    """(B, h, w, E) of the last tap, one image at a time, on the CPU."""
    assert not backbone.training, "pictures show a backbone in eval mode"
    taps = backbone.default_taps()[-1:]
    last: Tensor = backbone(images, taps=taps, images_at_once=1).maps[-1]
    return last.float().cpu().movedim(1, -1)


def _to_bytes(image: Tensor) -> NDArray[np.uint8]:
    """(P, H, W) network input as (H, W, 3), from its darkest to its brightest values."""
    planes = image[:3].detach().cpu().double()
    planes = planes if len(planes) == 3 else planes[:1].expand(3, -1, -1)
    values = planes.flatten()[:: max(1, planes.numel() // 1_000_000)]
    low, high = torch.quantile(values, torch.tensor(SHOWN).double())
    shares = ((planes - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return np.array((shares * 255).round().to(torch.uint8).movedim(0, -1).numpy())


def _enlarge(colours: NDArray[np.uint8], size: Sequence[int]) -> NDArray[np.uint8]:
    """Every token as large as its patch."""
    rows, columns = size[0] // colours.shape[0], size[1] // colours.shape[1]
    return colours.repeat(rows, axis=0).repeat(columns, axis=1)


def _frame(picture: NDArray[np.uint8], top: int, left: int, side: int) -> None:
    """Draw the outline of a patch into a picture."""
    patch = picture[top : top + side, left : left + side]
    for edge in (patch[0], patch[-1], patch[:, 0], patch[:, -1]):
        edge[...] = MARK


def _write(rows: Sequence[Sequence[NDArray[np.uint8]]], path: str | PathLike[str]) -> None:
    """Parts of equal size, row by row on white, as PNG."""
    height, width = rows[0][0].shape[:2]
    shape = (len(rows) * (height + GAP) - GAP, len(rows[0]) * (width + GAP) - GAP, 3)
    sheet = np.full(shape, 255, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, part in enumerate(row):
            top, left = y * (height + GAP), x * (width + GAP)
            sheet[top : top + height, left : left + width] = part
    with write_atomic(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")
