"""Seconds from an image file to a label map file: voxdino beside nnU-Net and MONAI, on one CT-like volume.

python benchmarks/predict.py --work FOLDER --backbone FILE [--size 512] [--slices 120] [--runs 5] [--peer-env FOLDER]
       [--budget 5m] [--most-minutes 60] [--only SYSTEM ...] [--device auto] [--save docs/results/predict.md]

The network is SegDINO's with the plan's defaults, fine-tuned for --budget on enlarged phantoms (a network that was
never trained has label maps of noise, which no two precisions agree on). Rows: ours as it comes, with tiles over all
that is air too (so they lie where MONAI's windows do), in float32, and with --fast; MONAI's SlidingWindowInferer
driving the same network, as its documentation shows (four windows at a time, no autocast) and in our precision, with
our overlap and Gaussian weights so that label maps can be compared; nnU-Net 2.8.1
with untrained networks of its own plan for these data, with its defaults and with mirroring off. Every measurement is a
process of its own; imports and the loading of weights do not count, reading and writing do. Where nnU-Net would take
longer than --most-minutes, some of its tiles are measured and scaled, and the row is marked so.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

TRAINING_CASES = 6
EVERY_TILE = "voxdino --gate off"
OURS = {
    "voxdino": {},
    EVERY_TILE: {"gate": "off"},
    "voxdino, float32": {"amp": "off"},
    "voxdino --fast": {"overlap": 0.0},
}
MONAI = {"MONAI inferer, same network": False, "MONAI inferer, same network, our precision": True}
NNUNET = {
    "nnU-Net 3d_fullres": ("3d_fullres", True),
    "nnU-Net 3d_fullres, no mirroring": ("3d_fullres", False),
    "nnU-Net 2d": ("2d", True),
    "nnU-Net 2d, no mirroring": ("2d", False),
}
HEAD = (
    "| system | runs | s (median) | voxdino is so many times as fast | labels as voxdino | labels as its --gate off |"
    " inside the network | share of the matmul rate |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--slices", type=int, default=120)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer-env", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*OURS, *MONAI, *NNUNET], help="of the systems; voxdino always is")
    parser.add_argument("--budget", default="5m")
    parser.add_argument("--most-minutes", type=float, default=60)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments, arguments.child)))
        return
    make_data(arguments)
    make_model(arguments)
    text = report(arguments, measured(arguments))
    print(text)
    if arguments.save:
        arguments.save.write_text(text)


def systems(arguments: argparse.Namespace) -> list[str]:
    known = [*OURS, *((*MONAI, *NNUNET) if arguments.peer_env else ())]
    return [name for name in known if name in (arguments.only or known) or name == "voxdino"]


def make_data(arguments: argparse.Namespace) -> None:
    """Phantoms enlarged to the size of a CT: a data set to plan for and train on, and the volume that is timed."""
    import numpy as np

    from voxdino.core.geometry import Grid
    from voxdino.core.io import write_label_map, write_volume
    from voxdino.core.resample import resize_linear, resize_nearest
    from voxdino.core.safe_files import write_json
    from voxdino.core.volume import LabelMap, Volume
    from voxdino.preparation.phantoms import LABELS, draw_phantom

    folder = arguments.work / "Dataset005_Enlarged"
    if (folder / "dataset.json").exists():
        return
    for number in range(TRAINING_CASES + 1):
        rng = np.random.default_rng([5, number])
        image, label = draw_phantom(rng)
        shape = (arguments.size, arguments.size, arguments.slices)
        large = resize_linear(image.array[0], shape, (0, 1, 2)) + rng.normal(0, 12, shape)
        grid = Grid.from_spacing(shape, (360 / arguments.size, 360 / arguments.size, 130 / arguments.slices))
        grid = grid.transposed((0, 1, 2), (True, True, False))
        place = "Ts" if number == TRAINING_CASES else "Tr"
        values = np.clip(np.rint(large), -1024, 3071).astype(np.int16)
        write_volume(folder / f"images{place}" / f"e{number}_0000.nii.gz", Volume(values[None], grid))
        labels = resize_nearest(label.array, shape, (0, 1, 2))
        write_label_map(folder / f"labels{place}" / f"e{number}.nii.gz", LabelMap(labels, grid))
    record = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": TRAINING_CASES, "file_ending": ".nii.gz"}
    write_json(folder / "dataset.json", record)


def make_model(arguments: argparse.Namespace) -> None:
    """The fine-tuned run, and nnU-Net's plan of the same data."""
    data = arguments.work / "Dataset005_Enlarged"
    if not (run_folder(arguments) / "manifest.json").exists():
        command = [sys.executable, "-m", "voxdino", "run", str(data), "--workdir", str(arguments.work / "voxdino")]
        command += ["--recipe", "segdino_v2", "--backbone", arguments.backbone, "--time-budget", arguments.budget]
        subprocess.run([*command, "--name", "timed", "--device", arguments.device], check=True)
    if arguments.peer_env and not (arguments.work / "nnUNet_preprocessed" / data.name / "nnUNetPlans.json").exists():
        tools = arguments.peer_env / "bin"
        for command in (
            ["nnUNetv2_extract_fingerprint", "-d", "5", "-np", "2"],
            ["nnUNetv2_plan_experiment", "-d", "5"],
        ):
            subprocess.run([str(tools / command[0]), *command[1:]], env=environment(arguments), check=True)
        shutil.copy(data / "dataset.json", arguments.work / "nnUNet_preprocessed" / data.name / "dataset.json")


