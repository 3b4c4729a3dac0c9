"""Laws of predicting one volume."""

import numpy as np
import pytest
import torch
from small_models import LABELS, make_plan, make_volume, model_by_hand, with_plan

from voxdino.core.errors import CheckpointError, PlanError, ResourceError, UsageError
from voxdino.core.geometry import Grid
from voxdino.core.volume import Volume
from voxdino.inference.frame import normalise_tensor
from voxdino.inference.predictor import PredictSettings, predict_slabs, predict_volume
from voxdino.preparation.intensity import ChannelScaling, normalise
from voxdino.preparation.slices import CaseSlices

SCALING = (ChannelScaling(source=0, lower=-1000.0, upper=1000.0, mean=0.0, sd=1.0),)


def threshold_logits(image):
    """Class 1 above 0, class 2 above 50 HU (normalised: 1): a model that can be checked voxel by voxel."""
    middle = image[:, 0]
    return torch.stack((torch.zeros_like(middle), middle * 10, (middle - 0.5) * 20), dim=1)


def sliced(image, scaling=SCALING):
    return CaseSlices(image, image.shape[2:], scaling)


def all_logits(model, image, scaling=SCALING, **settings):
    slabs = list(predict_slabs(model, sliced(image, scaling), PredictSettings(amp="off", **settings)))
    assert [first for first, _ in slabs] == list(np.cumsum([0, *(len(logits) for _, logits in slabs[:-1])]))
    return torch.cat([logits for _, logits in slabs])


@pytest.mark.parametrize("shape", [(9, 11, 6), (3, 2, 1), (8, 8, 4), (20, 8, 1)], ids=str)
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_every_voxel_gets_the_label_its_value_asks_for(shape, overlap):
    volume = make_volume(shape)
    labels = predict_volume(model_by_hand(threshold_logits, make_plan()), volume, PredictSettings(overlap=overlap))
    values = volume.array[0]
    np.testing.assert_array_equal(labels.array, np.select([values > 50, values > 0], [9, 5], 0))
    assert labels.grid.same_as(volume.grid)


def test_pictures_are_predicted_as_pictures():
    volume = Volume(np.random.default_rng(0).integers(-99, 99, (1, 9, 13)).astype(np.int16), Grid.from_spacing((9, 13)))
    labels = predict_volume(model_by_hand(threshold_logits, make_plan(ndim=2, slice_axis=None)), volume)
    np.testing.assert_array_equal(labels.array > 0, volume.array[0] > 0)


def test_the_input_is_not_changed(model):
    volume = make_volume()
    before = volume.array.copy()
    predict_volume(model, volume)
    np.testing.assert_array_equal(volume.array, before)


@pytest.mark.parametrize("shape", [(1, 6, 9, 11), (1, 5, 3, 20)], ids=str)
def test_the_number_of_slices_at_once_changes_nothing(model, shape):
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    one = all_logits(model, image, slices_at_once=1)
    for num in (2, 4, 100):
        torch.testing.assert_close(all_logits(model, image, slices_at_once=num), one, atol=1e-5, rtol=1e-5)


def test_context_slices_are_the_real_neighbours_and_ends_are_repeated():
    image = np.arange(7, dtype=np.float32)[None, :, None, None] * np.ones((1, 1, 8, 8), np.float32)

    def neighbours(crop):  # (B, 1, D + 2, H, W) -> the previous, this, and the next slice
        return torch.cat((crop[:, :, :-2], crop[:, :, 1:-1], crop[:, :, 2:]), dim=1)

    model = model_by_hand(neighbours, make_plan(context_slices=1, input_builder="neighbours"))
    for num in (1, 3, 7):
        logits = all_logits(model, image, slices_at_once=num)[:, :, 0, 0].numpy()
        np.testing.assert_array_equal(logits[:, 0], [0, 0, 1, 2, 3, 4, 5])
        np.testing.assert_array_equal(logits[:, 1], range(7))
        np.testing.assert_array_equal(logits[:, 2], [1, 2, 3, 4, 5, 6, 6])


