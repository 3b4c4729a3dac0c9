"""DINOv3 ConvNeXt: what its stages are, what trains, and every published layout, complete or refused."""

import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from voxdino.core.errors import ConfigError, WeightsError
from voxdino.models.backbones.build import backbone_from_state, build_backbone
from voxdino.models.backbones.convnext import ConvNeXt, ConvNeXtConfig
from voxdino.models.compose import build_segmenter
from voxdino.models.layouts import convert
from voxdino.models.registry import BACKBONES
from voxdino.models.segmenter import ModelConfig
from voxdino.models.weights import import_weights, load_backbone

SMALL = ConvNeXtConfig(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), layer_scale_init=0.5)


@pytest.fixture
def convnext():
    torch.manual_seed(5)
    model = ConvNeXt(SMALL)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model.eval()


@pytest.fixture
def images():
    torch.manual_seed(6)
    return torch.randn(2, 3, 64, 96)


# Stages


@torch.no_grad()
def test_stages_have_strides_4_to_32_and_come_to_one_grid(convnext, images):
    stages = convnext.stage_maps(images)
    assert [tuple(s.shape) for s in stages] == [(2, 8, 16, 24), (2, 16, 8, 12), (2, 24, 4, 6), (2, 32, 2, 3)]
    maps = convnext(images, tap_norm=False).maps
    torch.testing.assert_close(maps[0], F.avg_pool2d(stages[0], 4))
    torch.testing.assert_close(maps[1], F.avg_pool2d(stages[1], 2))
    assert torch.equal(maps[2], stages[2])
    torch.testing.assert_close(F.avg_pool2d(maps[3], 2).mean(), stages[3].mean(), atol=0.1, rtol=0)
    torch.testing.assert_close(maps[3], F.interpolate(stages[3], size=(4, 6), mode="bilinear"))


@torch.no_grad()
def test_the_class_token_is_the_normed_average_and_only_the_last_stage_has_a_norm(convnext, images):
    raw, normed = convnext(images, tap_norm=False), convnext(images)
    expected = convnext.norm(convnext.stage_maps(images)[-1].mean(dim=(2, 3)))
    torch.testing.assert_close(normed.cls_token, expected)
    assert torch.equal(raw.cls_token, normed.cls_token)
    assert all(torch.equal(a, b) for a, b in zip(raw.maps[:3], normed.maps[:3], strict=True))
    assert not torch.allclose(raw.maps[3], normed.maps[3])


@torch.no_grad()
def test_a_side_that_no_stage_divides_is_extended_by_its_last_pixels(convnext):
    image = torch.randn(1, 3, 48, 16)
    extended = F.pad(image, (0, 16, 0, 16), mode="replicate")
    for ours, whole in zip(convnext(image).maps, convnext(extended).maps, strict=True):
        assert ours.shape[2:] == (3, 1)
        torch.testing.assert_close(ours, whole[:, :, :3, :1])


@torch.no_grad()
def test_memory_order_changes_nothing(convnext, images):
    expected = convnext(images).maps
    convnext.to(memory_format=torch.channels_last)
    for ours, theirs in zip(convnext(images.to(memory_format=torch.channels_last)).maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, millions", [("tiny", 28.6), ("small", 50.2), ("base", 88.6), ("large", 197.8)])
def test_published_sizes_are_those_of_the_table(name, millions):
    config = BACKBONES[f"dinov3_convnext_{name}"]
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in build_backbone(config).parameters())
    classifier = 1000 * (config.dims[-1] + 1)  # which published counts of this family include
    assert (num_parameters + classifier) / 1e6 == pytest.approx(millions, abs=0.05)


# Training


def test_gradient_checkpointing_gives_the_same_gradients(convnext, images):
    gradients = []
    for checkpointing in (False, True):
        convnext.gradient_checkpointing = checkpointing
        loss = convnext(images).maps[-1].square().sum()
        gradients.append(torch.autograd.grad(loss, convnext.stages[0][0].dwconv.weight)[0])
    torch.testing.assert_close(*gradients)


def test_dropped_branches_leave_images_as_they_were_and_only_in_training(convnext, images):
    block, x = convnext.stages[2][0], torch.randn(4, 24, 5, 7)
    assert torch.equal(block(x, 0.5), block(x))
    block.train()
    unchanged = (block(x, 0.5) == x).flatten(1).all(1)
    assert unchanged.sum() == 2


def build(adaptation, convnext, **settings):
    config = ModelConfig(backbone="convnext", decoder="linear", num_outputs=2, adaptation=adaptation, **settings)
    return build_segmenter(config, convnext)


@pytest.mark.parametrize("last_k, stages", [(1, {3}), (2, {2, 3})])
def test_the_last_stages_train_with_their_downsampling_and_the_norm(convnext, last_k, stages):
    segmenter = build("last_k", convnext, last_k=last_k)
    trained = {name.removeprefix("backbone.") for name in segmenter.trainable_state() if name.startswith("backbone.")}
    expected = {name for name, _ in convnext.named_parameters() if convnext.level(name) in stages}
    assert trained == expected
    assert {"norm.weight", "downsample_layers.3.0.weight"} <= trained
    assert convnext.stages[3].training and not convnext.stages[1].training


