"""Backbones of every published layout load completely, or are refused with the first names that do not fit."""

import re

import pytest
import torch

from voxdino.core.errors import ConfigError, UsageError, WeightsError
from voxdino.models.backbones.vit import ViT
from voxdino.models.layouts import convert

HEADS = {"num_heads": "2"}  # 24 channels in 2 heads: not the 64 wide heads of published models


def as_hugging_face(state, *, prefix="model.layer."):
    """Our state in the names of transformers 5.x (4.x: prefix "layer.")."""
    gated = any(".mlp.w1." in key for key in state)
    names = {"w1": "gate_proj", "w2": "up_proj", "w3": "down_proj"} if gated else {"fc1": "up_proj", "fc2": "down_proj"}
    renamed = {}
    for key, value in state.items():
        if key.endswith((".bias_mask", "rope_embed.periods")):
            continue
        key = re.sub(r"^(cls_token|mask_token|patch_embed)", r"embeddings.\1", key)
        key = key.replace("patch_embed.proj", "patch_embeddings").replace(
            "storage_tokens", "embeddings.register_tokens"
        )
        key = re.sub(r"^blocks\.", prefix, key).replace("attn.proj", "attention.o_proj")
        key = re.sub(r"\.ls([12])\.gamma", r".layer_scale\1.lambda1", key)
        key = re.sub(r"\.mlp\.(\w+)\.", lambda m: f".mlp.{names[m[1]]}.", key)
        if ".attn.qkv." in key:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                if not (part == "k" and key.endswith("bias")):
                    renamed[key.replace("attn.qkv", f"attention.{part}_proj")] = third.clone()
        else:
            renamed[key] = value[None] if key == "embeddings.mask_token" else value
    return renamed


def as_timm(state):
    """Our state in the names of timm's Eva."""
    gated = any(".mlp.w1." in key for key in state)
    renamed = {}
    for key, value in state.items():
        if key.endswith((".bias_mask", "rope_embed.periods", "mask_token")):
            continue
        key = re.sub(r"\.ls([12])\.gamma", r".gamma_\1", key.replace("storage_tokens", "reg_token"))
        if gated:
            key = key.replace("mlp.w1", "mlp.fc1_g").replace("mlp.w2", "mlp.fc1_x").replace("mlp.w3", "mlp.fc2")
        if key.endswith("attn.qkv.bias"):
            renamed[key.replace("qkv.bias", "q_bias")], _, renamed[key.replace("qkv.bias", "v_bias")] = value.chunk(3)
        else:
            renamed[key] = value
    return renamed


def as_teacher(state):
    heads = {"dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.last_layer.weight": torch.zeros(2, 2)}
    return {f"backbone.{key}": value for key, value in state.items()} | heads


LAYOUTS = {
    "official DINOv3": dict,
    "Hugging Face DINOv3": as_hugging_face,
    "Hugging Face 4.x": lambda state: as_hugging_face(state, prefix="layer."),
    "timm DINOv3": as_timm,
    "teacher": as_teacher,
}


