"""`voxdino doctor`: what this machine and installation offer, as a block one can paste, and parity with references."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from voxdino.cli.options import DEFAULT_WORKDIR, JsonOption, WorkdirOption
from voxdino.cli.output import print_json, print_table, say


@dataclass(frozen=True)
class Fact:
    """One line of the report; `fix` says what to do where it is not good."""

    name: str
    value: str
    fix: str | None = None


def doctor(
    reference_values: Annotated[
        Path | None,
        typer.Option("--reference-values", metavar="DIR", help="Compare the models with the cases there."),
    ] = None,
    workdir: WorkdirOption = DEFAULT_WORKDIR,
    json: JsonOption = False,
) -> None:
    """Report versions, device, memory, disk and weights; or compare models and metrics with reference values."""
    if reference_values is not None:
        _compare(reference_values, json)
        return
    from voxdino.core.errors import ResourceError

    facts = [*_versions(), *_devices(), *_memory(), *_folders(workdir), *_weights()]
    if json:
        print_json([{"name": fact.name, "value": fact.value, "fix": fact.fix} for fact in facts])
    else:
        width = max(len(fact.name) for fact in facts)
        for fact in facts:
            print(f"{fact.name:<{width}}  {fact.value}")
    faults = [fact for fact in facts if fact.fix]
    if faults:
        raise ResourceError(f"{faults[0].value}.", where=faults[0].name, fix=faults[0].fix)


def _compare(folder: Path, as_json: bool) -> None:
    from dataclasses import asdict

    from voxdino.core.errors import VoxdinoError
    from voxdino.evaluation.reference import CASES as CASES_OF_METRICS
    from voxdino.models.reference import CASES, check_reference_values
    from voxdino.pretraining.reference import CASES as CASES_OF_PRETRAINING
    from voxdino.training.reference import CASES as CASES_OF_LOSSES

    results = check_reference_values(folder, {**CASES, **CASES_OF_LOSSES, **CASES_OF_PRETRAINING, **CASES_OF_METRICS})
    if as_json:
        print_json([asdict(result) for result in results])
    else:
        rows = [
            (
                result.name,
                "-" if result.skipped_reason else f"{result.largest_error:.1e}",
                "-" if result.skipped_reason else f"{result.tolerance:.0e}",
                f"skipped: {result.skipped_reason}" if result.skipped_reason else "ok" if result.passed else "FAILED",
            )
            for result in results
        ]
        print_table("reference values", ("case", "largest error", "tolerance", "result"), rows)
    failed = [result.name for result in results if not result.skipped_reason and not result.passed]
    if failed:
        raise VoxdinoError(
            f"{', '.join(failed)}: voxdino computes something else than the reference.",
            where=str(folder),
            fix="try torch as in constraints.txt; if it still fails, report it with the output of voxdino doctor.",
        )
    num_run = sum(not result.skipped_reason for result in results)
    say(f"{num_run} of {len(results)} cases compared, all within tolerance")


def _versions() -> list[Fact]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from voxdino import __version__

    facts = [
        Fact("voxdino", __version__),
        Fact("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]
    for package in ("torch", "numpy", "nibabel", "SimpleITK", "blosc2", "safetensors", "pydantic"):
        try:
            found = version(package)
        except PackageNotFoundError:
            facts.append(Fact(package, "missing", f"pip install {package}"))
            continue
        facts.append(Fact(package, found, _torch_fix(found) if package == "torch" else None))
    return facts


def _torch_fix(version: str) -> str | None:
    """torch below 2.10 can be made to run code by a weights file; 2.9 is also slow."""
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    return None if release >= (2, 10) else "pip install 'torch>=2.10' (older ones run code hidden in weights files)."


def _devices() -> list[Fact]:
    import os

    import torch

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    facts = [
        Fact("cpu", f"{cores} cores, torch uses {torch.get_num_threads()} threads, bf16 {_bf16_speed():.1f} x float32")
    ]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        facts.append(Fact(f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.is_available():
        facts.append(Fact("cuda", "none found; everything runs on the CPU"))
    if torch.backends.mps.is_available():
        facts.append(Fact("mps", "available"))
    return facts


def _bf16_speed() -> float:
    """Time of a float32 matrix product over that of a bfloat16 one: above 1, autocast pays on this CPU."""
    import statistics
    import time

    import torch

    def median_s(dtype: torch.dtype) -> float:
        matrix = torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    return median_s(torch.float32) / median_s(torch.bfloat16)


def _memory() -> list[Fact]:
    import os

    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return [Fact("memory", f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free")]


def _folders(workdir: Path) -> list[Fact]:
    import os
    import shutil

    folder = next(parent for parent in (workdir, *workdir.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK | os.X_OK)
    return [
        Fact("disk", f"{free / 2**30:.1f} GiB free for {workdir}", None if free > 2**30 else "free disk space."),
        Fact(
            "workdir", f"{workdir} can{'' if writable else 'not'} be written", None if writable else "choose --workdir."
        ),
    ]


def _weights() -> list[Fact]:
    from voxdino.models.weights import default_weights_folder, list_weights

    folder = default_weights_folder()
    cards = list_weights(folder)
    if not cards:
        return [Fact("weights", f"none in {folder}; voxdino weights pull NAME, or --backbone FILE")]
    return [Fact("weights", f"{card.name} ({card.licence})") for card in cards]