def test_small_slices_are_padded_to_the_tile_as_crops_are_in_training():
    seen = []

    def remember(crop):
        seen.append(crop.clone())
        return crop.repeat(1, 3, 1, 1, 1)

    image = np.full((1, 2, 3, 6), 7.0, np.float32)
    logits = all_logits(model_by_hand(remember, make_plan()), image)
    assert logits.shape == (2, 3, 3, 6)
    assert (logits == 7).all()
    assert seen[0].shape == (1, 1, 2, 8, 8)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:5, 1:7] = True
    assert (seen[0][0, 0, 0][inside] == 7).all()
    assert (seen[0][0, 0, 0][~inside] == -1000).all()  # the lower bound, normalised


def test_a_slice_of_one_tile_takes_one_pass_and_many_tiles_are_blended():
    model = model_by_hand(threshold_logits, make_plan())
    all_logits(model, np.zeros((1, 4, 8, 8), np.float32), slices_at_once=4)
    assert model.segmenter.calls == [(1, 1, 4, 8, 8)]
    image = np.random.default_rng(0).standard_normal((1, 4, 19, 12)).astype(np.float32)
    blended = all_logits(model, image, overlap=0.5, slices_at_once=4)
    np.testing.assert_allclose(blended[:, 1].numpy(), image[0] * 10, rtol=1e-5)
    assert model.segmenter.calls[1:] == [(1, 1, 4, 8, 8)] * (4 * 2)


def test_mirroring_averages_the_four_mirror_images(model):
    image = np.random.default_rng(1).standard_normal((1, 2, 8, 8)).astype(np.float32)
    plain = {
        axes: torch.from_numpy(np.flip(all_logits(model, np.flip(image, axes).copy()).numpy(), axes).copy())
        for axes in ((), (2,), (3,), (2, 3))
    }
    mirrored = all_logits(model, image, mirror=True)
    torch.testing.assert_close(mirrored, sum(plain.values()) / 4, atol=1e-5, rtol=1e-5)
    again = all_logits(model, image[..., ::-1].copy(), mirror=True).flip(-1)
    torch.testing.assert_close(again, mirrored, atol=1e-5, rtol=1e-5)


def test_nan_scores_are_an_error():
    def broken(crop):
        logits = threshold_logits(crop)
        logits[:, 1, -1] = float("nan")
        return logits

    with pytest.raises(CheckpointError, match="NaN or infinite scores"):
        predict_volume(model_by_hand(broken, make_plan()), make_volume())


def test_a_picture_under_a_plan_for_volumes_is_refused(model):
    with pytest.raises(PlanError, match="plan is for volumes"):
        predict_volume(model, Volume(np.zeros((1, 5, 5), np.int16), Grid.from_spacing((5, 5))))


def test_when_memory_ends_fewer_slices_are_taken_and_the_result_is_the_same():
    def hungry(crop):
        if crop.shape[2] > 2:
            raise torch.OutOfMemoryError("no more")
        return threshold_logits(crop)

    volume = make_volume()
    expected = predict_volume(model_by_hand(threshold_logits, make_plan()), volume).array
    model = model_by_hand(hungry, make_plan())
    settings = PredictSettings(slices_at_once=8)
    np.testing.assert_array_equal(predict_volume(model, volume, settings).array, expected)
    assert model.segmenter.calls[0][2] == 6  # all slices
    assert max(call[2] for call in model.segmenter.calls[2:]) <= 2


def test_when_not_one_slice_fits_the_error_says_so():
    def starving(crop):
        raise torch.OutOfMemoryError("no more")

    with pytest.raises(ResourceError, match="one slice of 9 x 11 voxels does not fit"):
        predict_volume(model_by_hand(starving, make_plan()), make_volume((11, 9, 6)))


def test_many_classes_do_not_hold_many_slices_at_once():
    names = tuple(f"s{i}" for i in range(300))
    labels = LABELS.model_copy(update={"names": names, "ids": tuple(range(300))})
    model = model_by_hand(lambda crop: crop.expand(-1, 300, -1, -1, -1), make_plan(labels=labels, tile=(256, 256)))
    list(predict_slabs(model, sliced(np.zeros((1, 3, 256, 256), np.uint8)), PredictSettings()))
    assert {call[2] for call in model.segmenter.calls} == {1}


