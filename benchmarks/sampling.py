"""Random crops per second: our store against a NumPy memmap and nnU-Net v2's loader, on the same cases, taking turns.

    python benchmarks/sampling.py DATASET [--nnunet-python ENV/bin/python] [--crop 16 32 32] [--out FILE.md]

DATASET is in nnU-Net layout; "large" draws four CT-like volumes of 96 x 320 x 320 voxels instead. Every contender gives
float32 normalised crops with labels, one thread, a third of them around foreground; the figure is the median of several
rounds. Without --nnunet-python (an environment with nnunetv2 2.8.1) that row is left out, and the table says so.
"""

import argparse
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch

from voxdino.core.geometry import Grid
from voxdino.core.io import write_label_map, write_volume
from voxdino.core.safe_files import format_bytes, write_json, write_text
from voxdino.core.volume import LabelMap, Volume
from voxdino.data.sampling import Quotas, Sampler
from voxdino.data.store import CaseStore
from voxdino.preparation.check import survey
from voxdino.preparation.dataset import read_dataset
from voxdino.preparation.plan import make_plan
from voxdino.preparation.prepare import normalise, prepare

QUOTAS = Quotas(foreground=1 / 3, empty=0.0)
BATCH = 8

NNUNET = """
import sys, time
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from batchgenerators.utilities.file_and_folder_operations import load_json
folder, crop, number, batch = sys.argv[1], [int(n) for n in sys.argv[2].split(",")], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
plans = PlansManager(folder + "/nnUNetPlans.json")
labels = plans.get_label_manager(load_json(folder + "/dataset.json"))
data = folder + "/" + plans.get_configuration("3d_fullres").data_identifier
cases = infer_dataset_class(data)(data)
loader = nnUNetDataLoader(cases, batch, crop, crop, labels, 1 / 3, probabilistic_oversampling=True)
for _ in sys.stdin:
    start = time.perf_counter()
    for _ in range(number // batch):
        loader.generate_train_batch()
    print(number / (time.perf_counter() - start), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--nnunet-python", type=Path)
    parser.add_argument("--crop", type=int, nargs=3, default=(16, 32, 32))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--number", type=int, default=800, help="crops per round")
    parser.add_argument("--out", type=Path, help="Markdown file to append the table to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = draw_large(folder / "large") if options.dataset == "large" else Path(options.dataset)
        table = compare(source, folder, tuple(options.crop), options.number, options.rounds, options.nnunet_python)
    print(table)
    if options.out:
        before = options.out.read_text(encoding="utf-8") if options.out.exists() else "# Random crops per second\n"
        write_text(options.out, f"{before}\n{table}\n")


def compare(
    source: Path, folder: Path, crop: tuple[int, int, int], number: int, rounds: int, nnunet: Path | None
) -> str:
    dataset = read_dataset(source)
    _, fingerprint = survey(dataset)
    settings = {"crop": f"[{crop[1]}, {crop[2]}]", "slab": str(crop[0])}
    plan = make_plan(fingerprint, dataset, backbone="tiny", memory="skip", settings=settings)
    prepare(dataset, plan, folder)
    store = CaseStore(folder / "prepared")
    arrays = copy_to_npy(store, folder / "npy")
    sampler = Sampler([store.extent(case) for case in store.ids], crop[1:], crop[0], QUOTAS, seed=0)
    draws = [sampler.draw(1, index) for index in range(number)]

    def ours() -> float:
        return rate(lambda: [store.cut(draw.case_id, draw.box) for draw in draws], number)

    def memmap() -> float:
        return rate(lambda: [cut_npy(store, arrays, draw.case_id, draw.box) for draw in draws], number)

    contenders: dict[str, Callable[[], float]] = {"voxdino store": ours, "NumPy memmap (.npy)": memmap}
    sizes = {"voxdino store": folder / "prepared", "NumPy memmap (.npy)": arrays}
    process = None
    if nnunet is not None:
        preprocessed = preprocess(source, folder / "nnunet", nnunet)
        sizes["nnU-Net 2.8.1 loader"] = preprocessed
        arguments = [str(preprocessed), ",".join(map(str, crop)), str(number), str(BATCH)]
        process = subprocess.Popen(
            [str(nnunet), "-c", NNUNET, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        contenders["nnU-Net 2.8.1 loader"] = lambda: ask(process)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, measure in contenders.items():
            result = measure()
            if turn:  # the first warms the page cache
                rates[name].append(result)
    if process is not None:
        process.communicate()
    return to_table(dataset.name, len(store.ids), crop, number, rates, sizes)


def rate(work: Callable[[], object], number: int) -> float:
    start = time.perf_counter()
    work()
    return number / (time.perf_counter() - start)


def ask(process: "subprocess.Popen[str]") -> float:
    assert process.stdin and process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def copy_to_npy(store: CaseStore, folder: Path) -> Path:
    """The prepared arrays, in the same types, as plain .npy files."""
    folder.mkdir()
    for case in store.ids:
        box = [(0, size) for size in store.shape(case)]
        np.save(folder / f"{case}.image.npy", store.read_image(case, box))
        np.save(folder / f"{case}.label.npy", store.read_label(case, box).astype(np.uint8))
    return folder


def cut_npy(store: CaseStore, folder: Path, case: str, box: tuple[tuple[int, int], ...]) -> object:
    """The plain way: map, slice, normalise, pad."""
    image, label = (np.load(folder / f"{case}.{kind}.npy", mmap_mode="r") for kind in ("image", "label"))
    inside = tuple(slice(max(first, 0), min(last, size)) for (first, last), size in zip(box, label.shape, strict=True))
    margins = [(part.start - first, last - part.stop) for (first, last), part in zip(box, inside, strict=True)]
    scaled = normalise(np.ascontiguousarray(image[(slice(None), *inside)]), store.record(case).scaling)
    return np.pad(scaled, [(0, 0), *margins]), np.pad(label[inside].astype(np.int64), margins, constant_values=-1)


def preprocess(source: Path, folder: Path, python: Path) -> Path:
    """Let nnU-Net plan and preprocess the same files."""
    raw = folder / "raw/Dataset001_Benchmark"
    raw.mkdir(parents=True)
    for name in ("imagesTr", "labelsTr", "dataset.json"):
        (raw / name).symlink_to((source / name).resolve())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for key in ("raw", "preprocessed", "results"):
        environment[f"nnUNet_{key}"] = str(folder / key)
    command = [str(python.with_name("nnUNetv2_plan_and_preprocess")), "-d", "1", "-c", "3d_fullres", "-np", "2"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return folder / "preprocessed/Dataset001_Benchmark"


def draw_large(folder: Path, num_cases: int = 4) -> Path:
    """CT-like volumes: smooth structures of body values with quantum noise, one organ labelled."""
    shape = (320, 320, 96)
    x, y, z = np.ogrid[-1:1:320j, -1:1:320j, -1:1:96j]
    for index in range(num_cases):
        rng = np.random.default_rng(index)
        body = x**2 / 0.7 + y**2 / 0.5 < 1
        organ = (x - 0.2) ** 2 + (y + 0.1) ** 2 + z**2 / 2 < 0.04 * (1 + index / 4)
        image = np.where(body, 40.0 + 30 * np.sin(9 * x) * np.cos(7 * y) + 60 * organ, -1000.0)
        image = (image + rng.normal(0, 12, shape)).astype(np.int16)
        grid = Grid.from_spacing(shape, (0.9, 0.9, 2.5))
        write_volume(folder / f"imagesTr/case_{index}_0000.nii.gz", Volume(image[None], grid))
        write_label_map(folder / f"labelsTr/case_{index}.nii.gz", LabelMap((organ & body).astype(np.uint8), grid))
    labels = {"background": 0, "organ": 1}
    description = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": num_cases, "file_ending": ".nii.gz"}
    write_json(folder / "dataset.json", description)
    return folder


def to_table(
    dataset: str,
    num_cases: int,
    crop: tuple[int, int, int],
    number: int,
    rates: dict[str, list[float]],
    folders: dict[str, Path],
) -> str:
    middle = {name: statistics.median(values) for name, values in rates.items()}
    base = middle["NumPy memmap (.npy)"]
    lines = [
        f"## {dataset}, {num_cases} cases, crops of {' x '.join(map(str, crop))}",
        "",
        "| reader | crops per second (median, range) | ratio to memmap | disk |",
        "| --- | --- | --- | --- |",
    ]
    for name, value in middle.items():
        spread = f"{min(rates[name]):.0f} to {max(rates[name]):.0f}"
        disk = format_bytes(sum(path.stat().st_size for path in folders[name].rglob("*") if path.is_file()))
        lines.append(f"| {name} | {value:.0f} ({spread}) | {value / base:.2f} | {disk} |")
    if "nnU-Net 2.8.1 loader" in middle:
        lines += ["", f"Ours to nnU-Net's: {middle['voxdino store'] / middle['nnU-Net 2.8.1 loader']:.2f}."]
    else:
        lines += ["", "nnU-Net was not measured: no --nnunet-python was given."]
    lines.append("Our store keeps arrays up to 2 MiB decompressed in memory, 512 MiB in all; larger ones stay on disk.")
    rounds = len(rates["voxdino store"])
    load = os.getloadavg()[0]
    machine = f"{os.cpu_count()} CPUs (load {load:.1f} at the end), Python {platform.python_version()}"
    lines.append(f"{date.today()}, {machine}; one thread each, {number} crops a round, {rounds} rounds, taking turns.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
