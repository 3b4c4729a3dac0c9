"""Every decoder obeys the contract of its base; TPA/SAD is what the dossier says."""

import pytest
import torch
import torch.nn.functional as F

from voxdino.core.errors import ConfigError
from voxdino.models.decoders.tpa_sad import EnlargeAndConvolve, TpaSadDecoder, from_segdino_v2
from voxdino.models.features import Features
from voxdino.models.registry import DECODERS

GRIDS = {2: (3, 5), 3: (2, 3, 5)}


def random_features(grid, *, batch=2, dim=8, patch=16):
    maps = tuple(torch.randn(batch, dim, *grid) for _ in range(4))
    return Features(maps, torch.randn(batch, dim), (patch,) * len(grid))


def build(name, embed_dim=8, num_outputs=3):
    kind = DECODERS[name]
    if kind.reads_image:
        pytest.importorskip("dynamic_network_architectures", reason="needs the extra `baseline`")
        return kind(embed_dims=(), num_outputs=num_outputs, plan_size=(8, 16, 24)[-max(kind.num_dims) :])
    return kind(embed_dims=(embed_dim,) * kind.num_taps, num_outputs=num_outputs)


def image_for(name, size, *, batch=2):
    """What a decoder that reads the voxels wants beside the features."""
    if not DECODERS[name].reads_image:
        return {}
    return {"image": torch.randn(batch, 1, *(size if len(size) == 3 else (1, *size)))}


def cases():
    """A decoder runs on the grids it declares; one of 2-D only gets the slices of a volume as its batch."""
    return [(name, dims) for name, kind in DECODERS.items() for dims in kind.num_dims]


@pytest.mark.parametrize("name, dims", cases())
def test_every_decoder_returns_voxel_logits_and_trains_all_its_weights(name, dims):
    decoder = build(name)
    grid = GRIDS[dims]
    size = tuple(g * 16 for g in grid)
    logits = decoder(random_features(grid), **image_for(name, size))
    assert logits.shape == (2, 3, *size)
    assert logits.dtype == torch.float32
    logits.square().sum().backward()
    assert all(p.grad is not None for p in decoder.parameters())


@pytest.mark.parametrize("name, dims", cases())
def test_every_decoder_gives_logits_at_any_size(name, dims):
    decoder = build(name)
    size = (7, 33, 21)[-dims:]
    assert decoder(random_features(GRIDS[dims]), size, **image_for(name, size)).shape == (2, 3, *size)


@pytest.mark.parametrize("name, dims", cases())
def test_every_decoder_treats_images_of_a_batch_alone(name, dims):
    torch.manual_seed(1)
    decoder = build(name).eval()
    features = random_features(GRIDS[dims])
    alone = Features(tuple(m[1:] for m in features.maps), features.cls_token[1:], features.patch_size)
    given = image_for(name, (9, 18, 21)[-dims:])
    first, second = decoder(features, **given)[1:], decoder(alone, **{key: value[1:] for key, value in given.items()})
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)  # norms over 2 channels


def test_every_decoder_declares_its_dimensions_and_taps():
    assert all(kind.num_dims and set(kind.num_dims) <= {2, 3} for kind in DECODERS.values())
    assert DECODERS["linear"].num_dims == (2, 3)
    assert (DECODERS["linear"].num_taps, DECODERS["tpa_sad"].num_taps) == (1, 4)


@pytest.mark.parametrize("name, dims", cases())
def test_every_decoder_without_outputs_gives_its_hidden_features(name, dims):
    torch.manual_seed(1)
    features = random_features(GRIDS[dims])
    hidden = build(name, num_outputs=None).hidden(features, **image_for(name, (7, 33, 21)[-dims:]))
    assert hidden.shape[:2] == (2, build(name).hidden_width)


def test_the_linear_decoder_reads_one_token_per_logit():
    decoder = build("linear", num_outputs=2)
    features = random_features((3, 5))
    token = features.maps[-1][1, :, 2, 4]
    native = decoder.native_logits(features)
    torch.testing.assert_close(native[1, :, 2, 4], F.linear(token, decoder.to_logits.weight, decoder.to_logits.bias))


def tpa_sad(embed_dim=8, num_outputs=3, **settings):
    return TpaSadDecoder(embed_dims=(embed_dim,) * 4, num_outputs=num_outputs, **settings)


def count(num_outputs=1, **settings):
    return sum(p.numel() for p in tpa_sad(num_outputs=num_outputs, **settings).parameters())


@pytest.mark.parametrize(
    "embed_dim, width, expected",
    [
        (384, 256, 3_299_593),
        (384, 128, 928_905),
        (768, 256, 3_692_809),
        (768, 128, 1_125_513),
        (1024, 256, 3_954_953),
        (1024, 128, 1_256_585),
    ],
)
def test_tpa_sad_has_the_published_number_of_weights(embed_dim, width, expected):
    assert count(embed_dim=embed_dim, decoder_width=width) == expected


def test_tpa_sad_has_the_number_of_weights_a_third_party_reports():
    assert count(embed_dim=384, decoder_width=256, num_outputs=4) == 3_300_364


def test_the_first_release_has_about_its_published_number_of_weights():
    assert count(embed_dim=384, decoder_width=384, pyramid="first_release") == pytest.approx(6.08e6, rel=1e-3)


