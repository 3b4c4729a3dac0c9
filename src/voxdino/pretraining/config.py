"""Settings of a pretraining: what it starts from, and its stages one after the other."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from voxdino.core.records import Record
from voxdino.pretraining.schedules import Schedule, constant, rising
from voxdino.pretraining.views import ViewConfig


class HeadConfig(Record):
    """A projection head. Defaults are those of DINOv3's ViT-L recipe for a million images (dossier 5.7)."""

    num_prototypes: int = Field(default=65536, ge=2)
    hidden_dim: int = Field(default=2048, ge=1)
    bottleneck_dim: int = Field(default=256, ge=1)


class Resolution(Record):
    """Sizes of crops, and how often a batch has them (relative weight).

    gram_size: of the Gram teacher's view of the global crops; None: it sees them as they are.
    """

    weight: float = Field(default=1.0, gt=0)
    global_size: int = Field(ge=1)
    local_size: int = Field(ge=1)
    gram_size: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _gram_teacher_sees_no_less(self) -> "Resolution":
        if self.gram_size is not None and self.gram_size < self.global_size:
            raise ValueError(f"gram_size {self.gram_size} is smaller than global_size {self.global_size}")
        return self


class Stage(Record):
    """What all kinds of stages share.

    num_steps, batch_size: optimiser steps; images of all processes and portions together.
    accumulate:    portions that a step's images are computed in, one after the other.
    learning_rate: of what is new; pretrained blocks may get less.
    rope_rescale:  coordinates are stretched by up to this factor, each pass anew (DINOv3's position augmentation).
    resolutions:   every batch has one of them, drawn by weight.
    """

    name: str
    num_steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    accumulate: int = Field(default=1, ge=1)
    learning_rate: Schedule
    weight_decay: Schedule = constant(0.04)
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = Field(default=3.0, gt=0)
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    rope_rescale: float | None = Field(default=2.0, ge=1)
    resolutions: tuple[Resolution, ...] = (Resolution(global_size=224, local_size=96),)

    @model_validator(mode="after")
    def _can_be_shared_out(self) -> "Stage":
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        if not self.resolutions:
            raise ValueError("resolutions must hold at least one")
        return self


class SelfDistillationStage(Stage):
    """DINO + iBOT + KoLeo, with Gram anchoring where it has a weight (dossier 5.7).

    Over the portions of a step, Sinkhorn-Knopp sees all images, KoLeo the neighbours within a portion. (DINOv3 seeks
    KoLeo's neighbours on each GPU, in its last stage in groups of 16; here among all processes: it does not matter then
    how many there are.)

    scale_rate:        multiply the rate by 4 sqrt(batch_size / 1024), as DINOv3 does with the numbers it prints.
    layer_decay:       factor per block from the last one down; patch_rate: a further one for the patch embedding.
    head_rate:         factor for the two heads, which start from nothing where the backbone does not.
    frozen_last_layer: share of the steps in which the heads' last layers stay as they are.
    teacher_momentum:  of the running average that is the teacher.
    local_weight:      of the local crops' part in the DINO loss.
    gram_weight:       of the MEAN squared difference of similarities, not of the papers' squared norm.
    gram_teacher:      whose similarities are kept: "start", of the backbone that the stage starts from; "earlier", of
                       the running teacher at `gram_moment` of the stage before, else "start"; "kept", of the stage
                       before where that had a Gram teacher, else "start"; or weights of an earlier backbone.
    gram_moment:       share of the stage before's steps that "earlier" means.
    gram_refresh:      steps after which the running teacher takes over from it, `gram_refreshes` times; None: never.
    """

    kind: Literal["self_distillation"] = "self_distillation"
    scale_rate: bool = True
    layer_decay: float = Field(default=0.9, gt=0, le=1)
    patch_rate: float = Field(default=0.2, gt=0, le=1)
    head_rate: float = Field(default=1.0, gt=0)
    frozen_last_layer: float = Field(default=0.0, ge=0, le=1)
    teacher_momentum: Schedule = constant(0.994)
    teacher_temperature: Schedule = constant(0.07)
    student_temperature: float = Field(default=0.1, gt=0)
    dino_weight: float = Field(default=1.0, ge=0)
    local_weight: Schedule = constant(1.0)
    ibot_weight: float = Field(default=1.0, ge=0)
    koleo_weight: float = Field(default=0.1, ge=0)
    gram_weight: Schedule = constant(0.0)
    gram_teacher: str = "start"
    gram_moment: float = Field(default=0.2, gt=0, le=1)
    gram_refresh: int | None = Field(default=None, ge=1)
    gram_refreshes: int = Field(default=3, ge=0)
    masked_share: float = Field(default=0.5, ge=0, le=1)
    mask_ratios: tuple[float, float] = (0.1, 0.5)

    def refreshes_gram(self, step: int) -> bool:
        """Whether the Gram teacher changes before this step (0-based, of the stage)."""
        if self.gram_refresh is None or step == 0 or step % self.gram_refresh:
            return False
        return step // self.gram_refresh <= self.gram_refreshes

    @property
    def has_gram(self) -> bool:
        weight = self.gram_weight
        return max(weight.start, weight.peak, weight.end) > 0

    @property
    def rate_factor(self) -> float:
        return 4 * (self.batch_size / 1024) ** 0.5 if self.scale_rate else 1.0

    @model_validator(mode="after")
    def _masks(self) -> "SelfDistillationStage":
        if not 0 <= self.mask_ratios[0] <= self.mask_ratios[1] <= 1:
            raise ValueError("mask_ratios are written [low, high] with 0 <= low <= high <= 1")
        return self


