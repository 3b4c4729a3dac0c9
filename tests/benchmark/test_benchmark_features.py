"""Features are computed once, kept with a digest, and the same when they are read again."""

import pytest
import torch
from small_benchmark import draw_pictures, opened

from voxdino.benchmark.decoders import RememberingBackbone
from voxdino.benchmark.images import ImageFeatures, View
from voxdino.benchmark.kept import kept
from voxdino.core.errors import DatasetError, WeightsError
from voxdino.models.backbones.pixels import PixelConfig, Pixels
from voxdino.models.weights import load_backbone
from voxdino.preparation.classification import open_classification_set
from voxdino.preparation.intensity import IMAGENET_MEAN, IMAGENET_SD

CPU = torch.device("cpu")


class Counted(Pixels):
    """Counts the images it sees."""

    seen = 0

    def forward(self, images, **settings):
        self.seen += len(images)
        return super().forward(images, **settings)


def test_tokens_of_pixels_are_the_pixels():
    images = torch.rand(2, 3, 10, 15)
    features = Pixels(PixelConfig(patch_size=5))(images, taps=(0,))
    torch.testing.assert_close(torch.nn.functional.pixel_shuffle(features.maps[0], 5), images)
    assert features.cls_token.shape == (2, 3 * 28 * 28)


def test_pixels_are_loaded_by_name_and_of_another_patch_other_features():
    fine, coarse = (load_backbone(f"pixels:{size}") for size in (4, 8))
    assert (fine[0].patch_size, coarse[0].patch_size) == (4, 8)
    assert fine[1].file_digest != coarse[1].file_digest and fine[1].num_parameters == 0


@pytest.mark.parametrize("name", ["pixels:", "pixels:0", "pixels:fine"])
def test_pixels_without_a_sensible_patch_are_refused(name):
    with pytest.raises((WeightsError, ValueError), match="patch_size"):
        load_backbone(name)


def test_kept_tensors_are_made_once_and_read_to_the_same_bits(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"x": torch.randn(3, 5), "n": torch.arange(4)}

    first = kept(tmp_path / "a.safetensors", make)
    again = kept(tmp_path / "a.safetensors", make)
    assert len(made) == 1
    assert all(torch.equal(first[name], again[name]) and first[name].dtype == again[name].dtype for name in ("x", "n"))


@pytest.mark.parametrize("fault", ["flip", "cut", "unsealed"])
def test_what_is_damaged_is_made_again(tmp_path, fault):
    path = tmp_path / "a.safetensors"
    kept(path, lambda: {"x": torch.zeros(8)})
    data = bytearray(path.read_bytes())
    if fault == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif fault == "cut":
        path.write_bytes(data[:-3])
    else:
        path.with_suffix(".json").unlink()
    assert torch.equal(kept(path, lambda: {"x": torch.ones(8)})["x"], torch.ones(8).half())


@pytest.fixture
def volumes(tmp_path):
    return open_classification_set(draw_pictures(tmp_path / "volumes.npz", shape=(6, 7, 20)))


def features_of(folder, known, view, resolution=32):
    return ImageFeatures(folder, opened("random:tiny"), resolution, CPU, content=known.digest, view=view)


def test_features_of_a_volume_are_those_of_its_slices(tmp_path, volumes):
    cases = volumes.splits["test"]
    both = features_of(tmp_path, volumes, View(3, (0, 2), 3, 1))(cases)
    alone = features_of(tmp_path, volumes, View(3, (2,), 3, 1))(cases)
    assert both.shape[:2] == (len(cases), 6)
    torch.testing.assert_close(both[:, 3:], alone, rtol=0.05, atol=0.05)


def test_a_case_has_the_same_features_whatever_is_asked_with_it(tmp_path, volumes):
    cases = volumes.splits["test"]
    view = View(3, (1,), 2, 1)
    together = features_of(tmp_path / "a", volumes, view)(cases)
    alone = features_of(tmp_path / "b", volumes, view)(cases[4:5])
    torch.testing.assert_close(together[4:5], alone, rtol=0.02, atol=0.02)


def test_nothing_is_missing_once_it_is_computed(tmp_path, volumes):
    features = features_of(tmp_path, volumes, View(3, (0, 1), 4, 1))
    cases = volumes.splits["val"]
    assert features.num_missing(cases) == len(cases) * 8
    features(cases)
    assert features.num_missing(cases) == 0
    assert features_of(tmp_path, volumes, View(3, (0, 1), 4, 1), resolution=48).num_missing(cases) == len(cases) * 8


def test_a_slice_comes_with_its_neighbours_as_colours_and_the_outer_ones_with_themselves(volumes):
    case = volumes.splits["val"][0]
    alone, windows = (View(3, (0,), 6, width)(case, 16)[:, :, 3, 5] for width in (1, 3))
    mean, sd = (torch.tensor(values) for values in (IMAGENET_MEAN, IMAGENET_SD))
    alone, windows = alone * sd + mean, windows * sd + mean
    torch.testing.assert_close(windows[2], alone[1:4, 0])
    torch.testing.assert_close(windows[0], alone[[0, 0, 1], 0])


def test_thin_volumes_have_slices_more_than_once(volumes):
    assert len(View(3, (0,), 9, 1)(volumes.splits["val"][0], 16)) == 9


def test_images_of_two_channels_are_refused(tmp_path, monkeypatch, volumes):
    from voxdino.benchmark import images
    from voxdino.preparation.classification import LabelledImage

    monkeypatch.setattr(images, "load_image", lambda case: LabelledImage(torch.zeros(2, 4, 4).numpy(), (1.0, 1.0)))
    with pytest.raises(DatasetError, match="2 channels"):
        View(2, (), 1, 1)(volumes.splits["val"][0], 16)


def test_a_remembering_backbone_computes_each_image_once_and_answers_the_same(tmp_path):
    inner = Counted(PixelConfig(patch_size=4)).eval()
    path, images = tmp_path / "case.safetensors", torch.rand(2, 3, 8, 12)
    answers = []
    for _ in range(2):
        backbone = RememberingBackbone(inner)
        with backbone.case(path):
            answers += [backbone(images, taps=(0,)), backbone(images.flip(0), taps=(0,)), backbone(images, taps=(0,))]
    assert inner.seen == 4
    for number in range(3):
        assert torch.equal(answers[number].maps[0], answers[number + 3].maps[0])
    torch.testing.assert_close(answers[0].maps[0], answers[1].maps[0].flip(0))


def test_nothing_is_kept_of_a_case_that_failed(tmp_path):
    backbone, path = RememberingBackbone(Counted(PixelConfig(patch_size=4)).eval()), tmp_path / "case.safetensors"
    with pytest.raises(DatasetError), backbone.case(path):
        backbone(torch.rand(1, 3, 4, 4), taps=(0,))
        raise DatasetError("broken")
    assert not path.exists()
