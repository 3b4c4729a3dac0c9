"""Cases a minute with one worker, two processes and two Ray actors: which share of twice the one is reached.

python benchmarks/cohort.py IMAGES --run RUN --work FOLDER [--cases 200] [--repeats 3] [--save docs/results/cohort.md]

Every worker computes with one thread, so that "ideal" for two is twice the rate of one. The rate counts from the first
finished case to the last; starting (Python, torch, the model; for Ray its cluster too) stands beside it. Medians.
"""

import argparse
import datetime
import os
import platform
import shutil
import statistics
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # also of the workers, which inherit it

from voxdino.cohort.crew import Crew, LocalCrew
from voxdino.cohort.dispatch import Cohort
from voxdino.cohort.predicting import Models, Spread
from voxdino.inference.cases import find_cases, num_source_channels
from voxdino.inference.load import load_model
from voxdino.inference.run import predict_cases

NUM_WORKERS = 2
HEAD = "| workers | cases a minute | share of ideal | until the first case (s) |\n| --- | --- | --- | --- |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {}
    starts: dict[str, list[float]] = {}
    for _ in range(arguments.repeats):
        for name in ("1 process", f"{NUM_WORKERS} processes", f"{NUM_WORKERS} Ray actors"):
            rate, start = measure(name, arguments)
            rates.setdefault(name, []).append(rate)
            starts.setdefault(name, []).append(start)
            print(f"{name}: {rate:.1f} cases a minute, the first after {start:.1f} s", flush=True)
    one = statistics.median(rates["1 process"])
    body = ""
    for name, found in rates.items():
        rate, workers = statistics.median(found), int(name.split()[0])
        share = rate / (workers * one)
        body += f"| {name} | {rate:.1f} | {share:.0%} | {statistics.median(starts[name]):.1f} |\n"
    print(HEAD + body)
    if arguments.save:
        arguments.save.write_text(page(body, arguments))


def measure(name: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """Cases a minute, and seconds until the first one was done."""
    model = load_model(arguments.run)
    cases = find_cases([arguments.images], num_channels=num_source_channels(model.plan))[: arguments.cases]
    out = arguments.work / "predictions"
    shutil.rmtree(out, ignore_errors=True)
    done: list[float] = []
    started = time.monotonic()
    spread = Spread(Cohort(make_crew(name)), Models((arguments.run.absolute(),), device="cpu"))
    summary = predict_cases(cases, model, out, spread=spread, on_progress=lambda *_: done.append(time.monotonic()))
    assert (summary.num_done, len(done)) == (len(cases), len(cases))
    return 60 * (len(done) - 1) / (done[-1] - done[0]), done[0] - started


def make_crew(name: str) -> Crew:
    if "Ray" not in name:
        return LocalCrew(int(name.split()[0]))
    import ray

    from voxdino.cohort.ray_crew import RayCrew

    if not ray.is_initialized():
        ray.init(
            num_cpus=NUM_WORKERS,
            include_dashboard=False,
            object_store_memory=80_000_000,
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            _system_config={"worker_niceness": 0},  # as RayCrew starts one
        )
    return RayCrew()


def page(body: str, arguments: argparse.Namespace) -> str:
    machine = f"{os.cpu_count()} CPUs ({platform.processor() or platform.machine()})"
    told = f"{arguments.cases} cases, one thread a worker, {machine}"
    counts = f"--cases {arguments.cases} --repeats {arguments.repeats}"
    command = f"python benchmarks/cohort.py IMAGES --run RUN --work FOLDER {counts}"
    return f"# Cohorts\n\n`{command}`, {datetime.date.today()}: {told}.\n\n{HEAD}{body}"


if __name__ == "__main__":
    main()