@pytest.mark.parametrize("grid", [(4, 6), (3, 5)])
def test_the_first_release_decodes_even_and_odd_grids(grid):
    decoder = tpa_sad(embed_dim=8, num_outputs=3, decoder_width=8, pyramid="first_release")
    features = random_features(grid)
    assert decoder.native_logits(features).shape == (2, 3, 4 * grid[0], 4 * grid[1])
    decoder(features).sum().backward()


def test_gated_blocks_start_as_the_identity():
    decoder = tpa_sad(embed_dim=8, num_outputs=3, decoder_width=16)
    x = torch.randn(2, 16, 5, 7)
    assert all(torch.equal(block(x), x) for block in (*decoder.intra, *decoder.inter))


@pytest.mark.parametrize("scale, size", [(1, (3, 5)), (2, (3, 5)), (3, (5, 4)), (4, (1, 1)), (8, (3, 5)), (8, (1, 7))])
def test_a_level_is_the_enlarged_map_convolved_and_so_are_its_gradients(scale, size):
    torch.manual_seed(0)
    level = EnlargeAndConvolve(32, scale).double()
    x = torch.randn(2, 32, *size, dtype=torch.float64, requires_grad=True)
    enlarged = F.interpolate(x, scale_factor=scale, mode="bilinear")
    weight = torch.randn(enlarged.shape, dtype=torch.float64)
    expected, *others = (
        (out, *torch.autograd.grad((out * weight).sum(), (x, level.conv.weight)))
        for out in (level.conv(enlarged), level(x), level._taps_first(x))
    )
    for one in others:
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)


def test_a_level_takes_the_taps_first_where_that_is_less_work(monkeypatch):
    done = []
    level = EnlargeAndConvolve(64, 4)
    taps_first = level._taps_first
    monkeypatch.setattr(level, "_taps_first", lambda x: done.append(tuple(x.shape)) or taps_first(x))
    for shape in ((1, 64, 16, 16), (1, 64, 64, 64), (0, 64, 16, 16)):
        level(torch.zeros(shape))
    assert done == [(1, 64, 16, 16), (0, 64, 16, 16)]


def test_a_level_of_no_images_is_of_none():
    assert EnlargeAndConvolve(64, 4)(torch.zeros(0, 64, 16, 16)).shape == (0, 64, 64, 64)


def test_levels_and_gates_stay_in_the_precision_of_autocast():
    decoder = tpa_sad(embed_dim=8, num_outputs=3, decoder_width=64)
    with torch.no_grad():
        for block in (*decoder.intra, *decoder.inter):
            block.gate.fill_(0.5)
    features = random_features((4, 4))
    exact = decoder.native_logits(features)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = decoder.native_logits(features)
        assert decoder.intra[0](decoder.levels[0](decoder.project[0](features.maps[0]))).dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("scales, finest", [((8, 4, 2, 1), 8), ((4, 4, 2, 1), 4), ((2, 2, 1, 1), 2)])
def test_pyramid_scales_set_the_native_grid(scales, finest):
    decoder = tpa_sad(embed_dim=8, num_outputs=3, decoder_width=8, pyramid_scales=scales)
    assert decoder.native_logits(random_features((3, 5))).shape[2:] == (3 * finest, 5 * finest)


@pytest.mark.parametrize("scales", [(8, 4, 2), (1, 2, 4, 8), (8, 4, 2, 0)])
def test_pyramids_that_rise_or_have_other_lengths_are_refused(scales):
    with pytest.raises(ConfigError, match="no four falling enlargements"):
        tpa_sad(embed_dim=8, num_outputs=3, pyramid_scales=scales)


def test_scales_of_the_first_release_cannot_be_chosen():
    with pytest.raises(ConfigError, match="scales of its own"):
        tpa_sad(embed_dim=8, num_outputs=3, pyramid="first_release", pyramid_scales=(4, 4, 2, 1))


def test_channels_last_changes_nothing_but_the_memory_order():
    torch.manual_seed(2)
    decoder = tpa_sad(embed_dim=8, num_outputs=3, decoder_width=16)
    features = random_features((3, 5))
    expected = decoder(features)
    last = Features(
        tuple(m.contiguous(memory_format=torch.channels_last) for m in features.maps),
        features.cls_token,
        features.patch_size,
    )
    decoder.to(memory_format=torch.channels_last)
    torch.testing.assert_close(decoder(last), expected, rtol=1e-4, atol=1e-4)


def test_authors_names_cover_every_weight_once():
    decoder = tpa_sad(embed_dim=24, num_outputs=1, decoder_width=16)
    names = [f"decoder.token_projections.{i}.weight" for i in range(4)] + [
        "decoder.out_conv.weight",
        "decoder.out_conv.bias",
    ]
    names += [f"decoder.tpa_branch_{i}.conv.weight" for i in range(1, 5)]
    parts = ("gamma", "depthwise.weight", "pointwise.weight", "norm.weight", "norm.bias")
    names += [f"decoder.sad_{kind}_{i}.{part}" for kind in ("intra", "inter") for i in range(1, 5) for part in parts]
    renamed = from_segdino_v2(dict.fromkeys(names, torch.zeros(1)))
    assert set(renamed) == set(decoder.state_dict())
