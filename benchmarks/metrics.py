"""Dice, HD95 and NSD of many labels: voxdino against MONAI and surface-distance, time and peak memory in one go.

    python benchmarks/metrics.py --peer-python ENV/bin/python [--shape 300 512 512] [--labels 20] [--out FILE.md]

ENV holds monai 1.6.1 and surface-distance 0.1. The pair is drawn: bent ellipsoids, the prediction moved and scaled a
little. Every contender is a fresh process that reads both label maps from disk; the clock runs from the arrays to the
numbers, imports left out; the peak is that of the process, its imports and the two maps included. The peers get one
label's masks at a time, which is their least memory. All must agree on Dice, ours and surface-distance on all three.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxdino.core.safe_files import write_text

SPACING = (2.0, 0.8, 0.8)
GOALS = {"monai": 10.0, "surface-distance": 3.0}

FRAME = """
import json, resource, sys, time
import numpy as np
folder, num_labels, spacing = sys.argv[1], int(sys.argv[2]), tuple(json.loads(sys.argv[3]))
{imports}
prediction, reference = (np.load(folder + "/" + name + ".npy") for name in ("prediction", "reference"))
start = time.perf_counter()
rows = []
{body}
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(dict(seconds=seconds, peak=peak, version=version, rows=rows)))
"""
OURS = FRAME.format(
    imports="""
from voxdino import __version__ as version
from voxdino.core.geometry import Grid
from voxdino.core.labels import LabelSet
from voxdino.evaluation.measure import Measures, score_label_maps
labels = LabelSet(names=tuple(f"label {i}" for i in range(num_labels + 1)), ids=tuple(range(num_labels + 1)))
""",
    body="""
metrics = ("dice", "hd95", "nsd")
grid = Grid.from_spacing(prediction.shape, spacing)
for row in score_label_maps(prediction, reference, grid, labels, measures=Measures(metrics=metrics)):
    rows.append([row.values[metric] for metric in metrics])
""",
)
SURFACE_DISTANCE = FRAME.format(
    imports="""
from importlib.metadata import version as of
import surface_distance as sd
version = of("surface-distance")
""",
    body="""
for label in range(1, num_labels + 1):
    there, claimed = reference == label, prediction == label
    found = sd.compute_surface_distances(there, claimed, spacing)
    dice = sd.compute_dice_coefficient(there, claimed)
    hd95 = sd.compute_robust_hausdorff(found, 95)
    rows.append([float(dice), float(hd95), float(sd.compute_surface_dice_at_tolerance(found, 1.0))])
""",
)
MONAI = FRAME.format(
    imports="""
import warnings
warnings.simplefilter("ignore")
import torch
from monai import __version__ as version
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
""",
    body="""
for label in range(1, num_labels + 1):
    masks = [torch.from_numpy(array == label)[None, None] for array in (prediction, reference)]
    options = dict(include_background=True, spacing=spacing)
    dice = compute_dice(*masks)
    hd95 = compute_hausdorff_distance(*masks, percentile=95, **options)
    rows.append([float(dice), float(hd95), float(compute_surface_dice(*masks, [1.0], **options))])
""",
)


@dataclass(frozen=True)
class Measured:
    """One run of a contender. rows: per label Dice, HD95 and NSD."""

    seconds: float
    peak: int
    version: str
    rows: list[list[float]]


def draw_pair(shape: tuple[int, ...], num_labels: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Two label maps of bent ellipsoids, an eighth to two fifths of the volume across."""
    rng = np.random.default_rng(0)
    maps = np.zeros((2, *shape), np.uint8)
    for label in range(1, num_labels + 1):
        radii = np.array([rng.uniform(0.06, 0.2) * size for size in shape])
        centre = np.array([rng.uniform(radius, size - radius) for radius, size in zip(radii, shape, strict=True)])
        for which in range(2):
            middle = centre + which * rng.normal(0, 0.01 * np.mean(shape), 3)
            across = radii * (rng.uniform(0.93, 1.07, 3) if which else 1)
            low = np.maximum(middle - 1.1 * across, 0).astype(int)
            high = np.minimum(middle + 1.1 * across + 2, shape).astype(int)
            box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            places = np.ogrid[box]
            bend = 0.08 * np.sin(places[0] / 3 + which) * np.cos(places[1] / 4) * np.sin(places[2] / 5)
            inside = sum(((x - m) / r) ** 2 for x, m, r in zip(places, middle, across, strict=True)) + bend < 1
            maps[which][box][inside] = label
    return maps[0], maps[1]


def measure(python: str, code: str, folder: Path, num_labels: int) -> Measured:
    command = [python, "-c", code, str(folder), str(num_labels), json.dumps(SPACING)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a contender failed:\n{done.stderr[-4000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def require_agreement(runs: dict[str, list[Measured]]) -> None:
    """All have done the same work, or nothing is reported."""
    ours = np.array(runs["voxdino"][0].rows)
    columns = {"surface-distance": slice(0, 3), "monai": slice(0, 1)}  # MONAI's surfaces are defined otherwise
    for name, which in columns.items():
        np.testing.assert_allclose(ours[:, which], np.array(runs[name][0].rows)[:, which], rtol=1e-6)


def table(runs: dict[str, list[Measured]], shape: tuple[int, ...], num_labels: int) -> str:
    ours = statistics.median(run.seconds for run in runs["voxdino"])
    size = " x ".join(map(str, shape))
    lines = [
        f"`benchmarks/metrics.py`: Dice, HD95 and NSD (1 mm) of {num_labels} labels, {size} voxels at "
        f"{' x '.join(map(str, SPACING))} mm. {date.today():%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}), "
        f"Python {platform.python_version()}, median of {len(runs['voxdino'])} runs in turn, load average at the end "
        f"{os.getloadavg()[0]:.1f}.",
        "",
        "| | seconds | times voxdino | goal | peak memory (MiB) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, measured in runs.items():
        seconds = statistics.median(run.seconds for run in measured)
        peak = max(run.peak for run in measured) / 2**20
        goal = f"{GOALS[name]:.0f}" if name in GOALS else ""
        lines.append(f"| {name} {measured[0].version} | {seconds:.2f} | {seconds / ours:.1f} | {goal} | {peak:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="of an environment with monai and surface-distance")
    parser.add_argument("--shape", type=int, nargs=3, default=(300, 512, 512))
    parser.add_argument("--labels", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="Markdown file to write the table to")
    options = parser.parse_args()
    contenders = {
        "voxdino": (sys.executable, OURS),
        "surface-distance": (options.peer_python, SURFACE_DISTANCE),
        "monai": (options.peer_python, MONAI),
    }
    runs: dict[str, list[Measured]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for which, array in zip(("prediction", "reference"), draw_pair(options.shape, options.labels), strict=True):
            np.save(folder / f"{which}.npy", array)
        for run in range(options.runs):
            for contender, (python, code) in contenders.items():
                runs[contender].append(measure(python, code, folder, options.labels))
                print(f"run {run + 1}: {contender}: {runs[contender][-1].seconds:.2f} s", file=sys.stderr)
    require_agreement(runs)
    text = table(runs, tuple(options.shape), options.labels)
    print(text)
    if options.out:
        write_text(options.out, f"# Metrics\n\n{text}\n")


if __name__ == "__main__":
    main()
