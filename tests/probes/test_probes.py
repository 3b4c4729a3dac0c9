"""Probes measure frozen features: against brute force, by hand, and with a backbone whose features are the pixels."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize

from voxdino.core.errors import ConfigError, DatasetError
from voxdino.core.geometry import Grid
from voxdino.core.io import write_label_map, write_volume
from voxdino.core.labels import LabelSet
from voxdino.core.safe_files import write_json
from voxdino.core.volume import LabelMap, Volume
from voxdino.data.sampling import CaseExtent
from voxdino.models.backbones.base import Backbone
from voxdino.models.features import Features
from voxdino.preparation.classification import load_image, open_classification_set
from voxdino.preparation.dataset import read_dataset
from voxdino.preparation.intensity import ChannelPolicy
from voxdino.preparation.plan import Plan
from voxdino.preparation.prepare import prepare
from voxdino.probes.class_tokens import accuracy, class_features, class_probe
from voxdino.probes.fitting import fit_logistic
from voxdino.probes.knn import knn_probabilities
from voxdino.probes.measures import effective_rank, feature_spread, target_entropy
from voxdino.probes.patches import choose_probe_slices, patch_probe

torch.set_num_threads(1)


class Pixels(Backbone):
    """Features are the mean of a patch, and of its square; `weight` 0 makes it blind."""

    depth, patch_size, config = 1, 2, None

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, images, *, taps=None, tap_norm=True, num_slices=1, images_at_once=None):
        grey = images[:, :1]
        maps = self.weight * F.avg_pool2d(torch.cat((grey, grey.square(), -grey), dim=1), self.patch_size)
        return Features((maps,), maps.mean((2, 3)), (self.patch_size, self.patch_size))

    def default_taps(self):
        return (0,)

    def embed_dims(self, taps):
        return (3,) * len(taps)

    def tail(self, num_parts):
        return ()

    def level(self, name):
        return 0


def two_clouds(number, *, seed=0, distance=1.0, width=5):
    """Features of three classes around points that lie `distance` apart, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, number)
    features = rng.normal(size=(number, width)) + distance * np.eye(3, width)[labels]
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


# Numbers of a set of features


def test_the_effective_rank_counts_equal_directions():
    cross = torch.cat((torch.eye(5), -torch.eye(5)))
    assert effective_rank(cross) == pytest.approx(5)
    assert effective_rank(cross[:, :1] @ torch.ones(1, 4)) == pytest.approx(1)


def test_the_effective_rank_is_that_of_the_definition():
    features = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 8)
    singular = np.linalg.svd(features.double().numpy() - features.double().numpy().mean(0), compute_uv=False)
    shares = singular / singular.sum()
    assert effective_rank(features) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))


def test_shifting_scaling_and_turning_leave_the_effective_rank():
    features, _ = two_clouds(50)
    turned = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)))[0]
    for other in (features + 3, features * 0.01, features @ turned):
        assert effective_rank(other) == pytest.approx(effective_rank(features), rel=1e-4)


def test_equal_features_have_no_rank_even_after_rounding():
    same = torch.rand(1, 6, generator=torch.Generator().manual_seed(2)).expand(30, 6)
    noise = 1e-7 * torch.randn(30, 6, generator=torch.Generator().manual_seed(3))
    assert effective_rank(same.clone()) == 0.0
    assert effective_rank(same + noise) == 0.0
    assert math.isnan(effective_rank(same.clone().fill_(math.nan)))


def test_the_spread_of_features_is_one_for_any_direction_and_zero_for_one():
    features = torch.randn(4000, 16, generator=torch.Generator().manual_seed(4))
    assert feature_spread(features) == pytest.approx(1, abs=0.02)
    assert feature_spread(torch.ones(9, 3) * torch.arange(1.0, 10)[:, None]) == pytest.approx(0, abs=1e-9)


def test_the_entropy_of_targets_goes_from_zero_to_log_k():
    assert target_entropy(torch.eye(8)) == 0
    assert float(target_entropy(torch.full((3, 8), 1 / 8))) == pytest.approx(math.log(8))


# Nearest neighbours


