"""Laws of DINO-Med3D's decoder, its published size, and the authors' names."""

import pytest
import torch

from voxdino.core.errors import ConfigError, PlanError
from voxdino.models.decoders.upernet3d import Upernet3dDecoder, from_dinomed3d_stage2
from voxdino.models.detail import DetailStream, Refinement
from voxdino.models.features import Features

torch.set_num_threads(1)


def features(grid=(3, 3, 5), *, batch=2, dim=6):
    return Features(tuple(torch.randn(batch, dim, *grid) for _ in range(4)), torch.randn(batch, dim), (1, 16, 16))


def decoder(*, num_outputs=2, width=8, dim=6, **settings):
    torch.manual_seed(0)
    return Upernet3dDecoder(embed_dims=(dim,) * 4, num_outputs=num_outputs, decoder_width=width, **settings)


@pytest.mark.parametrize("grid", [(3, 3, 5), (1, 4, 2), (2, 1, 1)])
@pytest.mark.parametrize("scale", [4, 2, 1])
def test_the_finest_level_decides_the_grid_and_no_slice_is_lost(grid, scale):
    net = decoder(finest_scale=scale)
    depth, rows, columns = grid
    shapes = [level.shape[2:] for level in net.pyramid(features(grid))]
    finer = [(depth, rows * s, columns * s) for s in (scale, min(2, scale), 1)]
    assert shapes == [*finer, (depth, -(-rows // 2), -(-columns // 2))]
    assert net.native_logits(features(grid)).shape == (2, 2, *finer[0])


@pytest.mark.parametrize("batch", [1, 2])
def test_a_single_token_has_nothing_to_be_compared_with(batch):
    with pytest.raises(PlanError, match=r"one token in one slice.*enlarge the plan's crop or slab"):
        decoder()(features((1, 1, 1), batch=batch))
    assert decoder()(features((1, 1, 2), batch=batch)).isfinite().all()


@pytest.mark.parametrize("fine", [(3, 12, 20), (3, 7, 9), (3, 30, 41)])
def test_detail_decides_the_grid_where_it_is_given_and_is_heard(fine):
    net, seen = decoder(num_outputs=None).eval(), features()
    detail = torch.randn(2, 8, *fine)
    hidden = net.hidden(seen, detail)
    assert hidden.shape == (2, net.hidden_width, *fine)
    assert not torch.allclose(hidden, net.hidden(seen, -detail), atol=1e-3)


def test_the_gate_is_there_only_where_a_refinement_follows():
    assert decoder(num_outputs=2).fuse is None
    net = decoder(num_outputs=None)
    net.hidden(features(), torch.randn(2, 8, 3, 12, 20)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_volumes_turned_over_give_turned_logits_when_the_kernels_are_turned_too():
    net, seen = decoder().eval(), features((4, 3, 5))
    expected = net.native_logits(seen)
    with torch.no_grad():
        for value in net.parameters():
            if value.ndim == 5:
                value.copy_(value.flip(2))
    turned = Features(tuple(one.flip(2) for one in seen.maps), seen.cls_token, seen.patch_size)
    torch.testing.assert_close(net.native_logits(turned).flip(2), expected, rtol=1e-4, atol=1e-4)


def test_a_change_in_one_slice_reaches_others():
    net, seen = decoder().eval(), features((5, 3, 5), batch=1)
    changed = tuple(one.clone() for one in seen.maps)
    for one in changed:
        one[:, :, 2] += torch.randn(6, 3, 5)
    other = net.native_logits(Features(changed, seen.cls_token, seen.patch_size))
    assert (other - net.native_logits(seen)).abs().amax((0, 1, 3, 4)).min() > 1e-4


def test_channels_last_changes_nothing_but_the_memory_order():
    net, seen = decoder().eval(), features()
    last = tuple(one.contiguous(memory_format=torch.channels_last_3d) for one in seen.maps)
    other = net(Features(last, seen.cls_token, seen.patch_size))
    torch.testing.assert_close(other, net(seen), rtol=1e-4, atol=1e-4)


def test_cubic_kernels_of_the_release_add_slices_until_refinement():
    net, seen = decoder(num_outputs=None, release_kernels=True), features((4, 2, 3))
    assert [level.shape[2] for level in net.pyramid(seen)] == [7, 5, 4, 4]
    detail = DetailStream(num_channels=1, width=8)(torch.randn(2, 1, 4, 32, 48))
    hidden = net.hidden(seen, detail.quarter)
    assert hidden.shape == (2, 8, 7, 8, 12)
    assert Refinement(hidden_width=8, num_outputs=2)(hidden, detail).shape == (2, 2, 4, 32, 48)


@pytest.mark.parametrize("embed_dim, millions", [(384, 24.43), (768, 24.82), (1024, 25.09)])
def test_the_release_has_the_published_number_of_weights_outside_the_backbone(embed_dim, millions):
    with torch.device("meta"):
        parts = (
            Upernet3dDecoder(embed_dims=(embed_dim,) * 4, num_outputs=None, release_kernels=True),
            DetailStream(num_channels=1),
            Refinement(hidden_width=256, num_outputs=2),
        )
    total = sum(p.numel() for part in parts for p in part.parameters())
    unused_classifier = 2 * 256 + 2  # of the UPerNet, which the release keeps beside its refinement
    assert (total + unused_classifier) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"width": 6}, "no multiple of 4"),
        ({"finest_scale": 3}, "finest_scale 3 cannot be built"),
        ({"finest_scale": 2, "release_kernels": True}, "the release's kernels have 4"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        decoder(**settings)


STAGE_2 = [
    ("cnn_encoder.layer2_down.downsample.0.weight", "detail.at_half.0.shortcut.0.weight"),
    ("cnn_encoder.layer3_refine.conv2.weight", "detail.at_quarter.1.second.weight"),
    ("adapter_3d.id1.2.weight", "decoder.adapt.2.2.weight"),
    ("fusion_mid.gate.0.bias", "decoder.fuse.gate.bias"),
    ("decoder.fpn_out.1.0.weight", "decoder.smooth.1.0.weight"),
    ("decoder_final.r11.conv.3.weight", "refine.to_full.3.weight"),
    ("encoder.backbone.model.blocks.3.norm1.bias", "backbone.blocks.3.norm1.bias"),
    ("encoder.backbone.model.base_model.model.blocks.3.ls1.gamma", "backbone.blocks.3.ls1.gamma"),
    (
        "encoder.backbone.base_model.model.model.blocks.0.mlp.fc1.base_layer.bias",
        "backbone.blocks.0.mlp.fc1.bias",
    ),
    (
        "base_model.model.encoder.backbone.model.blocks.0.attn.qkv.lora_A.default.weight",
        "backbone.blocks.0.attn.qkv.adapter.down.weight",
    ),
    (
        "encoder.backbone.model.base_model.model.blocks.0.attn.proj.lora_B.default.weight",
        "backbone.blocks.0.attn.proj.adapter.up.weight",
    ),
    ("something.else", "something.else"),
]


@pytest.mark.parametrize("theirs, ours", STAGE_2)
def test_names_of_the_authors_become_ours(theirs, ours):
    assert list(from_dinomed3d_stage2({theirs: torch.zeros(1)})) == [ours]


def test_the_unused_classifier_is_left_out():
    assert from_dinomed3d_stage2({"decoder.cls.weight": torch.zeros(1), "decoder.cls.bias": torch.zeros(1)}) == {}


def test_an_adapter_on_the_patch_embedding_is_added_to_its_weights():
    torch.manual_seed(0)
    weight, down, up = torch.randn(5, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(5, 2, 1, 1)
    stem = "encoder.backbone.model.base_model.model.patch_embed.proj."
    state = {"base_layer.weight": weight, "lora_A.default.weight": down, "lora_B.default.weight": up}
    merged = from_dinomed3d_stage2({stem + key: value for key, value in state.items()}, lora_alpha=6.0)
    assert list(merged) == ["backbone.patch_embed.proj.weight"]
    image = torch.randn(1, 3, 8, 8)
    conv = torch.nn.functional.conv2d
    expected = conv(image, weight, stride=4) + 6.0 / 2 * conv(conv(image, down, stride=4), up)
    torch.testing.assert_close(conv(image, merged["backbone.patch_embed.proj.weight"], stride=4), expected)


def test_an_adapter_that_does_not_fit_the_patch_embedding_is_kept_for_the_loader_to_refuse():
    stem = "backbone.patch_embed.proj"
    state = {
        f"{stem}.weight": torch.zeros(5, 3, 4, 4),
        f"{stem}.adapter.down.weight": torch.zeros(2, 1, 4, 4),
        f"{stem}.adapter.up.weight": torch.zeros(5, 2, 1, 1),
    }
    assert set(from_dinomed3d_stage2(state)) == set(state)
