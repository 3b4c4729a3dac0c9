"""Laws of the way from logits to labels on the original grid."""

import numpy as np
import pytest
import torch

from voxdino.core.errors import CheckpointError
from voxdino.core.geometry import Grid
from voxdino.core.labels import LabelSet, Region
from voxdino.inference import export
from voxdino.inference.export import class_indices, export_labels, resize_scores
from voxdino.preparation.orientation import slice_geometry

LABELS = LabelSet(names=("background", "a", "b", "c"), ids=(0, 2, 7, 300))
TUMOUR = LabelSet(
    names=("background", "oedema", "core", "enhancing"),
    ids=(0, 1, 2, 4),
    regions=(
        Region(name="whole", ids=(1, 2, 4)),
        Region(name="core", ids=(2, 4)),
        Region(name="enhancing", ids=(4,)),
    ),
    region_ids=(1, 2, 4),
)


def test_the_class_of_the_largest_score_wins_and_ties_go_to_the_first():
    scores = torch.tensor([[[0.0, 1.0, 5.0]], [[2.0, 1.0, 5.0]], [[1.0, 0.0, 7.0]], [[-1.0, 1.0, 7.0]]])
    assert class_indices(scores, (1, 3), LABELS).tolist() == [[1, 0, 2]]


@pytest.mark.parametrize("size", [(5, 7), (13, 9), (3, 20)])
def test_deciding_a_few_classes_at_a_time_changes_nothing(monkeypatch, size):
    scores = torch.randn(4, 5, 7)
    whole = class_indices(scores, size, LABELS)
    monkeypatch.setattr(export, "BYTES_AT_ONCE", 4 * size[0] * size[1] + 1)
    torch.testing.assert_close(class_indices(scores, size, LABELS), whole)


def test_regions_are_written_in_order_the_later_over_the_earlier():
    whole, core, enhancing = [1.0, 1.0, 1.0, -1.0, -1.0], [-1.0, 1.0, 1.0, 1.0, -1.0], [-1.0, -1.0, 1.0, -1.0, -1.0]
    scores = torch.tensor([[whole], [core], [enhancing]])
    indices = class_indices(scores, (1, 5), TUMOUR)
    assert TUMOUR.to_ids(indices.numpy()).tolist() == [[1, 2, 4, 2, 0]]


def test_growing_is_linear_between_agreeing_outer_edges():
    scores = torch.tensor([[[0.0, 2.0, 4.0]]])
    np.testing.assert_allclose(resize_scores(scores, (1, 6))[0, 0], [0.0, 0.5, 1.5, 2.5, 3.5, 4.0])


@pytest.mark.parametrize("old, new", [(6, 3), (7, 3), (9, 4), (13, 10)])
def test_shrinking_takes_the_score_nearest_to_each_centre(old, new):
    scores = torch.arange(float(old)).reshape(1, old, 1)
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    assert np.abs(resize_scores(scores, (new, 1))[0, :, 0].numpy() - centres).max() <= 0.5


def test_one_axis_may_grow_while_the_other_shrinks():
    scores = torch.arange(8.0).reshape(1, 4, 2)
    resized = resize_scores(scores, (2, 4))
    np.testing.assert_allclose(resized[0], [[2.0, 2.25, 2.75, 3.0], [6.0, 6.25, 6.75, 7.0]])


def test_slabs_land_in_their_slices_and_ids_are_the_files_own():
    geometry = slice_geometry(Grid.from_spacing((4, 3, 5)), "S")
    slabs = [(first, torch.eye(4)[first][None, :, None, None].expand(1, 4, 3, 4)) for first in range(4)]
    slabs.append((4, torch.eye(4)[0][None, :, None, None].expand(1, 4, 3, 4)))
    labels = export_labels(slabs, geometry, LABELS)
    assert labels.array.shape == (4, 3, 5)
    assert labels.array[1, 2].tolist() == [0, 2, 7, 300, 0]
    assert labels.array.dtype == np.uint16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_an_error_not_a_class(bad):
    scores = torch.zeros(1, 4, 3, 4)
    scores[0, 2, 1, 1] = bad
    with pytest.raises(CheckpointError, match="slice 3"):
        export_labels([(3, scores)], slice_geometry(Grid.from_spacing((4, 3, 5)), "S"), LABELS)
