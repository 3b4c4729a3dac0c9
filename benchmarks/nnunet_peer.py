"""nnU-Net under a wall-clock budget: runs in nnU-Net's own environment, called by benchmarks/systems.py.

PEER_PYTHON benchmarks/nnunet_peer.py --configuration 3d_fullres --fold 0 --budget-s 1200 --device cpu --json OUT

Expects the usual three environment variables, the data set under the number 4, and plan_and_preprocess done. The
trainer is nnU-Net's own but for its length: epochs are shortened and counted so that training with its polynomial
schedule ends within the budget; then the fold's validation cases are predicted with nnU-Net's defaults.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

RAW, PREPROCESSED = (Path(os.environ[f"nnUNet_{name}"]) for name in ("raw", "preprocessed"))
STEPS_PER_EPOCH = 10
RESERVED = 0.25  # of the budget, for predicting the validation cases


class Budgeted(nnUNetTrainer):  # type: ignore[misc]
    """nnU-Net's trainer that fits its number of epochs to the time it has."""

    ends_at = float("inf")

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  (nnU-Net reads these names from the signature)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = STEPS_PER_EPOCH, 1
        self.num_epochs = 10**6  # until the speed is known
        self.save_every = 10**6

    def run_training(self) -> None:
        """As nnU-Net's, but that the number of epochs follows from the time that is left."""
        self.on_train_start()
        ends: list[float] = []
        while self.current_epoch < self.num_epochs:
            self.on_epoch_start()
            self.on_train_epoch_start()
            steps = [self.train_step(next(self.dataloader_train)) for _ in range(self.num_iterations_per_epoch)]
            self.on_train_epoch_end(steps)
            with torch.no_grad():
                self.on_validation_epoch_start()
                seen = [self.validation_step(next(self.dataloader_val))]
                self.on_validation_epoch_end(seen)
            self.on_epoch_end()
            ends.append(time.monotonic())
            per_epoch = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else 0.0
            left = int((self.ends_at - ends[-1]) / per_epoch) if per_epoch else 1
            self.num_epochs = self.current_epoch + max(left, 0)
            self.lr_scheduler.max_steps = max(self.num_epochs, 1)
        self.on_train_end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--budget-s", type=float, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--predictions", type=Path, required=True)
    arguments = parser.parse_args()
    started = time.monotonic()
    Budgeted.ends_at = started + (1 - RESERVED) * arguments.budget_s
    folder = next(PREPROCESSED.glob("Dataset004_*"))
    device = torch.device(arguments.device)
    plans = load_json(str(folder / "nnUNetPlans.json"))
    plans["continue_training"] = False  # as nnUNetv2_train says it
    trainer = Budgeted(
        plans,
        arguments.configuration,
        arguments.fold,
        load_json(str(folder / "dataset.json")),
        device=device,
    )
    trainer.disable_checkpointing = False
    trainer.run_training()
    trained_s = time.monotonic() - started
    predicting = time.monotonic()
    predict(trainer, folder.name, arguments.predictions, device)
    network = trainer.network
    told = {
        "num_steps": trainer.current_epoch * STEPS_PER_EPOCH,
        "batch_size": trainer.batch_size,
        "training_s": trained_s,
        "predicting_s": time.monotonic() - predicting,
        "num_parameters": int(sum(np.prod(p.shape) for p in network.parameters())),
    }
    arguments.json.write_text(json.dumps(told, indent=1))


def predict(trainer: Budgeted, dataset: str, folder: Path, device: torch.device) -> None:
    """The fold's validation cases, as `nnUNetv2_predict` does by default (mirroring, half-overlapping tiles)."""
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor = nnUNetPredictor(device=device, perform_everything_on_device=device.type != "cpu", allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        trainer.dataset_json,
        "nnUNetTrainer",
        trainer.inference_allowed_mirroring_axes,
    )
    cases = load_json(str(PREPROCESSED / dataset / "splits_final.json"))[trainer.fold]["val"]
    ending = trainer.dataset_json["file_ending"]
    folder.mkdir(parents=True, exist_ok=True)
    predictor.predict_from_files(
        [[str(RAW / dataset / "imagesTr" / f"{case}_0000{ending}")] for case in cases],
        [str(folder / case) for case in cases],
        num_processes_preprocessing=1,
        num_processes_segmentation_export=1,
    )


if __name__ == "__main__":
    main()
