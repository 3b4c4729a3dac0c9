"""Peak memory of predicting one large volume with few and with many classes: voxdino beside MONAI and nnU-Net.

python benchmarks/memory.py --work FOLDER [--size 512] [--slices 2000] [--classes 25 118] [--slabs 1 16]
       [--peer-env FOLDER] [--usable 0.95] [--save docs/results/memory.md]

A small network (a narrow ViT with a linear decoder, or the 3-D one for slabs; a single convolution for the peers), on
the CPU, from file to file, each in a process of its own. Peers get the volume halved along its slices until they manage
it in --usable of the machine's free memory; their rows are without reading, resampling and writing, which only lowers
them.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

BASE_GIB, BYTES_A_VOXEL = 0.6, 12
HEAD = "| system | classes | voxels | peak RSS (GiB) | bound (GiB) | s |\n| --- | --- | --- | --- | --- | --- |\n"
PEERS = ("MONAI 1.6.1", "nnU-Net 2.8.1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--slices", type=int, default=2000)
    parser.add_argument("--classes", type=int, nargs="+", default=[25, 118])
    parser.add_argument("--slabs", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--peer-env", type=Path)
    parser.add_argument("--usable", type=float, default=0.95)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    shape = (arguments.size, arguments.size, arguments.slices)
    make_volume(arguments.work / "large.nii.gz", shape)
    body, grows = "", []
    for slab in arguments.slabs:
        peaks = []
        for classes in arguments.classes:
            run = arguments.work / f"small_{classes}_{slab}"
            make_model(run, classes, slab)
            row = ours(arguments.work / "large.nii.gz", run, arguments.work / f"out_{classes}_{slab}")
            weights = (run / "model.safetensors").stat().st_size
            bound = BASE_GIB + (weights + BYTES_A_VOXEL * shape[0] * shape[1] * shape[2]) / 2**30
            peaks.append(row["peak_gib"])
            body += line("voxdino" + f", slabs of {slab}" * (slab > 1), classes, shape, row, f"{bound:.2f}")
        grows.append(f"{max(peaks) / min(peaks) - 1:.1%} ({f'slabs of {slab}' if slab > 1 else 'slices'})")
    for name in PEERS if arguments.peer_env else ():
        for classes in arguments.classes:
            body += peer(name, classes, shape, arguments)
    slabs = " ".join(map(str, arguments.slabs))
    command = f"memory.py --size {arguments.size} --slices {arguments.slices} --slabs {slabs}"
    text = f"""# Peak memory of prediction

`python benchmarks/{command}`, {datetime.date.today()}, {os.cpu_count()} cores {platform.machine()}, CPU. voxdino's
largest peak is above its smallest by {", ".join(grows)}; its bound is {BASE_GIB} GiB + weights +
{BYTES_A_VOXEL} bytes a voxel.

{HEAD}{body}"""
    print(text)
    if arguments.save:
        arguments.save.write_text(text)


def line(name: str, classes: int, shape: tuple[int, ...], row: dict[str, Any], bound: str) -> str:
    """A row of the table, told at once: a whole table takes hours."""
    voxels = " x ".join(map(str, shape))
    told = f"| {name} | {classes} | {voxels} | {row['peak_gib']:.2f} | {bound} | {row['seconds']:.0f} |"
    print(told, file=sys.stderr, flush=True)
    return f"{told}\n"


def make_volume(path: Path, shape: tuple[int, int, int]) -> None:
    """A body of noise, as high as wide, in the air; written slab by slab as any scan would be read."""
    import numpy as np

    from voxdino.core.geometry import Grid
    from voxdino.core.io import write_volume
    from voxdino.core.volume import Volume

    if path.exists():
        return
    rng = np.random.default_rng(0)
    rows, columns, slices = shape
    y, x = np.ogrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    inside = x**2 / 0.6 + y**2 / 0.5 < 1
    array = np.full(shape, -1000, np.int16, order="F")
    for index in range(slices):
        array[..., index][inside] = rng.integers(-100, 200, int(inside.sum()))
    write_volume(path, Volume(array[None], Grid.from_spacing(shape, (0.8, 0.8, 1.0))))


def make_model(folder: Path, classes: int, slab: int) -> None:
    """A run folder with a small random network; one that sees slabs where they are of more than a slice."""
    import torch

    from voxdino.core.labels import LabelSet
    from voxdino.inference.load import save_model
    from voxdino.models.backbones.vit import ViT, ViTConfig
    from voxdino.models.compose import build_segmenter
    from voxdino.models.segmenter import ModelConfig
    from voxdino.models.weights_card import WeightsCard
    from voxdino.preparation.intensity import ChannelPolicy
    from voxdino.preparation.plan import Plan

    torch.manual_seed(0)
    config = ViTConfig(embed_dim=32, depth=4, num_heads=2, patch_size=16, ffn_hidden=64)
    labels = LabelSet(names=tuple(f"class {n}" for n in range(classes)), ids=tuple(range(classes)))
    channel = ChannelPolicy(name="CT", source=0, kind="ct", lower=-200.0, upper=300.0, mean=50.0, sd=80.0)
    plan = Plan(
        dataset="memory",
        fingerprint_digest="",
        ndim=3,
        labels=labels,
        channels=(channel,),
        slice_axis="S",
        in_plane_spacing=None,
        magnification=1.0,
        crop=(256, 256),
        tile=(256, 256),
        context_slices=0,
        input_builder="repeat",
        batch_size=1,
        patch_size=16,
        slab=slab,
    )
    decoder = {"decoder": "conv3d", "decoder_width": 16} if slab > 1 else {"decoder": "linear"}
    model = ModelConfig(backbone="small", num_outputs=classes, slab=slab, **decoder)
    backbone = ViT(config)
    card = WeightsCard(
        name="small",
        layout="voxdino",
        licence="none",
        source="random",
        file_digest="0",
        source_digest="0",
        config=config,
        num_parameters=sum(parameter.numel() for parameter in backbone.parameters()),
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, build_segmenter(model, backbone).eval(), plan, card)


def ours(image: Path, run: Path, out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)  # what lies there already would not be made again
    command = [sys.executable, "-m", "voxdino", "predict", str(image), "--run", str(run), "--out", str(out)]
    row = measured([*command, "--device", "cpu"])
    if "failed" in row:
        raise SystemExit(row["failed"])
    return row


def measured(command: list[str]) -> dict[str, Any]:
    """Peak RSS and seconds of a process; "failed" where it did not end well."""
    import time

    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    told = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    row = {"peak_gib": usage.ru_maxrss / 2**20, "seconds": time.perf_counter() - started}
    if process.returncode:
        row["failed"] = told[-2000:]
    return row


def peer(name: str, classes: int, shape: tuple[int, int, int], arguments: argparse.Namespace) -> str:
    """The row of the largest part of the volume that a peer manages."""
    from voxdino.core.memory import available_memory

    slices = shape[2]
    while slices:
        most = str(int(arguments.usable * available_memory()))
        task = json.dumps({"name": name, "classes": classes, "shape": [shape[0], shape[1], slices], "most": most})
        script = Path(__file__).with_name("memory_peer.py")
        row = measured([str(arguments.peer_env / "bin" / "python"), str(script), task])
        if "failed" not in row:
            return line(name, classes, (*shape[:2], slices), row, "–")
        given = f"given {int(most) / 2**30:.1f} GiB"
        told = row["failed"].splitlines()[-1:]
        print(f"{name}, {classes} classes, {slices} slices, {given}: {told}", file=sys.stderr)
        slices //= 2
    return f"| {name} | {classes} | none | – | – | – |\n"


if __name__ == "__main__":
    main()
