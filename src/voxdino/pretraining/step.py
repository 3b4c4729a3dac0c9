"""One step of self-distillation: a student that sees parts and masked views learns to say what its running average,
the teacher, says of whole ones. DINO + iBOT + KoLeo + Gram anchoring, from the description in the dossier (5.7).
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from voxdino.models.backbones.vit import ViT
from voxdino.models.precision import autocast, uses_bf16
from voxdino.pretraining.config import PretrainConfig, SelfDistillationStage
from voxdino.pretraining.losses import dino_loss, gram_loss, ibot_loss, koleo_loss, sinkhorn_knopp
from voxdino.pretraining.masking import draw_masks
from voxdino.pretraining.networks import Network, PatchFeatures, Seen
from voxdino.pretraining.views import Views
from voxdino.training.distributed import World

Terms = dict[str, float]


@dataclass(frozen=True)
class Portion:
    """Views of some of a step's images, and what is masked of their global crops."""

    views: Views
    masks: Bool[Tensor, "G N"]


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
            for block in (*self.student.backbone.blocks, *self.teacher.backbone.blocks):
                block.compile()
        self.optimizer: AdamW | None = None

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
        self.optimizer = AdamW(groups, lr=1.0, betas=stage.betas, fused=not self._shared_out)
        if not stage.has_gram:
            self.gram = None
        elif self.gram is None or stage.gram_teacher != "kept":
            self.gram = PatchFeatures(anchor or ViT(backbone.config)).to(self.world.device)
            if self._shared_out:
                share_out(self.gram)
            if anchor is None:
                copy_weights(self.teacher.backbone, self.gram.backbone)

    def step(self, portions: Sequence[Portion], step: int) -> Terms:
        """Learn from one batch; step: 0-based, of the stage. What was lost, by term; all processes get the same.

        Not-a-number anywhere leaves everything as it was, and "skipped" is 1.
        """
        assert self.optimizer is not None
        stage, done = self.stage, (step, self.stage.num_steps)
        if self.gram is not None and stage.refreshes_gram(step):
            copy_weights(self.teacher.backbone, self.gram.backbone)
        torch.manual_seed(mixed_seed(self.config.seed, stage.name, step, self.world.rank))  # of drop path and positions
        targets = self._targets(portions, stage.teacher_temperature.at(*done))
        sums: dict[str, Tensor] = {}
        for number, (portion, wanted) in enumerate(zip(portions, targets, strict=True), 1):
            with exchange(self._wrapped, number == len(portions)):
                with autocast(self.world.device, self.amp):
                    seen: Seen = self._wrapped(portion.views.globals, portion.views.locals, portion.masks)
                terms = self._terms(seen, portion, wanted)
                total = sum(self._weights(step)[name] * term for name, term in terms.items())
                (total / len(portions)).backward()  # type: ignore[union-attr]
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach() / len(portions)
        norm = clip_gradients(self.student, stage.clip)
        told = self.world.mean(torch.stack([*sums.values(), entropy(targets)]))
        values = dict(zip([*sums, "target_entropy"], told.tolist(), strict=True))
        norm_value = float(norm)
        good = norm_value < float("inf") and all(value == value for value in values.values())
        if good:
            self._descend(step)
            with torch.no_grad():
                momentum = stage.teacher_momentum.at(*done)
                torch._foreach_lerp_(local_tensors(self.teacher), local_tensors(self.student), 1 - momentum)
        self.optimizer.zero_grad(set_to_none=True)
        return {**values, "grad_norm": norm_value, "skipped": float(not good)}

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

    def _terms(self, seen: Seen, portion: Portion, wanted: Targets) -> dict[str, Tensor]:
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

    def _descend(self, step: int) -> None:
        assert self.optimizer is not None
        stage, done = self.stage, (step, self.stage.num_steps)
        rate, decay = stage.learning_rate.at(*done) * stage.rate_factor, stage.weight_decay.at(*done)
        for group in self.optimizer.param_groups:
            frozen = group["is_last_layer"] and step < stage.frozen_last_layer * stage.num_steps
            group["lr"] = 0.0 if frozen else rate * group["factor"]
            group["weight_decay"] = decay if group["decays"] else 0.0
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a resumed run needs, by name; of this process where they are shared out."""
        tensors = {f"student.{name}": value.data for name, value in self.student.named_parameters()}
        tensors |= {f"teacher.{name}": value.data for name, value in self.teacher.named_parameters()}
        if self.gram is not None:
            tensors |= {f"gram.{name}": value.data for name, value in self.gram.named_parameters()}
        for name, parameter in self.student.named_parameters():
            for key, value in self._moments(parameter).items():
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's, made where there was no step yet, so that they have names to be loaded under."""
        assert self.optimizer is not None
        held = self.optimizer.state[parameter]
        if not held and parameter.requires_grad:
            counter = torch.zeros((), device="cpu" if self._shared_out else parameter.device)
            held |= {"step": counter, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        return dict(held)

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, in place. Its names must be those of `state`."""
        for name, own in self.state().items():
            own.copy_(tensors[name])


def exchange(wrapped: nn.Module, is_last: bool) -> Any:
    """Gradients are exchanged between the processes once a step, with the last portion."""
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not is_last else nullcontext()


def share_out(network: Network | PatchFeatures) -> None:
    """Spread the weights over the processes (FSDP2), block by block."""
    from torch.distributed.fsdp import fully_shard

    for part in (*network.backbone.blocks, network):
        fully_shard(part, reshard_after_forward=True)  # a teacher has no backward pass that would do it


def parameter_groups(network: Network, stage: SelfDistillationStage) -> list[dict[str, Any]]:
    """AdamW's groups: `factor` of the rate (a power of `layer_decay` in the backbone, less for the patch embedding),
    `decays` (not biases, norms and scales; tokens do, as in the authors' code), `is_last_layer`.
    """
    backbone = network.backbone
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        factor = 1.0
        inner = name.removeprefix("backbone.")
        if inner != name and not inner.startswith(("norm.", "local_cls_norm.")):
            factor = stage.layer_decay ** (backbone.depth - backbone.level(inner))
            factor *= stage.patch_rate if inner.startswith("patch_embed") else 1.0
        key = (factor, parameter.ndim > 1, "last_layer" in name)
        fresh = {"params": [], "factor": key[0], "decays": key[1], "is_last_layer": key[2]}
        groups.setdefault(key, fresh)["params"].append(parameter)
    return list(groups.values())


def clip_gradients(network: nn.Module, most: float) -> Tensor:
    """Scale all gradients so that their norm is `most` at most; the norm before."""
    norm = nn.utils.clip_grad_norm_(network.parameters(), most)
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # shared out: of all processes
    return whole


def local_tensors(network: nn.Module) -> list[Tensor]:
    """The parameters' values; where they are shared out, this process's part."""
    return [
        parameter.data.to_local() if hasattr(parameter.data, "to_local") else parameter.data
        for parameter in network.parameters()
    ]


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """And buffers, which files may hold with a rounding of their own."""
    for given, taken in zip(local_tensors(source), local_tensors(target), strict=True):
        taken.copy_(given)
    for held, own in zip(source.buffers(), target.buffers(), strict=True):
        own.copy_(held)


def entropy(targets: Sequence[Targets]) -> Tensor:
    """Mean entropy of the teacher's class-token targets, in nats: near 0 or log K it tells nothing apart."""
    rows = torch.cat([one.dino.flatten(0, 1) for one in targets])
    mean: Tensor = torch.special.entr(rows).sum(1).mean()
    return mean


def mixed_seed(seed: int, *parts: Any) -> int:
    """63 bits from all of them; the same on every machine."""
    words = [seed, *(int.from_bytes(str(part).encode(), "little") for part in parts)]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def draw_step_masks(
    stage: SelfDistillationStage, seed: int, step: int, grid: tuple[int, int], share: range
) -> list[Bool[Tensor, "G N"]]:
    """Of the global crops of each portion of this process; drawn for all processes together, so that their number does
    not matter. share: this process's images.
    """
    rng = np.random.default_rng([seed, 11, mixed_seed(seed, stage.name), step])
    masks = draw_masks(2 * stage.batch_size, grid, share_masked=stage.masked_share, ratios=stage.mask_ratios, rng=rng)
    by_crop = masks.unflatten(0, (2, stage.batch_size))[:, share.start : share.stop]
    return [part.flatten(0, 1) for part in by_crop.tensor_split(stage.accumulate, dim=1)]
