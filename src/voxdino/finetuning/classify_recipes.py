"""Settings and recipes of classification; `voxdino finetune --data SET` takes them by name."""

from collections.abc import Callable
from typing import Literal

from pydantic import Field

from voxdino.data.augment import AugmentConfig
from voxdino.training.config import TrainingConfig

MILD = AugmentConfig(flips="none", rotation_degrees=10.0, scale=(0.9, 1.1))


class ClassifyConfig(TrainingConfig):
    """What is adapted, how, and what the network sees of each image.

    backbone:    weights file or folder, or a name in the weights folder.
    adaptation:  what of the backbone trains: nothing, LoRA, or all. The head starts as the linear probe in any case.
    pooling:     from slices to a volume: mean, max, attention or abmil.
    side:        pixels of the square that images are resized to, rounded to whole patches.
    num_slices:  of a volume, evenly spread along `slice_axis`; 0: all.
    eval_batch:  images at a time where nothing trains.
    calibrate:   fit a temperature to the validation cases.
    """

    recipe: str = "classify_linear"
    backbone: str = "dinov3_vits16"
    adaptation: Literal["frozen", "lora", "full"] = "frozen"
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: float = Field(default=16.0, gt=0)
    pooling: str = "mean"
    side: int = Field(default=224, ge=8)
    num_slices: int = Field(default=16, ge=0)
    slice_axis: int = Field(default=0, ge=0, le=2)
    augment: AugmentConfig = MILD
    eval_batch: int = Field(default=32, ge=1)
    calibrate: bool = True


def classify_linear() -> ClassifyConfig:
    """A linear probe on frozen features, fitted to its minimum. arXiv 2509.06467.

    Take it first: the images go through the backbone once, and there is no rate to choose. Of each slice it reads the
    class token and the mean of the patch tokens; `--set pooling=abmil` weighs the slices of a volume.
    """
    return ClassifyConfig()


def classify_lora() -> ClassifyConfig:
    """The linear probe, then LoRA (rank 16) in every block together with it.

    Take it where the probe levels off and there are hundreds of images.
    """
    return ClassifyConfig(
        recipe="classify_lora",
        adaptation="lora",
        learning_rate=3e-4,
        backbone_lr_scale=1.0,
        num_epochs=10,
        batch_size=16,
    )


def classify_full() -> ClassifyConfig:
    """The linear probe, then the whole backbone together with it (arXiv 2202.10054: probe first, features survive).

    Take it on a GPU with thousands of images.
    """
    return ClassifyConfig(
        recipe="classify_full",
        adaptation="full",
        learning_rate=1e-4,
        backbone_lr_scale=0.1,
        num_epochs=10,
        batch_size=16,
    )


CLASSIFY_RECIPES: dict[str, Callable[[], ClassifyConfig]] = {
    recipe.__name__: recipe for recipe in (classify_linear, classify_lora, classify_full)
}
