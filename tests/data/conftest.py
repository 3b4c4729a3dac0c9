"""Two prepared volumes whose every voxel value names its place, on an oblique anisotropic grid."""

from pathlib import Path

import numpy as np
import pytest
import torch

from voxdino.core.geometry import Grid
from voxdino.core.io import write_label_map, write_volume
from voxdino.core.labels import LabelSet
from voxdino.core.safe_files import write_json
from voxdino.core.volume import LabelMap, Volume
from voxdino.data.store import CaseStore
from voxdino.preparation.dataset import read_dataset
from voxdino.preparation.intensity import ChannelPolicy
from voxdino.preparation.plan import Plan
from voxdino.preparation.prepare import prepare

torch.set_num_threads(1)

LABELS = LabelSet(names=("background", "block"), ids=(0, 7), ignore_id=9)
SCALE = {"lower": 0.0, "upper": 30000.0, "mean": 100.0, "sd": 50.0}


def make_plan(**changes) -> Plan:
    facts = {
        "dataset": "places",
        "fingerprint_digest": "",
        "ndim": 3,
        "labels": LABELS,
        "channels": (
            ChannelPolicy(name="CT", source=0, kind="ct", **SCALE),
            ChannelPolicy(name="CT narrow", source=0, kind="window", **{**SCALE, "lower": 200.0, "upper": 400.0}),
        ),
        "slice_axis": "S",
        "in_plane_spacing": None,
        "magnification": 1.0,
        "crop": (8, 8),
        "tile": (8, 8),
        "context_slices": 1,
        "input_builder": "channels",
        "batch_size": 2,
        "patch_size": 4,
    }
    return Plan(**{**facts, **changes})


@pytest.fixture(scope="session")
def places(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("places")
    for index in range(3):
        shape = (13 + index, 11, 6)
        affine = np.diag([-1.0, -2.0, 5.0, 1.0])  # LPS: the slices come out as they lie in the file, transposed
        grid = Grid(shape, affine)
        image = np.arange(np.prod(shape), dtype=np.int16).reshape(shape) + 1000 * index
        label = np.zeros(shape, dtype=np.uint8)
        label[4:7, 3:6, 2:4] = 7
        label[0, 0, 0] = 9
        write_volume(root / f"data/imagesTr/case_{index}_0000.nii.gz", Volume(image[None], grid))
        write_label_map(root / f"data/labelsTr/case_{index}.nii.gz", LabelMap(label, grid))
    names = {"background": 0, "block": 7, "ignore": 9}
    description = {"channel_names": {"0": "CT"}, "labels": names, "numTraining": 3, "file_ending": ".nii.gz"}
    write_json(root / "data/dataset.json", description)
    prepare(read_dataset(root / "data"), make_plan(), root / "work", num_workers=1)
    return root / "work/prepared"


@pytest.fixture
def store(places) -> CaseStore:
    return CaseStore(places)
