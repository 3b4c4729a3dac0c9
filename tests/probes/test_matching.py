"""Retrieval and correspondence: against brute force, by hand, and on maps that are shifted copies."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from voxdino.probes.correspondence import class_shares, distances_mm, mask_centre, match_points, transfer_labels
from voxdino.probes.retrieval import retrieval_scores

torch.set_num_threads(1)


def brute_force(queries, query_labels, gallery, labels, k):
    recall, precision = [], []
    for one, truth in zip(queries.numpy(), query_labels.tolist(), strict=True):
        similarity = gallery.numpy() @ one / np.linalg.norm(gallery.numpy(), axis=1)
        hits = [int(labels[place]) == truth for place in np.argsort(-similarity)[:k]]
        recall.append(any(hits))
        sums = [sum(hits[: rank + 1]) / (rank + 1) for rank, hit in enumerate(hits) if hit]
        precision.append(sum(sums) / min(k, int((labels == truth).sum())))
    return np.mean(recall), np.mean(precision)


def found(*arguments, **options):
    """Means over the queries that have a match."""
    return {name: float(values.nanmean()) for name, values in retrieval_scores(*arguments, **options).items()}


@pytest.mark.parametrize("k", [1, 3, 10, 99])
def test_recall_and_average_precision_are_those_of_brute_force(k):
    generator = torch.Generator().manual_seed(0)
    gallery, labels = torch.randn(40, 4, generator=generator), torch.arange(40) % 3
    queries, truth = torch.randn(23, 4, generator=generator), torch.arange(23) % 3
    recall, precision = brute_force(queries, truth, gallery, labels, k)
    expected = {f"recall@{k}": pytest.approx(recall), f"map@{k}": pytest.approx(precision)}
    assert found(queries, truth, gallery, labels, ks=(k,)) == expected


def test_pictures_of_the_same_patient_are_no_finds():
    gallery, labels = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 1, 0])
    query, truth = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert found(query, truth, gallery, labels, ks=(1,))["recall@1"] == 1
    groups = {"query_groups": ["p"], "gallery_groups": ["p", "q", None]}
    expected = {"recall@1": 0, "recall@2": 1, "map@1": 0, "map@2": 0.5}
    assert found(query, truth, gallery, labels, ks=(1, 2), **groups) == expected
    unknown = {"query_groups": [None], "gallery_groups": [None, None, None]}
    assert found(query, truth, gallery, labels, ks=(1,), **unknown)["recall@1"] == 1


def test_one_common_label_is_a_match_and_queries_without_any_have_no_score():
    gallery, labels = torch.eye(3), torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 0]])
    queries, truth = torch.eye(3)[[0, 1]], torch.tensor([[0, 0, 0], [1, 0, 1]])
    scores = retrieval_scores(queries, truth, gallery, labels, ks=(1,))
    assert all(values[0].isnan() and values[1] == 1 for values in scores.values())


@pytest.mark.parametrize("grid, patch", [((6, 9), 14), ((3, 5, 7), 4)], ids=["2d", "3d"])
def test_points_are_found_in_a_shifted_image(grid, patch):
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(16, *grid, generator=generator)
    target = source.roll(1, dims=-1)
    shape = [n * patch for n in grid]
    tokens = torch.tensor([[0] * len(grid), [n - 2 for n in grid], [1] * len(grid)])
    points = (tokens + 0.5) * patch - 0.5
    found = match_points(source, target, points, source_shape=shape, target_shape=shape)
    moved = points.clone()
    moved[:, -1] += patch
    torch.testing.assert_close(found, moved)
    spacing = [2.0] * (len(grid) - 1) + [0.5]
    torch.testing.assert_close(distances_mm(points, moved, spacing), torch.full((3,), 0.5 * patch))


def test_a_target_of_another_size_is_measured_in_its_own_voxels():
    source = torch.eye(4).reshape(4, 2, 2)
    found = match_points(
        source, source, torch.tensor([[7.0, 2.0]]), source_shape=(10, 20), target_shape=(20, 60)
    )  # lower left
    torch.testing.assert_close(found, torch.tensor([[14.5, 14.5]]))


@pytest.mark.parametrize("grid", [(4, 6), (2, 4, 6)], ids=["2d", "3d"])
def test_labels_move_with_the_features(grid):
    generator = torch.Generator().manual_seed(2)
    source = torch.randn(32, *grid, generator=generator)
    shape = [4 * n for n in grid]
    label = torch.zeros(shape, dtype=torch.int64)
    label[..., 4:8, 8:16] = 1
    target = source.roll(1, dims=-1)
    shares = class_shares(label, grid, num_classes=2)
    moved = transfer_labels(source, target, shares, target_shape=shape, k=1)
    expected = label.roll(4, dims=-1)
    overlap = 2 * int((moved & expected).sum()) / int(moved.sum() + expected.sum())
    assert moved.shape == label.shape and overlap > 0.9
    torch.testing.assert_close(mask_centre(moved, 1), mask_centre(expected, 1), atol=0.6, rtol=0)
    assert bool(mask_centre(moved, 5).isnan().all())


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.num_bytes = max(self.num_bytes, made.nbytes)
        return made


@pytest.mark.parametrize("grid", [(4, 6), (2, 4, 6)], ids=["2d", "3d"])
def test_many_classes_take_the_memory_of_one_and_fill_each_token_once(grid):
    label = torch.arange(4 ** len(grid) * int(np.prod(grid))).reshape([4 * n for n in grid]) % 10
    with Largest() as largest:
        shares = class_shares(label, grid, num_classes=10)
    assert largest.num_bytes <= 4 * label.numel()
    torch.testing.assert_close(shares.sum(1), torch.ones(int(np.prod(grid))))
    first = label[tuple(slice(4) for _ in grid)]
    torch.testing.assert_close(shares[0], torch.bincount(first.flatten(), minlength=10) / first.numel())
