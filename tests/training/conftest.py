"""A tiny training on made-up pictures: bright squares on noise, a two-layer network with dropout."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from voxdino.training.config import TrainingConfig
from voxdino.training.loop import Job, Outcome, Validation, train
from voxdino.training.losses import dice_cross_entropy
from voxdino.training.stopping import StopRequest

IGNORED = -1

torch.set_num_threads(1)  # several tests share the machine; and the same bits everywhere


@dataclass(frozen=True)
class Picture:
    image: Tensor
    label: Tensor


def picture(step: int, size: int = 16, number: int = 4) -> Picture:
    generator = torch.Generator().manual_seed(step)
    label = torch.zeros(number, size, size, dtype=torch.int64)
    for one in label:
        y, x = torch.randint(1, size - 7, (2,), generator=generator).tolist()
        one[y : y + 6, x : x + 5] = 1
    image = label[:, None] + 0.5 * torch.randn(number, 1, size, size, generator=generator)
    return Picture(image, label)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.GELU(), nn.Dropout(0.1), nn.Conv2d(8, 2, 3, padding=1))


class Training:
    """One run of the tiny training; `at_step` is called with each step before its batch is given out."""

    def __init__(
        self,
        folder: Path,
        *,
        num_steps: int = 20,
        seed: int = 0,
        at_step=lambda step, stop: None,
        every_s: float = 1e9,
        **config,
    ):
        self.folder, self.num_steps, self.at_step = folder, num_steps, at_step
        self.config = TrainingConfig(seed=seed, amp="off", learning_rate=3e-3, checkpoint_every_s=every_s, **config)
        self.stop, self.events = StopRequest(), []
        self.model = network(seed).to(memory_format=torch.channels_last)

    @contextmanager
    def batches(self, first: int) -> Iterator[Iterator[Picture]]:
        def draw():
            step = first
            while True:
                self.at_step(step, self.stop)
                yield picture(step)
                step += 1

        yield draw()

    def validate(self, stop) -> Validation | None:
        if stop():
            return None
        batch = picture(10_000)
        with torch.no_grad():
            found = self.model(batch.image).argmax(1) == 1
        truth = batch.label == 1
        dice = 2 * (found & truth).sum().item() / max((found.sum() + truth.sum()).item(), 1)
        return Validation(dice, {"square": dice})

    def run(self) -> Outcome:
        torch.manual_seed(1)
        parameters = list(self.model.parameters())
        job = Job(
            model=self.model,
            groups=[{"params": parameters, "lr": self.config.learning_rate, "weight_decay": 0.01}],
            predict=lambda batch: self.model(batch.image),
            loss=partial(dice_cross_entropy, ignore_index=IGNORED),
            batches=self.batches,
            validate=self.validate,
            num_steps=self.num_steps,
            steps_per_epoch=5,
            identity={"learning_rate": self.config.learning_rate, "seed": self.config.seed},
        )
        return train(
            job,
            self.config,
            run_folder=self.folder,
            device=torch.device("cpu"),
            stop=self.stop,
            listen=self.events.append,
        )


@pytest.fixture
def training():
    return Training
