"""Every family of backbones obeys the contract of its base; configurations rebuild what they describe."""

import pytest
import torch

from voxdino.core.errors import ConfigError
from voxdino.core.records import Record
from voxdino.models.backbones.base import on_grid, pad_to_multiple
from voxdino.models.backbones.build import BackboneConfig, backbone_from_state, build_backbone
from voxdino.models.backbones.convnext import ConvNeXt, ConvNeXtConfig
from voxdino.models.backbones.no_backbone import NoBackbone, NoBackboneConfig
from voxdino.models.backbones.timm_bridge import TimmBackbone, TimmConfig
from voxdino.models.backbones.vit import ViTConfig
from voxdino.models.weights import load_backbone

VIT = {"embed_dim": 24, "depth": 5, "num_heads": 2, "patch_size": 4, "ffn_hidden": 40}
CONFIGS = {
    "dinov3": ViTConfig(**VIT, layer_scale_init=0.3),
    "dinov2": ViTConfig(
        **VIT, family="dinov2", mask_k_bias=False, num_registers=0, position_grid=(3, 3), layer_scale_init=0.3
    ),
    "dinov3_convnext": ConvNeXtConfig(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), layer_scale_init=0.3),
    "timm transformer": TimmConfig(model="vit_tiny_patch16_224"),
    "timm stages": TimmConfig(model="mobilenetv3_small_050"),
}


@pytest.fixture(scope="module", params=CONFIGS)
def backbone(request):
    config = CONFIGS[request.param]
    if isinstance(config, TimmConfig):
        request.getfixturevalue("timm")
    torch.manual_seed(3)
    return build_backbone(config).eval()


def images(backbone, rows=3, columns=5, batch=2):
    torch.manual_seed(4)
    return torch.randn(batch, 3, rows * backbone.patch_size, columns * backbone.patch_size)


@torch.no_grad()
def test_all_taps_share_the_grid_of_the_patch_and_have_the_promised_channels(backbone):
    for taps in (backbone.default_taps(), tuple(range(backbone.depth)), (backbone.depth - 1,)):
        features = backbone(images(backbone), taps=taps)
        assert [tuple(one.shape) for one in features.maps] == [(2, n, 3, 5) for n in backbone.embed_dims(taps)]
        assert features.patch_size == (backbone.patch_size,) * 2
        assert len(features.cls_token) == 2


@torch.no_grad()
def test_a_tap_is_the_same_whatever_else_is_tapped(backbone):
    everything = backbone(images(backbone), taps=range(backbone.depth)).maps
    alone = backbone(images(backbone), taps=(1,)).maps
    torch.testing.assert_close(alone[0], everything[1])


@torch.no_grad()
def test_the_usual_taps_are_what_forward_takes(backbone):
    usual, said = backbone(images(backbone)), backbone(images(backbone), taps=backbone.default_taps())
    assert all(torch.equal(a, b) for a, b in zip(usual.maps, said.maps, strict=True))


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(backbone):
    batch = images(backbone, batch=3)
    together = backbone(batch)
    for settings in ({"images_at_once": 2}, {"images_at_once": 1}):
        parts = backbone(batch, **settings)
        torch.testing.assert_close(parts.cls_token, together.cls_token, rtol=1e-4, atol=1e-5)
        for one, other in zip(parts.maps, together.maps, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_tail_is_what_its_levels_say(backbone):
    idle = {id(p) for p in backbone.idle_parameters()}
    levels = {name: backbone.level(name) for name, _ in backbone.named_parameters()}
    assert set(levels.values()) <= set(range(-1, backbone.depth))
    assert backbone.tail(0) == ()
    for num_parts in range(1, backbone.depth + 1):
        in_tail = {id(p) for module in backbone.tail(num_parts) for p in module.parameters()}
        by_level = {id(p) for name, p in backbone.named_parameters() if levels[name] >= backbone.depth - num_parts}
        assert in_tail == by_level
        assert not in_tail & idle


def test_gradients_reach_every_parameter_that_is_not_idle(backbone):
    features = backbone(images(backbone), taps=range(backbone.depth))
    total = features.cls_token.square().sum() + sum(one.square().sum() for one in features.maps)
    names = [name for name, _ in backbone.named_parameters()]
    gradients = torch.autograd.grad(total, list(backbone.parameters()), allow_unused=True)
    unread = {name for name, gradient in zip(names, gradients, strict=True) if gradient is None}
    own = {id(p): name for name, p in backbone.named_parameters()}
    assert unread == {own[id(p)] for p in backbone.idle_parameters()}


def test_images_that_are_no_multiple_of_the_patch_are_refused(backbone):
    side = backbone.patch_size
    with pytest.raises(ConfigError, match=f"images of {side + 1} x {side} pixels are no multiple"):
        backbone(torch.zeros(1, 3, side + 1, side))


@pytest.mark.parametrize("taps", [(), (-1,), (0, 99)])
def test_taps_it_does_not_have_are_refused(backbone, taps):
    with pytest.raises(ConfigError, match=f"do not fit a backbone of {backbone.depth} blocks"):
        backbone(images(backbone), taps=taps)


@torch.no_grad()
def test_the_configuration_and_the_state_rebuild_the_backbone(backbone):
    config = Holder.from_json(Holder(config=backbone.config).to_json()).config
    assert config == backbone.config
    again = backbone_from_state(config, backbone.state_dict())
    assert not again.training
    assert torch.equal(again(images(backbone)).maps[-1], backbone(images(backbone)).maps[-1])


class Holder(Record):
    config: BackboneConfig


def test_every_family_says_in_a_line_what_it_is():
    assert ConvNeXtConfig(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)).summary() == (
        "dinov3_convnext of 3-3-9-3 blocks and 96-192-384-768 channels, patch 16"
    )
    assert all(config.summary() for config in (*CONFIGS.values(), NoBackboneConfig()))