def test_a_plan_finer_than_the_scan_is_followed_and_the_label_map_is_native():
    volume = make_volume((6, 5, 3), spacing=(2.0, 2.0, 2.0))
    model = model_by_hand(threshold_logits, make_plan(in_plane_spacing=(1.0, 1.0), tile=(16, 16)))
    assert predict_volume(model, volume).array.shape == (6, 5, 3)
    assert model.segmenter.calls[0][-2:] == (16, 16)  # 5 x 6 voxels of 2 mm are 10 x 12 of 1 mm, in one tile


def test_bfloat16_changes_little(model):
    image = np.random.default_rng(0).standard_normal((1, 2, 8, 8)).astype(np.float32)
    full = all_logits(model, image)
    half = torch.cat([logits for _, logits in predict_slabs(model, sliced(image), PredictSettings(amp="bf16"))])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.1, rtol=0.1)


def test_a_large_tile_sees_the_whole_slice_at_once(model):
    large = with_plan(model, tile=(16, 16))
    image = np.random.default_rng(0).standard_normal((1, 2, 12, 13)).astype(np.float32)
    assert all_logits(large, image).shape == (2, 3, 12, 13)


def slab_model(slab, logits=None):
    """A model that sees slabs; every logit tells how many slices came in one call."""
    plan = make_plan(slab=slab)

    def tell(image):
        shape = (len(image), 3, *image.shape[2:])
        return torch.full(shape, float(image.shape[2])) + image.new_tensor([0.0, 1.0, 2.0]).view(1, 3, 1, 1, 1)

    return model_by_hand(logits or tell, plan)


def slabs_of(model, depth, overlap=0.5):
    """(first slice, logits) of a prepared image whose slice z has the value z everywhere."""
    image = np.broadcast_to(np.arange(depth, dtype=np.int16)[None, :, None, None], (1, depth, 8, 8))
    scaling = (ChannelScaling(source=0, lower=-1e4, upper=1e4, mean=0.0, sd=1.0),)
    return list(predict_slabs(model, sliced(image, scaling), PredictSettings(overlap=overlap, amp="off")))


@pytest.mark.parametrize("depth", [1, 3, 6, 7, 20, 23])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
def test_blended_slabs_give_every_slice_once_and_its_own_value(depth, overlap):
    model = slab_model(4, lambda image: torch.cat([image, -image, 0 * image], dim=1))
    found = slabs_of(model, depth, overlap)
    assert [first for first, _ in found] == list(np.cumsum([0, *[len(part) for _, part in found[:-1]]]))
    logits = torch.cat([part for _, part in found])
    expected = torch.arange(depth, dtype=torch.float32).view(-1, 1, 1).expand(depth, 8, 8)
    torch.testing.assert_close(logits[:, 0], expected, rtol=1e-5, atol=1e-4)


def test_a_volume_little_longer_than_a_slab_is_seen_whole():
    for depth, seen in ((3, 3), (4, 4), (6, 6), (7, 4)):
        assert {round(float(part[0, 0, 0, 0])) for _, part in slabs_of(slab_model(4), depth)} == {seen}


def test_a_slab_that_does_not_fit_into_memory_says_what_to_do():
    def full(image):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(ResourceError, match=r"a slab of 4 slices.*smaller slab"):
        slabs_of(slab_model(4, full), 9)


def test_a_second_look_is_taken_at_small_candidates_only():
    plan = make_plan()
    volume = make_volume((16, 16, 3))
    volume.array[:] = -100  # normalised: -2
    volume.array[0, 9, 5, 1] = 100

    def logits(image):
        found = torch.cat([torch.zeros_like(image), 3 * image, torch.full_like(image, -9.0)], dim=1)
        return found if image.shape[-1] == 8 else found - 100 * (found > 0)  # the second look sees nothing

    for settings, value in ((PredictSettings(amp="off"), 5), (PredictSettings(amp="off", second_look=2.0), 0)):
        model = model_by_hand(logits, plan)
        predicted = predict_volume(model, volume, settings)
        assert predicted.array[9, 5, 1] == value
        assert (4, 4) in {shape[-2:] for shape in model.segmenter.calls} or settings.second_look is None


