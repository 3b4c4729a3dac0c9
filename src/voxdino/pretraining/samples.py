"""From the pool to the views of a step: which slices, which planes, which crops, the same whoever computes them."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from voxdino.pretraining.config import PretrainConfig, Resolution, SelfDistillationStage, Stage
from voxdino.pretraining.learning import Portion, mixed_seed
from voxdino.pretraining.pool import Pool
from voxdino.pretraining.step import draw_step_masks
from voxdino.pretraining.views import make_views
from voxdino.training.distributed import World


@dataclass(frozen=True, eq=False)
class Slices:
    """A process's share of the images of a step, before any view is cut.

    images:  (P, D, H, W) each, of sizes of their own: one plane or three of a scan (P = 1, D = 1 or 3), or a colour
             picture (P = 3, D = 1).
    paddings: the value of nothing, of each.
    """

    images: list[Float[Tensor, "_ _ _ _"]]
    seeds: list[int]
    paddings: list[float]
    are_photos: list[bool]

    @property
    def num_bytes(self) -> int:
        return sum(image.nbytes for image in self.images)


class Samples:
    """The images of every step of a pretraining. Image n of the whole run depends on n and the seed alone."""

    def __init__(self, pool: Pool, config: PretrainConfig, world: World) -> None:
        self._pool, self._config, self._world = pool, config, world

    def slices(self, stage: Stage, first_image: int) -> Slices:
        """The share of this process in a step; first_image: the number of the step's first image in the whole run."""
        numbers = [first_image + place for place in self._share(stage)]
        read = [self._read(number) for number in numbers]
        return Slices(
            [one[0] for one in read],
            [mixed_seed(self._config.seed, "views", number) for number in numbers],
            [one[1] for one in read],
            [one[2] for one in read],
        )

    def _share(self, stage: Stage) -> list[int]:
        """This process's part of every portion: what a portion holds does not depend on the number of processes."""
        size = stage.batch_size // stage.accumulate
        return [first + place for first in range(0, stage.batch_size, size) for place in self._world.share(size)]

    def _read(self, number: int) -> tuple[Tensor, float, bool]:
        rng = np.random.default_rng([self._config.seed, 12, number])
        index = self._pool.draw(number, self._config.seed)
        as_neighbours = {"repeat": False, "neighbours": True, "mixed": rng.random() < 0.5}[self._config.input]
        one = self._pool.read(index, context=int(as_neighbours))
        image, padding = torch.from_numpy(one.image), one.padding
        if one.is_photo:
            return image[:, image.shape[1] // 2][:, None], float(padding.min()), True
        channel = int(rng.integers(len(image)))
        return image[channel : channel + 1], float(padding[channel]), False

    def portions(self, slices: Slices, stage: Stage, step: int, patch_size: int) -> list[Portion]:
        """Views and masks of the step's portions, on the device; a distillation has global crops only, unmasked.

        step: 0-based, of the stage.
        """
        size = draw_resolution(stage, self._config.seed, step)
        changes = {"global_size": size.global_size, "local_size": size.local_size, "gram_size": None}
        share = self._share(stage)
        side = size.global_size // patch_size
        if isinstance(stage, SelfDistillationStage):
            changes["gram_size"] = size.gram_size if stage.has_gram else None
            masks = draw_step_masks(stage, self._config.seed, step, (side, side), share)
        else:
            changes["num_locals"] = 0
            masks = [torch.zeros(2 * len(share) // stage.accumulate, side**2, dtype=torch.bool)] * stage.accumulate
        config = self._config.views.model_copy(update=changes)
        device = self._world.device
        portions = []
        for places, masked in zip(np.array_split(np.arange(len(share)), stage.accumulate), masks, strict=True):
            views = make_views(
                [slices.images[place].to(device, non_blocking=True) for place in places],
                seeds=[slices.seeds[place] for place in places],
                paddings=[slices.paddings[place] for place in places],
                is_photo=[slices.are_photos[place] for place in places],
                config=config,
            )
            portions.append(Portion(views, masked.to(device)))
        return portions


def draw_resolution(stage: Stage, seed: int, step: int) -> Resolution:
    """The same in all processes."""
    weights = np.array([one.weight for one in stage.resolutions])
    rng = np.random.default_rng([seed, 13, mixed_seed(seed, stage.name), step])
    return stage.resolutions[int(rng.choice(len(weights), p=weights / weights.sum()))]