def run_folder(arguments: argparse.Namespace) -> Path:
    return Path(arguments.work) / "voxdino" / "runs" / "timed"


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    places = {name: str(arguments.work / name) for name in ("nnUNet_preprocessed", "nnUNet_results")}
    return {**os.environ, **places, "nnUNet_raw": str(arguments.work)}


def measured(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The runs of each system, in turn, so that a machine that gets slower does so for all of them.

    One of nnU-Net's that takes very long is measured once.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in systems(arguments)}
    for number in range(arguments.runs):
        for name, runs in found.items():
            if not (runs and runs[-1].get("scaled")):
                runs.append(one_run(name, number, arguments))
                print(f"{name}: {runs[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    return found


def one_run(name: str, number: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """A run of one system, in a process of its own."""
    image = arguments.work / "Dataset005_Enlarged" / "imagesTs" / f"e{TRAINING_CASES}_0000.nii.gz"
    out = arguments.work / "out" / f"{name.replace(' ', '_').replace(',', '')}_{number}"
    shutil.rmtree(out, ignore_errors=True)
    task = {"name": name, "image": str(image), "out": str(out), "run": str(run_folder(arguments))}
    if name in NNUNET:
        configuration, mirror = NNUNET[name]
        plans = arguments.work / "nnUNet_preprocessed" / "Dataset005_Enlarged"
        task |= {"configuration": configuration, "mirror": mirror, "plans": str(plans)}
    python = str(arguments.peer_env / "bin" / "python") if name not in OURS else sys.executable
    script = Path(__file__).with_name("predict_peer.py") if name not in OURS else Path(__file__)
    command = [python, str(script), "--work", str(arguments.work), "--backbone", arguments.backbone]
    command += ["--device", arguments.device, "--most-minutes", str(arguments.most_minutes)]
    if name in MONAI:
        task |= {"site": sysconfig.get_path("purelib"), "ours": str(Path(__file__).parents[1] / "src")}
        task["amp"] = MONAI[name]
    command += ["--child", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(arguments))
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(arguments: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    """One prediction of ours, and what its network did meanwhile."""
    import time

    import torch
    from train_step import flop_counter, matmul_rate

    from voxdino.inference import frame
    from voxdino.inference.cases import find_cases
    from voxdino.inference.load import load_model
    from voxdino.inference.run import predict_cases
    from voxdino.inference.settings import PredictSettings
    from voxdino.models.precision import autocast, resolve_device, uses_bf16

    device = resolve_device(arguments.device)
    settings = PredictSettings(**OURS[task["name"]])
    model = load_model(task["run"], device)
    bf16 = uses_bf16(device, settings.amp)
    rate = matmul_rate(device, bf16)
    seen = {"crops": 0, "seconds": 0.0}
    original = frame.logits_of_crops

    def watched(segmenter: Any, crops: Any, mirror: bool) -> Any:
        started = time.perf_counter()
        logits = original(segmenter, crops, mirror)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seen["seconds"] += time.perf_counter() - started
        seen["crops"] += logits.shape[0] * logits.shape[1]
        return logits

    plan = model.plan
    crop = torch.zeros(1, len(plan.channels), plan.slab + 2 * plan.context_slices, *plan.tile, device=device)

    with torch.inference_mode(), autocast(device, bf16), flop_counter() as counter:
        model.segmenter(crop)
    frame.logits_of_crops = watched
    started = time.perf_counter()
    summary = predict_cases(find_cases([Path(task["image"])]), model, Path(task["out"]), settings=settings)
    seconds = time.perf_counter() - started
    flop = counter.get_total_flops() / plan.slab * seen["crops"]
    return {
        "seconds": seconds,
        "labels": str(Path(task["out"]) / next(iter(summary.record.cases.values())).output),
        "inside": seen["seconds"] / seconds,
        "share": flop / seen["seconds"] / rate,
        "crops": seen["crops"],
        "torch": torch.__version__,
        "bf16": bf16,
    }


def report(arguments: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> str:
    from voxdino import __version__
    from voxdino.core.io import read_label_map

    medians = {name: statistics.median(row["seconds"] for row in runs) for name, runs in found.items()}
    ours = {name: read_label_map(found[name][0]["labels"]).array for name in ("voxdino", EVERY_TILE) if name in found}
    body = ""
    for name, runs in found.items():
        last = runs[-1]
        equal = dict.fromkeys(("voxdino", EVERY_TILE), "–")
        if name in MONAI or name in OURS:
            labels = read_label_map(last["labels"]).array
            equal |= {one: f"{(labels == values).mean():.3%}" for one, values in ours.items()}
        marks = f" ({last['scaled']})" if last.get("scaled") else ""
        inside, share = (
            f"{statistics.median(row[key] for row in runs):.0%}" if key in last else "–" for key in ("inside", "share")
        )
        ratio = f"{medians[name] / medians['voxdino']:.1f}"
        body += f"| {name} | {len(runs)} | {medians[name]:.1f}{marks} | {ratio} | {' | '.join(equal.values())} "
        body += f"| {inside} | {share} |\n"
    first = found["voxdino"][0]
    precision = "bfloat16" if first["bf16"] else "float32"
    shape = f"{arguments.size} x {arguments.size} x {arguments.slices}"
    return f"""# From file to file: {shape} voxels

`python benchmarks/predict.py --size {arguments.size} --slices {arguments.slices} --runs {arguments.runs}`, backbone
{Path(arguments.backbone).name}, {datetime.date.today()}, voxdino {__version__}, torch {first["torch"]},
{os.cpu_count()} cores {platform.machine()}, device {arguments.device}; ours in {precision}, {first["crops"]} crops.
Each run is a process of its own; imports and loading weights do not count.

{HEAD}{body}"""


if __name__ == "__main__":
    main()
