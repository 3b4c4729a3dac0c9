"""Backbones written in other layouts read back to the same bits, and compute the same in the libraries they are for."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from voxdino.core.errors import ConfigError, UsageError, WeightsError
from voxdino.models.backbones.build import backbone_from_state
from voxdino.models.backbones.convnext import ConvNeXt, ConvNeXtConfig
from voxdino.models.backbones.no_backbone import NoBackboneConfig
from voxdino.models.backbones.timm_bridge import TimmConfig
from voxdino.models.export_configs import TIMM_NAMES
from voxdino.models.export_layouts import LAYOUTS, export_backbone, to_hugging_face, to_official, to_timm
from voxdino.models.layouts import convert
from voxdino.models.registry import BACKBONES
from voxdino.models.weights import inspect_weights, load_backbone, write_backbone
from voxdino.models.weights_card import PretrainingFacts, pack_seen

VITS = {
    "plain": {},
    "swiglu": {"ffn": "swiglu"},
    "no bias": {"qkv_bias": False, "mask_k_bias": False},
    "no registers": {"num_registers": 0},
    "as MedDINOv3": {"qkv_bias": False, "mask_k_bias": False, "norm_eps": 1e-6, "rope_dtype": "bfloat16"},
    "five planes": {"in_planes": 5},
}
DINOV2S = {
    "plain": {},
    "registers": {"num_registers": 4},
    "swiglu": {"ffn": "swiglu", "ffn_hidden": 64},
}


def without_silent_parts(vit):
    """Nothing in it that another layout has no place for."""
    with torch.no_grad():
        vit.mask_token.zero_()
        for block in vit.blocks:
            if block.attn.qkv.bias_mask is not None:
                block.attn.qkv.bias.mul_(block.attn.qkv.bias_mask)
    return vit


@pytest.fixture
def vits(new_vit, dinov2_facts):
    """Backbones by name, built when asked for."""

    def make(family, name):
        facts = VITS[name] if family == "dinov3" else dinov2_facts | {"ffn_hidden": 48} | DINOV2S[name]
        return without_silent_parts(new_vit(**facts))

    return make


@pytest.fixture
def convnext():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = ConvNeXtConfig(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), layer_scale_init=0.3)
        return ConvNeXt(config).eval()


def read_back(exported):
    return convert(exported.tensors, hub_config=exported.config, settings=exported.settings)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


# Laws


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", VITS)
def test_dinov3_comes_back_bit_for_bit(vits, layout, name):
    vit = vits("dinov3", name)
    state = read_back(LAYOUTS[layout](vit.state_dict(), vit.config))
    assert_same(state.tensors, vit.state_dict())
    assert state.config == vit.config.model_copy(update={"layer_scale_init": state.config.layer_scale_init})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DINOV2S)
def test_dinov2_comes_back_bit_for_bit(vits, layout, name):
    vit = vits("dinov2", name)
    exported = LAYOUTS[layout](vit.state_dict(), vit.config)
    state = read_back(exported)
    assert state.config == vit.config.model_copy(update={"layer_scale_init": state.config.layer_scale_init})
    if (layout, name) == ("timm", "registers"):  # one sum in place of its two parts
        again, images = backbone_from_state(state.config, state.tensors), torch.randn(1, 3, 12, 12)
        assert torch.equal(again(images).maps[-1], vit(images).maps[-1])
        assert any("position of the class token" in note for note in exported.notes)
    else:
        assert_same(state.tensors, vit.state_dict())
        assert exported.notes == ()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_convnexts_come_back_bit_for_bit(convnext, layout):
    state = read_back(LAYOUTS[layout](convnext.state_dict(), convnext.config))
    assert_same(state.tensors, convnext.state_dict())


@pytest.mark.parametrize("layout", ["huggingface", "timm"])
def test_what_has_no_place_is_said_and_changes_no_feature(new_vit, layout):
    vit = new_vit(local_cls_norm=True)
    exported = LAYOUTS[layout](vit.state_dict(), vit.config)
    told = "; ".join(exported.notes)
    assert "local_cls_norm" in told and "biases of keys, which are switched off, are not kept (3 blocks)" in told
    assert ("mask token" in told) == (layout == "timm" and bool(vit.mask_token.any()))
    state, images = read_back(exported), torch.randn(1, 3, 8, 12)
    assert torch.equal(backbone_from_state(state.config, state.tensors)(images).maps[0], vit(images).maps[0])
    assert_same(state.tensors, exported.kept)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exporting_leaves_the_backbone_and_gives_each_tensor_its_own_memory(new_vit, layout):
    vit = new_vit()
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    tensors = LAYOUTS[layout](vit.state_dict(), vit.config).tensors
    assert_same(vit.state_dict(), before)
    assert len({value.untyped_storage().data_ptr() for value in tensors.values()}) == len(tensors)
    assert all(value.untyped_storage().nbytes() == 4 * value.numel() for value in tensors.values())


def test_what_a_file_cannot_say_is_told(vits):
    medical, hub = vits("dinov3", "as MedDINOv3"), to_hugging_face
    assert to_official(medical.state_dict(), medical.config).settings == {
        "norm_eps": "1e-06",
        "rope_dtype": "bfloat16",
    }
    assert hub(medical.state_dict(), medical.config).settings == {"rope_dtype": "bfloat16"}
    assert to_timm(medical.state_dict(), medical.config).settings["num_heads"] == "2"
    plain = vits("dinov3", "plain")
    assert hub(plain.state_dict(), plain.config).settings == {}


def test_the_official_layout_keeps_all_of_it(new_vit):
    vit = new_vit(local_cls_norm=True, mask_k_bias=False)
    exported = to_official(vit.state_dict(), vit.config)
    assert exported.notes == () and exported.config is None
    assert_same(exported.tensors, vit.state_dict())


def test_key_biases_that_work_go_to_hugging_face_and_not_to_timm(new_vit):
    vit = new_vit(mask_k_bias=False)
    exported = to_hugging_face(vit.state_dict(), vit.config)
    assert exported.config["key_bias"] and "layer.0.attention.k_proj.bias" in exported.tensors
    assert_same(read_back(exported).tensors, vit.state_dict())
    with pytest.raises(ConfigError, match=r"timm's DINOv3 models have no bias of the keys"):
        to_timm(vit.state_dict(), vit.config)


def test_published_sizes_have_a_model_in_timm_and_others_have_none(vit):
    assert set(TIMM_NAMES) == {name for name in BACKBONES if name.startswith("dino")}
    assert to_timm(vit.state_dict(), vit.config).config is None


# Refusals


@pytest.mark.parametrize("layout", ["huggingface", "timm"])
def test_unusual_rotary_periods_have_a_place_in_the_official_layout_only(vit, layout):
    state = vit.state_dict() | {"rope_embed.periods": torch.tensor([1.0, 3.15625, 11.0])}
    with pytest.raises(WeightsError, match=r"its rotary periods are not those of base 100 .* official layout"):
        LAYOUTS[layout](state, vit.config)
    assert to_official(state, vit.config).tensors["rope_embed.periods"].tolist() == [1.0, 3.15625, 11.0]


@pytest.mark.parametrize("layout", ["huggingface", "timm"])
def test_positions_that_are_no_square_go_to_the_official_layout_only(new_vit, dinov2_facts, layout):
    vit = new_vit(**dinov2_facts | {"position_grid": (2, 3)})
    with pytest.raises(ConfigError, match="grid of 2 x 3 are no square Fix: use the official"):
        LAYOUTS[layout](vit.state_dict(), vit.config)
    exported = to_official(vit.state_dict(), vit.config)
    assert exported.settings["position_grid"] == "[2, 3]"
    assert_same(read_back(exported).tensors, vit.state_dict())


def test_widths_that_transformers_cannot_say_are_refused(new_vit, dinov2_facts):
    vit = new_vit(**dinov2_facts | {"ffn_hidden": 40})
    with pytest.raises(ConfigError, match="40 is no whole multiple of 24 channels"):
        to_hugging_face(vit.state_dict(), vit.config)


@pytest.mark.parametrize("layout", ["official", "huggingface"])
def test_models_of_timm_and_none_at_all_are_refused(layout):
    with pytest.raises(ConfigError, match=r"no place for a timm model resnet18 Fix: export it in the timm layout"):
        LAYOUTS[layout]({}, TimmConfig(model="resnet18"))
    with pytest.raises(ConfigError, match=r"no place for a none"):
        LAYOUTS[layout]({}, NoBackboneConfig())


# Folders


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_loads_as_the_backbone_and_says_what_it_is(tmp_path, layout):
    expected, card = load_backbone("random:tiny")
    summary = export_backbone("random:tiny", tmp_path / "out", layout)
    assert sorted(summary.files) == sorted(path.name for path in (tmp_path / "out").iterdir())
    again, _ = load_backbone(tmp_path / "out" / summary.files[0], settings=summary.settings)
    images = torch.randn(1, 3, 32, 48)
    assert torch.equal(again(images).maps[-1], expected(images).maps[-1])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "none (random weights)" in text and card.config.summary() in text and card.source_digest in text
    assert str(tmp_path) not in text
    with pytest.raises(UsageError, match="exists and is not empty"):
        export_backbone("random:tiny", tmp_path / "out", layout)


def test_an_official_file_is_a_flat_dictionary_of_tensors(tmp_path):
    export_backbone("random:tiny", tmp_path / "out", "official")
    state = torch.load(tmp_path / "out" / "random-tiny.pth", weights_only=True)
    assert type(state) is dict and all(isinstance(value, torch.Tensor) for value in state.values())
    assert_same(state, load_backbone("random:tiny")[0].state_dict())


def test_a_layout_nobody_knows_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(UsageError, match=r"unknown layout 'hugging_face'\. Did you mean 'huggingface'"):
        export_backbone("random:tiny", tmp_path / "out", "hugging_face")
    assert not (tmp_path / "out").exists()


def test_the_card_names_sources_counts_recipe_and_the_inherited_licence(tmp_path):
    backbone, card = load_backbone("random:tiny")
    facts = PretrainingFacts(
        recipe="adapt",
        start="dinov2_vits14",
        num_steps=1234,
        pool_digest="ab" * 32,
        sources={"liver": {"cases": 20, "slices": 700}, "lung": {"cases": 5, "slices": 90}},
        seen=pack_seen(["ab" * 32]),
    )
    ours = card.model_copy(update={"name": "mine", "licence": "Apache-2.0", "pretraining": facts, "source": "mine"})
    write_backbone(tmp_path / "mine.safetensors", backbone.state_dict(), ours)
    export_backbone(tmp_path / "mine.safetensors", tmp_path / "out", "huggingface")
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\nlicense: apache-2.0\nlibrary_name: transformers\n")
    assert "recipe `adapt`, 1234 steps" in text and "pretraining of `dinov2_vits14`" in text
    assert "| liver | 20 | 700 |" in text and "| all | 25 | 790 |" in text
    assert "Apache-2.0. It is inherited from the weights the pretraining started from (`dinov2_vits14`)" in text
    assert 'AutoModel.from_pretrained("FOLDER")' in text


# In the libraries they are for


@pytest.fixture(scope="module")
def transformers():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers
    except ImportError as error:
        pytest.skip(f"needs transformers ({error})")
    return transformers


@torch.no_grad()
def assert_same_in_transformers(transformers, kind, ours, images, folder, source):
    export_backbone(source, folder, "huggingface")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert set(report["missing_keys"]) <= {"embeddings.register_tokens"}  # an empty tensor where there are none
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    found = theirs.eval()(images)
    if isinstance(ours, ConvNeXt):
        torch.testing.assert_close(found.pooler_output, ours(images).cls_token, rtol=0, atol=1e-5)
        return
    tokens = ours.tokens(images)
    expected = torch.cat((tokens.cls[:, None], tokens.registers, tokens.patches), dim=1)
    torch.testing.assert_close(found.last_hidden_state, expected, rtol=0, atol=1e-5)


def write_own(backbone, path):
    _, card = load_backbone("random:tiny")
    write_backbone(path, backbone.state_dict(), card.model_copy(update={"config": backbone.config}))
    return path


@pytest.mark.parametrize("name", ["plain", "swiglu", "no bias", "no registers"])
def test_transformers_dinov3_computes_the_same(transformers, vits, tmp_path, name):
    vit = vits("dinov3", name)
    source = write_own(vit, tmp_path / "vit.safetensors")
    assert_same_in_transformers(
        transformers, "DINOv3ViTModel", vit, torch.randn(2, 3, 12, 20), tmp_path / "out", source
    )
    again, _ = load_backbone(tmp_path / "out")
    assert_same(again.state_dict(), vit.state_dict())


@pytest.mark.parametrize("name", DINOV2S)
def test_transformers_dinov2_computes_the_same(transformers, vits, tmp_path, name):
    vit = vits("dinov2", name)
    source = write_own(vit, tmp_path / "vit.safetensors")
    kind = "Dinov2WithRegistersModel" if name == "registers" else "Dinov2Model"
    assert_same_in_transformers(transformers, kind, vit, torch.randn(2, 3, 12, 12), tmp_path / "out", source)


def test_transformers_convnext_computes_the_same(transformers, convnext, tmp_path):
    source = write_own(convnext, tmp_path / "convnext.safetensors")
    images = torch.randn(2, 3, 64, 32)
    assert_same_in_transformers(transformers, "DINOv3ConvNextModel", convnext, images, tmp_path / "out", source)


@torch.no_grad()
def test_timm_computes_the_same_from_a_local_folder(timm, tmp_path):
    summary = export_backbone("random:dinov3_vits16", tmp_path / "out", "timm")
    assert json.loads((tmp_path / "out/config.json").read_text())["architecture"] == "vit_small_patch16_dinov3_qkvb"
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
    ours, _ = load_backbone("random:dinov3_vits16")
    images = torch.randn(1, 3, 256, 256)
    tokens = ours.tokens(images)
    expected = torch.cat((tokens.cls[:, None], tokens.registers, tokens.patches), dim=1)
    torch.testing.assert_close(theirs.forward_features(images), expected, rtol=0, atol=1e-4)
    assert set(load_file(tmp_path / "out" / summary.files[0])) == set(theirs.state_dict())
    assert inspect_weights(tmp_path / "out" / "model.safetensors").config.num_heads == 6
