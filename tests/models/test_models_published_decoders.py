"""SegDINO v1 and MedDINOv3's decoder are what the dossier says; the authors' key names cover every weight."""

import pytest
import torch
import torch.nn.functional as F

from voxdino.models.decoders.primus import ChannelNorm, PrimusDecoder, SingleTapPrimusDecoder, from_meddinov3_decoder
from voxdino.models.decoders.segdino_v1 import SegdinoV1Decoder, from_segdino_v1
from voxdino.models.features import Features


def random_features(grid=(3, 5), *, dim=8, patch=16):
    maps = tuple(torch.randn(2, dim, *grid) for _ in range(4))
    return Features(maps, torch.randn(2, dim), (patch, patch))


def count(decoder):
    return sum(p.numel() for p in decoder.parameters())


def on_meta(kind, embed_dim, num_outputs, **settings):
    with torch.device("meta"):
        return kind(embed_dims=(embed_dim,) * kind.num_taps, num_outputs=num_outputs, **settings)


def test_segdino_v1_has_the_printed_number_of_weights():
    assert count(on_meta(SegdinoV1Decoder, 384, 1)) == 2_213_793


def test_the_release_of_segdino_v1_has_its_transposed_convolution_more():
    release = count(on_meta(SegdinoV1Decoder, 384, 1, head_form="release"))
    assert release == 2_213_793 + 128 * 128 * 4 * 4
    assert release == pytest.approx(2.48e6, rel=2e-3)


def test_the_paper_form_of_segdino_v1_stays_on_the_token_grid_and_the_release_is_four_times_finer():
    features = random_features()
    sizes = [
        SegdinoV1Decoder(embed_dims=(8,) * 4, num_outputs=2, head_form=form).native_logits(features).shape[2:]
        for form in ("paper", "release")
    ]
    assert sizes == [(3, 5), (12, 20)]


def test_segdino_v1_on_the_token_grid_is_the_sum_of_its_taps():
    decoder = SegdinoV1Decoder(embed_dims=(8,) * 4, num_outputs=2, decoder_width=6)
    features = random_features()
    blank = tuple(torch.zeros_like(m) for m in features.maps)

    def with_tap(index):
        maps = tuple(m if i == index else z for i, (m, z) in enumerate(zip(features.maps, blank, strict=True)))
        return decoder.native_logits(Features(maps, features.cls_token, features.patch_size))

    nothing = decoder.native_logits(Features(blank, features.cls_token, features.patch_size))
    parts = sum(with_tap(i) - nothing for i in range(4)) + nothing
    torch.testing.assert_close(decoder.native_logits(features), parts, rtol=1e-4, atol=1e-5)


def test_the_release_of_segdino_v1_ends_with_the_corners_of_its_grid():
    decoder = SegdinoV1Decoder(embed_dims=(8,) * 4, num_outputs=2, head_form="release").eval()
    features = random_features()
    native, full = decoder.native_logits(features), decoder(features)
    assert full.shape == (2, 2, 48, 80)
    corners = (slice(None), slice(None), [0, 0, -1, -1], [0, -1, 0, -1])
    torch.testing.assert_close(full[corners], native[corners])


def test_the_meddinov3_decoder_has_the_published_number_of_weights():
    assert count(on_meta(PrimusDecoder, 768, 16)) == pytest.approx(25.1e6, rel=2e-3)
    assert count(on_meta(SingleTapPrimusDecoder, 768, 16)) == pytest.approx(1.57e6, rel=3e-3)


def test_the_meddinov3_decoder_mixes_no_neighbouring_tokens():
    decoder = PrimusDecoder(embed_dims=(8,) * 4, num_outputs=3)
    features = random_features()
    changed = tuple(m.clone() for m in features.maps)
    for one in changed:
        one[:, :, 1, 2] += 1
    before = decoder.native_logits(features)
    after = decoder.native_logits(Features(changed, features.cls_token, features.patch_size))
    differs = (before != after).any(dim=1)[0]  # (48, 80)
    assert differs[16:32, 32:48].any()
    differs[16:32, 32:48] = False
    assert not differs.any()


def test_a_projection_before_the_doublings_narrows_all_of_them():
    decoder = PrimusDecoder(embed_dims=(8,) * 4, num_outputs=3, primus_width=16)
    assert (decoder.hidden_width, decoder.native_logits(random_features()).shape) == (1, (2, 3, 48, 80))
    published, narrow = on_meta(PrimusDecoder, 384, 3), on_meta(PrimusDecoder, 384, 3, primus_width=384)
    assert count(narrow) < count(published) / 5


@pytest.mark.parametrize("channels", [3, 6, 24])
def test_the_channel_norm_is_layer_norm_over_channels_with_and_without_gradients(channels):
    norm = ChannelNorm(channels, eps=1e-6)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    x = torch.randn(2, channels, 3, 5)
    expected = F.layer_norm(x.movedim(1, -1), (channels,), norm.weight, norm.bias, 1e-6).movedim(-1, 1)
    copy = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, copy)
    torch.testing.assert_close(norm(x.requires_grad_()), expected, rtol=1e-4, atol=1e-5)


def test_authors_names_of_segdino_v1_cover_every_weight_once():
    names = [f"head.projects.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")]
    names += [f"head.scratch.layer{i}_rn.weight" for i in range(1, 5)]
    names += ["head.scratch.output_conv.weight", "head.scratch.output_conv.bias", "head.proj.weight"]
    renamed = from_segdino_v1(dict.fromkeys(names, torch.zeros(1)))
    decoder = SegdinoV1Decoder(embed_dims=(8,) * 4, num_outputs=2, head_form="release")
    assert set(renamed) == set(decoder.state_dict())


def test_authors_names_of_meddinov3_cover_every_weight_once():
    names = [f"up_projection.decode.{i}.{j}.{kind}" for i in range(4) for j in (0, 1) for kind in ("weight", "bias")]
    names += ["up_projection.decode.4.weight", "up_projection.decode.4.bias"]
    renamed = from_meddinov3_decoder(dict.fromkeys(names, torch.zeros(1)))
    assert set(renamed) == set(PrimusDecoder(embed_dims=(8,) * 4, num_outputs=2).state_dict())
