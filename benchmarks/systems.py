"""Every recipe on the same folds, budget, seeds and evaluation; nnU-Net beside them; what the backbone adds.

python benchmarks/systems.py --data DATASET --backbone FILE --budget 20m --work FOLDER --save docs/results/systems.md
       [--recipes all | NAME ...] [--folds 0] [--seeds 0] [--cases all 16 4] [--controls] [--peer-env FOLDER]
       [--peer 3d_fullres 2d] [--device auto] [--at-once 1] [-- further options of voxdino run, such as
       --lossy-labels 127]

A cell is one run of `voxdino run` (or of nnU-Net 2.8.1, in its own environment) with the whole budget, in a work folder
of its own: preparation and features are computed anew and count (nnU-Net's preparation does not). Cells that are done
are not done again: stop it and start it whenever you like. One that fails is named at the end and tried again then.
Memory is the process's on a CPU, the whole device's on a GPU (leave it to one cell: --at-once 1). With --controls every
recipe whose network sees the voxels beside the features is also trained, frozen, with zeros in place of what the
backbone says (the others would see nothing at all and answer with a constant). With --at-once 2 two cells run side by
side, each on half of the cores.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import wilcoxon
from train_step import flop_counter

from voxdino.evaluation.statistics import mean_interval
from voxdino.finetuning.recipes import RECIPES
from voxdino.models.precision import resolve_device

PEER = "nnU-Net"
PREPARING = Lock()  # of nnU-Net's preparation, which all its cells share
COLUMNS = (
    *("recipe", "Dice", "HD95", "NSD", "against nnU-Net (p)", "trained / all weights (M)", "GFLOP a slice"),
    *("steps", "training (min)", "s a case", "peak memory (GiB)"),
)
HEADER = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"


class Cell(NamedTuple):
    """One run. cases: to train on, None for all. blank: the features are zeros."""

    recipe: str
    fold: int
    seed: int
    cases: int | None
    blank: bool

    @property
    def name(self) -> str:
        cases = "" if self.cases is None else f"-n{self.cases}"
        return f"{self.recipe}{cases}{'-blank' if self.blank else ''}-s{self.seed}-f{self.fold}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--budget", default="20m")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["all"])
    parser.add_argument("--folds", nargs="+", type=int, default=[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--cases", nargs="+", default=["all"])
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--peer", nargs="*", default=[], help="configurations of nnU-Net to run as well")
    parser.add_argument("--peer-env", type=Path, help="nnU-Net's environment (made by benchmarks/prepare.py)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=float, help="start no further cell after so many seconds")
    parser.add_argument("--at-once", type=int, default=1, help="cells side by side; the cores are shared out evenly")
    arguments, further = parser.parse_known_args()
    if unknown := {*arguments.recipes} - {"all", *RECIPES}:
        parser.error(f"no recipe {', '.join(sorted(unknown))}: {', '.join(RECIPES)}")
    arguments.further = [option for option in further if option != "--"]
    arguments.threads = max(1, (os.cpu_count() or 1) // arguments.at_once)
    if arguments.device == "auto":
        arguments.device = resolve_device("auto").type
    (arguments.work / "cells").mkdir(parents=True, exist_ok=True)
    started, failed = time.monotonic(), []

    def do(cell: Cell) -> None:
        path = arguments.work / "cells" / f"{cell.name}.json"
        if path.exists():
            if json.loads(path.read_text())["terms"] != terms(arguments):
                raise SystemExit(f"{path} was run under other terms: choose another --work, or delete it")
        elif not arguments.limit or time.monotonic() - started < arguments.limit:
            print(f"{cell.name} ...", file=sys.stderr, flush=True)
            try:
                row = {"cell": cell._asdict(), "terms": terms(arguments), "made": made_by(), **run(cell, arguments)}
            except subprocess.CalledProcessError as error:
                failed.append(f"{cell.name}: {error}")
            else:
                path.write_text(json.dumps(row, indent=1))

    with ThreadPoolExecutor(arguments.at_once) as pool:
        list(pool.map(do, cells(arguments)))
    text = report(arguments)
    print(text)
    if arguments.save:
        arguments.save.write_text(text)
    if failed:
        raise SystemExit("\n".join(["failed, and not in the table:", *failed]))


def made_by() -> str:
    """Versions and commit of what runs now."""
    folder = Path(__file__).parent
    told = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    return f"voxdino {version('voxdino')} {told.stdout.strip()}, torch {version('torch')}".replace(" ,", ",")


def terms(arguments: argparse.Namespace) -> list[str]:
    """What all cells of a table share."""
    data, backbone = arguments.data.name, Path(arguments.backbone).name
    return [data, backbone, arguments.budget, arguments.device, f"{arguments.threads} threads", *arguments.further]


def cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    """All that is asked for, the peers first, what is needed for a whole table before its repetitions."""
    names = list(RECIPES) if arguments.recipes == ["all"] else arguments.recipes
    counts = [None if count == "all" else int(count) for count in arguments.cases]
    for seed in arguments.seeds:
        for fold in arguments.folds:
            for count in counts:
                if count is None and seed == arguments.seeds[0]:
                    yield from (Cell(f"{PEER} {name}", fold, seed, None, False) for name in arguments.peer)
                for name in names:
                    yield Cell(name, fold, seed, count, False)
                    if arguments.controls and _has_control(RECIPES[name]()):
                        yield Cell(name, fold, seed, count, True)


def _has_control(config: Any) -> bool:
    return bool(config.backbone != "none" and config.detail != "none")


def run(cell: Cell, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, predict, score: what the tables need of it."""
    if cell.recipe.startswith(PEER):
        return run_peer(cell, arguments)
    work = arguments.work / cell.name
    command = [sys.executable, "-m", "voxdino", "run", str(arguments.data), "--workdir", str(work), "--json"]
    command += ["--recipe", cell.recipe, "--fold", str(cell.fold), "--name", cell.name, "--device", arguments.device]
    command += ["--time-budget", arguments.budget, "--set", f"seed={cell.seed}", *arguments.further]
    if not cell.recipe.startswith("unet"):
        command += ["--backbone", arguments.backbone]
    if cell.cases is not None:
        command += ["--set", f"num_train_cases={cell.cases}"]
    if cell.blank:
        command += ["--set", "blank_features=true", "--set", "adaptation=frozen", "--set", "depth_adapter=0"]
        command += ["--set", "first=null"]
    started = time.perf_counter()
    output, peak_gib = measured(command, {"OMP_NUM_THREADS": str(arguments.threads)}, arguments.device)
    told = json.loads(output)
    folder = work / "runs" / cell.name
    record = json.loads((folder / "run.json").read_text())
    shutil.rmtree(work / "features", ignore_errors=True)
    return {
        "scores": told["scores"],
        "wall_s": time.perf_counter() - started,
        "training_s": told["seconds"]["finetune"],
        "predicting_s": told["seconds"]["predict"],
        "num_steps": told["run"]["num_steps"],
        "trained": record["num_parameters"]["trained"],
        "all": record["num_parameters"]["all"],
        "gflop": gflop_per_slice(folder),
        "peak_gib": peak_gib,
    }


