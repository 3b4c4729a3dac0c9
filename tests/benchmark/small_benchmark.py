"""Toy data sets and grids: seconds, not minutes."""

from pathlib import Path

import numpy as np

from voxdino.benchmark.encoders import Encoder, open_encoder
from voxdino.benchmark.grid import Cell, EncoderEntry, Grid, TaskEntry
from voxdino.benchmark.result import CellResult
from voxdino.benchmark.run import Outcome
from voxdino.core.geometry import Grid as VoxelGrid
from voxdino.core.io import write_label_map, write_volume
from voxdino.core.volume import LabelMap, Volume

SIZES = {"train": 16, "val": 8, "test": 10}


def draw_pictures(path: Path, *, shape: tuple[int, ...] = (20, 20)) -> Path:
    """A .npz of two classes: images that are brighter in one half or in the other, on noise."""
    arrays = {}
    for place, (split, number) in enumerate(SIZES.items()):
        rng = np.random.default_rng([len(shape), place])
        labels = np.arange(number) % 2
        images = rng.integers(0, 60, (number, *shape))
        half = shape[-1] // 2
        for image, label in zip(images, labels, strict=True):
            image[..., half * label : half * (label + 1)] += 120
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels[:, None].astype(np.uint8)}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def draw_blobs(folder: Path, *, num_cases: int = 6) -> Path:
    """Pictures with a bright disc and its mask, in two folders."""
    for case in range(num_cases):
        rng = np.random.default_rng(case)
        row, column = rng.integers(12, 28, 2)
        y, x = np.mgrid[:40, :44]
        label = ((y - row) ** 2 + (x - column) ** 2 < 64).astype(np.uint8)
        image = (150 * label + rng.integers(0, 60, label.shape)).astype(np.uint8)
        grid = VoxelGrid.from_spacing(label.shape, (1.0, 1.0))
        write_volume(folder / "image" / f"case_{case}.png", Volume(image[None], grid))
        write_label_map(folder / "label" / f"case_{case}.png", LabelMap(label, grid))
    return folder


def toy_grid(**changes: object) -> Grid:
    """Pictures, volumes and masks for two encoders without weights."""
    values = {
        "encoders": (
            EncoderEntry(name="tiny", source="random:tiny"),
            EncoderEntry(name="pixels", source="pixels:16"),
            EncoderEntry(name="later", source="not_there.safetensors", optional=True),
        ),
        "tasks": (
            TaskEntry(name="pictures", data="pictures.npz", probe="linear", resolutions=(16, 32), shots=(2,)),
            TaskEntry(name="volumes", data="volumes.npz", probe="slice_max", resolutions=(16,), slices=2, axes=(0, 2)),
            TaskEntry(name="masks", data="masks", probe="patch_linear", resolutions=(64,)),
        ),
        "seeds": (0, 1),
    }
    return Grid(**{**values, **changes})


def draw_all(root: Path) -> Path:
    draw_pictures(root / "pictures.npz")
    draw_pictures(root / "volumes.npz", shape=(6, 7, 20))
    draw_blobs(root / "masks")
    return root


def opened(source: str, *, name: str | None = None, claimed: str | None = None) -> Encoder:
    """An encoder; `claimed` as its source makes it look pretrained."""
    encoder = open_encoder(EncoderEntry(name=name or source, source=source), Path())
    assert encoder is not None
    return encoder if claimed is None else Encoder(encoder.name, claimed, encoder.card, encoder.patch_size)


def segmented(encoder: str, dices: np.ndarray, *, task: str = "organs", resolution: int = 112) -> CellResult:
    """A result with these Dice values."""
    scores = {metric: tuple(map(float, dices)) for metric in ("dice", "nsd", "hd95")}
    cell = Cell(task=task, encoder=encoder, resolution=resolution)
    cases = tuple(f"case_{place}" for place in range(len(dices)))
    return CellResult(cell=cell, cases=cases, scores=scores, validation=float(np.mean(dices)), num_train=9)


def classified(encoder: str, labels: np.ndarray, share: np.ndarray, *, task: str = "findings") -> CellResult:
    """A result of two classes with these probabilities of the second."""
    return CellResult(
        cell=Cell(task=task, encoder=encoder, resolution=112),
        cases=tuple(f"case_{place}" for place in range(len(labels))),
        labels=tuple((int(label),) for label in labels),
        probabilities=tuple((1 - float(p), float(p)) for p in share),
        validation=0.5,
        num_train=9,
    )


def outcome_of(results: list[CellResult], encoders: list[Encoder], probes: dict[str, str]) -> Outcome:
    """An outcome as a run would give it. probes: task -> its probe."""
    tasks = tuple(TaskEntry(name=name, data=name, probe=probe, resolutions=(112,)) for name, probe in probes.items())
    entries = tuple(EncoderEntry(name=one.name, source=one.source) for one in encoders)
    grid = Grid(encoders=entries, tasks=tasks)
    return Outcome(grid, {one.name: one for one in encoders}, tuple(results), (), {}, ())
