"""Laws of the whole model: sizes, what trains and what stays frozen, saving what trained."""

import copy

import pytest
import torch

from voxdino.core.errors import CheckpointError, ConfigError, UsageError
from voxdino.models.compose import build_segmenter
from voxdino.models.registry import DECODERS
from voxdino.models.segmenter import ModelConfig

SETTINGS = {
    "frozen": {"adaptation": "frozen"},
    "lora": {"adaptation": "lora", "lora_rank": 2},
    "last_k": {"adaptation": "last_k", "last_k": 1},
    "full": {"adaptation": "full"},
}


@pytest.fixture
def build(new_vit):
    def build(vit=None, **settings):
        torch.manual_seed(3)
        config = ModelConfig(backbone="test", num_outputs=3, decoder_width=8, **settings)
        return build_segmenter(config, vit if vit is not None else new_vit())

    return build


def volume(channels=1, depth=4, height=9, width=14):
    return torch.randn(2, channels, depth, height, width)


@pytest.mark.parametrize("decoder", [name for name, kind in DECODERS.items() if kind.num_taps])
@pytest.mark.parametrize("size", [(9, 14), (16, 16), (5, 31)])
@pytest.mark.parametrize("magnification", [0.7, 1.0, 2.5])
def test_logits_have_the_size_of_the_crop(build, decoder, size, magnification):
    model = build(decoder=decoder, magnification=magnification)
    assert model(volume(1, 4, *size)).logits.shape == (2, 3, 4, *size)


def test_context_slices_give_no_logits(build):
    model = build(input_builder="neighbours", context_slices=1)
    assert model(volume(depth=5)).logits.shape == (2, 3, 3, 9, 14)


def test_one_picture_is_a_volume_of_one_slice(build):
    model = build(input_builder="rgb", num_channels=3)
    assert model(volume(3, 1)).logits.shape == (2, 3, 1, 9, 14)


@pytest.mark.parametrize(
    "size, magnification, expected",
    [
        ((9, 14), 1.0, (12, 16)),
        ((8, 8), 1.0, (8, 8)),
        ((10, 30), 0.4, (4, 12)),
        ((56, 57), 3.0, (168, 172)),
        ((100, 50), 2.2, (220, 112)),  # 100 * 2.2 / 4 is 55.00000000000001, and no patch more
    ],
)
def test_the_network_sees_whole_patches(build, size, magnification, expected):
    assert build(magnification=magnification).network_size(size) == expected


def test_slices_do_not_see_each_other(build):
    model = build().eval()
    image = volume()
    changed = image.clone()
    changed[:, :, 2] += 1
    difference = (model(image).logits - model(changed).logits).abs().amax((0, 1, 3, 4))
    assert difference[2] > 1e-3
    assert difference[[0, 1, 3]].max() < 1e-5


def test_neighbours_are_seen_by_the_slices_beside_them(build):
    model = build(input_builder="neighbours", context_slices=1).eval()
    image = volume(depth=7)
    changed = image.clone()
    changed[:, :, 3] += 1  # slice 2 of the five that get logits
    difference = (model(image).logits - model(changed).logits).abs().amax((0, 1, 3, 4))
    assert difference[1:4].min() > 1e-3
    assert difference[[0, 4]].max() < 1e-5


def test_encoding_in_portions_changes_nothing(build):
    model = build().eval()
    whole, portions = model.encode(volume_of(5)), model.encode(volume_of(5), slices_at_once=3)
    for a, b in zip(whole.maps, portions.maps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.cls_token, portions.cls_token, rtol=1e-5, atol=1e-5)


def volume_of(depth):
    return torch.linspace(-1, 1, 2 * depth * 9 * 14).reshape(2, 1, depth, 9, 14)


def test_encode_then_decode_is_the_forward_pass(build):
    model = build(magnification=2.0).eval()
    image = volume()
    torch.testing.assert_close(model.decode(model.encode(image), (4, 9, 14)), model(image).logits)