def measured(command: list[str], environment: dict[str, str] | None = None, device: str = "cpu") -> tuple[str, float]:
    """stdout of a command and the most memory it took, in GiB."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})})
    assert process.stdout is not None
    ended, held = Event(), [0.0]
    watcher = Thread(target=_watch_gpu, args=(ended, held), daemon=True)
    if device.startswith("cuda"):
        watcher.start()
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    ended.set()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return output, max(held) if device.startswith("cuda") else usage.ru_maxrss / 2**20


def _watch_gpu(ended: Event, held: list[float]) -> None:
    """GiB in use on the first GPU, twice a second, appended to `held`."""
    query = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    while not ended.wait(0.5):
        held.append(float(subprocess.run(query, capture_output=True, text=True, check=True).stdout) / 1024)


def gflop_per_slice(run_folder: Path) -> float:
    """Arithmetic of a forward pass: 1e9 multiplications and additions, for a slice of the plan's tile."""
    import torch

    from voxdino.inference.load import load_model

    model = load_model(run_folder)
    slices = model.plan.slab
    image = torch.zeros(1, len(model.plan.channels), slices + 2 * model.plan.context_slices, *model.plan.tile)
    with torch.no_grad(), flop_counter() as counter:
        model.segmenter(image)
    return counter.get_total_flops() / slices / 1e9


