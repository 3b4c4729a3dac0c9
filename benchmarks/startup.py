"""How long `voxdino --help` takes, against `python -c 'import torch'`: medians of fresh processes, in one go.

python benchmarks/startup.py [--runs 7]
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

HELP = [sys.executable, "-c", "from voxdino.cli import main; raise SystemExit(main(['--help']))"]
TORCH = [sys.executable, "-c", "import torch"]
NOTHING = [sys.executable, "-c", "pass"]


def seconds(command: Sequence[str]) -> float:
    """Wall-clock time of one fresh process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    commands = {"voxdino --help": HELP, "python -c 'import torch'": TORCH, "python -c pass": NOTHING}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for command in commands.values():  # warm the disk cache
        seconds(command)
    for _ in range(runs):  # interleaved: a busy moment hits all of them
        for name, command in commands.items():
            times[name].append(seconds(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:<26} {1000 * median:7.0f} ms   (median of {runs})")
    ratio = medians["voxdino --help"] / medians["python -c 'import torch'"]
    print(f"voxdino --help takes {ratio:.3f} of the time of importing torch (goal: below 0.2)")


if __name__ == "__main__":
    main()
