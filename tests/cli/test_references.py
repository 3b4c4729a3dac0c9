"""The files that say what label values mean: every dataset.json that `prepare` reads."""

import json

import pytest

from voxdino.cli.references import read_labels
from voxdino.core.labels import LabelSet

LABELS = LabelSet(names=("background", "liver", "tumour"), ids=(0, 1, 2))
BY_NAME = {"background": 0, "liver": 1, "tumour": 2}
BY_NUMBER = {"0": "background", "1": "liver", "2": "tumour"}


@pytest.mark.parametrize(
    "described",
    [
        {"labels": BY_NAME, "channel_names": {"0": "CT"}},
        {"labels": BY_NUMBER, "modality": {"0": "CT"}, "training": []},
        BY_NAME,
        BY_NUMBER,
    ],
    ids=["nnU-Net", "MSD", "labels.json", "labels.json by number"],
)
def test_labels_are_read_from_every_layout(described, tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(described))
    assert read_labels(path) == LABELS