def assert_same_function(state, vit):
    other = ViT.from_state(state.config, state.tensors)
    images = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(other(images).maps[-1], vit(images).maps[-1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    "facts", [{}, {"ffn": "swiglu"}, {"qkv_bias": False, "mask_k_bias": False}, {"num_registers": 0}]
)
def test_every_layout_gives_the_same_function(new_vit, name, facts):
    vit = new_vit(**facts)
    with torch.no_grad():
        for block in vit.blocks:  # a key bias has no place in the other layouts; ours is masked
            if block.attn.qkv.bias is not None:
                block.attn.qkv.bias[24:48] = 0
    exported = LAYOUTS[name](vit.state_dict())
    if "num_registers" in facts and name == "timm DINOv3":
        assert "reg_token" not in exported
    state = convert(exported, settings=HEADS)
    assert name.split()[0].lower() in state.layout.lower()
    assert_same_function(state, vit)
    changed = state.config.model_copy(update={"rope_dtype": "float32", "norm_eps": 1e-5})
    assert changed == vit.config


def test_heads_follow_from_the_rotary_periods(vit):
    assert convert(vit.state_dict()).config.num_heads == 2


def test_heads_follow_from_the_hub_config(vit):
    config = {"num_attention_heads": 2, "layer_norm_eps": 1e-6, "rope_theta": 50.0, "model_type": "dinov3_vit"}
    state = convert(as_hugging_face(vit.state_dict()), hub_config=config)
    assert (state.config.num_heads, state.config.norm_eps, state.config.rope_base) == (2, 1e-6, 50.0)


def test_heads_that_cannot_be_known_are_asked_for(vit):
    with pytest.raises(WeightsError, match=r"24 channels cannot be split into heads of 64 Fix: .*num_heads=N"):
        convert(as_timm(vit.state_dict()))


def test_stored_periods_are_used_as_they_are(vit):
    state = vit.state_dict() | {"rope_embed.periods": torch.tensor([1.0, 3.15625, 11.0])}
    assert convert(state).tensors["rope_embed.periods"].tolist() == [1.0, 3.15625, 11.0]


def test_a_norm_of_self_supervised_training_is_kept(new_vit):
    vit = new_vit(local_cls_norm=True)
    state = convert(vit.state_dict())
    assert state.config.local_cls_norm
    assert "local_cls_norm.weight" in state.tensors


def test_a_medical_teacher_checkpoint_gets_its_options_and_says_so(new_vit):
    vit = new_vit(qkv_bias=False, mask_k_bias=False, rope_dtype="bfloat16", norm_eps=1e-6)
    state = convert(as_teacher(vit.state_dict()))
    assert (state.config.norm_eps, state.config.rope_dtype) == (1e-6, "bfloat16")
    assert state.notes == (
        "2 tensors of self-supervision heads dropped (dino_head, ibot_head)",
        "read as a MedDINOv3 checkpoint: norm_eps 1e-6, rotary positions in bfloat16",
    )
    assert_same_function(state, vit)
    assert convert(as_teacher(vit.state_dict()), settings={"norm_eps": "1e-5"}).config.norm_eps == 1e-5


def test_official_dinov2_loads_with_registers_and_joined_gates(new_vit, dinov2_facts):
    vit = new_vit(**dinov2_facts | {"num_registers": 4, "ffn": "swiglu"})
    state = dict(vit.state_dict())
    state["register_tokens"] = state.pop("storage_tokens")
    for index in range(3):
        for kind in ("weight", "bias"):
            halves = [state.pop(f"blocks.{index}.mlp.{part}.{kind}") for part in ("w1", "w2")]
            state[f"blocks.{index}.mlp.w12.{kind}"] = torch.cat(halves)
    converted = convert(state, settings=HEADS)
    assert converted.layout == "official DINOv2"
    assert converted.config == vit.config
    assert_same_function(converted, vit)


@pytest.mark.parametrize("registers", [0, 4])
def test_timm_dinov2_loads_with_and_without_a_position_of_the_class_token(new_vit, dinov2_facts, registers):
    vit = new_vit(**dinov2_facts | {"num_registers": registers})
    state = {key: value for key, value in vit.state_dict().items() if key != "mask_token"}
    if registers:
        state["reg_token"] = state.pop("storage_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    converted = convert(state, settings=HEADS)
    assert converted.layout == "timm DINOv2"
    assert converted.config == vit.config
    assert_same_function(converted, vit)


def test_half_precision_is_cast_and_noted(vit):
    state = convert({key: value.half() for key, value in vit.state_dict().items()})
    assert state.notes == ("cast from float16 to float32",)
    assert {value.dtype for value in state.tensors.values()} == {torch.float32}


def test_views_into_one_storage_become_tensors_of_their_own(vit):
    state = dict(vit.state_dict())
    large = torch.randn(2, 24)
    state["norm.weight"], state["norm.bias"] = large[0], large[1]
    tensors = convert(state).tensors
    assert tensors["norm.weight"].untyped_storage().data_ptr() != tensors["norm.bias"].untyped_storage().data_ptr()


# Refusals


def test_missing_tensors_are_named(vit):
    state = {key: value for key, value in vit.state_dict().items() if not key.startswith("blocks.1.")}
    words = r"w.safetensors: does not fit a dinov3 ViT of 24 channels and 3 blocks, .*: 15 tensors missing: blocks\.1\."
    with pytest.raises(WeightsError, match=words):
        convert(state, where="w.safetensors")


def test_unexpected_tensors_are_named(vit):
    with pytest.raises(WeightsError, match=r"1 tensors unexpected: decode_head\.weight"):
        convert(vit.state_dict() | {"decode_head.weight": torch.zeros(1)})


def test_misshaped_tensors_are_named_with_both_shapes(vit):
    with pytest.raises(
        WeightsError, match=r"1 tensors of another shape: blocks\.2\.attn\.proj\.weight \(24 x 20, not 24 x 24\)"
    ):
        convert(vit.state_dict() | {"blocks.2.attn.proj.weight": torch.zeros(24, 20)})


@pytest.mark.parametrize("layout", ["official DINOv3", "Hugging Face DINOv3", "timm DINOv3", "teacher"])
def test_any_tensor_missing_from_any_layout_is_noticed(new_vit, layout):
    exported = LAYOUTS[layout](new_vit(depth=2).state_dict())
    optional = {"dino_head.mlp.0.weight", "ibot_head.last_layer.weight"}
    optional |= {
        "storage_tokens",
        "reg_token",
        "embeddings.register_tokens",
        "backbone.storage_tokens",
    }  # of the family
    for key in exported.keys() - optional:
        with pytest.raises(WeightsError):
            convert({name: value for name, value in exported.items() if name != key}, settings=HEADS)


def test_biases_of_values_alone_are_not_dropped_in_silence(vit):
    exported = as_hugging_face(vit.state_dict())
    with pytest.raises(WeightsError, match=r"unexpected: blocks\.0\.attn\.v_proj\.bias"):
        convert({key: value for key, value in exported.items() if "q_proj.bias" not in key}, settings=HEADS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(vit, value):
    vit.state_dict()["blocks.1.norm2.bias"][3] = value
    with pytest.raises(WeightsError, match=r"1 tensors hold NaN or infinity: blocks\.1\.norm2\.bias"):
        convert(vit.state_dict())


def test_integers_are_refused(vit):
    with pytest.raises(WeightsError, match=r"no floating-point numbers: norm\.bias"):
        convert(vit.state_dict() | {"norm.bias": torch.zeros(24, dtype=torch.int64)})


@pytest.mark.parametrize(
    "tensors, words",
    [
        (
            {"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)},
            r"no layout we know; it begins with fc\.bias, fc\.weight",
        ),
        (
            {"downsample_layers.0.0.weight": torch.zeros(2)},
            "not a complete ConvNeXt: downsample_layers.0.0.weight has shape",
        ),
        ({}, "no tensor at all"),
        ({"storage_tokens": torch.zeros(1, 4, 8)}, "cls_token is missing"),
    ],
)
def test_other_architectures_are_named(tensors, words):
    with pytest.raises(WeightsError, match=words):
        convert(tensors)


def test_a_stored_configuration_that_does_not_fit_is_refused_before_it_is_built(vit):
    hostile = vit.config.model_copy(update={"depth": 10**9})
    with pytest.raises(WeightsError, match="it holds 53 tensors"):
        convert(vit.state_dict(), own_config=hostile)
    hostile = vit.config.model_copy(update={"ffn_hidden": 2**62})
    with pytest.raises(WeightsError, match=r"cannot be built|of another shape"):
        convert(vit.state_dict(), own_config=hostile)


def test_positions_that_are_no_square_are_asked_for(new_vit, dinov2_facts):
    vit = new_vit(**dinov2_facts | {"position_grid": (2, 3)})
    with pytest.raises(WeightsError, match=r"6 positions are not a square grid Fix: .*position_grid"):
        convert(vit.state_dict(), settings=HEADS)
    converted = convert(vit.state_dict(), settings=HEADS | {"position_grid": "[2, 3]"})
    assert_same_function(converted, vit)


def test_unknown_settings_name_the_nearest(vit):
    with pytest.raises(UsageError, match="Did you mean 'num_heads'"):
        convert(vit.state_dict(), settings={"num_head": "2"})


def test_a_hub_config_that_contradicts_the_shapes_is_refused(vit):
    with pytest.raises(ConfigError, match="not a multiple of num_heads 7"):
        convert(as_hugging_face(vit.state_dict()), hub_config={"num_attention_heads": 7})
