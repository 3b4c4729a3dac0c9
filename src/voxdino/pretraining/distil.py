"""Distillation: a small student learns to see as frozen teachers do. Class tokens, patches, and their similarities.

Any backbones can teach, several at once, whatever their patch size or width: each gets a linear layer of its own from
the student's width to its own, and its map of patches is brought to the student's grid.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from voxdino.models.backbones.base import Backbone
from voxdino.models.backbones.vit import ViT
from voxdino.models.precision import autocast, uses_bf16
from voxdino.pretraining.config import DistillationStage, PretrainConfig
from voxdino.pretraining.losses import gram_loss
from voxdino.pretraining.step import Portion, Terms, clip_gradients, exchange, local_tensors, mixed_seed
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
        self.result = ViT(backbone.config).to(world.device).eval().requires_grad_(False)
        self.result.load_state_dict(backbone.state_dict())
        self.amp = uses_bf16(world.device, config.precision)
        self._wrapped: nn.Module = self.pupil
        if world.group is not None:
            self._wrapped = DistributedDataParallel(self.pupil, broadcast_buffers=False)
        self._trained = {name: one for name, one in self.pupil.named_parameters() if one.requires_grad}
        groups = [
            {"params": [one for one in self._trained.values() if (one.ndim > 1) == decays]} for decays in (True, False)
        ]
        self.optimizer = AdamW(groups, lr=1.0, betas=stage.betas, fused=True)

    def step(self, portions: Sequence[Portion], step: int) -> Terms:
        """Learn from the global crops of a batch; step: 0-based, of the stage. What was lost, by term."""
        stage, done = self.stage, (step, self.stage.num_steps)
        torch.manual_seed(mixed_seed(self.seed, stage.name, step, self.world.rank))
        sums: dict[str, Tensor] = {}
        weights = {"class": stage.class_weight, "patch": stage.patch_weight, "gram": stage.gram_weight}
        for number, portion in enumerate(portions, 1):
            with exchange(self._wrapped, number == len(portions)):
                terms = self._terms(portion.views.globals)
                total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
                (total / len(portions)).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach() / len(portions)
        norm = float(clip_gradients(self.pupil, stage.clip))
        told = self.world.mean(torch.stack(list(sums.values())))
        values = dict(zip(sums, told.tolist(), strict=True))
        good = norm < float("inf") and all(value == value for value in values.values())
        if good:
            rate, decay = stage.learning_rate.at(*done), stage.weight_decay.at(*done)
            for group, own in zip(self.optimizer.param_groups, (decay, 0.0), strict=True):
                group["lr"], group["weight_decay"] = rate, own
            self.optimizer.step()
            with torch.no_grad():
                weight = 1 - stage.momentum.at(*done)
                torch._foreach_lerp_(local_tensors(self.result), local_tensors(self.pupil.backbone), weight)
        self.optimizer.zero_grad(set_to_none=True)
        return {**values, "grad_norm": norm, "skipped": float(not good)}

    def _terms(self, images: Float[Tensor, "B P H W"]) -> dict[str, Tensor]:
        """Averaged over the teachers."""
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
        """Every tensor that a resumed run needs, by name."""
        tensors = {f"pupil.{name}": value.data for name, value in self.pupil.named_parameters()}
        tensors |= {f"result.{name}": value.data for name, value in self.result.named_parameters()}
        for name, parameter in self._trained.items():
            held = self.optimizer.state[parameter]
            if not held:
                held |= {"step": torch.zeros((), device=parameter.device), "exp_avg": torch.zeros_like(parameter)}
                held["exp_avg_sq"] = torch.zeros_like(parameter)
            tensors |= {f"optimizer.{key}.{name}": value for key, value in held.items()}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, in place."""
        for name, own in self.state().items():
            own.copy_(tensors[name])


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