def run_peer(cell: Cell, arguments: argparse.Namespace) -> dict[str, Any]:
    """nnU-Net under the same budget, scored by our evaluation on the same cases."""
    from voxdino.cli.values import parse_time_budget

    configuration = cell.recipe.removeprefix(f"{PEER} ")
    folder = arguments.work / "nnunet"
    places = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    dataset = folder / "raw" / "Dataset004_Peer"
    plans = folder / "preprocessed" / dataset.name
    python = arguments.peer_env / "bin" / "python"
    with PREPARING:
        if not dataset.exists():
            dataset.parent.mkdir(parents=True)
            dataset.symlink_to(arguments.data.resolve())
        if not (plans / f"ready_{configuration}").exists():
            tool = str(arguments.peer_env / "bin" / "nnUNetv2_plan_and_preprocess")
            measured([tool, "-d", "4", "-c", configuration, "-npfp", "2", "-np", "2"], places)
            given = arguments.data / "splits_final.json"
            (plans / "splits_final.json").write_text(given.read_text())
            (plans / f"ready_{configuration}").touch()
    told, predictions = folder / f"{cell.name}.json", folder / "predictions" / cell.name
    budget_s = parse_time_budget(arguments.budget)
    command = [str(python), str(Path(__file__).with_name("nnunet_peer.py")), "--configuration", configuration]
    command += ["--fold", str(cell.fold), "--budget-s", str(budget_s), "--device", arguments.device]
    started = time.perf_counter()
    places |= {"OMP_NUM_THREADS": str(arguments.threads), "nnUNet_n_proc_DA": str(arguments.threads)}
    words = [*command, "--json", str(told), "--predictions", str(predictions)]
    _, peak_gib = measured(words, places, arguments.device)
    wall_s = time.perf_counter() - started
    scored = [sys.executable, "-m", "voxdino", "evaluate", str(predictions), str(arguments.data), "--json"]
    scores = json.loads(measured(scored)[0])
    facts = json.loads(told.read_text())
    return {
        "scores": scores,
        "wall_s": wall_s,
        "training_s": facts["training_s"],
        "predicting_s": facts["predicting_s"],
        "num_steps": facts["num_steps"],
        "trained": facts["num_parameters"],
        "all": facts["num_parameters"],
        "gflop": None,
        "peak_gib": peak_gib,
    }


def report(arguments: argparse.Namespace) -> str:
    """The tables of all cells that are done."""
    done = {}
    for path in sorted((arguments.work / "cells").glob("*.json")):
        row = json.loads(path.read_text())
        done[Cell(**row["cell"])] = row
    command = f"python benchmarks/systems.py --data {arguments.data.name} --budget {arguments.budget}"
    made = " and ".join(sorted({row["made"] for row in done.values() if "made" in row})) or made_by()
    machine = f"{arguments.threads} of {os.cpu_count()} cores {platform.machine()} a row, device {arguments.device}"
    text = f"""# Systems side by side: {arguments.data.name}

`{command} --backbone {Path(arguments.backbone).name} ...`: every row had {arguments.budget} of wall clock for
fine-tuning, predicting and scoring. {datetime.date.today()}, {made},
{machine}. Mean over the held-back cases [95 % BCa bootstrap interval
over cases]; p: paired Wilcoxon test of the cases' Dice against the first nnU-Net row.

"""
    folds = sorted({(cell.fold, cell.seed) for cell in done if cell.cases is None and not cell.blank})
    for fold, seed in folds:
        rows = {c.recipe: r for c, r in done.items() if (c.fold, c.seed, c.cases, c.blank) == (fold, seed, None, False)}
        text += f"## Fold {fold}, seed {seed}, all training cases\n\n{HEADER}{_rows(rows)}\n"
    return text + _over_folds(done) + _few(done) + _controls(done)


