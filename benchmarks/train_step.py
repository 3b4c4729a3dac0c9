"""How much of the machine a training step uses: its arithmetic a second over the measured matmul rate.

python benchmarks/train_step.py [--backbone random:dinov3_vits16] [--recipes NAME ...] [--crop 224] [--batch 4]
       [--device auto] [--runs 5] [--save docs/results/train-step.md]

Each recipe in a process of its own, so that its peak memory is its own; medians of the runs after two warm-up ones.
The matmul rate is measured in the same process and precision, just before. The row "ViT" is the backbone alone,
trained in full. Arithmetic is counted by torch (multiplications and additions), recomputation under gradient
checkpointing and attention included.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

VIT = "ViT"
HEAD = (
    "| recipe | samples a step | GFLOP a step | s a step | share of the matmul rate | peak memory (GiB) |"
    " with checkpointing (GiB) |\n| --- | --- | --- | --- | --- | --- | --- |\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="random:dinov3_vits16")
    parser.add_argument("--recipes", nargs="+")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--batch", type=int, default=4, help="slices a step; recipes that see slabs get one slab")
    parser.add_argument("--slab", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments)))
        return
    from voxdino.finetuning.recipes import RECIPES

    rows = "".join(row(name, arguments) for name in [VIT, *(arguments.recipes or RECIPES)])
    machine = f"{os.cpu_count()} cores {platform.machine()}, device {arguments.device}"
    command = f"train_step.py --crop {arguments.crop} --batch {arguments.batch} --slab {arguments.slab}"
    text = f"""# A training step as a share of the machine

`python benchmarks/{command}`, {datetime.date.today()}, backbone {Path(arguments.backbone).name},
voxdino {version("voxdino")}, torch {version("torch")}, {machine}.

{HEAD}{rows}"""
    print(text)
    if arguments.save:
        arguments.save.write_text(text)


def row(name: str, arguments: argparse.Namespace) -> str:
    options = ("backbone", "crop", "batch", "slab", "device", "runs")
    plain, less = (measure_in_child(__file__, name, arguments, options, *more) for more in ((), ("--checkpointing",)))
    cells = [
        name,
        plain["samples"],
        f"{plain['flop'] / 1e9:.0f}",
        f"{plain['seconds']:.2f}",
        f"{plain['share']:.0%}",
        f"{plain['peak_gib']:.2f}",
        f"{less['peak_gib']:.2f}" if less["checkpointed"] else "–",
    ]
    print(" | ".join(cells), file=sys.stderr)
    return f"| {' | '.join(cells)} |\n"


def measure_in_child(
    script: str, name: str, arguments: argparse.Namespace, options: Sequence[str], *others: str
) -> dict[str, Any]:
    """What `script --child NAME` prints, run by itself. options: passed on from `arguments`; others: beside them."""
    command = [sys.executable, script, "--child", name, *others]
    for option in options:
        command += [f"--{option}", str(getattr(arguments, option.replace("-", "_")))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One recipe's step: time, arithmetic, memory."""
    import torch

    from voxdino.finetuning.cost import example_plan
    from voxdino.finetuning.model import effective_plan, new_segmenter
    from voxdino.finetuning.recipes import RECIPES, segdino_v2_full
    from voxdino.models.precision import autocast, resolve_device, uses_bf16
    from voxdino.models.weights import load_backbone
    from voxdino.training.losses import dice_cross_entropy

    torch.manual_seed(0)
    device = resolve_device(arguments.device)
    alone = arguments.child == VIT
    config = segdino_v2_full() if alone else RECIPES[arguments.child]()
    update: dict[str, Any] = {"gradient_checkpointing": arguments.checkpointing, "batch_size": None}
    if config.slab:
        update["slab"] = arguments.slab
    config = config.model_copy(update=update)
    backbone, card = load_backbone("none" if config.backbone == "none" else arguments.backbone)
    able = "gradient_checkpointing" in backbone.abilities and (
        config.adaptation != "frozen" or config.depth_adapter > 0
    )
    config = config.model_copy(update={"gradient_checkpointing": arguments.checkpointing and able})
    size = (arguments.crop, arguments.crop)
    plan = effective_plan(config, example_plan().model_copy(update={"crop": size, "tile": size}))
    if plan.slab > arguments.slab:
        plan = plan.model_copy(update={"slab": arguments.slab})
    model = new_segmenter(config, plan, backbone, card, device).train()
    batch = 1 if plan.slab > 1 else arguments.batch
    image = torch.randn(batch, 1, plan.slab, *size, device=device)
    label = torch.randint(0, 2, (batch, plan.slab, *size), device=device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    amp = uses_bf16(device, "auto")
    features = None
    if model.cacheable:
        with torch.no_grad(), autocast(device, amp):
            features = model.encode(image)

    def step() -> None:
        with autocast(device, amp):
            if alone:
                loss = torch.stack([one.float().square().mean() for one in model.encode(image).maps]).sum()
            else:
                given = model.encode(image) if features is None else features
                logits = model.decode(given, (plan.slab, *size), image)
                loss = dice_cross_entropy(logits, label, ignore_index=-1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    rate = matmul_rate(device, amp)
    with flop_counter() as counter:
        step()
    times = []
    for _ in range(arguments.runs + 1):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    seconds, flop = statistics.median(times[1:]), counter.get_total_flops()
    return {
        "samples": f"{batch} x {plan.slab} slices" if plan.slab > 1 else f"{batch} slices",
        "flop": flop,
        "seconds": seconds,
        "share": flop / seconds / rate,
        "peak_gib": peak_gib(device),
        "checkpointed": config.gradient_checkpointing,
    }


def flop_counter() -> Any:
    """torch's counter, which of itself does not know the attention of CPUs."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    def forward(query: Any, key: Any, value: Any, *rest: Any, **names: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(gradient: Any, query: Any, key: Any, value: Any, *rest: Any, **names: Any) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))

    known = {"": forward, "_backward": backward}
    names = {f"_scaled_dot_product_flash_attention_for_cpu{end}": count for end, count in known.items()}
    return FlopCounterMode(
        display=False, custom_mapping={getattr(torch.ops.aten, name): count for name, count in names.items()}
    )


def matmul_rate(device: Any, amp: bool) -> float:
    """Arithmetic a second of a large matrix product in the precision of training: the best of a few."""
    import torch

    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if amp else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        float((a @ b)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def peak_gib(device: Any) -> float:
    if device.type == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated() / 2**30)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


if __name__ == "__main__":
    main()
