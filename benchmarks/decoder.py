"""Enlarging and convolving in SegDINO's decoder: taps at the small size beside torch's two calls, in one run.

python benchmarks/decoder.py [--widths 64 128 256] [--grids 16 32] [--images 4] [--runs 21] [--save FILE]

A level of the pyramid (`EnlargeAndConvolve`) and the whole decoder of four taps of 384 channels on grids of so many
tokens a side, forward, and forward and backward, in the precision and memory layout of training; medians of runs that
take turns. 1.0: the level leaves the order as it is.
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
from torch import Tensor, nn

from voxdino.models.decoders.tpa_sad import PUBLISHED_SCALES, EnlargeAndConvolve, TpaSadDecoder
from voxdino.models.features import Features
from voxdino.models.precision import autocast, channels_last, uses_bf16

CHANNELS, CLASSES = 384, 3
HEAD = "| width | grid | part | forward | forward and backward |\n| --- | --- | --- | --- | --- |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--grids", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    body = "".join(rows(width, grid, device, arguments) for width in arguments.widths for grid in arguments.grids)
    options = f"--widths {told(arguments.widths)} --grids {told(arguments.grids)} --images {arguments.images}"
    precision = "bfloat16" if uses_bf16(device, "auto") else "float32"
    text = f"""# The levels of SegDINO's pyramid

`python benchmarks/decoder.py {options} --runs {arguments.runs}`,
{datetime.date.today()}, torch {torch.__version__}, {os.cpu_count()} cores {platform.machine()}, {device}, {precision}:
how many times as fast `EnlargeAndConvolve` is as enlarging and then convolving; medians.

{HEAD}{body}"""
    print(text)
    if arguments.save:
        arguments.save.write_text(text)


def told(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def rows(width: int, grid: int, device: torch.device, arguments: argparse.Namespace) -> str:
    images = arguments.images
    small = torch.randn(images, grid, grid, width, device=device).permute(0, 3, 1, 2)
    maps = tuple(torch.randn(images, grid, grid, CHANNELS, device=device).permute(0, 3, 1, 2) for _ in range(4))
    features = Features(maps, torch.zeros(images, CHANNELS, device=device), (16, 16))
    parts: list[tuple[str, nn.Module, Callable[[], Tensor]]] = []
    for scale in (8, 4, 2):
        level = EnlargeAndConvolve(width, scale).to(device)
        parts.append((f"scale {scale}", level, lambda level=level: level(small)))  # type: ignore[misc]
    for scales in (PUBLISHED_SCALES, (4, 2, 1, 1)):
        decoder = TpaSadDecoder(
            embed_dims=(CHANNELS,) * len(maps), num_outputs=CLASSES, decoder_width=width, pyramid_scales=scales
        ).to(device)
        run = lambda decoder=decoder: decoder(features)  # type: ignore[misc]  # noqa: E731
        parts.append((f"decoder, {told(list(scales))}", decoder, run))
    text = ""
    for name, module, run in parts:
        channels_last(module)
        forward, both = (
            times_as_fast(module, run, small.requires_grad_(train), device, arguments.runs) for train in (False, True)
        )
        text += f"| {width} | {grid} x {grid} | {name} | {forward:.1f} | {both:.1f} |\n"
    return text


def times_as_fast(module: nn.Module, run: Callable[[], Tensor], leaf: Tensor, device: torch.device, runs: int) -> float:
    """Trained where the leaf is."""
    train = leaf.requires_grad
    ours = EnlargeAndConvolve.forward
    seconds: dict[Callable[..., Tensor], list[float]] = {ours: [], one_after_the_other: []}
    module.requires_grad_(train)
    for _ in range(runs + 2):
        for forward, found in seconds.items():
            EnlargeAndConvolve.forward = forward  # type: ignore[method-assign]
            started = time.perf_counter()
            with autocast(device, uses_bf16(device, "auto")):
                out = run()
            if train:
                out.float().square().mean().backward()  # type: ignore[no-untyped-call]
            if device.type == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - started)
    EnlargeAndConvolve.forward = ours  # type: ignore[method-assign]
    return statistics.median(seconds[one_after_the_other][2:]) / statistics.median(seconds[ours][2:])


def one_after_the_other(level: EnlargeAndConvolve, x: Tensor) -> Tensor:
    size = x.shape[2] * level.scale, x.shape[3] * level.scale
    out: Tensor = level.conv(F.interpolate(x, size=size, mode="bilinear") if level.scale > 1 else x)
    return out


if __name__ == "__main__":
    main()
