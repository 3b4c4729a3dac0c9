"""Encoders of the timm library behind the seam, and what is said where it is absent or cannot do it."""

import socket
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from voxdino.core.errors import EXIT_RESOURCE, ConfigError, ResourceError, WeightsError
from voxdino.models import hub
from voxdino.models.backbones.timm_bridge import TimmBackbone, TimmConfig
from voxdino.models.compose import build_segmenter
from voxdino.models.segmenter import ModelConfig
from voxdino.models.weights import import_weights, inspect_weights, load_backbone, pull_weights

CNN = "mobilenetv3_small_050"
VIT = "vit_tiny_patch16_224"


def build(model):
    torch.manual_seed(2)
    return TimmBackbone(TimmConfig(model=model)).eval()


# Without the library


@pytest.mark.parametrize("source", [f"random:timm:{CNN}", f"timm:{CNN}@FILE"])
def test_where_timm_is_missing_the_extra_is_named(monkeypatch, tmp_path, source):
    monkeypatch.setitem(sys.modules, "timm", None)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ResourceError, match=r"pip install 'voxdino\[timm\]'") as caught:
        load_backbone(source.replace("FILE", str(tmp_path / "a.safetensors")))
    assert caught.value.exit_code == EXIT_RESOURCE
    assert caught.value.where == f"timm:{CNN}"


def test_weights_that_are_not_here_are_not_fetched_but_asked_for(tmp_path):
    with pytest.raises(WeightsError, match=r"voxdino weights pull timm:resnet18\.a1_in1k; or .*@FILE; or random:timm:"):
        load_backbone("timm:resnet18.a1_in1k", weights_folder=tmp_path)


def test_a_name_is_timms_own_repository_on_the_hub():
    assert hub.find_copy("timm:resnet18.a1_in1k") == hub.HubCopy("timm/resnet18.a1_in1k")
    assert hub.find_copy("timm:a/b") is None


@pytest.mark.parametrize("name", ["hf-hub:a/b", "a/b", "../x", "", "Big"])
def test_only_plain_names_are_names(name):
    with pytest.raises((ConfigError, ResourceError), match="string should match pattern"):
        load_backbone(f"random:timm:{name}")


# With it


@torch.no_grad()
def test_a_transformer_has_its_blocks_a_network_of_stages_its_stages(timm):
    vit, cnn = build(VIT), build(CNN)
    assert (vit.depth, vit.patch_size, vit.default_taps()) == (12, 16, (2, 5, 8, 11))
    assert (cnn.depth, cnn.patch_size, cnn.default_taps()) == (5, 16, (1, 2, 3, 4))
    assert build("vit_small_patch14_dinov2").patch_size == 14
    features = cnn(torch.randn(1, 3, 48, 80))  # 32 divides neither side
    assert [tuple(one.shape[2:]) for one in features.maps] == [(3, 5)] * 4


