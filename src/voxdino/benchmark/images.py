"""Pictures and volumes of labelled sets as an encoder sees them, and their features, computed once."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from numpy.typing import NDArray
from torch import Tensor

from voxdino.benchmark.encoders import Encoder
from voxdino.benchmark.kept import is_kept, kept
from voxdino.core.errors import DatasetError
from voxdino.core.safe_files import digest_json
from voxdino.data.corruptions import corrupted
from voxdino.models.features import Features
from voxdino.models.precision import autocast, uses_bf16
from voxdino.preparation.classification import LabelledCase, load_image
from voxdino.preparation.intensity import IMAGENET_MEAN, IMAGENET_SD
from voxdino.probes.fitting import spread

FORMAT = 2  # raised when the meaning of kept features changes
IMAGES_PER_FILE = 512  # what a kill can cost
IMAGES_AT_ONCE = 64
TAILS = (0.5, 99.5)  # percentiles that become black and white where values are no 8-bit pixels


class ImageFeatures:
    """Features of the cases of one set, for one encoder at one resolution.

    A picture has one vector, the class token beside the mean of the patch tokens; a volume one for each slice.
    content: digest of the set's images.   view: of volumes: which slices (see TaskEntry).
    """

    def __init__(
        self, folder: Path, encoder: Encoder, resolution: int, device: torch.device, *, content: str, view: "View"
    ) -> None:
        self.encoder, self.view, self.device = encoder, view, device
        self.side, self.bf16 = encoder.side(resolution), uses_bf16(device, "auto")
        key = [FORMAT, encoder.card.file_digest, content, self.side, self.bf16, *view.key]
        self.folder = folder / digest_json(key)[:20]

    def __call__(self, cases: Sequence[LabelledCase]) -> Float[Tensor, "N S E"]:
        """Of cases in their order. Errors: those of reading images; DatasetError naming the case."""
        parts = [kept(path, self._of(part))["features"] for path, part in self._files(cases)]
        return torch.cat(parts).float()

    def num_missing(self, cases: Sequence[LabelledCase]) -> int:
        """Images that still have to go through the encoder."""
        return sum(len(part) * self.view.num_images for path, part in self._files(cases) if not is_kept(path))

    def _files(self, cases: Sequence[LabelledCase]) -> Iterator[tuple[Path, Sequence[LabelledCase]]]:
        step = max(1, IMAGES_PER_FILE // self.view.num_images)
        for first in range(0, len(cases), step):
            part = cases[first : first + step]
            yield self.folder / f"{digest_json([case.id for case in part])[:20]}.safetensors", part

    def _of(self, cases: Sequence[LabelledCase]) -> Callable[[], dict[str, Tensor]]:
        def make() -> dict[str, Tensor]:
            images = torch.cat([self.view(case, self.side) for case in cases])  # (N * S, 3, side, side)
            features = torch.cat([self._encoded(part) for part in images.split(IMAGES_AT_ONCE)])
            return {"features": features.reshape(len(cases), -1, features.shape[1])}

        return make

    def _encoded(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B E"]:
        found = last_features(self.encoder, images, self.device, self.bf16)
        return torch.cat((found.cls_token.float(), found.maps[-1].float().mean((2, 3))), dim=1).cpu()


@torch.inference_mode()
def last_features(encoder: Encoder, images: Float[Tensor, "B 3 S S"], device: torch.device, bf16: bool) -> Features:
    """The class token and the map of an encoder's last block."""
    backbone = encoder.load().to(device)
    with autocast(device, bf16):
        found: Features = backbone(images.to(device), taps=backbone.default_taps()[-1:])
    return found


class View:
    """How a case becomes images of three planes: pictures as they are, volumes as slices along some axes.

    corruption: name and strength of a fault of voxdino.data.corruptions that every image gets.
    """

    def __init__(
        self, ndim: int, axes: Sequence[int], slices: int, window: int, corruption: tuple[str, int] | None = None
    ) -> None:
        self._axes = tuple(axes) if ndim == 3 else ()
        self._slices, self._window, self._corruption = slices, window, corruption

    @property
    def num_images(self) -> int:
        """Of one case."""
        return max(1, len(self._axes) * self._slices)

    @property
    def key(self) -> tuple[object, ...]:
        slices = (list(self._axes), self._slices, self._window) if self._axes else ()
        return slices if self._corruption is None else (*slices, list(self._corruption))

    def __call__(self, case: LabelledCase, side: int) -> Float[Tensor, "S 3 side side"]:
        """The images of a case. Errors: those of reading it, and of `images`."""
        array = load_image(case).array
        if self._corruption is not None:
            array = corrupted(array, *self._corruption, of=case.id)
        return self.images(array, side, where=case.file)

    def images(
        self, array: Shaped[np.ndarray, "C *spatial"], side: int, *, where: Path | None
    ) -> Float[Tensor, "S 3 side side"]:
        """8-bit pixels as shares of 255, other values between two percentiles; stretched to a square, as ImageNet.

        array: in file values. Of volumes with fewer slices than asked for some come twice; what lies beyond the first
        and the last slice is that slice again. Errors: DatasetError for 2 or more than 3 channels.
        """
        if len(array) not in (1, 3):
            fact = f"{len(array)} channels; encoders take one, or three colours."
            raise DatasetError(fact, where=where, fix="give one channel of each image.")
        image = _shares(array)
        planes = [image[None]] if not self._axes else [self._cut(image, axis) for axis in self._axes]
        resized = torch.cat([_resized(part, side) for part in planes])
        mean, sd = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_SD))
        return (resized.expand(-1, 3, -1, -1) - mean) / sd

    def _cut(self, image: Float[Tensor, "C D H W"], axis: int) -> Float[Tensor, "S P a b"]:
        """Slices, of one channel with their neighbours as colours where the window is wider than one."""
        depth = image.shape[axis + 1]
        places = torch.from_numpy(np.sort(np.resize(spread(depth, self._slices), self._slices)))
        slices = image.movedim(axis + 1, 0)  # (D, C, a, b)
        if len(image) > 1:
            return slices[places]
        around = torch.arange(self._window) - self._window // 2
        return slices[(places[:, None] + around).clamp(0, depth - 1), 0]  # (S, window, a, b)


def _shares(array: NDArray[Any]) -> Float[Tensor, "..."]:
    values = torch.from_numpy(array.astype(np.float32))
    if array.dtype == np.uint8:
        return values / 255
    low, high = (float(end) for end in np.percentile(array, TAILS))
    return ((values - low) / max(high - low, 1e-6)).clamp(0, 1)


def _resized(images: Float[Tensor, "S C a b"], side: int) -> Float[Tensor, "S C side side"]:
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