def body_model(**changes):
    return model_by_hand(threshold_logits, make_plan(**changes))


def body_in_air(shape=(40, 36, 5)):
    """Air (-1000) around a body that ends before the last slices; liver and lesion values inside."""
    volume = make_volume(shape)
    inside = volume.array[:, 21:31, 4:15, :3].copy()
    volume.array[:] = -1000
    volume.array[:, 21:31, 4:15, :3] = inside
    return volume


@pytest.mark.parametrize("gate", ["auto", "on"])
def test_skipping_air_changes_no_label_and_saves_passes(gate):
    volume, settings = body_in_air(), PredictSettings(gate="off", amp="off")
    everything, gated = body_model(), body_model()
    expected = predict_volume(everything, volume, settings).array
    found = predict_volume(gated, volume, settings.model_copy(update={"gate": gate})).array
    np.testing.assert_array_equal(found, expected)
    assert (expected > 0).any()
    tiles = [sum(call[0] * call[2] for call in model.segmenter.calls) for model in (gated, everything)]
    assert tiles[0] < tiles[1] / 2


def test_images_that_are_not_ct_are_looked_at_everywhere_unless_asked():
    mr = (make_plan().channels[0].model_copy(update={"kind": "mr"}),)
    volume, num_passes = body_in_air(), {}
    for gate in ("auto", "off", "on"):
        model = body_model(channels=mr)
        predict_volume(model, volume, PredictSettings(gate=gate))
        num_passes[gate] = len(model.segmenter.calls)
    assert num_passes["auto"] == num_passes["off"] > 2 * num_passes["on"]


def test_nothing_but_air_takes_no_pass_at_all():
    volume = make_volume()
    volume.array[:] = -1000
    model = body_model()
    assert not predict_volume(model, volume).array.any()
    assert model.segmenter.calls == []


def test_only_the_box_asked_for_is_anything_but_background():
    volume = make_volume((20, 17, 6))
    box = (slice(3, 9), slice(0, 5), slice(2, 4))
    inside = predict_volume(body_model(), volume, within=box).array
    everywhere = predict_volume(body_model(), volume).array
    np.testing.assert_array_equal(inside[box], everywhere[box])
    inside[box] = 0
    assert not inside.any()


def test_models_vote_by_the_mean_of_their_logits_whatever_their_resolution():
    volume = make_volume((9, 11, 6))

    def shifted(by):
        return lambda image: threshold_logits(image) + image.new_tensor([0.0, by, 0.0]).view(1, 3, 1, 1, 1)

    for first, second, mean in ((3.1, -2.9, 0.1), (8.4, 0.2, 4.3)):
        together = [model_by_hand(shifted(by), make_plan()) for by in (first, second)]
        alone = predict_volume(model_by_hand(shifted(mean), make_plan()), volume).array
        np.testing.assert_array_equal(predict_volume(together, volume).array, alone)
    finer = model_by_hand(threshold_logits, make_plan(in_plane_spacing=(0.45, 0.35)))
    plain = model_by_hand(threshold_logits, make_plan())
    agreed = predict_volume([plain, finer], volume).array == predict_volume(plain, volume).array
    assert agreed.mean() > 0.9


def test_models_of_other_labels_cannot_vote_together():
    other = make_plan(labels=LABELS.model_copy(update={"names": ("background", "a", "b")}))
    with pytest.raises(UsageError, match="differ in labels"):
        predict_volume([body_model(), model_by_hand(threshold_logits, other)], make_volume())


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_the_engine_normalises_as_training_does_to_the_bit(dtype):
    raw = np.random.default_rng(0).integers(0, 250, (2, 3, 5, 7)).astype(dtype)
    scaling = tuple(
        ChannelScaling(source=source, lower=17.3, upper=200.1, mean=91.7 / 3, sd=0.1 + source) for source in (1, 0, 1)
    )
    np.testing.assert_array_equal(normalise_tensor(torch.from_numpy(raw), scaling).numpy(), normalise(raw, scaling))
