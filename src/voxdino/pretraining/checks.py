"""What a pretraining can be made of: checked before the first step."""

from collections.abc import Mapping, Sequence
from typing import Any

from voxdino.core.errors import ConfigError
from voxdino.models.backbones.base import Backbone
from voxdino.models.backbones.vit import ViT
from voxdino.pretraining.config import AnyStage, DistillationStage, PretrainConfig
from voxdino.training.distributed import World


def named_weights(config: PretrainConfig) -> list[str]:
    """Of all teachers and Gram teachers, each once."""
    names = [
        *(name for stage in config.stages if isinstance(stage, DistillationStage) for name in stage.teachers),
        *(gram_teacher_of(config.stages, stage) for stage in config.stages),
    ]
    return [name for name in dict.fromkeys(names) if name not in ("", "start")]


def gram_teacher_of(stages: Sequence[AnyStage], stage: AnyStage) -> str:
    """Whose similarities a stage keeps: "start", or weights; "" where it keeps none."""
    if isinstance(stage, DistillationStage) or not stage.has_gram:
        return ""
    if stage.gram_teacher != "kept":
        return stage.gram_teacher
    before = stages[: next(place for place, one in enumerate(stages) if one is stage)]
    return (gram_teacher_of(before, before[-1]) if before else "") or "start"


def require_fit(backbone: Any, config: PretrainConfig, world: World, named: Mapping[str, Backbone]) -> ViT:
    """Errors: ConfigError for what cannot be pretrained so."""
    vit = require_vit(backbone, "backbone")
    for stage in config.stages:
        if stage.batch_size % (world.size * stage.accumulate):
            raise ConfigError(
                f"stage {stage.name}: batches of {stage.batch_size} images cannot be shared out evenly to {world.size} "
                f"processes in {stage.accumulate} portions",
                fix=f"give a multiple of {world.size * stage.accumulate}.",
            )
        for size in stage.resolutions:
            sides = [size.global_size, size.local_size]
            if size.gram_size is not None and gram_teacher_of(config.stages, stage):
                sides.append(size.gram_size)
            wrong = [side for side in sides if side % vit.patch_size]
            if wrong:
                fix = f"give multiples of its patch of {vit.patch_size}."
                raise ConfigError(f"stage {stage.name}: crops of {wrong[0]} px do not fit the backbone", fix=fix)
        anchor = named.get(gram_teacher_of(config.stages, stage))
        if anchor is not None and require_vit(anchor, "gram_teacher").config != vit.config:
            fix = "give one that this backbone has been, at another time."
            raise ConfigError("is of another architecture than the backbone", where="gram_teacher", fix=fix)
    return vit


def require_vit(backbone: Any, where: str) -> ViT:
    if not isinstance(backbone, ViT):
        fix = "choose a DINOv3 or DINOv2 backbone (voxdino list backbones)."
        raise ConfigError("is no vision transformer: its patches cannot be masked", where=where, fix=fix)
    return backbone