def brute_force_knn(train, train_labels, features, labels, k, temperature):
    train, features = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train.numpy(), features.numpy()))
    right = 0
    for one, truth in zip(features, labels.tolist(), strict=True):
        votes = {}
        for place in np.argsort(-(train @ one))[:k]:
            label = int(train_labels[place])
            votes[label] = votes.get(label, 0) + math.exp(float(train[place] @ one) / temperature)
        right += max(votes, key=votes.get) == truth
    return right / len(labels)


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 1.0), (500, 0.07)])
def test_nearest_neighbours_vote_as_in_brute_force(k, temperature):
    train, features = two_clouds(90, distance=2), two_clouds(41, seed=1, distance=2)
    expected = brute_force_knn(*train, *features, k, temperature)
    assert 0.5 < expected < 1
    votes = knn_probabilities(*train, features[0], k=k, temperature=temperature, num_classes=3)
    assert accuracy(votes, features[1]) == pytest.approx(expected)
    longer = features[0] * torch.arange(1.0, 42)[:, None]
    again = knn_probabilities(*train, longer, k=k, temperature=temperature, num_classes=3)
    torch.testing.assert_close(again, votes, atol=1e-4, rtol=0)
    torch.testing.assert_close(votes.sum(1), torch.ones(41).double())


def test_one_near_neighbour_outvotes_two_far_ones():
    train, labels, near = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.1]]), torch.tensor([0, 1, 1]), [[2.0, 0.1]]
    assert knn_probabilities(train, labels, torch.tensor(near), k=3, num_classes=2)[0, 0] > 0.99
    votes = knn_probabilities(train, labels, torch.tensor(near), k=3, temperature=100.0, num_classes=2)
    torch.testing.assert_close(votes, torch.tensor([[1 / 3, 2 / 3]]).double(), atol=0.01, rtol=0)


def test_neighbours_vote_for_each_of_several_labels():
    train, labels = torch.eye(2), torch.tensor([[1, 1, 0], [0, 1, 0]])
    votes = knn_probabilities(train, labels, torch.tensor([[1.0, 1.0]]), k=2, num_classes=3)
    torch.testing.assert_close(votes, torch.tensor([[0.5, 1.0, 0.0]]).double())


# Linear classifier


@pytest.mark.parametrize("strength", [1.0, 1e-3])
def test_the_fit_is_the_minimum_that_scipy_finds(strength):
    features, labels = two_clouds(60, distance=2)
    x, classes = features.double(), torch.unique(labels, return_inverse=True)[1]

    def loss(flat):
        weights = flat.reshape(3, 6)
        logits = x.numpy() @ weights[:, :-1].T + weights[:, -1]
        log_sum = np.log(np.exp(logits).sum(1))
        return (log_sum - logits[np.arange(60), classes]).mean() + strength / 2 * (weights[:, :-1] ** 2).sum()

    expected = minimize(loss, np.zeros(18), method="BFGS", options={"gtol": 1e-8}).x.reshape(3, 6)
    found = fit_logistic(x, classes, 3, strength).numpy()
    np.testing.assert_allclose(found[:, :-1], expected[:, :-1], atol=1e-4)
    assert loss(found.ravel()) <= loss(expected.ravel()) + 1e-9
    from_afar = fit_logistic(x, classes, 3, strength, start=torch.ones(3, 6).double()).numpy()
    np.testing.assert_allclose(from_afar[:, :-1], found[:, :-1], atol=3e-5)


# Sets of pictures


SIZES = {"train": 40, "val": 10, "test": 21}


def write_pictures(path, **changes):
    """Class 1 is bright."""
    arrays = {}
    for part, number in SIZES.items():
        labels = np.arange(number) % 2
        noise = np.random.default_rng(number).integers(0, 60, (number, 6, 6))
        arrays[f"{part}_images"] = (noise + 120 * labels[:, None, None]).astype(np.uint8)
        arrays[f"{part}_labels"] = labels[:, None].astype(np.uint8)
    np.savez(path, **arrays | changes)
    return path


def test_bright_pictures_are_told_from_dark_ones(tmp_path):
    pictures = open_classification_set(write_pictures(tmp_path / "bright.npz"))
    result = class_probe(pictures, Pixels().eval(), side=8)
    assert (result.knn, result.linear, result.num_train, result.num_test) == (1, 1, 40, 21)
    fewer = class_probe(pictures, Pixels().eval(), side=8, num_train=12, num_test=5)
    assert (fewer.num_train, fewer.num_test) == (12, 5)


def test_features_of_pictures_do_not_depend_on_the_batch_and_grey_is_grey_colour(tmp_path):
    pictures = open_classification_set(write_pictures(tmp_path / "bright.npz"))
    images = [load_image(case).array for case in pictures.splits["test"]]
    features = class_features(Pixels().eval(), images, batch_size=4)
    assert features.shape == (21, 3)
    colour = [np.repeat(image, 3, axis=0) for image in images]
    torch.testing.assert_close(features, class_features(Pixels().eval(), colour, batch_size=21))


