"""What pretraining does to features: a random student of a pretrained backbone, this one itself, Gram anchoring.

python benchmarks/pretraining.py HIPPOCAMPUS --weights FILE --pictures pneumoniamnist.npz [--work W] [--scale 1.0]
       [--only scratch continued gram] [--seeds 0 1 2] [--stop-after 9m] [--save docs/results/pretraining.md]

All through the command line: `prepare` (labelled cases, of which fold 0 is held back), `pool` (without labels, and
without the held-back cases), `pretrain`, whose looks train a linear probe on the frozen patch tokens (Dice of the
held-back cases) and a kNN on the pictures. What starts from random weights sees training pictures as well as scans.
Stop it and run it again: it goes on. --scale multiplies the steps; once it trains, others may start beside it.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from PIL import Image

from voxdino.core.safe_files import MANIFEST_NAME

STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % of n - 1 degrees of freedom
CROP_PATCHES = {"global_size": 8, "local_size": 3}  # sides, in patches: the slices have 30 to 50 pixels
ARMS = ("scratch", "continued", "gram", "gram, none", "gram, anchored")
HEAD = {"num_prototypes": 4096, "hidden_dim": 512, "bottleneck_dim": 128}
NUM_PICTURES = 1000  # of the training ones, in the pool of what starts from random weights


@dataclass(frozen=True)
class Arm:
    """One kind of pretraining."""

    recipe: str
    start: str
    patch_size: int
    num_steps: int
    batch_size: int
    settings: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--weights", required=True, help="the pretrained backbone to continue from")
    parser.add_argument("--patch-size", type=int, default=14, help="of these weights")
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("workdir-pretraining"))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--only", nargs="+", choices=ARMS, default=["scratch", "continued", "gram"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--stop-after", help="leave off each pretraining after 9m, say")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    labelled = arguments.work / "labelled"
    if not (labelled / "prepared" / MANIFEST_NAME).exists():
        voxdino("prepare", arguments.dataset, "--workdir", labelled)
    held_back = json.loads((labelled / "splits.json").read_text())[0]["val"]
    without = [part for case in held_back for part in ("--leave-out", case)]
    pool, mixed = arguments.work / "pool", arguments.work / "mixed"
    scans = [f"scans={arguments.dataset}", "--set", "min_foreground=0.05", *without]
    if not (pool / MANIFEST_NAME).exists():
        voxdino("pool", *scans, "--workdir", arguments.work)
    if "scratch" in arguments.only and not (mixed / "pool" / MANIFEST_NAME).exists():
        write_pictures(arguments.pictures, arguments.work / "pictures")
        pictures = f"pictures={arguments.work / 'pictures'}"
        voxdino("pool", pictures, *scans, "--weight", "pictures=2", "--workdir", mixed)
    rows = []
    for name, arm in arms(arguments.weights, arguments.patch_size).items():
        if not {name, name.split(",")[0]} & set(arguments.only):
            continue
        seeds = arguments.seeds if name != "scratch" else arguments.seeds[:1]
        rows.append((name, arm, [looks(name, arm, seed, arguments) for seed in seeds]))
    text = table(rows, arguments)
    print(text)
    if arguments.save:
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        arguments.save.write_text(text)


def write_pictures(source: Path, folder: Path) -> None:
    """Training pictures of a MedMNIST file as PNG files, which a pool can hold."""
    folder.mkdir(parents=True, exist_ok=True)
    with np.load(source) as arrays:
        for number, pixels in enumerate(arrays["train_images"][:NUM_PICTURES]):
            Image.fromarray(pixels).save(folder / f"{number:04d}.png")


def constant(name: str, value: float) -> dict[str, float]:
    """Settings of a schedule that stays where it is."""
    return {f"{name}.{part}": value for part in ("start", "peak", "end")}


# Fresh heads say the same of every image, and with DINOv3's temperatures, made for long trainings, they go on so.
FRESH_HEADS = {"head_rate": 10.0, **constant("teacher_temperature", 0.01)}


def arms(weights: str, patch_size: int) -> dict[str, Arm]:
    both = FRESH_HEADS | constant("learning_rate", 1e-4) | {"scale_rate": False, "drop_path": 0.0}
    both |= constant("teacher_momentum", 0.99)
    continued = both | {"dino_weight": 0.0}  # class tokens that agree over crops wear patch features down
    hard = both | constant("learning_rate", 2e-3)  # wears patch features down in a few hundred steps
    taught = constant("momentum", 0.98)
    return {
        "scratch": Arm("distil", "random:voxdino_tiny", 16, 300, 32, taught),
        "continued": Arm("adapt", weights, patch_size, 42, 16, continued),
        "gram, none": Arm("adapt", "voxdino_tiny", 16, 210, 16, hard),
        "gram, anchored": Arm("adapt", "voxdino_tiny", 16, 210, 16, hard | constant("gram_weight", 2.0)),
    }


def looks(name: str, arm: Arm, seed: int, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Step and what was seen there, of one pretraining; run where it has not ended."""
    folder = f"{name.replace(', ', '-')}-s{seed}"
    workdir = arguments.work / "mixed" if name == "scratch" else arguments.work
    log = workdir / "runs" / folder / "log.jsonl"
    num_steps = max(4, round(arm.num_steps * arguments.scale))
    settings = {f"stages.0.{key}": value for key, value in arm.settings.items()}
    crops = {name: patches * arm.patch_size for name, patches in CROP_PATCHES.items()}
    settings |= {"stages.0.resolutions": [crops], "views.num_locals": 4, "watch_every": max(1, num_steps // 3)}
    if arm.recipe == "adapt":
        settings |= {f"{head}_head": HEAD for head in ("dino", "ibot")}
    options = ["--recipe", arm.recipe, "--backbone", arm.start, "--steps", num_steps, "--batch", arm.batch_size]
    options += ["--seed", seed, "--name", folder, "--probe", arguments.work / "labelled", "--knn", arguments.pictures]
    options += ["--device", arguments.device, *(["--stop-after", arguments.stop_after] if arguments.stop_after else [])]
    options += ["--teacher", arguments.weights] if arm.recipe == "distil" else []
    for key, value in settings.items():
        options += ["--set", f"{key}={json.dumps(value)}"]
    voxdino("pretrain", "--workdir", workdir, *options)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [{"step": row["step"], **row["watch"]} for row in rows if "watch" in row]


def voxdino(*options: object) -> None:
    done = subprocess.run([sys.executable, "-m", "voxdino", *map(str, options)], stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(f"voxdino {options[0]} ended with {done.returncode}")


def table(rows: list[tuple[str, Arm, list[list[dict[str, float]]]]], arguments: argparse.Namespace) -> str:
    """Every look (mean over the seeds), and the change from the first to the last with its interval."""
    lines = [
        "# What pretraining does to features",
        "",
        "Frozen features, measured while they are trained: Dice of a linear probe on patch tokens (hippocampus, the",
        "held-back fold 0, which is not in the pool) and accuracy of kNN on pictures (PneumoniaMNIST test). Change:",
        "from the first to the last look, mean over the seeds [95 % t interval].",
        "",
        "| arm | recipe, start, steps | seeds | patch Dice at each look | change | kNN at each look | change |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, arm, runs in rows:
        start = f"{arm.recipe}, {Path(arm.start).stem}, {runs[0][-1]['step']:.0f} x {arm.batch_size}"
        cells = [name, start, str(len(runs))]
        for key in ("patch_dice", "knn"):
            seen = [mean(look[key] for look in same) for same in zip(*runs, strict=True)]
            cells += [" → ".join(f"{value:.3f}" for value in seen), told([run[-1][key] - run[0][key] for run in runs])]
        lines.append(f"| {' | '.join(cells)} |")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, device {arguments.device}"
    lines += [
        "",
        f"`python {' '.join(['benchmarks/pretraining.py', 'HIPPOCAMPUS', *told_options(arguments)])}`; {machine}; "
        f"torch {version('torch')}, voxdino {version('voxdino')}; {datetime.date.today()}.",
    ]
    return "\n".join(lines) + "\n"


def told(changes: list[float]) -> str:
    """Mean and 95 % interval of changes."""
    if len(changes) < 2:
        return f"{changes[0]:+.3f}"
    half = STUDENT_T[len(changes)] * stdev(changes) / len(changes) ** 0.5
    return f"{mean(changes):+.3f} [{mean(changes) - half:+.3f}, {mean(changes) + half:+.3f}]"


def told_options(arguments: argparse.Namespace) -> list[str]:
    seeds = " ".join(map(str, arguments.seeds))
    return [
        "--weights",
        Path(arguments.weights).name,
        "--pictures",
        arguments.pictures.name,
        "--scale",
        f"{arguments.scale:g}",
        "--seeds",
        seeds,
    ]


if __name__ == "__main__":
    main()
