"""Models that see slabs: what is blended tile by tile is the mean it should be, and the classes cost no memory."""

import numpy as np
import pytest
import torch
from small_models import LABELS, make_card, make_plan, make_segmenter, make_volume, model_by_hand
from torch.utils._python_dispatch import TorchDispatchMode

from voxdino.core.labels import LabelSet
from voxdino.inference import frame
from voxdino.inference.load import LoadedModel, ModelCard
from voxdino.inference.predictor import predict_slabs, predict_volume
from voxdino.inference.settings import PredictSettings
from voxdino.inference.tiles import blend, blend_slabs, gaussian_weight, shares, slab_starts, tile_boxes
from voxdino.models.backbones.no_backbone import NoBackbone, NoBackboneConfig
from voxdino.preparation.slices import slice_case

USUAL = PredictSettings(amp="off")
MODELS = {  # few features under the classifier
    "conv3d": {"decoder": "conv3d", "decoder_width": 8},
    "detail": {"decoder": "conv3d", "decoder_width": 8, "detail": "volume", "detail_width": 2},
    "unet_3d": {"decoder": "unet_3d", "backbone": "none", "decoder_settings": {"plan_size": (4, 8, 8)}},
}


def many(count):
    return LabelSet(names=tuple(f"s{n}" for n in range(count)), ids=tuple(range(count)))


def slab_model(kind, num_classes, **changes):
    plan = make_plan(slab=4, labels=many(num_classes), **changes)
    backbone = NoBackbone(NoBackboneConfig()) if kind == "unet_3d" else None
    segmenter = make_segmenter(plan, backbone, slab=4, **MODELS[kind])
    card = ModelCard(model=segmenter.config, backbone=make_card(), licence="", voxdino_version="0")
    return LoadedModel(segmenter, plan, card, kind, "0", torch.device("cpu"))


def all_logits(model, volume, settings=USUAL):
    slices, _ = slice_case("case", volume, model.plan)
    return torch.cat([logits for _, logits in predict_slabs(model, slices, settings)])


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("num_slices, plane", [(9, (7, 11)), (4, (5, 6)), (23, (5, 6))])
def test_tiles_added_one_by_one_give_the_mean_of_blended_slabs(num_slices, plane, overlap):
    random, depth, tile = np.random.default_rng(0), 4, (5, 6)
    boxes, weight = tile_boxes(plane, tile, overlap), gaussian_weight(tile)
    along = gaussian_weight((depth,)).tolist()
    slabs = [
        (first, [(box, random.random((depth, 3, *tile), np.float32)) for box in boxes])
        for first in slab_starts(num_slices, depth, overlap=overlap)
    ]
    total, weights = np.zeros((num_slices, 3, *plane)), np.zeros(num_slices)
    for first, tiles in slabs:
        whole = blend(tiles, weight, np.zeros((depth, 3, *plane), np.float32))
        total[first : first + depth] += whole * np.array(along)[:, None, None, None]
        weights[first : first + depth] += along
    seen = (
        (first, [(*one, share) for one, share in zip(tiles, shares(boxes, weight, np.zeros(plane)), strict=True)])
        for first, tiles in slabs
    )
    found = [(at, one.copy()) for at, one in blend_slabs(seen, along, np.zeros((depth, 4, *plane), np.float32))]
    assert [at for at, _ in found] == list(range(num_slices))
    blended = np.stack([one for _, one in found])
    np.testing.assert_allclose(blended[:, :3], total / weights[:, None, None, None], rtol=1e-4)
    np.testing.assert_allclose(blended[:, 3], 1, rtol=1e-5)  # seen all over


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("settings", [{}, {"mirror": True, "overlap": 0.2}], ids=str)
def test_features_blended_and_then_classified_are_the_blended_logits(kind, settings, monkeypatch):
    model, volume = slab_model(kind, 40), make_volume((13, 9, 11))
    volume.array[:, :3] = -900  # air: background, and not looked at
    settings = USUAL.model_copy(update=settings)
    assert frame.has_fewer_features(model.segmenter)
    found = all_logits(model, volume, settings)
    monkeypatch.setattr(frame, "has_fewer_features", lambda segmenter: False)
    expected = all_logits(model, volume, settings)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


class Largest(TorchDispatchMode):
    """The most values that any tensor made meanwhile has."""

    num_values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor) and one.untyped_storage().nbytes():
                self.num_values = max(self.num_values, one.untyped_storage().nbytes() // one.element_size())
        return out


@pytest.mark.parametrize("kind", MODELS)
def test_logits_of_a_slab_or_of_its_tile_are_never_held(kind):
    volume = make_volume((13, 9, 11))
    largest = []
    for num_classes in (40, 250):
        with Largest() as seen:
            predict_volume(slab_model(kind, num_classes), volume, USUAL)
        largest.append(seen.num_values)
    features = 4 * (slab_features(kind) + 1) * 9 * 13
    assert largest[1] <= max(250 * 9 * 13, largest[0], features)  # a slice's logits, or what takes no notice of them


def slab_features(kind):
    return slab_model(kind, 40).segmenter.classifier.in_channels


def test_where_memory_ends_tiles_are_taken_by_fewer_and_none_counts_twice():
    def logits(image):
        return torch.cat([image, -image, image.sin()], dim=1)

    def hungry(image):
        if len(image) > 1:
            raise torch.OutOfMemoryError("no more")
        return logits(image)

    volume, settings = make_volume((21, 9, 7)), PredictSettings(amp="off", slices_at_once=12)
    plan = make_plan(slab=4)
    expected = predict_volume(model_by_hand(logits, plan), volume, settings)
    found = predict_volume(model_by_hand(hungry, plan), volume, settings)
    np.testing.assert_array_equal(found.array, expected.array)
    assert len(np.unique(found.array)) > 1


def test_the_need_counts_the_slab_and_not_the_classes():
    grid = make_volume((90, 80, 70)).grid
    few, many_, more = (slab_model("conv3d", n).working_bytes(grid, USUAL) for n in (3, 40, 250))
    assert few < many_ == more
    flat = model_by_hand(lambda image: image, make_plan(labels=LABELS)).working_bytes(grid, USUAL)
    assert many_ - flat >= 4 * 4 * (4 + 1) * 90 * 80  # float32, slices, features and the share
    second_look = USUAL.model_copy(update={"second_look": 2.0})
    assert slab_model("conv3d", 40).working_bytes(grid, second_look) > 4 * 4 * 40 * 90 * 80
