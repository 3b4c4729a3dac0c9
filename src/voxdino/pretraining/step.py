"""One step of self-distillation: a student that sees parts and masked views learns to say what its running average,
the teacher, says of whole ones. DINO + iBOT + KoLeo + Gram anchoring, from the description in the dossier (5.7).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from voxdino.models.backbones.vit import ViT
from voxdino.models.precision import autocast, uses_bf16
from voxdino.pretraining.config import PretrainConfig, SelfDistillationStage
from voxdino.pretraining.learning import (
    Descent,
    Portion,
    Terms,
    compile_blocks,
    copy_weights,
    mixed_seed,
    named_tensors,
)
from voxdino.pretraining.losses import dino_loss, gram_loss, ibot_loss, koleo_loss, sinkhorn_knopp
from voxdino.pretraining.masking import draw_masks
from voxdino.pretraining.networks import Network, PatchFeatures, Seen
from voxdino.probes.measures import target_entropy
from voxdino.training.distributed import World


@dataclass(frozen=True)
class Targets:
    """What the teacher says of a portion, as probabilities. patches: of the Gram teacher, where there is one."""

    dino: Float[Tensor, "2 B K"]
    ibot: Float[Tensor, "M L"]
    patches: Float[Tensor, "G N E"] | None


class SelfDistillation:
    """Student, teacher, Gram teacher and optimiser, through the stages of a pretraining."""

    def __init__(self, config: PretrainConfig, backbone: ViT, world: World) -> None:
        self.config, self.world = config, world
        torch.manual_seed(config.seed)  # of the heads: the same in every process
        self.student = Network(backbone.requires_grad_(True), config.dino_head, config.ibot_head)
        self.student.backbone.gradient_checkpointing = config.gradient_checkpointing
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        if backbone.local_cls_norm is not None and config.views.num_locals == 0:
            backbone.local_cls_norm.requires_grad_(False)  # nothing goes through it
        self.student.to(world.device).train()
        self.teacher.to(world.device)
        self.gram: PatchFeatures | None = None
        self.amp = uses_bf16(world.device, config.precision)
        self._wrapped: nn.Module = self.student
        self._shared_out = config.parallel == "fsdp" and world.group is not None
        if self._shared_out:
            for network in (self.student, self.teacher):
                share_out(network)
        elif world.group is not None:
            self._wrapped = DistributedDataParallel(self.student, broadcast_buffers=False)
        if config.compile:
            compile_blocks(self.student.backbone, self.teacher.backbone)
        self.descent: Descent | None = None

    @property
    def result(self) -> ViT:
        """What a training is for."""
        return self.teacher.backbone

    def begin(self, stage: SelfDistillationStage, anchor: ViT | None = None) -> None:
        """Set up for a stage: a fresh optimiser, and where it has one the Gram teacher.

        anchor: the Gram teacher that `stage.gram_teacher` names; None where it names no weights.
        """
        self.stage = stage
        backbone = self.student.backbone
        backbone.drop_path, backbone.rope_rescale = stage.drop_path, None
        if backbone.rope_embed is not None:
            backbone.rope_rescale = stage.rope_rescale
        groups = parameter_groups(self.student, stage)
        self.descent = Descent(
            self.student,
            groups,
            betas=stage.betas,
            average=self.teacher,
            followed=self.student,
            world=self.world,
            is_shared_out=self._shared_out,
        )
        if not stage.has_gram:
            self.gram = None
        elif self.gram is None or stage.gram_teacher != "kept":
            self.gram = PatchFeatures(anchor or ViT(backbone.config)).to(self.world.device)
            if self._shared_out:
                share_out(self.gram)
            if anchor is None:
                copy_weights(self.teacher.backbone, self.gram.backbone)

    def step(self, portions: Sequence[Portion], step: int) -> Terms:
        """Learn from one batch; step: 0-based, of the stage. What was lost, as `Descent.step` tells it."""
        assert self.descent is not None
        stage, done = self.stage, (step, self.stage.num_steps)
        if self.gram is not None and stage.refreshes_gram(step):
            copy_weights(self.teacher.backbone, self.gram.backbone)
        torch.manual_seed(mixed_seed(self.config.seed, stage.name, step, self.world.rank))  # of drop path and positions
        targets = self._targets(portions, stage.teacher_temperature.at(*done))
        pairs = list(zip(portions, targets, strict=True))
        terms = self.descent.gradients(self._wrapped, pairs, lambda pair: self._terms(*pair), self._weights(step))
        if stage.dino_weight:
            terms["target_entropy"] = target_entropy(torch.cat([one.dino.flatten(0, 1) for one in targets]))
        if stage.ibot_weight and stage.masked_share:
            terms["patch_entropy"] = self._patch_entropy(torch.cat([one.ibot for one in targets]))
        momentum = stage.teacher_momentum.at(*done)
        return self.descent.step(terms, lambda group: self._rates(group, step), clip=stage.clip, momentum=momentum)

    def _patch_entropy(self, targets: Float[Tensor, "M L"]) -> Tensor:
        """Of this process's patches, by the mean number of them: averaged over the processes, that of all patches."""
        each: Tensor = self.world.mean(torch.tensor(float(len(targets)), device=targets.device))
        found = target_entropy(targets) * len(targets) if len(targets) else targets.new_zeros(())
        return found / each.clamp(min=1)

    def _weights(self, step: int) -> dict[str, float]:
        """Of the terms; global and local DINO terms share their weight by their number of pairs."""
        stage, done = self.stage, (step, self.stage.num_steps)
        pairs = 2 + 2 * self.config.views.num_locals
        local = 2 * self.config.views.num_locals / pairs
        return {
            "dino_global": stage.dino_weight * 2 / pairs,
            "dino_local": stage.dino_weight * local * stage.local_weight.at(*done),
            "ibot": stage.ibot_weight,
            "koleo": stage.koleo_weight,
            "gram": stage.gram_weight.at(*done),
        }

    def _terms(self, portion: Portion, wanted: Targets) -> dict[str, Tensor]:
        with autocast(self.world.device, self.amp):
            seen: Seen = self._wrapped(portion.views.globals, portion.views.locals, portion.masks)
        temperature = self.stage.student_temperature
        num_images = seen.dino.shape[1]
        terms = {
            "dino_global": dino_loss(seen.dino[:2], wanted.dino, student_temperature=temperature, ignore_diagonal=True)
        }
        if len(seen.dino) > 2:
            terms["dino_local"] = dino_loss(seen.dino[2:], wanted.dino, student_temperature=temperature)
        weights = (1 / portion.masks.sum(1).clamp(min=1))[:, None].expand(portion.masks.shape)[portion.masks]
        terms["ibot"] = ibot_loss(
            seen.ibot, wanted.ibot, weights=weights, num_images=2 * num_images, student_temperature=temperature
        )
        if self.stage.koleo_weight:
            halves = seen.cls.split(num_images)
            terms["koleo"] = sum(koleo_loss(half, group=self.world.group) for half in halves)  # type: ignore[assignment]
        if wanted.patches is not None:
            assert seen.patches is not None
            terms["gram"] = gram_loss(seen.patches, wanted.patches)
        return terms

    @torch.no_grad()
    def _targets(self, portions: Sequence[Portion], temperature: float) -> list[Targets]:
        """Sinkhorn-Knopp over all portions and processes."""
        said: list[Seen] = []
        anchors: list[Tensor | None] = []
        for portion in portions:
            with autocast(self.world.device, self.amp):
                said.append(self.teacher(portion.views.globals, None, portion.masks))
                anchors.append(self._anchor(portion))
        sizes = [one.dino.shape[1] for one in said]
        dino = torch.cat([one.dino for one in said], dim=1)  # (2, B, K)
        group = self.world.group
        shared = sinkhorn_knopp(dino.flatten(0, 1), temperature=temperature, group=group).unflatten(0, (2, -1))
        ibot = sinkhorn_knopp(torch.cat([one.ibot for one in said]), temperature=temperature, group=group)
        masked = [len(one.ibot) for one in said]
        parts = zip(shared.split(sizes, dim=1), ibot.split(masked), anchors, strict=True)
        return [Targets(of_cls, of_patches, anchor) for of_cls, of_patches, anchor in parts]

    def _anchor(self, portion: Portion) -> Tensor | None:
        if self.gram is None:
            return None
        crops, patch = portion.views.globals, self.student.backbone.patch_size
        larger = portion.views.gram
        found: Tensor = self.gram(
            crops if larger is None else larger, (crops.shape[2] // patch, crops.shape[3] // patch)
        )
        return found

    def _rates(self, group: Mapping[str, Any], step: int) -> tuple[float, float]:
        """Learning rate and weight decay of a group of `parameter_groups`."""
        stage, done = self.stage, (step, self.stage.num_steps)
        is_frozen = group["is_last_layer"] and step < stage.frozen_last_layer * stage.num_steps
        rate = stage.learning_rate.at(*done) * stage.rate_factor * group["factor"]
        return 0.0 if is_frozen else rate, stage.weight_decay.at(*done) if group["decays"] else 0.0

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a resumed run needs, by name, to be written to; of this process where it is shared out."""
        assert self.descent is not None
        networks = named_tensors(student=self.student, teacher=self.teacher, gram=self.gram)
        return networks | self.descent.state()


def share_out(network: Network | PatchFeatures) -> None:
    """Spread the weights over the processes (FSDP2), block by block."""
    from torch.distributed.fsdp import fully_shard

    for part in (*network.backbone.blocks, network):
        fully_shard(part, reshard_after_forward=True)  # a teacher has no backward pass that would do it


def parameter_groups(network: Network, stage: SelfDistillationStage) -> list[dict[str, Any]]:
    """AdamW's groups: `factor` of the rate (in the backbone a power of `layer_decay`, less for the patch embedding; in
    the heads `head_rate`), `decays` (not biases, norms and scales; tokens do, as in the authors' code),
    `is_last_layer`.
    """
    backbone = network.backbone
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        inner = name.removeprefix("backbone.")
        factor = stage.head_rate if inner == name else 1.0
        if inner != name and not inner.startswith(("norm.", "local_cls_norm.")):
            factor = stage.layer_decay ** (backbone.depth - backbone.level(inner))
            factor *= stage.patch_rate if inner.startswith("patch_embed") else 1.0
        key = (factor, parameter.ndim > 1, "last_layer" in name)
        fresh = {"params": [], "factor": key[0], "decays": key[1], "is_last_layer": key[2]}
        groups.setdefault(key, fresh)["params"].append(parameter)
    return list(groups.values())


def draw_step_masks(
    stage: SelfDistillationStage, seed: int, step: int, grid: tuple[int, int], share: Sequence[int]
) -> list[Bool[Tensor, "G N"]]:
    """Of the global crops of each portion of this process; drawn for all processes together, so that their number does
    not matter. share: this process's images, portion after portion.
    """
    rng = np.random.default_rng([seed, 11, mixed_seed(seed, stage.name), step])
    masks = draw_masks(2 * stage.batch_size, grid, share_masked=stage.masked_share, ratios=stage.mask_ratios, rng=rng)
    by_crop = masks.unflatten(0, (2, stage.batch_size))[:, list(share)]
    return [part.flatten(0, 1) for part in by_crop.tensor_split(stage.accumulate, dim=1)]
