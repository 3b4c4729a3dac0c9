"""Named settings: each a function that returns a FinetuneConfig. Its docstring says what it is and when to take it."""

from collections.abc import Callable

from voxdino.finetuning.config import FinetuneConfig


def segdino_v2() -> FinetuneConfig:
    """SegDINO v2 (arXiv 2606.17972): frozen backbone, four taps, token pyramid (TPA), scale-aware decoder (SAD).

    Take it first: it learns in minutes, because a frozen backbone's features are computed once and cached.
    Differences from the authors' release: the backbone is frozen for real (the release never calls its
    `lock_backbone`), the best weights are chosen on validation cases (there: on the test split), Dice + cross-entropy
    (there: binary cross-entropy), cosine schedule and averaged weights (there: a constant rate).
    """
    return FinetuneConfig(recipe="segdino_v2", learning_rate=2e-3)


def segdino_v2_lora() -> FinetuneConfig:
    """SegDINO v2 with LoRA (rank 16) in every block of the backbone.

    Take it when the frozen recipe levels off and there is time: every step runs the whole backbone forward and
    backward, some five times the work, and pays most where images look least like photographs (CT, MR, ultrasound).
    Batches are small, because for a given time more steps teach more than larger ones. Not in the paper; rank and
    targets as in DINO-Med3D stage 2 (arXiv 2606.18886).
    """
    return FinetuneConfig(
        recipe="segdino_v2_lora", adaptation="lora", learning_rate=1e-3, backbone_lr_scale=1.0, batch_size=8
    )


def linear_probe() -> FinetuneConfig:
    """One linear layer on the last block's tokens, upsampled: what the features alone know.

    Take it to compare backbones, not to segment: nothing finer than a token is learned.
    """
    return FinetuneConfig(recipe="linear_probe", decoder="linear", learning_rate=2e-3, weight_decay=0.0)


RECIPES: dict[str, Callable[[], FinetuneConfig]] = {
    "segdino_v2": segdino_v2,
    "segdino_v2_lora": segdino_v2_lora,
    "linear_probe": linear_probe,
}
