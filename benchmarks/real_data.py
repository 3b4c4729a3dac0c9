"""What `voxdino run` reaches on a real data set in a given time: trains, predicts, scores, and adds a row to a table.

python benchmarks/real_data.py DATASET --backbone FILE --budget 12m [--recipe segdino_v2] [--title "..."]
       [--save docs/results/first-road.md] [-- further options of voxdino run, such as --lossy-labels 127]

The wall clock is that of the whole command, imports included; scores are of the held-back fold, on the original grids.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HEAD = """# What `voxdino run` reaches on real data

Scores of the held-back fold on the original grids: mean over cases [95 % BCa bootstrap interval]. One row a run.

| data | backbone, recipe | options | cases | Dice | HD95 | NSD | wall clock (budget) | machine | date, versions |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--budget", required=True, help="such as 12m")
    parser.add_argument("--recipe", default="segdino_v2")
    parser.add_argument("--title", help="name of the backbone in the table; default: its file's name")
    parser.add_argument("--workdir", type=Path, help="kept for a look; default: a temporary folder")
    parser.add_argument("--save", type=Path)
    arguments, further = parser.parse_known_args()
    further = [option for option in further if option != "--"]
    with tempfile.TemporaryDirectory() as temporary:
        workdir = arguments.workdir or Path(temporary)
        command = [sys.executable, "-m", "voxdino", "run", str(arguments.dataset), "--workdir", str(workdir)]
        command += ["--backbone", arguments.backbone, "--recipe", arguments.recipe]
        command += ["--time-budget", arguments.budget, "--json", *further]
        started = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        elapsed_s = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"voxdino run ended with {done.returncode}\n{done.stdout[-2000:]}")
    row = table_row(json.loads(done.stdout), arguments, further, elapsed_s)
    print(row)
    if arguments.save:
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        text = arguments.save.read_text() if arguments.save.exists() else HEAD
        arguments.save.write_text(text + row + "\n")


def table_row(result: dict[str, Any], arguments: argparse.Namespace, further: list[str], elapsed_s: float) -> str:
    scores = result["scores"]
    backbone = arguments.title or Path(arguments.backbone).stem
    cells = [
        arguments.dataset.name,
        f"{backbone}, {arguments.recipe}",
        " ".join(further) or "–",
        str(scores["num_cases"]),
        *(told(scores["summary"], metric) for metric in ("dice", "hd95", "nsd")),
        f"{elapsed_s / 60:.1f} min ({arguments.budget})",
        f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
        f"{datetime.date.today()}, voxdino {version('voxdino')}, torch {version('torch')}",
    ]
    return f"| {' | '.join(cells)} |"


def told(summary: list[dict[str, Any]], metric: str) -> str:
    """ "mean [low, high] unit", each structure's mean behind it."""
    rows = {row["structure"]: row for row in summary if row["metric"] == metric}
    mean = rows.pop("mean", None) or next(iter(rows.values()))
    each = ", ".join(f"{name} {row['mean']:.3f}" for name, row in rows.items()) if len(rows) > 1 else ""
    interval = f"[{mean['low']:.3f}, {mean['high']:.3f}]" if mean["low"] is not None else ""
    return f"{mean['mean']:.3f} {interval}{' ' + mean['unit'] if mean['unit'] else ''}{f' ({each})' if each else ''}"


if __name__ == "__main__":
    main()