def test_several_labels_per_picture_have_no_one_class_to_probe(tmp_path):
    changes = {f"{part}_labels": np.eye(2, dtype=np.uint8)[np.arange(n) % 2] for part, n in SIZES.items()}
    pictures = open_classification_set(write_pictures(tmp_path / "several.npz", **changes))
    with pytest.raises(DatasetError, match=r"several\.npz: holds volumes, or several labels"):
        class_probe(pictures, Pixels().eval(), side=8)


# Patch tokens


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Five noisy volumes with a bright block and a brighter core, whose edges lie on patches of 2."""
    root = tmp_path_factory.mktemp("blocks")
    labels = LabelSet(names=("background", "block", "core"), ids=(0, 1, 2))
    for index in range(5):
        rng = np.random.default_rng(index)
        label = np.zeros((12, 16, 4), dtype=np.uint8)
        label[2:10, 4:12, 1:3] = 1
        label[4:8, 6:10, 2] = 2
        image = (100 * label + rng.normal(0, 10, label.shape)).astype(np.float32)
        grid = Grid.from_spacing(label.shape, (1.0, 1.0, 4.0))
        write_volume(root / f"data/imagesTr/case_{index}_0000.nii.gz", Volume(image[None], grid))
        write_label_map(root / f"data/labelsTr/case_{index}.nii.gz", LabelMap(label, grid))
    names = {"background": 0, "block": 1, "core": 2}
    write_json(
        root / "data/dataset.json",
        {"channel_names": {"0": "MRI"}, "labels": names, "numTraining": 5, "file_ending": ".nii.gz"},
    )
    scale = {"lower": -50.0, "upper": 300.0, "mean": 50.0, "sd": 80.0}
    plan = Plan(
        dataset="blocks",
        fingerprint_digest="",
        ndim=3,
        labels=labels,
        channels=(ChannelPolicy(name="MRI", source=0, kind="mr", **scale),),
        slice_axis="S",
        in_plane_spacing=None,
        magnification=1.0,
        crop=(16, 16),
        tile=(16, 16),
        context_slices=0,
        input_builder="repeat",
        batch_size=2,
        patch_size=2,
    )
    prepare(read_dataset(root / "data"), plan, root / "work", num_workers=1)
    plan.write(root / "work/plan.json")
    write_json(
        root / "work/splits.json",
        [{"train": [f"case_{i}" for i in range(4)], "val": ["case_4"]}],
    )
    return root / "work"


def test_a_linear_layer_on_the_pixels_finds_bright_blocks(workdir):
    backbone = Pixels().eval()
    result = patch_probe(workdir, backbone, num_train_slices=12, num_test_slices=4)
    assert set(result.per_class) == {"block", "core"}
    assert result.dice > 0.9
    assert (result.num_train_slices, result.num_test_slices) == (10, 3)  # 8 and 2 slices hold foreground
    assert result == patch_probe(workdir, backbone, num_train_slices=12, num_test_slices=4, batch_size=3)


def test_blind_features_find_nothing(workdir):
    result = patch_probe(workdir, Pixels(0.0).eval(), num_train_slices=12, num_test_slices=4)
    assert result.per_class == {"block": 0.0, "core": 0.0}
    assert (result.dice, result.rank) == (0.0, 0.0)


def test_a_probe_leaves_the_backbone_as_it_is(workdir):
    backbone = Pixels().eval()
    patch_probe(workdir, backbone, num_train_slices=5, num_test_slices=2, strengths=[0.1])
    assert not backbone.training and backbone.weight.requires_grad and backbone.weight.grad is None


def test_a_fold_that_is_not_there_is_named(workdir):
    with pytest.raises(ConfigError, match="there is no fold 7; the splits have 1"):
        patch_probe(workdir, Pixels().eval(), fold=7)


def extent(case, depth, foreground):
    return CaseExtent(case, (depth, 8, 8), {}, tuple(foreground))


def test_slices_are_spread_over_the_cases_and_four_of_five_hold_foreground():
    cases = [extent("b", 10, range(5)), extent("a", 10, range(2, 10))]
    chosen = choose_probe_slices(cases, 10)
    assert len(set(chosen)) == 10 and chosen == sorted(chosen)
    filled = [(case, depth) for case, depth in chosen if depth in (range(5) if case == "b" else range(2, 10))]
    assert len(filled) == 8 and {case for case, _ in filled} == {"a", "b"}
    assert chosen == choose_probe_slices(cases[::-1], 10)
    assert len(choose_probe_slices(cases, 1000)) == 20