class DistillationStage(Stage):
    """The backbone learns to see as frozen teachers do (see voxdino.pretraining.distil).

    teachers:      weights of each.
    class_weight, patch_weight: of one minus the cosine between what student and teacher say.
    gram_weight:   of the mean squared difference of patch similarities.
    momentum:      of the running average of the student that is kept.
    """

    kind: Literal["distillation"] = "distillation"
    name: str = "distil"
    batch_size: int = Field(default=64, ge=1)
    learning_rate: Schedule = Schedule(start=0.0, peak=1e-3, end=1e-6, warmup=0.05)
    betas: tuple[float, float] = (0.9, 0.999)
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    rope_rescale: float | None = Field(default=None, ge=1)
    teachers: tuple[str, ...] = Field(min_length=1)
    class_weight: float = Field(default=1.0, ge=0)
    patch_weight: float = Field(default=1.0, ge=0)
    gram_weight: float = Field(default=1.0, ge=0)
    momentum: Schedule = constant(0.999)


AnyStage = Annotated[SelfDistillationStage | DistillationStage, Field(discriminator="kind")]


class PretrainConfig(Record):
    """A whole pretraining; kept in run.json.

    backbone:      where it starts: weights, or "random:<backbone>".
    dino_head, ibot_head: fresh at the start of the first stage.
    input:         what fills the three planes: "repeat" (grey three times), "neighbours" (the slices above and below,
                   2.5-D), "mixed" (either, half of the time: the backbone then serves both kinds of plan).
    views:         augmentation; sizes come from each stage's `resolutions`.
    watch_every:   steps between looks at fixed images (pictures, effective rank, probes); 0: never.
    precision:     "auto": bfloat16 where the hardware is faster at it.
    parallel:      over several processes: "ddp" keeps the model whole in each, "fsdp" shares it out (H+ and 7B).
    compile:       torch.compile of the blocks.
    """

    recipe: str = "adapt"
    backbone: str = "dinov3_vits16"
    stages: tuple[AnyStage, ...] = Field(min_length=1)
    dino_head: HeadConfig = HeadConfig()
    ibot_head: HeadConfig = HeadConfig()
    input: Literal["repeat", "neighbours", "mixed"] = "mixed"
    views: ViewConfig = ViewConfig()
    watch_every: int = Field(default=1000, ge=0)
    precision: Literal["auto", "bf16", "off"] = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    gradient_checkpointing: bool = False
    compile: bool = False
    checkpoint_every_s: float = Field(default=300.0, ge=0)
    num_workers: int = Field(default=2, ge=0)
    seed: int = Field(default=0, ge=0)


def adapt(num_steps: int = 100_000) -> SelfDistillationStage:
    """Stage 1, adaptation to the domain: MedDINOv3's (arXiv 2509.02379, dossier 2.4), open values as in 5.7.

    Its rate is the printed 2e-4; whether the authors scaled it is not known: here it is, with the batch.
    """
    return SelfDistillationStage(
        name="adapt",
        num_steps=num_steps,
        batch_size=512,
        learning_rate=rising(0.0, 2e-4, 0.03),
        teacher_temperature=rising(0.04, 0.07, 0.3),
        frozen_last_layer=0.01,
    )


def gram(num_steps: int = 10_000) -> SelfDistillationStage:
    """Stage 2, Gram anchoring: patch similarities are held at those of stage 1's teacher after a fifth of its steps.

    Its teacher sees crops of twice the size. MedDINOv3 takes it after 20,000 of 100,000 steps, and up to 40,000 work as
    well (dossier 2.4); run by itself, the stage takes the backbone it starts from.
    """
    return SelfDistillationStage(
        name="gram",
        num_steps=num_steps,
        batch_size=512,
        learning_rate=rising(0.0, 5e-5, 0.03),  # the optimiser starts anew: it may not jump
        teacher_momentum=constant(0.999),
        local_weight=Schedule(start=1.0, peak=0.5, end=0.5, warmup=0.1),
        gram_weight=rising(0.0, 2.0, 0.1),
        gram_teacher="earlier",
        resolutions=(Resolution(global_size=256, local_size=112, gram_size=512),),
    )


def highres(num_steps: int = 10_000) -> SelfDistillationStage:
    """Stage 3, mixed high resolutions, with the Gram teacher kept: MedDINOv3's sizes, DINOv3's shares (dossier 5.7)."""
    pairs = ((512, 112, 0.3), (768, 112, 0.3), (768, 168, 0.3), (768, 224, 0.05), (768, 336, 0.05))
    return SelfDistillationStage(
        name="highres",
        num_steps=num_steps,
        batch_size=512,
        accumulate=8,
        learning_rate=Schedule(start=0.0, peak=0.0, end=2.5e-5, cosine=0.33),
        teacher_momentum=constant(0.999),
        local_weight=constant(0.5),
        gram_weight=constant(1.5),
        gram_teacher="kept",
        resolutions=tuple(
            Resolution(global_size=large, local_size=small, gram_size=768 if large == 512 else 1152, weight=weight)
            for large, small, weight in pairs
        ),
    )


STAGES = {"adapt": adapt, "gram": gram, "highres": highres}
