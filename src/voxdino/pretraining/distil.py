"""Distillation: a small student learns to see as frozen teachers do. Class tokens, patches, and their similarities.

Any backbones can teach, several at once, whatever their patch size or width: each gets a linear layer of its own from
the student's width to its own, and its map of patches is brought to the student's grid.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from voxdino.models.backbones.base import Backbone
from voxdino.models.backbones.vit import ViT
from voxdino.models.precision import autocast, uses_bf16
from voxdino.pretraining.config import DistillationStage, PretrainConfig
from voxdino.pretraining.learning import Descent, Portion, Terms, compile_blocks, mixed_seed, named_tensors
from voxdino.pretraining.losses import gram_loss
from voxdino.training.distributed import World


class Pupil(nn.Module):
    """The student's backbone with a linear layer to the width of each teacher, for class tokens and for patches."""

    def __init__(self, backbone: ViT, widths: Sequence[int]) -> None:
        super().__init__()
        self.backbone = backbone
        self.to_class = nn.ModuleList(nn.Linear(backbone.embed_dim, width) for width in widths)
        self.to_patches = nn.ModuleList(nn.Linear(backbone.embed_dim, width) for width in widths)

    def forward(self, images: Float[Tensor, "B P H W"]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Patches, then class tokens and patches as each teacher's layer makes them."""
        seen = self.backbone.tokens(images)
        classes = [layer(seen.cls) for layer in self.to_class]
        return seen.patches, classes, [layer(seen.patches) for layer in self.to_patches]


class Distillation:
    """Pupil, its running average, frozen teachers, optimiser: one stage."""

    def __init__(
        self,
        config: PretrainConfig,
        stage: DistillationStage,
        backbone: ViT,
        teachers: Sequence[Backbone],
        world: World,
    ) -> None:
        self.stage, self.world, self.seed = stage, world, config.seed
        self.teachers = [teacher.to(world.device).eval().requires_grad_(False) for teacher in teachers]
        torch.manual_seed(config.seed)  # of the layers to the teachers: the same in every process
        widths = [teacher.embed_dims(teacher.default_taps())[-1] for teacher in teachers]
        self.pupil = Pupil(backbone.requires_grad_(True), widths).to(world.device).train()
        for unused in backbone.idle_parameters():
            unused.requires_grad_(False)
        backbone.drop_path, backbone.rope_rescale = stage.drop_path, stage.rope_rescale
        backbone.gradient_checkpointing = config.gradient_checkpointing
        if config.compile:
            compile_blocks(backbone, *(teacher for teacher in self.teachers if isinstance(teacher, ViT)))
        self.result = ViT(backbone.config).to(world.device).eval().requires_grad_(False)
        self.result.load_state_dict(backbone.state_dict())
        self.amp = uses_bf16(world.device, config.precision)
        self._wrapped: nn.Module = self.pupil
        if world.group is not None:
            self._wrapped = DistributedDataParallel(self.pupil, broadcast_buffers=False)
        trained = [one for one in self.pupil.parameters() if one.requires_grad]
        groups = [
            {"params": [one for one in trained if (one.ndim > 1) == decays], "decays": decays}
            for decays in (True, False)
        ]
        self.descent = Descent(
            self.pupil, groups, betas=stage.betas, average=self.result, followed=self.pupil.backbone, world=world
        )

    def step(self, portions: Sequence[Portion], step: int) -> Terms:
        """Learn from the global crops of a batch; step: 0-based, of the stage. What was lost, by term."""
        stage, done = self.stage, (step, self.stage.num_steps)
        torch.manual_seed(mixed_seed(self.seed, stage.name, step, self.world.rank))
        weights = {"class": stage.class_weight, "patch": stage.patch_weight, "gram": stage.gram_weight}
        terms = self.descent.gradients(self._wrapped, portions, self._terms, weights)
        rate, decay = stage.learning_rate.at(*done), stage.weight_decay.at(*done)
        return self.descent.step(
            terms,
            lambda group: (rate, decay if group["decays"] else 0.0),
            clip=stage.clip,
            momentum=stage.momentum.at(*done),
        )

    def _terms(self, portion: Portion) -> dict[str, Tensor]:
        """Averaged over the teachers."""
        images = portion.views.globals
        with autocast(self.world.device, self.amp):
            patches, classes, mapped = self._wrapped(images)
        rows, columns = (side // self.pupil.backbone.patch_size for side in images.shape[2:])
        found: dict[str, list[Tensor]] = {"class": [], "patch": [], "gram": []}
        for teacher, own_class, own_patches in zip(self.teachers, classes, mapped, strict=True):
            with autocast(self.world.device, self.amp):
                wanted_class, wanted = shown(teacher, images, (rows, columns))
            found["class"].append((1 - F.cosine_similarity(own_class.float(), wanted_class)).mean())
            found["patch"].append((1 - F.cosine_similarity(own_patches.float(), wanted, dim=-1)).mean())
            found["gram"].append(gram_loss(patches, wanted))
        return {name: torch.stack(terms).mean() for name, terms in found.items()}

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a resumed run needs, by name, to be written to."""
        return named_tensors(pupil=self.pupil, result=self.result) | self.descent.state()


@torch.no_grad()
def shown(teacher: Backbone, images: Float[Tensor, "B P H W"], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What a teacher says: class tokens (B, E) and patches (B, N, E) on the student's grid, float32.

    It sees the images resized to the same number of its own patches, so that tokens lie on each other.
    """
    size = [side * teacher.patch_size for side in grid]
    if list(images.shape[2:]) != size:
        images = F.interpolate(images, size=size, mode="bicubic", antialias=size[0] < images.shape[2])
    features = teacher(images, taps=teacher.default_taps()[-1:])
    last = features.maps[-1].float()  # (B, E, rows, columns)
    if last.shape[2:] != grid:
        last = F.interpolate(last, size=grid, mode="bilinear")
    return features.cls_token.float(), last.flatten(2).transpose(1, 2)
