"""Cached features: what comes out was encoded, interrupted work goes on to the same bytes, damage is noticed."""

import pytest
import torch

from voxdino.core.errors import CheckpointError, ResourceError
from voxdino.data import features as module
from voxdino.data.augment import AugmentConfig
from voxdino.data.features import FeatureCache
from voxdino.data.loader import assemble
from voxdino.data.sampling import Quotas, Sampler, choose_slices
from voxdino.data.store import IGNORED
from voxdino.models.features import Features

AUGMENT = AugmentConfig().for_dimensions(3)


def encode(image):
    """Two taps of four and three numbers per 4 x 4 patch: mean and extremes of the middle slice."""
    middle = image[:, 0, image.shape[2] // 2].unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)  # (B, h, w, 16)
    tap = torch.stack([middle.mean(-1), middle.amin(-1), middle.amax(-1), middle[..., 0]], 1)  # (B, 4, h, w)
    return Features((tap, tap[:, :3] + 1), tap.mean((2, 3)), (4, 4))


@pytest.fixture
def sampler(store):
    return Sampler([store.extent(name) for name in store.ids], (12, 16), 1, Quotas(), seed=0)


@pytest.fixture
def slices(store):
    return choose_slices([store.extent(name) for name in store.ids], background_share=1.0, margin=1, seed=0)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(module, "ENCODE_BATCH", 4)
    monkeypatch.setattr(module, "MARK_EVERY", 2)


def make_cache(folder, slices, num_channels=0):
    folder.mkdir(exist_ok=True)
    return FeatureCache(
        folder,
        slices,
        grid=(3, 4),
        embed_dims=(4, 3),
        cls_dim=4,
        patch_size=4,
        crop=(12, 16),
        num_channels=num_channels,
    )


def fill(cache, view, store, sampler, go_on=lambda done: True, num_threads=0):
    return cache.encode(
        view,
        store=store,
        draw=sampler.view,
        seed=0,
        context=1,
        augmentation=AUGMENT,
        encode=encode,
        device=torch.device("cpu"),
        num_threads=num_threads,
        go_on=go_on,
    )


@pytest.mark.parametrize("view", [0, 1])
def test_a_record_is_the_features_and_label_of_its_slice(tmp_path, store, sampler, slices, view):
    cache = make_cache(tmp_path / "cache", slices)
    assert fill(cache, view, store, sampler) == len(slices) == 18
    for index in (0, 7, 17):
        plain = assemble(store, [sampler.view(*slices[index], view)], context=1, seed=0)
        wanted = plain.augmented(AUGMENT) if view else plain
        batch = cache.batch([(view, index)], torch.float32)
        expected = encode(wanted.image)
        for ours, theirs in zip(batch.features.maps, expected.maps, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)  # float16
        torch.testing.assert_close(batch.features.cls_token, expected.cls_token, rtol=1e-3, atol=1e-3)
        assert torch.equal(batch.label, wanted.label) and batch.image is None
        assert batch.case_ids == (slices[index][0],)
    assert (cache.batch([(view, i) for i in range(18)], torch.float32).label == IGNORED).any()


def test_slabs_of_records_come_with_their_voxels(tmp_path, store, sampler, slices):
    cache = make_cache(tmp_path / "cache", slices, num_channels=2)
    fill(cache, 0, store, sampler)
    places = [(0, index) for index in (3, 4, 5, 9, 10, 11)]
    batch = cache.batch(places, torch.float32, num_slices=3)
    assert batch.image.shape == (2, 2, 3, 12, 16) and batch.label.shape == (2, 3, 12, 16)
    assert batch.features.maps[1].shape == (6, 3, 3, 4)
    plain = assemble(store, [sampler.view(*slices[10], 0)], context=0, seed=0)
    torch.testing.assert_close(batch.image[1, :, 1], plain.image[0, :, 0], rtol=1e-3, atol=1e-3)
    assert torch.equal(batch.label[1, 1], plain.label[0, 0])
    assert batch.case_ids == (slices[3][0], slices[9][0])


def test_an_interrupted_view_ends_with_the_same_bytes(tmp_path, store, sampler, slices, small_batches):
    whole, parts = make_cache(tmp_path / "whole", slices), make_cache(tmp_path / "parts", slices)
    fill(whole, 1, store, sampler)
    calls = iter(range(100))
    assert fill(parts, 1, store, sampler, go_on=lambda done: next(calls) < 2) == 8
    with (tmp_path / "parts/view_001.bin").open("ab") as file:
        file.write(b"half a record, written when the power went")
    assert make_cache(tmp_path / "parts", slices).num_done(1) == 8
    assert fill(make_cache(tmp_path / "parts", slices), 1, store, sampler, num_threads=3) == 18
    assert (tmp_path / "parts/view_001.bin").read_bytes() == (tmp_path / "whole/view_001.bin").read_bytes()


def test_a_complete_view_is_not_computed_again(tmp_path, store, sampler, slices):
    cache = make_cache(tmp_path / "cache", slices)
    fill(cache, 0, store, sampler)
    assert fill(cache, 0, store, sampler, go_on=lambda done: pytest.fail("computed again")) == 18


def test_views_differ_and_the_plain_one_is_not_augmented(tmp_path, store, sampler, slices):
    cache = make_cache(tmp_path / "cache", slices)
    for view in (0, 1, 2):
        fill(cache, view, store, sampler)
    maps = [cache.batch([(view, i) for i in range(18)], torch.float32).features.maps[0] for view in (0, 1, 2)]
    assert not torch.allclose(maps[0], maps[1]) and not torch.allclose(maps[1], maps[2])


def test_one_flipped_bit_is_noticed_and_the_case_named(tmp_path, store, sampler, slices):
    cache = make_cache(tmp_path / "cache", slices)
    fill(cache, 0, store, sampler)
    path = tmp_path / "cache/view_000.bin"
    content = bytearray(path.read_bytes())
    content[5 * cache.record_bytes + 11] ^= 16
    path.write_bytes(bytes(content))
    cache = make_cache(tmp_path / "cache", slices)
    cache.batch([(0, 4), (0, 6)], torch.float32)
    with pytest.raises(CheckpointError, match=f"case '{slices[5][0]}' are damaged"):
        cache.batch([(0, 5)], torch.float32)


def test_values_beyond_half_precision_are_clipped_not_infinite(tmp_path, store, sampler, slices):
    cache = make_cache(tmp_path / "cache", slices)
    huge = Features(tuple(torch.full((1, n, 3, 4), 1e6) for n in (4, 3)), torch.full((1, 4), -1e6), (4, 4))
    record = cache._pack(huge, torch.zeros(1, 1, 12, 16, dtype=torch.int64), torch.zeros(1, 1, 1, 12, 16))
    (tmp_path / "cache/view_000.bin").write_bytes(record)
    (tmp_path / "cache/view_000.json").write_text('{"done": 1, "of": 18}')
    batch = cache.batch([(0, 0)], torch.float32)
    assert torch.isfinite(batch.features.maps[0]).all() and torch.isfinite(batch.features.cls_token).all()


@pytest.mark.parametrize("cut", [0, 1, 9, 17])
def test_a_file_cut_short_is_completed(tmp_path, store, sampler, slices, small_batches, cut):
    cache = make_cache(tmp_path / "cache", slices)
    fill(cache, 1, store, sampler)
    path = tmp_path / "cache/view_001.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: cut * cache.record_bytes + 7 * (cut > 0)])
    again = make_cache(tmp_path / "cache", slices)
    assert again.num_done(1) == cut
    assert fill(again, 1, store, sampler) == 18
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", ["{}", "[]", "", '{"done": -3, "of": 18}', '{"done": "many", "of": 18}'])
def test_a_view_with_a_damaged_mark_is_computed_again(tmp_path, store, sampler, slices, content):
    cache = make_cache(tmp_path / "cache", slices)
    fill(cache, 0, store, sampler)
    whole = (tmp_path / "cache/view_000.bin").read_bytes()
    (tmp_path / "cache/view_000.json").write_text(content)
    assert cache.num_done(0) == 0
    assert fill(cache, 0, store, sampler) == 18
    assert (tmp_path / "cache/view_000.bin").read_bytes() == whole


def test_a_full_disk_says_how_to_go_on(tmp_path, store, sampler, slices, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(ResourceError, match="cache=off"):
        fill(make_cache(tmp_path / "cache", slices), 0, store, sampler)