def _rows(rows: dict[str, dict[str, Any]]) -> str:
    peer = next((per_case(row) for name, row in sorted(rows.items(), reverse=True) if name.startswith(PEER)), None)
    lines = []
    for name, row in sorted(rows.items(), key=lambda item: -np.mean(list(per_case(item[1]).values()))):
        dice = per_case(row)
        against = "–"
        if peer is not None and peer is not dice and not name.startswith(PEER):
            difference = np.array([dice[case] - peer[case] for case in peer if case in dice])
            against = f"{difference.mean():+.3f} ({wilcoxon(difference).pvalue:.1g})"
        gflop = "–" if row["gflop"] is None else f"{row['gflop']:.1f}"
        cells = [
            name,
            *(told(row["scores"]["summary"], metric) for metric in ("dice", "hd95", "nsd")),
            against,
            f"{row['trained'] / 1e6:.2f} / {row['all'] / 1e6:.1f}",
            gflop,
            str(row["num_steps"]),
            f"{row['training_s'] / 60:.1f}",
            f"{row['predicting_s'] / row['scores']['num_cases']:.2f}",
            f"{row['peak_gib']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def _over_folds(done: dict[Cell, dict[str, Any]]) -> str:
    """Every case once, from the fold that held it back; of recipes with more than one fold."""
    whole = [cell for cell in done if cell.cases is None and not cell.blank]
    names = sorted({cell.recipe for cell in whole})
    folds = {name: sorted({c.fold for c in whole if (c.recipe, c.seed) == (name, whole[0].seed)}) for name in names}
    if not any(len(held) > 1 for held in folds.values()):
        return ""
    text = "## All folds\n\n| recipe | folds | cases | Dice | each fold |\n| --- | --- | --- | --- | --- |\n"
    for name in names:
        if len(folds[name]) > 1:
            rows = [list(per_case(done[Cell(name, fold, whole[0].seed, None, False)]).values()) for fold in folds[name]]
            each = ", ".join(f"{np.mean(row):.3f}" for row in rows)
            text += f"| {name} | {len(rows)} | {sum(map(len, rows))} | {_interval(np.concatenate(rows))} | {each} |\n"
    return text + "\n"


def _few(done: dict[Cell, dict[str, Any]]) -> str:
    """How recipes do with few training cases: Dice of each held-back case, averaged over the seeds."""
    counts = sorted({cell.cases for cell in done if cell.cases is not None})
    if not counts:
        return ""
    text = "## Few training cases\n\n| recipe | training cases | seeds | Dice |\n| --- | --- | --- | --- |\n"
    for name in sorted({cell.recipe for cell in done if cell.cases is not None}):
        for count in [*counts, None]:
            held = [row for c, row in done.items() if (c.recipe, c.cases, c.blank, c.fold) == (name, count, False, 0)]
            if held:
                means = np.mean([list(dict(sorted(per_case(row).items())).values()) for row in held], axis=0)
                text += f"| {name} | {count or 'all'} | {len(held)} | {_interval(means)} |\n"
    return text + "\n"


def _interval(values: Any, form: str = ".3f") -> str:
    interval = mean_interval(list(values))
    limits = "" if interval.low is None else f" [{interval.low:{form}}, {interval.high:{form}}]"
    return f"{interval.mean:{form}}{limits}"


def _controls(done: dict[Cell, dict[str, Any]]) -> str:
    """What the features add: each recipe against itself with zeros, cases and seeds paired."""
    pairs = [cell for cell in done if not cell.blank and cell._replace(blank=True) in done]
    if not pairs:
        return ""
    text = (
        "## What the backbone is worth\n\nThe same network with zeros in place of the backbone's features; the"
        " difference is that of each case, averaged over the seeds.\n\n"
        "| recipe | training cases | seeds | Dice | with zeros | difference |\n| --- | --- | --- | --- | --- | --- |\n"
    )
    groups = sorted({(cell.recipe, cell.cases) for cell in pairs}, key=lambda one: (one[0], one[1] or 10**6))
    for recipe, count in groups:
        held = [cell for cell in pairs if (cell.recipe, cell.cases) == (recipe, count)]
        with_features = [per_case(done[cell]) for cell in held]
        blank = [per_case(done[cell._replace(blank=True)]) for cell in held]
        cases = sorted({case for one in with_features for case in one})
        rows = np.array([[one.get(case, np.nan) for case in cases] for one in with_features])
        zeros = np.array([[one.get(case, np.nan) for case in cases] for one in blank])
        means = (
            f"{np.nanmean(rows):.3f} | {np.nanmean(zeros):.3f} | {_interval(np.nanmean(rows - zeros, axis=0), '+.3f')}"
        )
        text += f"| {recipe} | {count or 'all'} | {len({cell.seed for cell in held})} | {means} |\n"
    return text


def per_case(row: dict[str, Any]) -> dict[str, float]:
    """Mean Dice over the structures of each case."""
    found: dict[str, list[float]] = {}
    for one in row["scores"]["cases"]:
        if one["values"]["dice"] is not None:
            found.setdefault(one["case"], []).append(one["values"]["dice"])
    return {case: float(np.mean(values)) for case, values in found.items()}


def told(summary: list[dict[str, Any]], metric: str) -> str:
    rows = {row["structure"]: row for row in summary if row["metric"] == metric}
    mean = rows.get("mean") or next(iter(rows.values()))
    if mean["mean"] is None:
        return "–"
    interval = "" if mean["low"] is None else f" [{mean['low']:.3f}, {mean['high']:.3f}]"
    return f"{mean['mean']:.3f}{interval}{' ' + mean['unit'] if mean['unit'] else ''}"


if __name__ == "__main__":
    main()
