"""Attention in bfloat16 on the CPU: plain matmuls beside torch's fused kernel.

python benchmarks/attention.py [--backbones voxdino_tiny FILE ...] [--runs 15] [--save docs/results/attention.md]

Time: six heads of 64 channels (ViT-S), about two thousand tokens at once; medians of runs that take turns. Error: of
the last feature maps of whole backbones, and of the gradients of all their weights, against float32 on phantoms; with
the spread of a query's logits (before softmax) in the block where it is largest.
"""

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from voxdino.models.backbones import blocks
from voxdino.models.precision import autocast
from voxdino.models.weights import load_backbone
from voxdino.preparation.phantoms import draw_phantom

TOKENS, HEADS, CHANNELS, AT_ONCE = (37, 65, 197, 257, 401, 577, 785, 1025, 1370), 6, 64, 2740
TIMES = "| tokens | images | forward | forward and backward |\n| --- | --- | --- | --- |\n"
SIDES = 16, 32  # of images, in patches
ERRORS = (
    "| backbone | patches | SD of logits | features, fused | features, plain | gradients, fused | gradients, plain |\n"
    "| --- | --- | --- | --- | --- | --- | --- |\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="*", default=["voxdino_tiny"])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    times = "".join(row(num_tokens, arguments.runs) for num_tokens in TOKENS)
    errors = "".join(errors_of(backbone, patches) for backbone in arguments.backbones for patches in SIDES)
    names = " ".join(Path(backbone).name for backbone in arguments.backbones)
    options = f"--backbones {names} --runs {arguments.runs}"
    text = f"""# Attention in bfloat16 on the CPU

`python benchmarks/attention.py {options}`,
{datetime.date.today()}, torch {torch.__version__}, {os.cpu_count()} cores {platform.machine()}: how many times as fast
plain matmuls (`voxdino.models.backbones.blocks.attend`) are as torch's `scaled_dot_product_attention`; medians.
"–": `attend` leaves it to torch, for the memory that the gradient would need.

{TIMES}{times}
Errors of whole backbones, relative to float32: features as in prediction, gradients as in training, where attention to
more than {blocks.MOST_TRAINED_TOKENS} tokens is the fused kernel's. Single layers of random queries and keys err 6 to
14 times as much as the fused kernel does (0.01 to 0.02 of the output); a whole backbone's other layers round as much in
both.

{ERRORS}{errors}"""
    print(text)
    if arguments.save:
        arguments.save.write_text(text)


def row(num_tokens: int, runs: int) -> str:
    images = max(1, AT_ONCE // num_tokens)
    forward = times_as_fast(torch.randn(images, num_tokens, 3, HEADS, CHANNELS).bfloat16(), runs)
    both = "–"
    if num_tokens <= blocks.MOST_TRAINED_TOKENS:
        packed = torch.randn(images, num_tokens, 3, HEADS, CHANNELS).bfloat16().requires_grad_()
        both = f"{times_as_fast(packed, runs):.1f}"
    return f"| {num_tokens} | {images} | {forward:.1f} | {both} |\n"


def times_as_fast(packed: Tensor, runs: int) -> float:
    kernels: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [F.scaled_dot_product_attention, blocks.attend]
    seconds: list[list[float]] = [[], []]
    for _ in range(runs + 2):
        for kernel, found in zip(kernels, seconds, strict=True):
            started = time.perf_counter()
            out = kernel(*packed.permute(2, 0, 3, 1, 4).unbind(0))  # as an attention layer cuts them from one product
            if packed.requires_grad:
                out.sum().backward()  # type: ignore[no-untyped-call]
            found.append(time.perf_counter() - started)
    fused, plain = (statistics.median(found[2:]) for found in seconds)
    return fused / plain


def errors_of(source: str, patches: int) -> str:
    """Both kernels in one backbone, on slices of three phantoms of so many patches a side."""
    backbone = load_backbone(source)[0].eval()
    side = patches * backbone.patch_size
    slices = [draw_phantom(np.random.default_rng(seed))[0].array[:, :, :, 10] for seed in range(3)]
    parts = [F.interpolate(torch.from_numpy(one).float()[None], size=(side, side), mode="bilinear") for one in slices]
    images = torch.cat(parts).expand(-1, 3, -1, -1)
    images = (images - images.mean()) / images.std()
    original, spreads = blocks.attend, list[float]()

    def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spreads.append(float((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).detach().std(-1).mean()))
        return original(q, k, v)

    def trained(kernel: Callable[[Tensor, Tensor, Tensor], Tensor], bf16: bool) -> tuple[Tensor, Tensor]:
        blocks.attend = kernel
        backbone.zero_grad()
        with autocast(torch.device("cpu"), bf16):
            with torch.no_grad():
                predicted = backbone(images).maps[-1].float()
            features = backbone(images).maps[-1].float()
        noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
        (features * noise).sum().backward()  # type: ignore[no-untyped-call]
        found = [parameter.grad.flatten() for parameter in backbone.parameters() if parameter.grad is not None]
        return predicted, torch.cat(found)

    exact = trained(watched, bf16=False)
    both = [trained(kernel, bf16=True) for kernel in (F.scaled_dot_product_attention, original)]
    cells = [
        f"{float((found[part] - exact[part]).norm() / exact[part].norm()):.4f}" for part in range(2) for found in both
    ]
    return f"| {Path(source).stem} | {patches} x {patches} | {max(spreads):.1f} | {' | '.join(cells)} |\n"


if __name__ == "__main__":
    main()
