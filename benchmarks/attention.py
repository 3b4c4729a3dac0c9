"""Training through attention in bfloat16 on the CPU: plain matmuls beside torch's fused kernel.

python benchmarks/attention.py [--runs 15] [--save docs/results/attention.md]

Six heads of 64 channels (ViT-S), about two thousand tokens at once, forward and backward; medians of runs that take
turns. The error is that of the output against float32, of normal queries and keys with an offset common to all keys.
"""

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from voxdino.models.backbones import blocks

TOKENS, HEADS, CHANNELS, AT_ONCE = (37, 65, 197, 257, 577), 6, 64, 2056
HEAD = "| tokens | images | times as fast | error fused | error plain |\n| --- | --- | --- | --- | --- |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    body = "".join(row(num_tokens, arguments.runs) for num_tokens in TOKENS)
    text = f"""# Attention in bfloat16 on the CPU

`python benchmarks/attention.py`, {datetime.date.today()}, torch {torch.__version__}, {os.cpu_count()} cores
{platform.machine()}: forward and backward of plain matmuls (`voxdino.models.backbones.blocks.attend`) beside torch's
`scaled_dot_product_attention`; medians of {arguments.runs} runs. Without gradients the two take about the same time.

{HEAD}{body}"""
    print(text)
    if arguments.save:
        arguments.save.write_text(text)


def row(num_tokens: int, runs: int) -> str:
    torch.manual_seed(0)
    images = max(1, AT_ONCE // num_tokens)
    exact = torch.randn(images, num_tokens, 3, HEADS, CHANNELS)
    exact[:, :, 1] += 3 * torch.randn(CHANNELS)
    packed = exact.bfloat16().requires_grad_()
    kernels: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [F.scaled_dot_product_attention, blocks.attend]
    true = kernels[0](*parts(exact))
    seconds: list[list[float]] = [[], []]
    errors = [0.0, 0.0]
    for _ in range(runs + 2):
        for number, kernel in enumerate(kernels):
            started = time.perf_counter()
            out = kernel(*parts(packed))
            out.sum().backward()  # type: ignore[no-untyped-call]
            seconds[number].append(time.perf_counter() - started)
            errors[number] = float((out.detach() - true).norm() / true.norm())
    fused, plain = (statistics.median(found[2:]) for found in seconds)
    cells = [str(num_tokens), str(images), f"{fused / plain:.1f}", *(f"{error:.4f}" for error in errors)]
    return f"| {' | '.join(cells)} |\n"


def parts(packed: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values as an attention layer cuts them from one product."""
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


if __name__ == "__main__":
    main()