def test_configurations_of_older_runs_are_read():
    stored = {  # as model.json had it before there were other families
        "family": "dinov2", "embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 14, "ffn": "mlp",
        "ffn_hidden": 40, "qkv_bias": True, "mask_k_bias": False, "num_registers": 0, "local_cls_norm": False,
        "norm_eps": 1e-6, "layer_scale_init": 1e-5, "rope_base": 100.0, "rope_dtype": "float32",
        "position_grid": [37, 37],
    }  # fmt: skip
    config = Holder.from_json({"config": stored}).config
    assert isinstance(config, ViTConfig)
    assert (config.depth, config.position_grid) == (3, (37, 37))


@pytest.mark.parametrize(
    "config, words",
    [
        ({"family": "resnet"}, "'config' is .*: input tag 'resnet'.* does not match any of the expected tags"),
        ({"family": "dinov3_convnext", "depths": [1, 1, 1, 1]}, "dims' is missing"),
        ({"family": "dinov3_convnext", "depts": 1, "depths": [1, 1, 1, 1], "dims": [1, 1, 1, 1]}, "mean 'depths'"),
        ({"family": "timm", "model": "hf-hub:somebody/something"}, "string should match pattern"),
    ],
)
def test_configurations_that_are_none_are_refused(config, words):
    with pytest.raises(ConfigError, match=words):
        Holder.from_json({"config": config})


# No backbone


def test_no_backbone_gives_features_without_maps():
    backbone, card = load_backbone("none")
    assert isinstance(backbone, NoBackbone)
    features = backbone(torch.zeros(6, 1, 9, 7))
    assert (features.maps, features.cls_token.shape, features.patch_size) == ((), (6, 0), (16, 16))
    assert (backbone.depth, backbone.default_taps(), backbone.embed_dims(())) == (0, (), ())
    assert not list(backbone.parameters())
    assert (card.config, card.num_parameters, card.licence) == (NoBackboneConfig(), 0, "none (no backbone)")
    assert isinstance(build_backbone(card.config), NoBackbone)
    assert features.as_volume(3).cls_token.shape == (2, 0)


# Bringing stages to one grid


def test_a_finer_map_is_averaged_and_a_coarser_one_resized_with_its_edges():
    fine = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert on_grid(fine, (2, 2), stride=8, patch_size=16).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    ramp = torch.tensor([0.0, 2.0]).expand(1, 1, 2, 2)
    assert on_grid(ramp, (4, 4), stride=32, patch_size=16)[0, 0, 0].tolist() == [0.0, 0.5, 1.5, 2.0]
    assert on_grid(ramp, (3, 3), stride=32, patch_size=16).shape == (1, 1, 3, 3)
    assert torch.equal(on_grid(fine, (4, 4), stride=16, patch_size=16), fine)


def test_padding_repeats_the_last_row_and_column_and_only_where_needed():
    image = torch.randn(1, 3, 3, 4)
    padded = pad_to_multiple(image, 4)
    assert padded.shape == (1, 3, 4, 4)
    assert torch.equal(padded[:, :, 3], image[:, :, 2])
    assert pad_to_multiple(padded, 2) is padded


def test_abilities_name_what_only_transformers_can_do():
    assert ConvNeXt.abilities == {"drop_path", "gradient_checkpointing"}
    assert TimmBackbone.abilities == frozenset()
