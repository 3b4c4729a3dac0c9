"""The volumetric probe: slices see each other, depth stays, every tap counts."""

import pytest
import torch

from voxdino.core.errors import ConfigError
from voxdino.models.decoders.conv3d import Conv3dDecoder
from voxdino.models.features import Features


def volume_features(grid=(4, 3, 5), dims=(8, 8, 8, 8), batch=2):
    maps = tuple(torch.randn(batch, dim, *grid) for dim in dims)
    return Features(maps, torch.randn(batch, 8), (1, 16, 16))


def decoder(dims=(8, 8, 8, 8), **settings):
    torch.manual_seed(0)
    return Conv3dDecoder(embed_dims=dims, num_outputs=2, **{"decoder_width": 16, **settings})


def test_at_the_default_width_it_is_light():
    count = sum(p.numel() for p in Conv3dDecoder(embed_dims=(384,) * 4, num_outputs=3).parameters())
    assert 0.5e6 < count < 0.9e6


@pytest.mark.parametrize("scale", [4, 2, 1])
@pytest.mark.parametrize("depth", [1, 4])
def test_depth_stays_and_the_plane_is_enlarged(scale, depth):
    out = decoder(finest_scale=scale).native_logits(volume_features((depth, 3, 5)))
    assert out.shape == (2, 2, depth, 3 * scale, 5 * scale)


@pytest.mark.parametrize("width", [4, 8, 16])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_single_token_is_decoded_in_training_mode_and_heard(width, batch):
    net = decoder(finest_scale=1, decoder_width=width).train()
    one, other = (net(volume_features((1, 1, 1), batch=batch), (1, 16, 16)) for _ in range(2))
    assert one.isfinite().all() and not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("tap", range(4))
def test_what_one_slice_holds_reaches_its_neighbours_from_every_tap(tap):
    one = decoder()
    features = volume_features()
    changed = [m.clone() for m in features.maps]
    changed[tap][:, :, 1] += 1
    before = one.native_logits(features)
    after = one.native_logits(Features(tuple(changed), features.cls_token, features.patch_size))
    moved = (after - before).abs().amax(dim=(0, 1, 3, 4))  # (D,)
    assert (moved[[0, 1, 2]] > 1e-3).all()


def test_taps_may_differ_in_channels():
    dims = (4, 6, 8, 10)
    assert decoder(dims).native_logits(volume_features(dims=dims)).shape == (2, 2, 4, 12, 20)


@pytest.mark.parametrize("settings", [{"finest_scale": 3}, {"decoder_width": 15}, {"decoder_width": 2}])
def test_what_cannot_be_built_is_refused(settings):
    with pytest.raises(ConfigError, match="cannot be"):
        decoder(**settings)
