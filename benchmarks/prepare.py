"""From raw files to training-ready cases: voxdino against nnU-Net, wall clock, imports included, medians in one go.

python benchmarks/prepare.py DATASET [--runs 3] [--peer-env FOLDER] [--save docs/results/prepare.md]

Ours: `voxdino prepare` (check of every file, fingerprint, plan with a measured training step, splits, prepared cases).
Theirs: `nnUNetv2_plan_and_preprocess --verify_dataset_integrity -c 3d_fullres`, with its default number of processes
and with one per core; the faster of the two counts. DATASET is a folder in nnU-Net layout. The peer lives in an
environment of its own, which is made (a large download) where it is not there yet.
"""

import argparse
import datetime
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

PEER = "nnunetv2==2.8.1"
BACKBONE = "dinov3_vits16"
GOAL = 3.0


@dataclass(frozen=True)
class Contender:
    """A command that starts from raw files in a fresh folder, which is emptied before every run."""

    name: str
    command: Sequence[str]
    output: Path
    environment: Mapping[str, str]

    def seconds(self) -> float:
        """Wall-clock time of one run of the command, as a fresh process."""
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir(parents=True)
        start = time.perf_counter()
        done = subprocess.run(self.command, env={**os.environ, **self.environment}, capture_output=True, text=True)
        elapsed = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{self.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return elapsed


def install_peer(folder: Path) -> None:
    """The peer in an environment of its own; nothing is done where it is there."""
    if (folder / "bin" / "nnUNetv2_plan_and_preprocess").exists():
        return
    print(f"installing {PEER} into {folder} (once)", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for packages in (["torch", "torchvision"], [PEER]):
        subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *packages], check=True)


def contenders(dataset: Path, peer_env: Path, scratch: Path) -> list[Contender]:
    raw = scratch / "raw" / "Dataset004_Benchmark"
    raw.parent.mkdir()
    raw.symlink_to(dataset.resolve())
    folders = {f"nnUNet_{name}": str(scratch / name) for name in ("raw", "preprocessed", "results")}
    path = {"PATH": f"{peer_env / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    peer = [str(peer_env / "bin" / "nnUNetv2_plan_and_preprocess"), "-d", "4", "--verify_dataset_integrity"]
    peer += ["-c", "3d_fullres"]
    cores = str(os.cpu_count() or 1)
    ours = [str(Path(sys.executable).with_name("voxdino")), "prepare", str(dataset)]
    ours += ["--workdir", str(scratch / "work"), "--backbone", BACKBONE]
    return [
        Contender("voxdino prepare", ours, scratch / "work", {}),
        Contender("nnU-Net 2.8.1, default processes", peer, scratch / "preprocessed", {**folders, **path}),
        Contender(
            f"nnU-Net 2.8.1, {cores} processes",
            [*peer, "-npfp", cores, "-np", cores],
            scratch / "preprocessed",
            {**folders, **path},
        ),
    ]


def table(times: Mapping[str, Sequence[float]], dataset: Path, num_cases: int, peer_env: Path) -> str:
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours, *peers = medians.values()
    code = "from importlib.metadata import version as v; print(v('nnunetv2'), v('torch'))"
    peer = subprocess.run([str(peer_env / "bin" / "python"), "-c", code], capture_output=True, text=True, check=True)
    peer_version, peer_torch = peer.stdout.split()
    lines = [
        "# Preparing a data set: voxdino against nnU-Net",
        "",
        f"`python benchmarks/prepare.py {dataset.name}`: {num_cases} cases, "
        f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}), "
        f"Python {platform.python_version()}, voxdino {version('voxdino')} (torch {version('torch')}), "
        f"nnunetv2 {peer_version} (torch {peer_torch}). "
        f"Wall clock with imports, median of {len(next(iter(times.values())))} runs taken in turn; "
        f"load average at the end {os.getloadavg()[0]:.1f}: "
        "above the number of cores other work was running, and only the ratios mean something.",
        "",
        "| | seconds (median) | all runs | times voxdino |",
        "| --- | ---: | --- | ---: |",
    ]
    for name, values in times.items():
        runs = ", ".join(f"{value:.1f}" for value in values)
        lines.append(f"| {name} | {medians[name]:.1f} | {runs} | {medians[name] / ours:.1f} |")
    lines += [
        "",
        f"voxdino is **{peers[0] / ours:.1f} times** as fast as nnU-Net's command as it stands, "
        f"**{min(peers) / ours:.1f} times** as fast as its faster setting (goal: {GOAL:.0f}).",
        "",
        "voxdino: every file read to its end and checked, facts, plan with one measured training step of",
        f"{BACKBONE}, splits, prepared cases synced to the disk with digests. nnU-Net: integrity check, fingerprint,",
        "plans, cases of 3d_fullres cropped, normalised, resampled where its plan says so.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="a folder in nnU-Net layout")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--peer-env", type=Path, default=Path(tempfile.gettempdir()) / "voxdino-peers" / "nnunetv2-2.8.1"
    )
    parser.add_argument("--save", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    install_peer(arguments.peer_env)
    num_cases = len(list((arguments.dataset / "labelsTr").iterdir()))
    with tempfile.TemporaryDirectory() as scratch:
        rivals = contenders(arguments.dataset, arguments.peer_env, Path(scratch))
        times: dict[str, list[float]] = {rival.name: [] for rival in rivals}
        for run in range(arguments.runs):
            for rival in rivals:
                times[rival.name].append(rival.seconds())
                print(f"run {run + 1}: {rival.name}: {times[rival.name][-1]:.1f} s", file=sys.stderr)
    text = table(times, arguments.dataset, num_cases, arguments.peer_env)
    print(text)
    if arguments.save:
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        arguments.save.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