def test_logits_lie_on_the_grid_of_the_crop(build, new_vit):
    """Mirroring the features mirrors the logits: outer edges agree, no shift by half a pixel."""
    model = build(decoder="linear", magnification=1.6).eval()
    features = model.encode(volume())
    mirrored = type(features)(tuple(m.flip(-1) for m in features.maps), features.cls_token, features.patch_size)
    torch.testing.assert_close(
        model.decode(mirrored, (4, 9, 14)), model.decode(features, (4, 9, 14)).flip(-1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_only_what_shall_train_gets_gradients(build, name):
    model = build(**SETTINGS[name])
    model(volume()).logits.square().sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(model.trainable_state())
    in_backbone = {n for n in with_gradient if n.startswith("backbone")}
    if name == "frozen":
        assert not in_backbone
    elif name == "lora":
        assert in_backbone and all(".adapter." in n for n in in_backbone)
    elif name == "last_k":
        assert in_backbone and all(n.startswith(("backbone.blocks.2.", "backbone.norm.")) for n in in_backbone)
    else:
        assert {"backbone.cls_token", "backbone.blocks.0.attn.qkv.weight"} <= in_backbone


@pytest.mark.parametrize("name", ["frozen", "last_k"])
def test_frozen_parts_stay_frozen_whatever_mode_is_asked_for(build, name):
    model = build(**SETTINGS[name])
    before = {n: v.clone() for n, v in model.backbone.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model.train()
        assert not model.backbone.training and not model.backbone.blocks[0].training
        model(volume()).logits.square().mean().backward()
        optimiser.step()
    changed = {n for n, v in model.backbone.state_dict().items() if not torch.equal(v, before[n])}
    assert all(n.startswith(("blocks.2.", "norm.")) for n in changed)
    assert bool(changed) == (name == "last_k")


def test_frozen_features_carry_no_graph_and_can_be_kept(build):
    model = build()
    assert model.cacheable
    assert not any(m.requires_grad for m in model.encode(volume().requires_grad_()).maps)
    image = volume()
    assert all(torch.equal(a, b) for a, b in zip(model.encode(image).maps, model.encode(image).maps, strict=True))


def test_a_learned_input_projection_trains_through_the_frozen_backbone(build):
    model = build(input_builder="channels", num_channels=4)
    assert not model.cacheable
    model(volume(4)).logits.square().sum().backward()
    assert model.inputs.mixing.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.backbone.parameters())
    assert "inputs.mixing" in model.trainable_state()


@pytest.mark.parametrize("name", SETTINGS)
def test_what_trained_comes_back(build, name):
    model, other = build(**SETTINGS[name]), build(**SETTINGS[name])
    with torch.no_grad():
        for value in model.trainable_state().values():
            value.add_(torch.randn_like(value) * 0.1)
    image = volume()
    model.eval(), other.eval()
    assert not torch.allclose(model(image).logits, other(image).logits)
    other.load_trainable_state(model.trainable_state())
    torch.testing.assert_close(model(image).logits, other(image).logits)


def test_states_of_other_models_are_refused(build):
    model = build()
    state = model.trainable_state()
    for other, words in (
        (state | {"decoder.to_logits.bias": torch.zeros(5)}, r"decoder\.to_logits\.bias is 5, not 3"),
        ({k: v for k, v in state.items() if k != "decoder.to_logits.bias"}, r"to_logits\.bias is missing"),
        (state | {"x": torch.zeros(1)}, "x is unexpected"),
    ):
        with pytest.raises(CheckpointError, match=words):
            model.load_trainable_state(other)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_trainable_weight_is_in_one_group(build, name):
    model = build(**SETTINGS[name])
    groups = model.parameter_groups(1e-3)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    torch.optim.AdamW(groups)


def test_pretrained_layers_learn_slower_the_deeper_they_lie(build):
    groups = build(adaptation="full").parameter_groups(1.0, backbone_lr_scale=0.1, layer_decay=0.5)
    rate = {name: group["lr"] for group in groups for name in group["names"]}
    assert rate["decoder.to_logits.weight"] == 1.0
    assert rate["backbone.norm.weight"] == rate["backbone.blocks.2.mlp.fc1.weight"] == 0.1
    assert rate["backbone.blocks.0.mlp.fc1.weight"] == pytest.approx(0.025)
    assert rate["backbone.patch_embed.proj.weight"] == pytest.approx(0.0125)


def test_adapters_learn_like_new_weights(build):
    groups = build(**SETTINGS["lora"]).parameter_groups(1e-3, backbone_lr_scale=0.1)
    assert {group["lr"] for group in groups} == {1e-3}


def test_biases_norms_and_tokens_are_not_decayed(build):
    groups = build(adaptation="full").parameter_groups(1.0, weight_decay=0.5)
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert {name for name in decay if decay[name] == 0} >= {
        "backbone.cls_token",
        "backbone.storage_tokens",
        "backbone.norm.weight",
        "backbone.blocks.0.ls1.gamma",
        "decoder.to_logits.bias",
        "decoder.intra.0.gate",
    }
    assert decay["decoder.to_logits.weight"] == decay["backbone.blocks.0.attn.qkv.weight"] == 0.5


def test_training_options_reach_the_backbone(build):
    model = build(adaptation="full", drop_path=0.2, rope_rescale=2.0, gradient_checkpointing=True)
    backbone = model.backbone
    assert (backbone.drop_path, backbone.rope_rescale, backbone.gradient_checkpointing) == (0.2, 2.0, True)
    model(volume()).logits.sum().backward()


@pytest.mark.parametrize("name", SETTINGS)
def test_bfloat16_autocast_trains(build, name):
    model = build(**SETTINGS[name])
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(volume()).logits
    assert logits.dtype == torch.float32
    logits.square().mean().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.requires_grad)


def test_taps_default_to_what_the_decoder_reads(build, new_vit):
    assert build(new_vit(depth=8)).taps == (1, 3, 5, 7)
    assert build(new_vit(depth=8), decoder="linear").taps == (7,)
    assert build(new_vit(depth=8), taps=(0, 1, 2, 3)).taps == (0, 1, 2, 3)


def test_tap_norm_can_be_left_out(build):
    image = volume()
    raw, normed = build(tap_norm=False).encode(image), build().encode(image)
    assert not torch.allclose(raw.maps[0], normed.maps[0])


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            {"input_builder": "neighbours"},
            r"reads 1 neighbouring slices each side, but context_slices is 0 Fix: set context_slices to 1",
        ),
        ({"context_slices": 1}, "reads 0 neighbouring slices"),
        ({"input_builder": "rgb"}, "takes 3 channels, the plan has 1"),
        ({"taps": (0, 1, 2, 3)}, "do not fit a backbone of 3 blocks"),
        ({"taps": (0, 1)}, "reads 4 taps, 2 are given"),
        ({"magnification": 0.0}, "magnification is 0.0"),
        ({"drop_path": 0.1}, "have no effect on a frozen backbone"),
        ({"rope_rescale": 2.0}, "have no effect on a frozen backbone"),
        ({"last_k": 2}, "'frozen' does not go with last_k 2"),
        ({"adaptation": "last_k"}, "'last_k' does not go with last_k 0"),
        ({"adaptation": "last_k", "last_k": 4}, "'last_k' does not go with last_k 4"),
        ({"adaptation": "full", "drop_path": 1.0}, "out of range"),
        ({"adaptation": "full", "rope_rescale": 0.5}, "out of range"),
        ({"adaptation": "lora", "lora_rank": 0}, "cannot be built"),
        ({"pyramid_scales": (1, 2, 4, 8)}, "no four falling enlargements"),
        ({"slab": 4}, "nothing in the model sees several slices"),
        ({"blank_features": True, "adaptation": "lora"}, "trains a backbone that blank_features hides"),
        ({"blank_features": True}, "nothing to see"),
        ({"blank_features": True, "detail": "slices", "depth_adapter": 4}, "depth_adapter trains in"),
        (
            {"blank_features": True, "detail": "slices", "input_builder": "slices_3", "context_slices": 1},
            "trains before a backbone that blank_features hides",
        ),
        ({"adaptation": "last_k", "last_k": 1, "decoder": "linear", "taps": (1,)}, "trains blocks after the last tap"),
        ({"decoder_settings": {"widht": 3}}, "decoder 'tpa_sad' has no setting 'widht'"),
        ({"decoder": "conv3d", "decoder_settings": {"finest_scal": 2}}, "Did you mean 'finest_scale'"),
        ({"decoder": "segdino_v1", "decoder_settings": {"head_form": "releese"}}, "head_form is 'releese'.*'release'"),
        ({"decoder": "conv3d", "decoder_settings": {"decoder_width": "x"}}, "decoder_width is 'x'"),
        ({"decoder": "primus", "decoder_settings": {"primus_width": -4}}, "cannot be built"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_a_fix(build, settings, words):
    with pytest.raises(ConfigError, match=words) as caught:
        build(**settings)
    assert caught.value.fix


COMPOSED = {
    f"{decoder}, {detail}, {adapter or 'no'} adapter": {"decoder": decoder, "detail": detail, "depth_adapter": adapter}
    for decoder in DECODERS
    if DECODERS[decoder].num_taps
    for detail in ("none", "slices", "volume")
    for adapter in (0, 4)
}


@pytest.mark.parametrize("name", COMPOSED)
def test_every_decoder_goes_with_every_detail_stream_and_adapter(build, name):
    model = build(detail_width=4, **COMPOSED[name])
    logits = model(volume(depth=3)).logits
    assert logits.shape == (2, 3, 3, 9, 14) and logits.dtype == torch.float32
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    again = build(detail_width=4, **COMPOSED[name])
    again.load_trainable_state(model.trainable_state())


@pytest.mark.parametrize("decoder", ["tpa_sad", "conv3d"])
def test_adapters_change_nothing_at_first(build, new_vit, decoder):
    torch.manual_seed(5)
    vit = new_vit()
    plain = build(copy.deepcopy(vit), decoder=decoder).eval()
    for settings in ({"depth_adapter": 4}, {"adaptation": "lora"}, {"depth_adapter": 4, "adaptation": "lora"}):
        adapted = build(copy.deepcopy(vit), decoder=decoder, **settings).eval()
        image = volume()
        for ours, theirs in zip(adapted.encode(image).maps, plain.encode(image).maps, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_what_works_in_3d_sees_the_slices_beside_it(build):
    for settings in ({"decoder": "conv3d"}, {"detail": "volume", "detail_width": 4}):
        model = build(**settings).eval()
        image = volume(depth=5)
        changed = image.clone()
        changed[:, :, 2] += 1
        difference = (model(image).logits - model(changed).logits).abs().amax((0, 1, 3, 4))
        assert difference[1:4].min() > 1e-4


def test_more_taps_than_a_decoder_reads_are_its_last_ones(build):
    assert build(decoder="tpa_sad", taps=(0, 0, 1, 1, 2)).taps == (0, 1, 1, 2)
    assert build(decoder="primus_single", taps=(0, 2))(volume()).logits.shape == (2, 3, 4, 9, 14)


def test_a_detail_stream_in_2d_sees_every_slice_alone(build):
    """However many slices come in one call, or lie beside it in the volume."""
    model = build(detail="slices", detail_width=4).eval()
    image = volume(depth=5)
    together = model(image).logits
    alone = torch.cat([model(image[:, :, depth : depth + 1]).logits for depth in range(5)], dim=2)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_control_without_features_does_not_see_the_backbone(build):
    image = volume()
    one, two = (build(new, detail="slices", detail_width=4, blank_features=True) for new in (None, None))
    with torch.no_grad():
        for value in two.backbone.parameters():
            value.add_(1)
    torch.testing.assert_close(one.eval()(image).logits, two.eval()(image).logits)
    assert not any(tap.any() for tap in one.encode(image).maps)


def test_a_detail_stream_sees_what_tokens_cannot(build):
    """A single bright voxel moves the peak of its influence with it, though it stays in its token."""
    model = build(detail="slices", detail_width=4, magnification=0.25).eval()
    peaks = []
    for column in (5, 7):
        image = torch.zeros(1, 1, 1, 32, 32)
        plain = model(image).logits
        image[..., 6, column] = 5
        peaks.append(int((model(image).logits - plain).abs().sum((0, 1, 2, 3)).argmax()))
    assert peaks[1] - peaks[0] == 2


@pytest.mark.parametrize("settings", [{"decoder": "tpa"}, {"input_builder": "repeats"}])
def test_unknown_names_are_refused_with_the_nearest(build, settings):
    with pytest.raises(UsageError, match="Did you mean"):
        build(**settings)


def test_configurations_survive_their_file(tmp_path):
    config = ModelConfig(backbone="a", num_outputs=2, taps=(1, 2), pyramid_scales=(4, 4, 2, 1), licence="CC0")
    config.write(tmp_path / "model.json")
    assert ModelConfig.read(tmp_path / "model.json") == config