@torch.no_grad()
def test_maps_are_timms_own_and_the_norm_is_a_choice(timm):
    vit, images = build(VIT), torch.randn(2, 3, 32, 48)
    for norm in (True, False):
        expected = vit.model.forward_intermediates(images, indices=[4, 11], norm=norm, intermediates_only=True)
        for ours, theirs in zip(vit(images, taps=(4, 11), tap_norm=norm).maps, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(vit(images).maps[-1], vit(images, tap_norm=False).maps[-1])
    torch.testing.assert_close(vit(images).cls_token, vit.model(images))


def test_batch_norms_are_fixed_whatever_trains(timm):
    cnn, images = build(CNN), torch.randn(4, 3, 32, 32)
    before = {name: value.clone() for name, value in cnn.state_dict().items()}
    with torch.no_grad():
        expected = cnn.eval()(images).maps[0]
        torch.testing.assert_close(cnn.train()(images).maps[0], expected)
    assert all(torch.equal(value, before[name]) for name, value in cnn.state_dict().items())


def test_any_encoder_goes_with_a_decoder_and_trains(timm):
    for model, decoder in ((CNN, "tpa_sad"), (VIT, "linear")):
        backbone = build(model)
        config = ModelConfig(
            backbone=f"timm:{model}", decoder=decoder, decoder_width=8, num_outputs=2, adaptation="last_k", last_k=1
        )
        segmenter = build_segmenter(config, backbone)
        logits = segmenter(torch.randn(1, 1, 2, 20, 33)).logits
        assert logits.shape == (1, 2, 2, 20, 33)
        logits.sum().backward()
        trained = {name for name in segmenter.trainable_state() if name.startswith("backbone.")}
        assert trained == {
            f"backbone.{name}" for name, _ in backbone.named_parameters() if backbone.level(name) == backbone.depth - 1
        }


@pytest.mark.parametrize(
    "model, words",
    [
        ("mobilenet_small_050", r"has no model 'mobilenet_small_050'\. Did you mean"),
        ("resnet18.nobodys", r"timm:resnet18\.nobodys: .*leave out the part after the point"),
        ("vgg11", r"timm:vgg11: gives no intermediate features"),
        ("mixer_s32_224", r"timm:mixer_s32_224: takes no images of other sizes than it was made for \(.*\)"),
    ],
)
def test_models_that_cannot_are_refused_with_the_reason(timm, model, words):
    with pytest.raises(ConfigError, match=words):
        TimmBackbone(TimmConfig(model=model))


@pytest.fixture
def file(timm, tmp_path):
    """As published: with a classifier, batch norms that count."""
    torch.manual_seed(3)
    path = tmp_path / "model.safetensors"
    save_file(timm.create_model(CNN, pretrained=False).state_dict(), path)
    return path


@torch.no_grad()
def test_a_local_file_loads_without_its_classifier_and_without_a_network(file, monkeypatch):
    def deny(*_, **__):
        raise AssertionError("connects")

    monkeypatch.setattr(socket, "socket", deny)
    monkeypatch.setattr(socket, "create_connection", deny)
    backbone, card = load_backbone(f"timm:{CNN}@{file}")
    assert torch.equal(backbone.state_dict()["model.conv_stem.weight"], load_file(file)["conv_stem.weight"])
    assert not any("classifier" in name for name in backbone.state_dict())
    assert card.config == TimmConfig(model=CNN)
    assert (card.name, card.layout, card.source, card.licence) == (CNN, "timm", "model.safetensors", "Apache-2.0")
    assert card.notes == ("2 tensors of the classifier dropped",)


def test_files_of_other_models_and_incomplete_ones_are_refused(file, tmp_path):
    with pytest.raises(WeightsError, match=r"does not fit a timm model resnet18: .*missing"):
        inspect_weights(f"timm:resnet18@{file}")
    state = load_file(file)
    for name, changed in (
        ("short", {key: value for key, value in state.items() if key != "bn1.running_var"}),
        ("long", state | {"extra.weight": torch.zeros(1)}),
        ("shape", state | {"conv_stem.weight": torch.zeros(1)}),
    ):
        save_file(changed, tmp_path / f"{name}.safetensors")
        with pytest.raises(WeightsError, match=r"1 tensors (missing|unexpected|of another shape)"):
            load_backbone(f"timm:{CNN}@{tmp_path / name}.safetensors")


@torch.no_grad()
def test_imported_weights_are_found_by_the_models_name(file, tmp_path):
    images, folder = torch.randn(1, 3, 32, 32), tmp_path / "weights"
    expected = load_backbone(f"timm:{CNN}@{file}")[0](images).maps[-1]
    import_weights(f"timm:{CNN}@{file}", folder)
    for source in (CNN, f"timm:{CNN}"):
        backbone, card = load_backbone(source, weights_folder=folder)
        torch.testing.assert_close(backbone(images).maps[-1], expected)
        assert card.config == TimmConfig(model=CNN)


def test_pulling_by_timms_name_fetches_its_repository(file, tmp_path):
    def download(repository, name, folder):
        assert repository == f"timm/{CNN}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(file.read_bytes() if name == "model.safetensors" else b"{}")
        return folder / name

    card = pull_weights(f"timm:{CNN}", tmp_path / "weights", download=download)
    assert (card.name, card.source) == (CNN, f"timm/{CNN}")
    assert isinstance(load_backbone(f"timm:{CNN}", weights_folder=tmp_path / "weights")[0], TimmBackbone)


@torch.no_grad()
def test_dinov3_convnexts_of_timm_compute_the_same_as_ours(timm, tmp_path):
    torch.manual_seed(4)
    theirs = build("convnext_tiny")
    for name, value in theirs.model.named_parameters():
        if name.endswith("gamma"):
            value.fill_(0.3)
    path = tmp_path / "convnext.safetensors"
    save_file(theirs.model.state_dict(), path)
    ours, card = load_backbone(path)
    assert card.layout == "timm ConvNeXt"
    images = torch.randn(1, 3, 64, 96)
    for tap, one in enumerate(ours(images, tap_norm=False).maps):
        torch.testing.assert_close(one, theirs(images, taps=(tap,), tap_norm=False).maps[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(images).cls_token, theirs(images).cls_token, rtol=1e-4, atol=1e-4)
