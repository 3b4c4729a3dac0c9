"""Models around any family of backbones come back from their run folder."""

import json

import pytest
import torch
from small_models import make_card, make_plan

from voxdino.core.safe_files import Manifest
from voxdino.inference.load import MODEL_FILES, load_model, save_model
from voxdino.models.backbones.build import build_backbone
from voxdino.models.backbones.convnext import ConvNeXt, ConvNeXtConfig
from voxdino.models.backbones.no_backbone import NoBackbone, NoBackboneConfig
from voxdino.models.compose import build_segmenter
from voxdino.models.segmenter import ModelConfig

CONVNEXT = ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), layer_scale_init=0.3)
FAMILIES = [
    (CONVNEXT, ConvNeXt, {"decoder": "tpa_sad", "decoder_width": 8, "adaptation": "last_k", "last_k": 2}),
    (NoBackboneConfig(), NoBackbone, {"decoder": "unet_2d", "decoder_settings": {"plan_size": (16, 16)}}),
    (NoBackboneConfig(), NoBackbone, {"decoder": "unet_3d", "decoder_settings": {"plan_size": (4, 16, 16)}}),
]


@pytest.mark.parametrize("config, kind, settings", FAMILIES, ids=["convnext", "unet_2d", "unet_3d"])
def test_a_saved_model_gives_the_same_logits_whatever_its_backbone(tmp_path, config, kind, settings):
    if kind is NoBackbone:
        pytest.importorskip("dynamic_network_architectures", reason="needs the extra `baseline`")
    torch.manual_seed(3)
    plan = make_plan(patch_size=16, crop=(16, 16), tile=(16, 16))
    model = ModelConfig(backbone="some", num_outputs=plan.labels.num_outputs, **settings)
    segmenter = build_segmenter(model, build_backbone(config)).eval()
    save_model(tmp_path / "run", segmenter, plan, make_card(config=config))
    loaded = load_model(tmp_path / "run").segmenter
    assert isinstance(loaded.backbone, kind)
    assert loaded.backbone.config == config
    image = torch.randn(1, 1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(image).logits, segmenter(image).logits)


def test_a_folder_from_before_there_were_other_families_still_loads(run_folder):
    path = run_folder / "model.json"
    card = json.loads(path.read_text())
    stored = card["backbone"]["config"]
    card["backbone"]["config"] = {key: stored[key] for key in stored if key != "in_planes"}  # that came later
    path.write_text(json.dumps(card))
    Manifest.of(run_folder, MODEL_FILES).write(run_folder)
    assert load_model(run_folder).segmenter.backbone.config.family == "dinov3"
