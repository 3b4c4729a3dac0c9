"""What overlapping tiles are worth: Dice and time of one model with tiles that share more and more.

python benchmarks/overlap.py IMAGES LABELS --run RUN [--overlaps 0 0.25 0.5 0.75] [--map FROM=TO ...] [--only NAME ...]
       [--save docs/results/overlap.md]

IMAGES and LABELS: folders (or files) of the same order. A row's difference is that to tiles half over each other, mean
over the cases with its 95 % interval; passes are crops a slice. Tables of several models are appended to the file.
"""

import argparse
import datetime
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import voxdino
from voxdino.core.io import read_label_map
from voxdino.core.io.options import ReadOptions
from voxdino.evaluation.overlap import dice
from voxdino.evaluation.statistics import mean_interval
from voxdino.inference.load import load_model
from voxdino.inference.settings import PredictSettings
from voxdino.inference.tiles import tile_boxes

HALF = 0.5
HEAD = (
    "| overlap | crops a slice | mean Dice | less that of a half | time, of a half's |\n"
    "| --- | --- | --- | --- | --- |\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--overlaps", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75])
    parser.add_argument("--map", nargs="*", default=[])
    parser.add_argument("--only", nargs="+", help="names of cases, without their ending")
    parser.add_argument("--title", help="of the table; default: the data set's name in the plan")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    pairs = list(zip(files(arguments.images, arguments.only), files(arguments.labels, arguments.only), strict=True))
    label_map = tuple((int(low), int(high)) for low, high in (item.split("=") for item in arguments.map))
    options = ReadOptions(label_map=label_map)
    model = voxdino.load(arguments.run)
    seen: dict[float, list[tuple[float, float]]] = {overlap: [] for overlap in arguments.overlaps}
    for image, label in pairs:
        truth = read_label_map(label, options=options).array
        for overlap, found in seen.items():
            started = time.perf_counter()
            labels = model.predict(image, settings=PredictSettings(overlap=overlap)).array
            found.append((mean_dice(labels, truth), time.perf_counter() - started))
    plan = load_model(arguments.run, torch.device("cpu")).plan
    size = tuple(max(length, tile) for length, tile in zip(truth.shape[:2], plan.tile, strict=True))
    title = arguments.title or plan.dataset
    text = f"""## {title}: slices of {size[0]} x {size[1]}, tiles of {plan.tile[0]} x {plan.tile[1]}

`python benchmarks/overlap.py`, {datetime.date.today()}, {len(pairs)} cases, torch {torch.__version__},
{os.cpu_count()} cores {platform.machine()}.

{HEAD}"""
    for overlap, found in seen.items():
        less = mean_interval([one[0] - half[0] for one, half in zip(found, seen[HALF], strict=True)])
        ratio = statistics.median(one[1] / half[1] for one, half in zip(found, seen[HALF], strict=True))
        mean = statistics.mean(score for score, _ in found)
        change = (
            f"{less.mean:+.4f} [{less.low:+.4f}, {less.high:+.4f}]" if less.low is not None else f"{less.mean:+.4f}"
        )
        text += f"| {overlap:g} | {len(tile_boxes(size, plan.tile, overlap))} | {mean:.4f} | {change} | {ratio:.2f} |\n"
    print(text)
    if arguments.save:
        before = arguments.save.read_text() if arguments.save.exists() else "# What overlapping tiles are worth\n"
        arguments.save.write_text(f"{before}\n{text}")


def files(path: Path, only: list[str] | None) -> list[Path]:
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in found if only is None or file.name.split(".")[0] in only]


def mean_dice(labels: np.ndarray, truth: np.ndarray) -> float:
    """Mean over the foreground classes of the truth."""
    return statistics.mean(dice(labels == value, truth == value) for value in np.unique(truth) if value)


if __name__ == "__main__":
    main()
