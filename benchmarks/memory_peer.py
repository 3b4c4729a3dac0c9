"""MONAI's or nnU-Net's sliding window over a volume in memory: runs in their environment, for benchmarks/memory.py."""

import json
import resource
import sys
from types import SimpleNamespace
from typing import Any

import torch


def main() -> None:
    task: dict[str, Any] = json.loads(sys.argv[1])
    most = int(task["most"])
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    rows, columns, slices = task["shape"]
    volume = torch.zeros(1, slices, rows, columns)
    network = torch.nn.Conv3d(1, task["classes"], 1).eval().requires_grad_(False)
    tile = (min(8, slices), min(256, rows), min(256, columns))
    with torch.inference_mode():
        if task["name"].startswith("MONAI"):
            from monai.inferers import SlidingWindowInferer

            logits = SlidingWindowInferer(roi_size=tile, sw_batch_size=1, overlap=0.5)(volume[None], network)[0]
        else:
            logits = nnunet(network, volume, tile, task["classes"])
        print(int(logits.argmax(0).sum()))


def nnunet(network: torch.nn.Module, volume: torch.Tensor, tile: tuple[int, ...], classes: int) -> torch.Tensor:
    """As nnUNetv2_predict runs on a CPU, mirroring off."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    predictor.network, predictor.allowed_mirroring_axes = network, None
    predictor.configuration_manager = SimpleNamespace(patch_size=tile)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=classes)
    logits: torch.Tensor = predictor.predict_sliding_window_return_logits(volume)
    return logits


if __name__ == "__main__":
    main()
