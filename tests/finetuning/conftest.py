"""A prepared data set of five small volumes (a bright block and a brighter core on noise), made once."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from voxdino.core.geometry import Grid
from voxdino.core.io import write_label_map, write_volume
from voxdino.core.safe_files import write_json
from voxdino.core.volume import LabelMap, Volume
from voxdino.finetuning.config import FinetuneConfig
from voxdino.preparation.check import survey
from voxdino.preparation.dataset import read_dataset
from voxdino.preparation.plan import make_plan
from voxdino.preparation.prepare import prepare
from voxdino.preparation.splits import make_splits

torch.set_num_threads(1)  # several tests share the machine; and the same bits everywhere

SMALL = FinetuneConfig(
    backbone="random:tiny",
    decoder_width=8,
    num_epochs=2,
    steps_per_epoch=4,
    batch_size=3,
    cached_views=2,
    validation_slices=5,
    num_workers=1,
    amp="off",
)


def draw_dataset(folder: Path, *, num_cases: int = 5) -> Path:
    """nnU-Net layout; case_04 has no foreground at all."""
    for index in range(num_cases):
        rng = np.random.default_rng(index)
        shape = (int(rng.integers(18, 22)), int(rng.integers(14, 17)), 5)
        label = np.zeros(shape, dtype=np.uint8)
        if index != 4:
            label[4:13, 3:11, 1:4] = 1
            label[6:9, 5:8, 2] = 2
        image = (100 * label + rng.normal(0, 20, shape)).astype(np.float32)
        grid = Grid.from_spacing(shape, (1.0, 1.0, 4.0))
        write_volume(folder / f"imagesTr/case_{index:02d}_0000.nii.gz", Volume(image[None], grid))
        write_label_map(folder / f"labelsTr/case_{index:02d}.nii.gz", LabelMap(label, grid))
    labels = {"background": 0, "block": 1, "core": 2}
    description = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": num_cases, "file_ending": ".nii.gz"}
    write_json(folder / "dataset.json", description)
    return folder


def draw_pictures(folder: Path, *, num_cases: int = 5) -> Path:
    """Colour pictures with a blob, masks of 0 and 1, and a table."""
    rows = ["image,label"]
    for index in range(num_cases):
        rng = np.random.default_rng(index)
        label = np.zeros((20, 24), dtype=np.uint8)
        label[5:13, 6 + index : 15 + index] = 1
        image = (90 * label[..., None] + rng.integers(0, 120, (20, 24, 3))).astype(np.uint8)
        for kind, array in (("image", image), ("mask", label)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / kind / f"{index}.png")
        rows.append(f"image/{index}.png,mask/{index}.png")
    (folder / "dataset.csv").write_text("\n".join(rows))
    return folder


def prepare_all(data: Path, workdir: Path) -> Path:
    dataset = read_dataset(data)
    _, fingerprint = survey(dataset, num_workers=1)
    settings = {"crop": "[24, 24]", "tile": "[24, 24]", "magnification": "2"}
    plan = make_plan(fingerprint, dataset, backbone="tiny", memory="skip", settings=settings)
    prepare(dataset, plan, workdir, num_workers=1)
    fingerprint.write(workdir / "fingerprint.json")
    plan.write(workdir / "plan.json")
    write_json(workdir / "splits.json", [split.to_json() for split in make_splits(dataset, 5)])
    return workdir


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    return prepare_all(draw_dataset(root / "data"), root / "work")


@pytest.fixture(scope="session")
def prepared_pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    return prepare_all(draw_pictures(root / "data"), root / "work")


@pytest.fixture
def workdir(prepared, tmp_path) -> Path:
    """A copy of its own for each test."""
    shutil.copytree(prepared, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def pictures(prepared_pictures, tmp_path) -> Path:
    """A workdir of prepared pictures, a copy of its own for each test."""
    shutil.copytree(prepared_pictures, tmp_path / "pictures")
    return tmp_path / "pictures"


@pytest.fixture
def small() -> FinetuneConfig:
    return SMALL
