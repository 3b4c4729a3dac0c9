"""The U-Net baseline: its topology by hand, its voxels, and what is said where it cannot be built."""

import sys

import pytest
import torch
import torch.nn.functional as F

from voxdino.core.errors import EXIT_RESOURCE, ConfigError, ResourceError
from voxdino.models.compose import build_segmenter
from voxdino.models.decoders.unet import Unet2dDecoder, Unet3dDecoder, plan_topology
from voxdino.models.features import Features
from voxdino.models.segmenter import ModelConfig
from voxdino.models.weights import load_backbone

NOTHING = Features((), torch.zeros(2, 0), (16, 16))
KINDS = {Unet2dDecoder: (24, 16), Unet3dDecoder: (8, 16, 16)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


@pytest.fixture
def package():
    pytest.importorskip("dynamic_network_architectures", reason="needs the extra `baseline`")


def build(kind, **settings):
    return kind(embed_dims=(), **{"num_outputs": 3, "plan_size": KINDS[kind], **settings}).eval()


# Topology


def test_an_isotropic_crop_is_halved_until_no_side_is_longer_than_seven():
    topology = plan_topology((40, 56, 40), (1.0, 1.0, 1.0))
    assert topology.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    assert topology.kernels == ((3, 3, 3),) * 4


def test_thick_slices_are_halved_only_when_pixels_have_become_as_large():
    topology = plan_topology((16, 64, 64), (5.0, 0.8, 0.8))
    assert topology.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))
    assert topology.kernels == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))


def test_a_side_that_is_short_enough_is_left_while_others_go_on():
    topology = plan_topology((40, 9), (1.0, 1.0))
    assert topology.strides == ((1, 1), (2, 2), (2, 1), (2, 1))
    assert topology.kernels == ((3, 3),) * 4  # once three, always three


@pytest.mark.parametrize("size", [(1, 4, 5), (3, 3, 1)])
def test_the_smallest_crops_have_two_stages(size):
    assert plan_topology(size, (1.0, 1.0, 1.0)).strides[1:] == (tuple(2 if n > 1 else 1 for n in size),)


# The network


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", ["plain", "residual"])
def test_every_weight_trains_and_has_one_name(package, kind, blocks):
    decoder = build(kind, blocks=blocks, num_channels=2).train()
    decoder(NOTHING, image=torch.randn(2, 2, 3, 17, 21)).square().sum().backward()
    assert all(value.grad is not None for value in decoder.parameters())
    assert set(decoder.state_dict()) == {name for name, _ in decoder.named_parameters()}


def test_widths_double_from_32_to_320(package):
    decoder = build(Unet2dDecoder, plan_size=(256, 256))
    norms = [m.num_features for m in decoder.network.encoder.modules() if isinstance(m, torch.nn.InstanceNorm2d)]
    assert norms[::2] == [32, 64, 128, 256, 320, 320, 320]
    assert decoder.hidden_width == 32
    assert sum(p.numel() for p in decoder.parameters()) == 15_731_171  # two convolutions a stage


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(5, 33, 21), (1, 8, 9), (3, 1, 1)])
def test_any_size_goes_in_and_comes_out(package, kind, size):
    decoder = build(kind)
    image = torch.randn(2, 1, *size)
    logits = decoder(NOTHING, image=image)
    assert logits.shape == (
        (6 if size[0] == 3 else 2 * size[0], 3, *size[1:]) if kind is Unet2dDecoder else (2, 3, *size)
    )
    assert logits.dtype == torch.float32
    assert bool(torch.isfinite(logits).all())


@torch.no_grad()
def test_padding_repeats_the_edge_and_is_cut_off(package):
    decoder = build(Unet3dDecoder)
    assert decoder.total_strides == (2, 4, 4)
    image = torch.randn(1, 1, 3, 18, 20)
    extended = F.pad(image, (0, 0, 0, 2, 0, 1), mode="replicate")
    torch.testing.assert_close(decoder(NOTHING, image=image), decoder(NOTHING, image=extended)[:, :, :3, :18])


@torch.no_grad()
def test_slices_are_alone_in_2d_and_see_each_other_in_3d(package):
    image = torch.randn(1, 1, 4, 16, 16)
    other = image.clone()
    other[:, :, 1] += 1
    two, three = build(Unet2dDecoder), build(Unet3dDecoder)
    torch.testing.assert_close(two(NOTHING, image=image)[2:], two(NOTHING, image=other)[2:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(three(NOTHING, image=image)[:, :, 2:], three(NOTHING, image=other)[:, :, 2:], atol=1e-3)


@torch.no_grad()
def test_another_size_is_one_linear_interpolation_away(package):
    decoder, image = build(Unet2dDecoder), torch.randn(1, 1, 1, 16, 24)
    expected = F.interpolate(decoder(NOTHING, image=image), size=(20, 20), mode="bilinear")
    assert torch.equal(decoder(NOTHING, (20, 20), image=image), expected)


@pytest.mark.parametrize("decoder", ["unet_2d", "unet_3d"])
def test_a_model_without_a_backbone_segments_and_can_be_rebuilt(package, decoder):
    config = ModelConfig(backbone="none", decoder=decoder, num_channels=2, input_builder="channels", num_outputs=3)
    first, second = (build_segmenter(config, load_backbone("none")[0]).eval() for _ in range(2))
    second.load_state_dict(first.state_dict(), strict=True)
    image = torch.randn(1, 2, 4, 20, 13)
    assert first(image).logits.shape == (1, 3, 4, 20, 13)
    assert torch.equal(first(image).logits, second(image).logits)
    assert not first.cacheable
    assert all(name.startswith("decoder.") for name in first.trainable_state())


# Refusals


def test_where_the_package_is_missing_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dynamic_network_architectures", None)
    monkeypatch.setitem(sys.modules, "dynamic_network_architectures.architectures", None)
    monkeypatch.setitem(sys.modules, "dynamic_network_architectures.architectures.unet", None)
    with pytest.raises(ResourceError, match=r"pip install 'voxdino\[baseline\]'") as caught:
        build(Unet2dDecoder)
    assert caught.value.exit_code == EXIT_RESOURCE


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"plan_size": (16, 16, 16)}, "are not 2 lengths"),
        ({"plan_size": (16, 0)}, "are not 2 lengths"),
        ({"plan_spacing_mm": (1.0, -1.0)}, "are not 2 lengths"),
        ({"plan_size": (1, 1)}, "a single voxel"),
        ({"blocks": "dense"}, "blocks is 'dense' Fix: choose from plain, residual"),
    ],
)
def test_settings_that_make_no_network_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        build(Unet2dDecoder, **settings)
