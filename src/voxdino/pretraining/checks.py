"""What a pretraining can be made of: checked before the first step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from voxdino.core.errors import ConfigError
from voxdino.models.backbones.base import Backbone
from voxdino.models.backbones.vit import ViT
from voxdino.pretraining.config import AnyStage, DistillationStage, PretrainConfig, Resolution, SelfDistillationStage
from voxdino.pretraining.views import ViewConfig
from voxdino.training.distributed import World


def named_weights(config: PretrainConfig) -> list[str]:
    """Of all teachers and Gram teachers, each once."""
    names: dict[str, None] = {}
    for stage in config.stages:
        if isinstance(stage, DistillationStage):
            names |= dict.fromkeys(stage.teachers)
        elif (teacher := gram_teacher_of(config.stages, stage)) and teacher.weights:
            names[teacher.weights] = None
    return list(names)


@dataclass(frozen=True)
class GramTeacher:
    """Whose similarities a stage keeps: of `weights`, or of the running teacher after so many steps of the whole run;
    where neither is given, of the backbone that the stage starts from.
    """

    weights: str | None = None
    step: int | None = None


def gram_teacher_of(stages: Sequence[AnyStage], stage: AnyStage) -> GramTeacher | None:
    """What `stage.gram_teacher` means among these stages; None for a stage without."""
    if isinstance(stage, DistillationStage) or not stage.has_gram:
        return None
    place = next(place for place, one in enumerate(stages) if one is stage)
    before = stages[:place]
    if stage.gram_teacher == "kept":
        return (gram_teacher_of(stages, before[-1]) if before else None) or GramTeacher()
    if stage.gram_teacher == "earlier" and before:
        moment = max(1, round(stage.gram_moment * before[-1].num_steps))
        return GramTeacher(step=sum(one.num_steps for one in before[:-1]) + moment)
    return GramTeacher() if stage.gram_teacher in ("start", "earlier") else GramTeacher(weights=stage.gram_teacher)


def fitted(config: PretrainConfig, patch_size: int) -> tuple[PretrainConfig, tuple[str, ...]]:
    """The config with crops of whole patches, and what was changed for it."""
    stages, told = [], []
    for stage in config.stages:
        sizes = tuple(_in_patches(size, patch_size) for size in stage.resolutions)
        stages.append(stage.model_copy(update={"resolutions": sizes}))
        pairs = zip(stage.resolutions, sizes, strict=True)
        changed = {
            f"{a} -> {b}": None for old, new in pairs for a, b in zip(_sides(old), _sides(new), strict=True) if a != b
        }
        if changed:
            told.append(f"stage {stage.name}: crops in whole patches of {patch_size} px: {', '.join(changed)}")
    return config.model_copy(update={"stages": tuple(stages)}), tuple(told)


def _sides(size: Resolution) -> tuple[int | None, ...]:
    return size.global_size, size.local_size, size.gram_size


def _in_patches(size: Resolution, patch_size: int) -> Resolution:
    names = ("global_size", "local_size", "gram_size")
    sides = {name: side for name, side in zip(names, _sides(size), strict=True) if side is not None}
    return size.model_copy(update={name: max(1, round(side / patch_size)) * patch_size for name, side in sides.items()})


def require_fit(backbone: Any, config: PretrainConfig, world: World, named: Mapping[str, Backbone]) -> ViT:
    """Errors: ConfigError for what cannot be pretrained so."""
    vit = require_vit(backbone, "backbone")
    if config.parallel == "fsdp" and any(isinstance(stage, DistillationStage) for stage in config.stages):
        fix = "--set parallel=ddp: every process then holds the whole student."
        raise ConfigError("a distillation cannot share its weights out", where="parallel=fsdp", fix=fix)
    for name in ("global_size", "local_size", "gram_size"):
        if getattr(config.views, name) != getattr(ViewConfig(), name):
            fix = f"set {name} in the stage's resolutions (voxdino pretrain --dry-run --json shows them)."
            raise ConfigError("sizes of crops are the stages'", where=f"views.{name}", fix=fix)
    for stage in config.stages:
        if stage.batch_size % (world.size * stage.accumulate):
            raise ConfigError(
                f"stage {stage.name}: batches of {stage.batch_size} images cannot be shared out evenly to {world.size} "
                f"processes in {stage.accumulate} portions",
                fix=f"give a multiple of {world.size * stage.accumulate}.",
            )
        portion = stage.batch_size // stage.accumulate
        if isinstance(stage, SelfDistillationStage) and stage.koleo_weight and portion < 2:
            fix = "give fewer portions (accumulate) or more images, or set koleo_weight to 0."
            raise ConfigError(f"stage {stage.name}: KoLeo needs neighbours, a portion has one image", fix=fix)
        teacher = gram_teacher_of(config.stages, stage)
        anchor = named[teacher.weights] if teacher and teacher.weights else vit
        if require_vit(anchor, "gram_teacher").config != vit.config:
            fix = "give one that this backbone has been, at another time."
            raise ConfigError("is of another architecture than the backbone", where="gram_teacher", fix=fix)
    return vit


def require_vit(backbone: Any, where: str) -> ViT:
    if not isinstance(backbone, ViT):
        fix = "choose a DINOv3 or DINOv2 backbone (voxdino list backbones)."
        raise ConfigError("is no vision transformer: its patches cannot be masked", where=where, fix=fix)
    return backbone
