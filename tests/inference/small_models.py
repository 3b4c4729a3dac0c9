"""A tiny trained model, a plan, and stand-ins for a segmenter whose logits can be checked by hand."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from voxdino.core.geometry import Grid
from voxdino.core.labels import LabelSet
from voxdino.core.volume import Volume
from voxdino.inference.load import LoadedModel, ModelCard
from voxdino.models.backbones.base import Backbone
from voxdino.models.backbones.vit import ViT, ViTConfig
from voxdino.models.compose import build_segmenter
from voxdino.models.features import Prediction
from voxdino.models.segmenter import ModelConfig, Segmenter
from voxdino.models.weights_card import WeightsCard
from voxdino.preparation.intensity import ChannelPolicy
from voxdino.preparation.plan import Plan

torch.set_num_threads(1)

VIT = ViTConfig(embed_dim=16, depth=4, num_heads=2, patch_size=4, ffn_hidden=32)
LABELS = LabelSet(names=("background", "liver", "lesion"), ids=(0, 5, 9))


def make_plan(**changes) -> Plan:
    facts = {
        "dataset": "test",
        "fingerprint_digest": "",
        "ndim": 3,
        "labels": LABELS,
        "channels": (ChannelPolicy(name="CT", source=0, kind="ct", lower=-100.0, upper=100.0, mean=0.0, sd=50.0),),
        "slice_axis": "S",
        "in_plane_spacing": None,
        "magnification": 1.0,
        "crop": (8, 8),
        "tile": (8, 8),
        "context_slices": 0,
        "input_builder": "repeat",
        "batch_size": 2,
        "patch_size": 4,
    }
    return Plan(**{**facts, **changes})


def make_card(**changes) -> WeightsCard:
    facts = {
        "name": "tiny",
        "layout": "voxdino",
        "licence": "DINOv3 License",
        "source": "tiny.safetensors",
        "file_digest": "0",
        "source_digest": "0",
        "config": VIT,
        "num_parameters": 1,
    }
    return WeightsCard(**{**facts, **changes})


def make_segmenter(plan: Plan, encoder: Backbone | None = None, **changes) -> Segmenter:
    torch.manual_seed(3)
    facts = {
        "backbone": "tiny",
        "input_builder": plan.input_builder,
        "context_slices": plan.context_slices,
        "num_channels": len(plan.channels),
        "decoder": "linear",
        "magnification": plan.magnification,
        "num_outputs": plan.labels.num_outputs,
    }
    segmenter = build_segmenter(ModelConfig(**{**facts, **changes}), encoder or ViT(VIT))
    with torch.no_grad():
        for value in segmenter.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return segmenter.eval()


class ByHand(Segmenter):
    """A segmenter whose logits are a given function of the normalised crop (B, C, D + 2 k, H, W)."""

    classifier = nn.Identity()

    def __init__(self, logits: Callable[[torch.Tensor], torch.Tensor]) -> None:
        nn.Module.__init__(self)
        self.logits = logits
        self.calls: list[tuple[int, ...]] = []

    def forward(self, image: torch.Tensor, magnify: float = 1.0) -> Prediction:
        self.calls.append(tuple(image.shape))
        return Prediction(self.logits(image))


def model_by_hand(logits: Callable[[torch.Tensor], torch.Tensor], plan: Plan) -> LoadedModel:
    card = ModelCard(
        model=ModelConfig(backbone="hand", num_outputs=plan.labels.num_outputs),
        backbone=make_card(),
        licence="none",
        voxdino_version="0",
    )
    return LoadedModel(ByHand(logits), plan, card, "hand", "digest", torch.device("cpu"))


def make_volume(shape=(9, 11, 6), seed=0, spacing=(0.7, 0.9, 3.0)) -> Volume:
    array = np.random.default_rng(seed).integers(-150, 150, (1, *shape)).astype(np.int16)
    turned = Grid.from_spacing(shape, spacing).transposed((0, 1, 2), (True, True, False))
    return Volume(array, turned)


def with_plan(model: LoadedModel, **changes) -> LoadedModel:
    return replace(model, plan=model.plan.model_copy(update=changes))