@pytest.mark.parametrize("adaptation, share", [("frozen", 0), ("full", 1)])
def test_all_or_none_of_it_trains(convnext, adaptation, share):
    segmenter = build(adaptation, convnext)
    assert all(p.requires_grad == bool(share) for p in convnext.parameters())
    assert segmenter(torch.randn(1, 1, 2, 20, 33)).logits.shape == (1, 2, 2, 20, 33)


def test_lora_is_for_transformers_and_what_works_is_named(convnext):
    with pytest.raises(ConfigError, match=r"lora does not go with backbone .*Fix:.*frozen, last_k or full"):
        build("lora", convnext)


@pytest.mark.parametrize("decoder", ["tpa_sad", "primus"])
def test_decoders_of_four_taps_take_stages_of_different_widths(convnext, decoder):
    config = ModelConfig(backbone="convnext", decoder=decoder, decoder_width=8, num_outputs=2)
    logits = build_segmenter(config, convnext)(torch.randn(1, 1, 2, 20, 33)).logits
    assert logits.shape == (1, 2, 2, 20, 33)
    logits.sum().backward()


# Layouts


def as_official(state):
    """With the module tree's second name of the final norm."""
    return state | {f"norms.3.{kind}": state[f"norm.{kind}"].clone() for kind in ("weight", "bias")}


def as_hugging_face(state, *, prefix="model."):
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^downsample_layers\.(\d)\.", rf"{prefix}stages.\1.downsample_layers.", key)
        key = re.sub(r"^stages\.(\d)\.(\d+)\.norm\.", rf"{prefix}stages.\1.layers.\2.layer_norm.", key)
        key = re.sub(r"^stages\.(\d)\.(\d+)\.", rf"{prefix}stages.\1.layers.\2.", key)
        key = re.sub(r"^norm\.", "layer_norm.", key).replace("dwconv", "depthwise_conv")
        renamed[key.replace("pwconv", "pointwise_conv")] = value
    return renamed


def as_timm(state):
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^downsample_layers\.0\.", "stem.", key)
        key = re.sub(r"^downsample_layers\.(\d)\.", r"stages.\1.downsample.", key)
        key = re.sub(r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2.", key)
        key = re.sub(r"^norm\.", "head.norm.", key).replace("dwconv", "conv_dw")
        renamed[re.sub(r"\.pwconv([12])\.", r".mlp.fc\1.", key)] = value
    return renamed


LAYOUTS = {
    "official ConvNeXt": as_official,
    "Hugging Face ConvNeXt": as_hugging_face,
    "Hugging Face ConvNeXt, 4.x": lambda state: as_hugging_face(state, prefix=""),
    "timm ConvNeXt": as_timm,
    "teacher, official ConvNeXt": lambda state: {f"backbone.{key}": value for key, value in state.items()},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_function(convnext, images, name):
    state = convert(LAYOUTS[name](convnext.state_dict()))
    assert state.layout == name.partition(",")[0] if "4.x" in name else name
    assert state.config == SMALL.model_copy(update={"layer_scale_init": 1e-6})
    again = backbone_from_state(state.config, state.tensors)
    assert torch.equal(again(images).maps[-1], convnext(images).maps[-1])


def test_the_epsilon_of_a_hub_config_is_taken(convnext):
    state = convert(as_hugging_face(convnext.state_dict()), hub_config={"layer_norm_eps": 1e-5})
    assert state.config.norm_eps == 1e-5


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_tensor_missing_from_any_layout_is_noticed(convnext, name):
    exported = LAYOUTS[name](convnext.state_dict())
    for key in exported:
        if not key.startswith("norms.3."):
            with pytest.raises(WeightsError):
                convert({other: value for other, value in exported.items() if other != key})


def test_a_second_norm_that_is_another_is_not_dropped_in_silence(convnext):
    exported = as_official(convnext.state_dict())
    exported["norms.3.bias"] = exported["norms.3.bias"] + 1
    with pytest.raises(WeightsError, match=r"dinov3_convnext of 1-1-2-1 blocks.*unexpected: norms\.3\.bias"):
        convert(exported)


def test_a_classifier_is_refused_with_the_way_to_load_other_convnexts(convnext):
    exported = as_timm(convnext.state_dict()) | {"head.fc.weight": torch.zeros(5, 32)}
    with pytest.raises(WeightsError, match=r"1 tensors unexpected: head\.fc\.weight"):
        convert(exported)


def test_a_file_loads_is_imported_and_carries_its_licence(convnext, images, tmp_path):
    path = tmp_path / "cnn.safetensors"
    save_file(as_official(convnext.state_dict()), path)
    loaded, card = load_backbone(path)
    assert torch.equal(loaded(images).maps[0], convnext(images).maps[0])
    assert (card.layout, card.licence) == ("official ConvNeXt", "DINOv3 License")
    assert card.num_parameters == sum(p.numel() for p in convnext.parameters())
    import_weights(path, tmp_path / "weights", "cnn")
    again, other = load_backbone("cnn", weights_folder=tmp_path / "weights")
    assert torch.equal(again(images).maps[0], convnext(images).maps[0])
    assert (other.layout, other.source_digest) == (card.layout, card.source_digest)


def test_random_ones_have_a_name():
    settings = {"depths": "[1,1,1,1]", "dims": "[8,8,8,8]"}
    backbone, card = load_backbone("random:dinov3_convnext_tiny", settings=settings)
    assert isinstance(backbone, ConvNeXt)
    assert (card.config.dims, card.licence) == ((8, 8, 8, 8), "none (random weights)")
