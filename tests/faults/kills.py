"""Kill -9 at random moments of every long command: nothing unreadable, and the same result in the end.

    python tests/faults/kills.py [--kills 20] [--at-once 4] [--seed 0]

Each step first runs undisturbed; that is the result to reach. Then, from a clean start, it is killed a few times at
moments drawn over its length, after each kill every file that has its final name must be readable, and the last run is
left to end: its files must be those of the undisturbed run, byte for byte (but for the seconds that run.json and
checkpoints say a run took).
Processes are forked from this one, which has imported everything: kills fall into the work, not into the imports.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a run is resumed with the number of threads it began with

from voxdino.cli import main as voxdino
from voxdino.core.arrays import ArrayFile
from voxdino.core.io import is_image, read_volume
from voxdino.core.safe_files import TEMPORARY_PREFIX, digest_bytes, read_json, write_json
from voxdino.models.weights import read_tensors
from voxdino.preparation.phantoms import draw_phantoms

BACKBONE = "random:tiny"
TRAINING = ("decoder_width=8", "num_epochs=3", "steps_per_epoch=6", "batch_size=2", "checkpoint_every_s=0")
NOT_COMPARED = (".lock",)
TIMED = ("run.json", "state.json")  # compared but for the seconds in them, so not with the digests of checkpoints
GRID = {
    "encoders": [{"name": "tiny", "source": BACKBONE}, {"name": "pixels", "source": "pixels:16"}],
    "tasks": [
        {"name": "organs", "data": "phantoms", "probe": "patch_linear", "resolutions": [32, 64], "shots": [1]},
        {"name": "small", "data": "phantoms", "probe": "patch_linear", "resolutions": [32], "limit": 3},
    ],
}


@dataclass
class Step:
    """A command and the folder it writes to; `prepared` is copied there before it starts anew."""

    name: str
    args: list[str]
    folder: Path
    start: Path | None
    seconds: float = 0.0
    num_kills: int = 0
    unreadable: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    def reset(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.start is not None:
            shutil.copytree(self.start, self.folder)


def run(args: list[str], kill_after_s: float | None = None) -> int:
    """The exit code of `voxdino ARGS` in a forked process, or -9 where it was killed first. Orphans die with it."""
    pid = os.fork()
    if pid == 0:
        os.setsid()  # a group of its own: workers are killed too, as by a power switch
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        os._exit(voxdino(args))
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def unreadable(folder: Path) -> Iterator[str]:
    """Files with a final name that cannot be read to their end."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name.startswith(TEMPORARY_PREFIX) or path.name in NOT_COMPARED:
            continue
        try:
            _read(path)
        except Exception as error:
            yield f"{path.relative_to(folder)}: {type(error).__name__}: {error}"


def _read(path: Path) -> None:
    if path.suffix == ".json":
        read_json(path)
    elif path.suffix == ".b2nd":
        ArrayFile(path)[:]
    elif path.suffix == ".safetensors":
        read_tensors(path)
    elif path.suffix == ".jsonl":  # appended to: only its last line may be cut
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                json.loads(line)
    elif is_image(path):
        read_volume(path)


def content(folder: Path) -> dict[str, str]:
    """Every file of a folder by digest."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_COMPARED):
        data = path.read_bytes()
        if path.name == "manifest.json" and path.with_name("state.json").exists():
            continue
        if path.name in TIMED or path.parent.name == "cells":
            data = json.dumps(_without_seconds(json.loads(data))).encode()
        found[str(path.relative_to(folder))] = digest_bytes(data)
    return found


def _without_seconds(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_seconds(entry) for key, entry in value.items() if not key.endswith("_s")}
    return value


def torture(step: Step, num_kills: int, at_once: int, random_numbers: random.Random) -> None:
    """Kill a step `num_kills` times, at most `at_once` times before it may end, and compare."""
    step.reset()
    started = time.monotonic()
    if code := run(step.args):
        raise SystemExit(f"{step.name} ends with {code} even undisturbed")
    step.seconds = time.monotonic() - started
    wanted = content(step.folder)
    while step.num_kills < num_kills:
        step.reset()
        for _ in range(min(at_once, num_kills - step.num_kills)):
            if run(step.args, random_numbers.uniform(0, step.seconds)) != -signal.SIGKILL:
                break  # it was done before the kill
            step.num_kills += 1
            step.unreadable += unreadable(step.folder)
        if code := run(step.args):
            step.different.append(f"after kill {step.num_kills} the same command ends with {code}")
            continue
        found = content(step.folder)
        names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        step.different += [f"after kill {step.num_kills}: {name}" for name in names]


def steps(folder: Path) -> Iterator[Step]:
    """prepare, finetune, predict and benchmark on a few phantoms; each starts from what was left undisturbed."""
    data = draw_phantoms(folder / "phantoms", num_cases=5, seed=0)
    work, out = folder / "work", folder / "predictions"
    common = ["--workdir", str(work), "--backbone", BACKBONE]
    small = ["--set", "plan.magnification=1.0", "--set", "plan.batch_size=2", "--workers", "2"]
    yield Step("prepare", ["prepare", str(data), *common, *small], work, None)
    shutil.copytree(work, folder / "prepared")
    training = ["--set", "adaptation=full", *(word for item in TRAINING for word in ("--set", item))]
    yield Step(
        "finetune",
        ["finetune", *common, "--recipe", "segdino_v2", "--device", "cpu", *training],
        work,
        folder / "prepared",
    )
    predict = ["predict", str(data / "imagesTr"), "--run", str(work / "runs" / "segdino_v2_fold0"), "--out", str(out)]
    yield Step("predict", [*predict, "--device", "cpu"], out, None)
    write_json(folder / "grid.json", GRID)
    bench = folder / "bench"
    yield Step("benchmark", ["benchmark", str(folder / "grid.json"), "-w", str(bench), "--device", "cpu"], bench, None)


def main(argv: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each step")
    parser.add_argument("--at-once", type=int, default=4, help="kills before a run may end")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    random_numbers = random.Random(options.seed)
    lost = 0
    say(f"{'step':<10} {'undisturbed':>11} {'kills':>6} {'unreadable':>11} {'different':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for step in steps(Path(folder)):
            torture(step, options.kills, options.at_once, random_numbers)
            problems = step.unreadable + step.different
            counts = f"{step.num_kills:>6} {len(step.unreadable):>11} {len(step.different):>10}"
            say(f"{step.name:<10} {step.seconds:>9.1f} s {counts}")
            for problem in problems[:20]:
                say(f"  {problem}")
            lost += len(problems)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
