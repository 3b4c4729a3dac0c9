"""Narrow ViTs out of wide ones."""

import pytest
import torch

from voxdino.core.errors import ConfigError, WeightsError
from voxdino.models.backbones.vit import ViT, ViTConfig
from voxdino.models.slim import slimmed
from voxdino.models.weights import load_backbone, write_backbone

SLIM = ViTConfig(embed_dim=16, depth=2, num_heads=2, patch_size=4, ffn_hidden=24)


def wide_vit(**changes: object) -> ViT:
    torch.manual_seed(1)
    fields = {"embed_dim": 32, "depth": 4, "num_heads": 4, "patch_size": 4, "ffn_hidden": 48, "layer_scale_init": 0.5}
    return ViT(ViTConfig(**(fields | changes))).eval()


def test_of_the_same_size_is_the_wide_one_itself():
    wide = wide_vit()
    images = torch.rand(2, 3, 12, 8)
    torch.testing.assert_close(slimmed(wide, wide.config)(images).maps, wide(images).maps)


def test_every_weight_is_one_of_the_wide_one():
    wide = wide_vit()
    slim = slimmed(wide, SLIM)
    for name, tensor in slim.named_parameters():
        origin = name.replace("blocks.1", "blocks.3").replace("blocks.0", "blocks.1")  # two of four blocks
        assert torch.isin(tensor, wide.state_dict()[origin]).all(), name


def test_a_flat_patch_keeps_its_token_when_patches_grow():
    wide = wide_vit()
    larger = slimmed(wide, wide.config.model_copy(update={"patch_size": 7}))
    tokens = [vit.patch_embed["proj"](torch.ones(1, 3, vit.patch_size, vit.patch_size)) for vit in (wide, larger)]
    torch.testing.assert_close(tokens[0], tokens[1], rtol=0, atol=1e-5)


def test_learned_positions_become_their_mean():
    wide = wide_vit(family="dinov2", position_grid=(3, 2), num_registers=0)
    with torch.no_grad():
        wide.pos_embed[0, 1:] = torch.arange(6.0)[:, None] / 10
    slim = slimmed(wide, SLIM)
    moved = slim.patch_embed["proj"].bias - wide.patch_embed["proj"].bias[1::2]
    torch.testing.assert_close(moved, torch.full((16,), 0.25))


@pytest.mark.parametrize(
    "change, told",
    [
        ({"embed_dim": 64, "num_heads": 8}, "embed_dim is 64, more than 32"),
        ({"num_heads": 4}, "heads differ in width"),
        ({"ffn": "swiglu"}, "ffn is swiglu, not mlp"),
        ({"depth": 5}, "depth is 5"),
    ],
)
def test_what_is_no_part_of_the_wide_one_is_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        slimmed(wide_vit(), SLIM.model_copy(update=change))


def test_a_source_names_it_and_inherits_the_licence(tmp_path):
    _, card = load_backbone("random:dinov3_vits16")
    wide, _ = load_backbone("random:dinov3_vits16")
    write_backbone(tmp_path / "w.safetensors", wide.state_dict(), card.model_copy(update={"licence": "Own-1.0"}))
    slim, told = load_backbone(f"slim:voxdino_tiny@{tmp_path / 'w.safetensors'}")
    assert (told.licence, slim.embed_dim) == ("Own-1.0", 192)
    assert str(tmp_path) not in str(told)


@pytest.mark.parametrize("source", ["slim:voxdino_tiny", "slim:dinov3_convnext_tiny@random:dinov3_vits16"])
def test_a_source_without_both_of_them_is_refused(source):
    with pytest.raises(WeightsError, match="slim:<backbone>@<weights>"):
        load_backbone(source)
