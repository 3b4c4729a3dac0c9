"""Dice during training: by hand, for classes and overlapping regions, with ignored voxels and absent classes."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from voxdino.core.labels import LabelSet, Region
from voxdino.finetuning.validation import validate

LABELS = LabelSet(names=("background", "liver", "lesion"), ids=(0, 1, 2))
REGIONS = LabelSet(
    names=("background", "edema", "core"),
    ids=(0, 1, 2),
    regions=(Region(name="whole", ids=(1, 2)), Region(name="inner", ids=(2,))),
    region_ids=(1, 2),
)


@dataclass
class Pair:
    label: Tensor
    logits: Tensor


def pair(label, found, num_classes=3):
    label, found = torch.tensor([[label]]), torch.tensor([[found]])
    return Pair(label, F.one_hot(found, num_classes).movedim(-1, 1).float())


def run(pairs, labels=LABELS, stop=lambda: False):
    return validate(pairs, lambda batch: batch.logits, labels, ignore_index=-1, stop=stop)


def test_dice_is_pooled_over_batches():
    result = run([pair([1, 1, 0, 2], [1, 0, 0, 2]), pair([1, 0, 0, 0], [1, 1, 0, 0])])
    assert result.per_class == {"liver": pytest.approx(2 * 2 / (3 + 3)), "lesion": 1.0}
    assert result.dice == pytest.approx((4 / 6 + 1) / 2)


def test_ignored_voxels_do_not_count():
    assert run([pair([1, -1, -1, 2], [1, 1, 2, 2])]).dice == 1.0


def test_a_class_that_is_nowhere_has_no_dice():
    result = run([pair([1, 0], [1, 0])])
    assert result.per_class["lesion"] is None and result.dice == 1.0


def test_a_class_only_predicted_scores_zero():
    assert run([pair([1, 0], [1, 2])]).per_class["lesion"] == 0.0


def test_regions_may_overlap():
    logits = torch.tensor([[[[3.0, 3.0, -3.0]], [[-3.0, 3.0, -3.0]]]])
    result = run([Pair(torch.tensor([[[1, 2, 0]]]), logits)], REGIONS)
    assert result.per_class == {"whole": 1.0, "inner": 1.0}


def test_a_stop_in_between_gives_no_result():
    assert run([pair([1, 0], [1, 0])], stop=lambda: True) is None
