"""Small data sets on disk, and a backbone that need not be loaded."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

from voxdino.core.labels import LabelSet
from voxdino.preparation.intensity import ChannelPolicy
from voxdino.preparation.memory import BackboneFacts, BackboneProbe
from voxdino.preparation.plan import Plan

LABELS = LabelSet(names=("background", "liver", "tumour"), ids=(0, 1, 2))
AFFINE = np.array([[1.5, 0, 0, -7], [0, 1, 0, 3], [0, 0, 2, 11], [0, 0, 0, 1]])


class KnownBackbone(BackboneProbe):
    """A probe that knows its answers without a child process."""

    def __init__(self, patch_size: int = 16, device: str = "cpu") -> None:
        self.facts = BackboneFacts("known", patch_size, 1_000_000, device)

    def describe(self) -> BackboneFacts:
        return self.facts

    def choose_batch(self, *_: Any) -> tuple[int, str]:
        return 4, "measured"


def make_plan(**changes: Any) -> Plan:
    values = {
        "dataset": "set",
        "fingerprint_digest": "0",
        "ndim": 3,
        "labels": LABELS,
        "channels": (ChannelPolicy(name="CT", source=0, kind="mr"),),
        "slice_axis": "S",
        "in_plane_spacing": None,
        "magnification": 2.0,
        "crop": (8, 8),
        "tile": (8, 8),
        "context_slices": 1,
        "input_builder": "neighbours",
        "batch_size": 2,
        "patch_size": 16,
    }
    return Plan(**{**values, **changes})


def draw_case(seed: int, shape: Sequence[int] = (11, 9, 7)) -> tuple[np.ndarray, np.ndarray]:
    """An int16 image, and a label map with a box of each class."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, dtype=np.uint8)
    for index in (1, 2):
        start = [int(rng.integers(0, max(1, size - 3))) for size in shape]
        label[tuple(slice(begin, begin + 3) for begin in start)] = index
    return rng.integers(-1000, 1000, shape).astype(np.int16) + label.astype(np.int16) * 300, label


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_nnunet(
    root: Path,
    num_cases: int = 5,
    channels: Sequence[str] = ("CT",),
    shape: Sequence[int] = (11, 9, 7),
    description: Mapping[str, Any] | None = None,
) -> Path:
    """An nnU-Net data set: cases case_00 ..., channel n is the image + n."""
    for number in range(num_cases):
        image, label = draw_case(number, shape)
        for channel in range(len(channels)):
            save_nifti(root / "imagesTr" / f"case_{number:02d}_{channel:04d}.nii.gz", image + np.int16(channel))
        save_nifti(root / "labelsTr" / f"case_{number:02d}.nii.gz", label)
    value = {
        "channel_names": {str(n): name for n, name in enumerate(channels)},
        "labels": {"background": 0, "liver": 1, "tumour": 2},
        "file_ending": ".nii.gz",
    }
    write_json(root / "dataset.json", {**value, **(description or {})})
    return root


def write_msd(root: Path, num_cases: int = 3, num_channels: int = 2) -> Path:
    """An MSD data set: 4-D images with their channels last."""
    for number in range(num_cases):
        image, label = draw_case(number)
        stack = np.stack([image + np.int16(n) for n in range(num_channels)], axis=-1)
        save_nifti(root / "imagesTr" / f"case_{number:02d}.nii.gz", stack)
        save_nifti(root / "labelsTr" / f"case_{number:02d}.nii.gz", label)
    names = [f"./imagesTr/case_{n:02d}.nii.gz" for n in range(num_cases)]
    value = {
        "modality": {str(n): f"MR{n}" for n in range(num_channels)},
        "labels": {"0": "background", "1": "liver", "2": "tumour"},
        "training": [{"image": name, "label": name.replace("images", "labels")} for name in names],
        "test": [],
        "numTraining": num_cases,
    }
    write_json(root / "dataset.json", value)
    return root


def write_folder(root: Path, rows: Sequence[str], *, foreground: int = 1, suffix: str = "png") -> Path:
    """Colour pictures and masks a to e in two folders, and dataset.csv with the rows given."""
    for number, name in enumerate("abcde"):
        rng = np.random.default_rng(number)
        save_picture(root / "images" / f"{name}.png", rng.integers(0, 256, (20, 27, 3)).astype(np.uint8))
        mask = np.zeros((20, 27), dtype=np.uint8)
        mask[3 + number : 12, 5:15] = foreground
        save_picture(root / "masks" / f"{name}.{suffix}", mask)
    (root / "dataset.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return root


def save_picture(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
