"""What a recipe costs before it runs: weights that train, and memory of a training step, counted without computing."""

from dataclasses import dataclass

import torch

from voxdino.core.labels import LabelSet
from voxdino.finetuning.config import FinetuneConfig
from voxdino.finetuning.model import effective_plan, model_config
from voxdino.models.backbones.build import build_backbone
from voxdino.models.backbones.no_backbone import NoBackboneConfig
from voxdino.models.compose import build_segmenter
from voxdino.models.registry import BACKBONES, look_up
from voxdino.preparation.intensity import ChannelPolicy
from voxdino.preparation.plan import DEFAULT_BACKBONE, Plan

CROP = (224, 224)
ADAM_BYTES = 16  # per weight that trains: itself, its gradient, two moments


@dataclass(frozen=True)
class Cost:
    """num_trained, num_parameters: weights.   memory_bytes: of a training step with one slab (2-D: one slice)."""

    num_trained: int
    num_parameters: int
    memory_bytes: int


def cost_of(config: FinetuneConfig, *, backbone: str = DEFAULT_BACKBONE, device: str = "cpu") -> Cost:
    """Of a recipe with `backbone` on one-channel volumes of two classes, crops of 224 x 224, in float32.

    Memory is what autograd keeps for the backward pass and what the optimiser holds; a frozen backbone's features are
    taken from their cache. Errors: ResourceError where an optional package is missing.
    """
    plan = effective_plan(config, example_plan())
    target = torch.device(device)
    architecture = NoBackboneConfig() if config.backbone == "none" else look_up(BACKBONES, backbone, kind="backbone")
    settings = model_config(config, plan, None, target)
    with torch.device("meta"):
        model = build_segmenter(settings, build_backbone(architecture)).train()
        image = torch.zeros(1, 1, plan.slab, *CROP)
        features = model.encode(image)
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if not model.cacheable:
                features = model.encode(image)
            model.decode(features, (plan.slab, *CROP), image)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    activations = sum(size for storage, size in kept.items() if storage not in weights)
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    held = num_parameters if not model.cacheable else num_trained
    memory = activations + ADAM_BYTES * num_trained + 4 * (held - num_trained)
    return Cost(num_trained, num_parameters, memory)


def memory_of(config: FinetuneConfig, plan: Plan, *, device: str = "cpu") -> int:
    """Bytes that a training step takes on crops of a plan: as much more than on 224 x 224 as there are more voxels."""
    voxels = plan.crop[0] * plan.crop[1] / (CROP[0] * CROP[1])
    return int(cost_of(config, device=device).memory_bytes * voxels * (config.batch_size or 1))


def example_plan() -> Plan:
    return Plan(
        dataset="volumes",
        fingerprint_digest="",
        ndim=3,
        labels=LabelSet(names=("background", "structure"), ids=(0, 1)),
        channels=(ChannelPolicy(name="CT", source=0, kind="ct", lower=0.0, upper=1.0, mean=0.0, sd=1.0),),
        slice_axis="S",
        in_plane_spacing=(1.0, 1.0),
        magnification=1.0,
        crop=CROP,
        tile=CROP,
        context_slices=0,
        input_builder="repeat",
        batch_size=1,
        patch_size=16,
    )
