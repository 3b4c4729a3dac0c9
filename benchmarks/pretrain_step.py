"""How much of the machine a step of self-distillation uses, and whether the data path feeds it.

python benchmarks/pretrain_step.py [--backbones dinov3_vits16 dinov3_vitb16] [--batches 4] [--global-size 224]
       [--local-size 96] [--prototypes 65536] [--device auto] [--runs 5] [--save docs/results/pretrain-step.md]

A whole step: two global and eight local crops of every image through the student, forward and backward, the global ones
through the teacher, both heads, Sinkhorn-Knopp, KoLeo, clipping, AdamW, the teacher's average. Each row in a process of
its own; medians of the runs after two warm-up ones. The matmul rate is measured in the same process and precision.
"ViT" is the arithmetic of the backbones (torch's count, multiplications and additions) over the time of the whole step;
"waiting" the share of the time in which a step waits for slices of a pool (512 x 512, compressed on the disk), "views"
the share for cutting and changing the crops.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from train_step import flop_counter, matmul_rate, measure_in_child, peak_gib

HEAD = (
    "| backbone | images a step | ViT GFLOP a step | s a step | ViT share of the matmul rate | waiting | views |"
    " peak memory (GiB) | with checkpointing (GiB) |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["dinov3_vits16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[4])
    parser.add_argument("--global-size", type=int, default=224)
    parser.add_argument("--local-size", type=int, default=96)
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments)))
        return
    rows = "".join(row(name, batch, arguments) for name in arguments.backbones for batch in arguments.batches)
    machine = f"{os.cpu_count()} cores {platform.machine()}, device {arguments.device}"
    sizes = f"2 x {arguments.global_size} and 8 x {arguments.local_size} px, {arguments.prototypes} prototypes"
    text = f"""# A step of self-distillation as a share of the machine

`python benchmarks/pretrain_step.py`, {sizes}; {datetime.date.today()}, voxdino {version("voxdino")}, torch
{version("torch")}, {machine}.

{HEAD}{rows}"""
    print(text)
    if arguments.save:
        arguments.save.write_text(text)


def row(name: str, batch: int, arguments: argparse.Namespace) -> str:
    options, size = ("global-size", "local-size", "prototypes", "device", "runs"), ("--batches", str(batch))
    plain, less = (
        measure_in_child(__file__, name, arguments, options, *size, *more) for more in ((), ("--checkpointing",))
    )
    cells = [
        name,
        str(batch),
        f"{plain['flop'] / 1e9:.0f}",
        f"{plain['seconds']:.2f}",
        f"{plain['share']:.0%}",
        f"{plain['waiting']:.1%}",
        f"{plain['views']:.1%}",
        f"{plain['peak_gib']:.2f}",
        f"{less['peak_gib']:.2f}",
    ]
    print(" | ".join(cells), file=sys.stderr)
    return f"| {' | '.join(cells)} |\n"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    import torch

    from voxdino.data.loader import ReadAhead
    from voxdino.models.backbones.vit import ViT
    from voxdino.models.weights import load_backbone
    from voxdino.pretraining.config import HeadConfig, PretrainConfig, Resolution, adapt
    from voxdino.pretraining.pool import Pool
    from voxdino.pretraining.samples import Samples
    from voxdino.pretraining.step import SelfDistillation
    from voxdino.training.distributed import join_world

    size = Resolution(global_size=arguments.global_size, local_size=arguments.local_size)
    changes = {"batch_size": arguments.batches[0], "resolutions": (size,), "drop_path": 0.0}
    stage = adapt(1000).model_copy(update=changes)
    head = HeadConfig(num_prototypes=arguments.prototypes)
    config = PretrainConfig(
        stages=(stage,), dino_head=head, ibot_head=head, gradient_checkpointing=arguments.checkpointing
    )
    with join_world(arguments.device) as world, tempfile.TemporaryDirectory() as folder:
        backbone, _ = load_backbone(f"random:{arguments.child}")
        assert isinstance(backbone, ViT)
        patch_size = backbone.patch_size
        pool = Pool(draw_pool(Path(folder)))
        samples, task = Samples(pool, config, world), SelfDistillation(config, backbone, world)
        task.begin(stage)
        rate = matmul_rate(world.device, task.amp)
        spent: dict[str, list[float]] = {"waiting": [], "views": [], "step": []}

        def timed(name: str, do: Any) -> Any:
            started = time.perf_counter()
            result = do()
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            spent[name].append(time.perf_counter() - started)
            return result

        flop = 0
        with ReadAhead(lambda step: samples.slices(stage, step * stage.batch_size), num_threads=2) as batches:
            for step in range(arguments.runs + 2):
                slices = timed("waiting", lambda: next(batches))
                portions = timed("views", lambda one=slices, at=step: samples.portions(one, stage, at, patch_size))
                if step == 0:
                    with flop_counter() as counter:
                        task.step(portions, step)
                    parts = counter.get_flop_counts()
                    heads = sum(sum(parts.get(f"Network.{name}", {}).values()) for name in ("dino_head", "ibot_head"))
                    flop = counter.get_total_flops() - heads
                else:
                    timed("step", lambda given=portions, at=step: task.step(given, at))
        seconds = {name: statistics.median(times[1:]) for name, times in spent.items()}
        whole = sum(seconds.values())
        return {
            "flop": flop,
            "seconds": whole,
            "share": flop / whole / rate,
            "waiting": seconds["waiting"] / whole,
            "views": seconds["views"] / whole,
            "peak_gib": peak_gib(world.device),
        }


def draw_pool(folder: Path) -> Path:
    """Eight volumes of 512 x 512 x 32 with smooth structure, as a pool."""
    import numpy as np
    from scipy.ndimage import zoom

    from voxdino.core.geometry import Grid
    from voxdino.core.io import write_volume
    from voxdino.core.volume import Volume
    from voxdino.pretraining.pool_build import build_pool
    from voxdino.pretraining.pool_slices import PoolConfig
    from voxdino.pretraining.pool_sources import PoolSource

    for number in range(8):
        rng = np.random.default_rng(number)
        smooth = zoom(rng.normal(0, 300, (16, 16, 4)), (32, 32, 8), order=1)
        array = (smooth + rng.normal(0, 30, smooth.shape)).astype(np.int16)[None]
        grid = Grid.from_spacing(array.shape[1:], (0.8, 0.8, 3.0))
        write_volume(folder / f"data/{number}.nii.gz", Volume(array, grid))
    build_pool([PoolSource(name="drawn", path=str(folder / "data"))], folder, PoolConfig(max_similarity=None))
    return folder / "pool"


if __name__ == "__main__":
    main()
