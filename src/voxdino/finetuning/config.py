"""Settings of one fine-tuning run; saved whole in run.json."""

from typing import Literal

from pydantic import Field

from voxdino.data.augment import AugmentConfig
from voxdino.data.sampling import Quotas
from voxdino.models.segmenter import DecoderSetting
from voxdino.training.config import TrainingConfig


class FinetuneConfig(TrainingConfig):
    """What is adapted, how, and on which samples. What the data ask for (crops, spacing, channels) is in the plan.

    backbone:          weights file or folder, or a name in the weights folder.
    taps:              blocks whose output the decoder sees; None: at each quarter of the depth.
    decoder_width:     channels of the decoder; None: 128, but 64 on a CPU, where it trains more than twice as fast.
    pyramid_scales:    of the decoder tpa_sad; None: as published, but no level finer than a voxel (CPU: a 1/4 token).
    adaptation:        what of the backbone trains: nothing, LoRA, its last `last_k` blocks, or all.
    drop_path:         share of residual branches left out in training, the same in every block; of a trained backbone.
    rope_rescale:      positions of a trained DINOv3 backbone are stretched by up to this factor; None: never.
    gradient_checkpointing: compute activations of the backbone twice instead of keeping them: less memory, slower.
    cache:             compute a frozen backbone's features once and train on them. "auto": whenever it is frozen.
    cached_views:      at most so many views of each slice; view 0 is plain, the others are augmented. Fewer where the
                       disk or time budget ends first.
    cache_gib:         disk the cached features may take.
    cache_time_share:  share of the time budget for computing them.
    background_share:  share of the slices far from any foreground that are cached.
    validation_slices: slices that measure Dice during training, evenly spread over the held-back cases.
    """

    recipe: str = "segdino_v2"
    backbone: str = "dinov3_vits16"
    taps: tuple[int, ...] | None = None
    tap_norm: bool = True
    decoder: str = "tpa_sad"
    decoder_width: int | None = Field(default=None, ge=8)
    pyramid_scales: tuple[int, ...] | None = None
    decoder_settings: dict[str, DecoderSetting] = Field(default_factory=dict)
    adaptation: Literal["frozen", "lora", "last_k", "full"] = "frozen"
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: float = Field(default=16.0, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    last_k: int = Field(default=0, ge=0)
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    rope_rescale: float | None = Field(default=None, ge=1)
    gradient_checkpointing: bool = False
    magnification_scale: float = Field(default=1.0, gt=0)
    depth_adapter: int = Field(default=0, ge=0)
    detail: Literal["none", "slices", "volume"] = "none"
    detail_width: int = Field(default=16, ge=4)
    slab: int | None = Field(default=None, ge=1)
    slices_at_once: int | None = Field(default=None, ge=1)
    blank_features: bool = False
    first: "FinetuneConfig | None" = None
    first_time_share: float = Field(default=0.35, gt=0, lt=1)
    initial_weights: str | None = None
    loss: str = "dice_ce"
    quotas: Quotas = Quotas()
    augment: AugmentConfig = AugmentConfig()
    cache: Literal["auto", "on", "off"] = "auto"
    cached_views: int = Field(default=4, ge=1)
    cache_gib: float = Field(default=16.0, gt=0)
    cache_time_share: float = Field(default=0.4, gt=0, lt=1)
    background_share: float = Field(default=0.5, ge=0, le=1)
    num_train_cases: int | None = Field(default=None, ge=1)
    validation_slices: int = Field(default=256, ge=1)
