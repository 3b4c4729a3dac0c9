"""Whole images to classify: read, normalised, brought to one size, in batches that depend on the seed alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from voxdino.core.records import Record
from voxdino.data.augment import AugmentConfig, augment, sample_seed
from voxdino.preparation.classification import ClassificationSet, LabelledCase, load_image
from voxdino.preparation.intensity import IMAGENET_MEAN, IMAGENET_SD, ChannelPolicy, normalise, scale_case

ALL_SLICES = 0


class ImageShape(Record):
    """How every image of a set becomes (C, D, side, side).

    channels:   their intensity policies, as in a plan.
    side:       pixels; the image is padded to a square with its darkest value, then resized.
    num_slices: of a volume, evenly spread along `slice_axis` (0 to 2, of the array); fewer where it has fewer, 0: all.
    """

    channels: tuple[ChannelPolicy, ...]
    side: int
    num_slices: int = 1
    slice_axis: int = 0


@dataclass(frozen=True, eq=False)
class LabelledBatch:
    """image: (B, C, D, side, side) normalised.   label: (B,) classes, or (B, K) of 0 and 1."""

    image: Float[Tensor, "B C D H W"]
    label: Int[Tensor, " B"] | Int[Tensor, "B K"]
    seeds: tuple[int, ...]

    def to(self, device: torch.device) -> "LabelledBatch":
        image = self.image.to(device, non_blocking=True)
        return replace(self, image=image, label=self.label.to(device, non_blocking=True))

    def augmented(self, config: AugmentConfig) -> "LabelledBatch":
        """A changed copy; what turns in from outside is the image's darkest value."""
        size = (len(self.image), *self.image.shape[2:])
        image, _ = augment(
            self.image,
            torch.zeros(size, dtype=torch.int64, device=self.image.device),
            seeds=self.seeds,
            padding=self.image.amin((2, 3, 4)),
            spacing=torch.ones(len(self.image), 3),
            config=config,
            ignore_index=0,
        )
        return replace(self, image=image)


def choose_channels(found: ClassificationSet) -> tuple[ChannelPolicy, ...]:
    """Policies for the channels of a set's first image: 8-bit ones as photographs, others by their own percentiles."""
    image = load_image(found.splits["train"][0]).array
    if image.dtype != np.uint8:
        return tuple(ChannelPolicy(name=f"channel {n}", source=n, kind="mr") for n in range(len(image)))
    means, sds = list(IMAGENET_MEAN), list(IMAGENET_SD)
    if len(image) != 3:
        means, sds = [sum(means) / 3] * len(image), [sum(sds) / 3] * len(image)
    return tuple(
        ChannelPolicy(name=f"channel {n}", source=n, kind="photo", lower=0.0, upper=255.0, mean=255 * mean, sd=255 * sd)
        for n, (mean, sd) in enumerate(zip(means, sds, strict=True))
    )


def read_image(case: LabelledCase, shape: ImageShape) -> Float[Tensor, "C D S S"]:
    """The image of a case, ready for the network. Errors: those of reading; ImageError where channels are missing."""
    array = load_image(case).array
    if array.ndim == 4:
        array = np.moveaxis(array, 1 + shape.slice_axis, 1)
        depth = array.shape[1]
        wanted = min(shape.num_slices or depth, depth)
        array = array[:, ((np.arange(wanted) + 0.5) * depth / wanted).astype(np.int64)]
    else:
        array = array[:, None]
    planes = torch.from_numpy(normalise(array, scale_case(array, shape.channels)))  # (C, D, H, W)
    height, width = planes.shape[2:]
    missing = max(height, width) - height, max(height, width) - width
    edges = (missing[1] // 2, missing[1] - missing[1] // 2, missing[0] // 2, missing[0] - missing[0] // 2)
    squared = F.pad(planes, edges, value=float(planes.min()))
    return F.interpolate(squared, size=(shape.side, shape.side), mode="bilinear", antialias=True)


def assemble_images(
    cases: Sequence[LabelledCase], shape: ImageShape, *, epoch: int = 0, seed: int = 0
) -> LabelledBatch:
    """A batch of cases; volumes with fewer slices than others repeat their last one."""
    images = [read_image(case, shape) for case in cases]
    depth = max(image.shape[1] for image in images)
    filled = [torch.cat((image, image[:, -1:].expand(-1, depth - image.shape[1], -1, -1)), dim=1) for image in images]
    labels = torch.tensor([case.labels for case in cases])
    return LabelledBatch(
        image=torch.stack(filled),
        label=labels[:, 0] if labels.shape[1] == 1 else labels,
        seeds=tuple(sample_seed(seed, epoch, index, case.id, 0) for index, case in enumerate(cases)),
    )
