"""Named pretrainings: functions that return a PretrainConfig. A docstring says what it is and when to take it."""

from collections.abc import Callable, Sequence

from voxdino.core.errors import UsageError
from voxdino.pretraining.config import (
    STAGES,
    AnyStage,
    DistillationStage,
    HeadConfig,
    PretrainConfig,
    Resolution,
)


def adapt() -> PretrainConfig:
    """Adaptation on one machine: DINO + iBOT + KoLeo on 64 images a step, 20,000 steps, small heads.

    Take it first, with some hundred scans or more and a GPU. It is stage 1 of `meddinov3` at a desk's size.
    """
    stages = (_sized(STAGES["adapt"](20_000), 64),)
    return PretrainConfig(recipe="adapt", stages=stages, dino_head=_SMALL_HEAD, ibot_head=_SMALL_HEAD)


def meddinov3() -> PretrainConfig:
    """MedDINOv3's three stages: adaptation, Gram anchoring, mixed high resolution. arXiv 2509.02379.

    Take it on several GPUs with some hundred thousand slices. Steps, batch and rates as printed, sizes of crops where
    they are. What the paper leaves open is taken from DINOv3's recipes, not from one of them: betas, constant decay and
    momentum of its 7B, clipping and layer-wise rates of its ViT-L on ImageNet (dossier 5.7); drop path 0.1 and the
    warm-ups are ours. The paper contradicts itself on stage 2's length (20k, 10k: here 10k); stage 3's Gram weight is
    DINOv3's 1.5.
    """
    stages: tuple[AnyStage, ...] = tuple(stage() for stage in STAGES.values())
    return PretrainConfig(recipe="meddinov3", backbone="dinov3_vitb16", input="repeat", stages=stages)


def anchored() -> PretrainConfig:
    """All three stages on one machine: 20,000 + 2,000 + 2,000 steps of 64 images, high resolution up to 448 pixels.

    Take it where patch features matter (segmentation) and `adapt` has been seen to help.
    """
    high = tuple(Resolution(global_size=448, local_size=small, gram_size=672) for small in (112, 160))
    gram_size = (Resolution(global_size=224, local_size=96, gram_size=448),)
    stages = (
        _sized(STAGES["adapt"](20_000), 64),
        _sized(STAGES["gram"](2_000), 64).model_copy(update={"resolutions": gram_size}),
        _sized(STAGES["highres"](2_000), 64).model_copy(update={"resolutions": high, "accumulate": 4}),
    )
    return PretrainConfig(recipe="anchored", stages=stages, dino_head=_SMALL_HEAD, ibot_head=_SMALL_HEAD)


def distil() -> PretrainConfig:
    """A small backbone learns to see as a large one does: class tokens, patches and their similarities.

    Take it for a backbone that runs on a laptop: `--teacher WEIGHTS --backbone slim:voxdino_tiny@WEIGHTS`. A student
    that starts as every other channel of its teacher is far ahead of a random one.
    """
    stage = DistillationStage(num_steps=20_000, batch_size=64, teachers=("dinov3_vits16",))
    return PretrainConfig(recipe="distil", backbone="random:voxdino_tiny", stages=(stage,))


_SMALL_HEAD = HeadConfig(num_prototypes=8192, hidden_dim=1024, bottleneck_dim=256)


def _sized(stage: AnyStage, batch_size: int) -> AnyStage:
    return stage.model_copy(update={"batch_size": batch_size, "accumulate": 1})


def resized(config: PretrainConfig, *, num_steps: int | None = None, batch_size: int | None = None) -> PretrainConfig:
    """With so many steps in all, which the stages share as before, and so many images in each."""
    total = sum(stage.num_steps for stage in config.stages)
    stages = []
    for stage in config.stages:
        share = stage.num_steps if num_steps is None else max(1, round(num_steps * stage.num_steps / total))
        size = batch_size or stage.batch_size
        portions = max(number for number in range(1, stage.accumulate + 1) if size % number == 0)
        stages.append(stage.model_copy(update={"num_steps": share, "batch_size": size, "accumulate": portions}))
    return config.model_copy(update={"stages": tuple(stages)})


def with_teachers(config: PretrainConfig, teachers: Sequence[str]) -> PretrainConfig:
    """With these teachers in its distillation. Errors: UsageError where it has none."""
    if not teachers:
        return config
    if not any(isinstance(stage, DistillationStage) for stage in config.stages):
        fact = f"the recipe {config.recipe!r} has no teacher but itself."
        raise UsageError(fact, where="--teacher", fix="leave it out, or take --recipe distil.")
    stages = tuple(
        stage.model_copy(update={"teachers": tuple(teachers)}) if isinstance(stage, DistillationStage) else stage
        for stage in config.stages
    )
    return config.model_copy(update={"stages": stages})


PRETRAININGS: dict[str, Callable[[], PretrainConfig]] = {
    recipe.__name__: recipe for recipe in (adapt, anchored, meddinov3, distil)
}
