"""Small random states with the key layouts of other authors (names from the reference values and the dossier)."""

import json
import re
from pathlib import Path

import torch

from voxdino.models.compose import build_segmenter
from voxdino.models.decoders.primus import from_meddinov3_decoder
from voxdino.models.decoders.segdino_v1 import from_segdino_v1
from voxdino.models.decoders.tpa_sad import from_segdino_v2
from voxdino.models.decoders.upernet3d import from_dinomed3d_stage2
from voxdino.models.segmenter import ModelConfig

REFERENCE = Path(__file__).parents[1] / "parity" / "reference-values"
NUM_OUTPUTS = 3


def _names(case, rename, prefix=""):
    """Our names -> the authors', from the list of a reference case."""
    theirs = json.loads((REFERENCE / f"{case}.json").read_text())["state_dict"]
    return {f"{prefix}{ours}": name for name in theirs for ours in rename({name: torch.zeros(1)})}


# system -> settings of our model, our names -> theirs, prefix of the backbone
LAYOUTS = {
    "SegDINO v1": (
        {"decoder": "segdino_v1", "decoder_settings": {"head_form": "release"}, "input_builder": "rgb"},
        lambda: _names("segdino_v1_head", from_segdino_v1, "decoder."),
        "backbone.",
    ),
    "SegDINO v2": (
        {"decoder": "tpa_sad", "decoder_width": 16, "input_builder": "rgb"},
        lambda: _names("segdino_v2_decoder", from_segdino_v2, "decoder."),
        "backbone.",
    ),
    "MedDINOv3, fine-tuned": (
        {"decoder": "primus"},
        lambda: _names("meddinov3_decoder", from_meddinov3_decoder, "decoder."),
        "encoder.",
    ),
    "DINO-Med3D, stage 1": (
        {"decoder": "linear", "tap_norm": False, "input_builder": "neighbours", "context_slices": 1},
        lambda: {"decoder.to_logits.weight": "head.weight", "decoder.to_logits.bias": "head.bias"},
        "backbone.model.",
    ),
    "DINO-Med3D, stage 2": (
        {
            "decoder": "upernet3d",
            "decoder_width": 8,
            "decoder_settings": {"release_kernels": True},
            "detail": "volume",
            "detail_width": 4,
            "tap_norm": False,
            "input_builder": "neighbours",
            "context_slices": 1,
            "adaptation": "lora",
            "lora_rank": 2,
        },
        lambda: _names("dinomed3d_stage2_head", from_dinomed3d_stage2),
        "encoder.backbone.model.base_model.model.",
    ),
}


def make_foreign(system, vit, **changes):
    """A segmenter of ours with random weights, and its state as the system's authors would save it."""
    settings, names, prefix = LAYOUTS[system]
    settings = {"adaptation": "full", **settings, **changes}
    channels = 3 if settings.get("input_builder") == "rgb" else 1
    torch.manual_seed(3)
    segmenter = build_segmenter(
        ModelConfig(backbone="theirs", num_outputs=NUM_OUTPUTS, num_channels=channels, **settings), vit
    ).eval()
    with torch.no_grad():
        for value in segmenter.parameters():
            value.add_(0.02 * torch.randn_like(value))
    return segmenter, to_theirs(system, segmenter.state_dict(), names(), prefix)


def to_theirs(system, state, names, prefix):
    theirs = {}
    for key, value in state.items():
        if key.startswith("backbone."):
            theirs[_peft(prefix, key.removeprefix("backbone."), state)] = value
        else:
            name = names[key]
            theirs[name] = value[..., None, None] if name == "head.weight" else value
    if system == "DINO-Med3D, stage 2":
        width = state["decoder.join.0.weight"].shape[0]
        theirs |= {"decoder.cls.weight": torch.randn(NUM_OUTPUTS, width, 1, 1, 1)}
        theirs |= {"decoder.cls.bias": torch.randn(NUM_OUTPUTS)}
    return theirs


def _peft(prefix, key, state):
    """With peft every adapted layer becomes `base_layer` beside `lora_A` and `lora_B`."""
    stem, _, kind = key.rpartition(".")
    if key.endswith((".adapter.down.weight", ".adapter.up.weight")):
        return prefix + re.sub(r"\.adapter\.(down|up)\.", lambda m: f".lora_{'AB'[m[1] == 'up']}.default.", key)
    return prefix + (f"{stem}.base_layer.{kind}" if f"backbone.{stem}.adapter.up.weight" in state else key)
