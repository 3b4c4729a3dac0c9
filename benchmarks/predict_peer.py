"""One prediction by nnU-Net or by MONAI's inferer, timed: runs in their environment, called by benchmarks/predict.py.

nnU-Net gets an untrained network of its own plan and predicts as nnUNetv2_predict does. Where all tiles would take
longer than --most-minutes, the first few are computed, the others answered with zeros, and their time is added.
MONAI's inferer gets our network, our reading, preparation and writing.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

MEASURED = 3  # tiles computed for certain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--work", "--backbone", "--device"):
        parser.add_argument(name)
    parser.add_argument("--most-minutes", type=float)
    parser.add_argument("--child", type=json.loads, required=True)
    arguments = parser.parse_args()
    task = arguments.child
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if arguments.device == "auto" else arguments.device
    )
    Path(task["out"]).mkdir(parents=True)
    told = nnunet(task, device, 60 * arguments.most_minutes) if "plans" in task else monai(task, device)
    print(json.dumps(told))


def nnunet(task: dict[str, Any], device: torch.device, most_s: float) -> dict[str, Any]:
    from batchgenerators.utilities.file_and_folder_operations import load_json
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    class Watched(nnUNetPredictor):  # type: ignore[misc]
        """nnU-Net's predictor that stops computing tiles once it knows that they take too long."""

        tiles_s: list[float]
        total = left_out = 0

        def _internal_get_sliding_window_slicers(self, image_size: tuple[int, ...]) -> Any:
            slicers = super()._internal_get_sliding_window_slicers(image_size)
            self.total, self.tiles_s = len(slicers), []
            return slicers

        def _internal_maybe_mirror_and_predict(self, x: torch.Tensor) -> torch.Tensor:
            known = self.tiles_s[1:]  # the first one warms up
            if len(known) >= MEASURED and sum(known) / len(known) * self.total > most_s:
                self.left_out += 1
                return torch.zeros(1, heads, *x.shape[2:], device=x.device)
            started = time.perf_counter()
            logits: torch.Tensor = super()._internal_maybe_mirror_and_predict(x)
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            self.tiles_s.append(time.perf_counter() - started)
            return logits

    folder = Path(task["plans"])
    plans, record = PlansManager(str(folder / "nnUNetPlans.json")), load_json(str(folder / "dataset.json"))
    configuration = plans.get_configuration(task["configuration"])
    heads = plans.get_label_manager(record).num_segmentation_heads
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        1,
        heads,
        deep_supervision=False,
    )
    predictor = Watched(
        device=device, use_mirroring=task["mirror"], perform_everything_on_device=device.type != "cpu", allow_tqdm=False
    )
    axes = tuple(range(len(configuration.patch_size)))
    network.to(device).eval()
    state = network.state_dict()
    predictor.manual_initialization(network, plans, configuration, [state], record, "nnUNetTrainer", axes)
    started = time.perf_counter()
    predictor.predict_from_files_sequential([[task["image"]]], [str(Path(task["out"]) / "label")])
    seconds = time.perf_counter() - started
    tiles_s = predictor.tiles_s[1:] or predictor.tiles_s
    told: dict[str, Any] = {"seconds": seconds + predictor.left_out * sum(tiles_s) / len(tiles_s)}
    if predictor.left_out:
        told["scaled"] = f"{predictor.total - predictor.left_out} of {predictor.total} tiles measured, scaled"
    return told


def monai(task: dict[str, Any], device: torch.device) -> dict[str, Any]:
    sys.path.insert(0, task["ours"])
    sys.path.append(task["site"])  # what our code needs and the peers' environment lacks; theirs comes first
    import numpy as np
    from monai.inferers import SlidingWindowInferer

    from voxdino.core.io import read_volume, write_label_map
    from voxdino.core.volume import LabelMap
    from voxdino.inference.load import load_model
    from voxdino.models.precision import autocast, uses_bf16
    from voxdino.preparation.intensity import normalise
    from voxdino.preparation.orientation import restore_labels
    from voxdino.preparation.slices import slice_case

    model = load_model(task["run"], device)
    plan, bf16 = model.plan, task["amp"] and uses_bf16(device, "auto")
    context, num_channels = plan.context_slices, len(plan.channels)

    def network(windows: torch.Tensor) -> torch.Tensor:
        """(B, C * (2 k + 1), 1, h, w): a slice and its neighbours as channels."""
        crops = windows.unflatten(1, (num_channels, -1)).squeeze(3)  # (B, C, 2 k + 1, h, w)
        with autocast(device, bf16):
            logits: torch.Tensor = model.segmenter(crops).logits
        return logits.float()

    started = time.perf_counter()
    slices, geometry = slice_case("case", read_volume(task["image"]), plan)
    image = normalise(slices.read(slice(None)), slices.scaling)
    shared = shares(image.shape[2:], plan.tile)
    inferer = SlidingWindowInferer(roi_size=(1, *plan.tile), sw_batch_size=4, overlap=(0.0, *shared), mode="gaussian")
    beside = [np.clip(np.arange(image.shape[1]) + by, 0, image.shape[1] - 1) for by in range(-context, context + 1)]
    stacked = np.stack([image[:, indices] for indices in beside], axis=1).reshape(-1, *image.shape[1:])
    with torch.inference_mode():
        logits = inferer(torch.from_numpy(stacked)[None].to(device), network)
        labels = logits[0].argmax(0).cpu().numpy().astype(plan.labels.index_dtype)
    restored = restore_labels(labels, geometry)
    path = Path(task["out"]) / "label.nii.gz"
    write_label_map(path, LabelMap(plan.labels.to_ids(restored.array), restored.grid), like=task["image"])
    return {"seconds": time.perf_counter() - started, "labels": str(path)}


def shares(size: tuple[int, ...], tile: tuple[int, ...]) -> list[float]:
    """What our tiles really share along each axis, so that windows of MONAI lie where ours do."""
    from voxdino.inference.tiles import OVERLAP, slab_starts

    found = []
    for length, side in zip(size, tile, strict=True):
        starts = slab_starts(max(length, side), side, overlap=OVERLAP)
        found.append(1 - (starts[1] - starts[0] + 0.5) / side if len(starts) > 1 else 0.0)
    return found


if __name__ == "__main__":
    main()
