"""Runs killed with SIGKILL at random events: the same call goes on and ends with the same bits."""

import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from voxdino.finetuning.run import finetune

KILLED_RUN = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from voxdino.finetuning.config import FinetuneConfig
from voxdino.finetuning.run import finetune

workdir, config, wanted = Path(sys.argv[1]), FinetuneConfig.read(sys.argv[2]), int(sys.argv[3])
seen = 0
def listen(event):
    global seen
    seen += 1
    if seen == wanted:
        os.kill(os.getpid(), signal.SIGKILL)
finetune(workdir, config, run_folder=workdir / "parts", on_event=listen)
"""


@pytest.mark.slow
@pytest.mark.parametrize("road", [{}, {"adaptation": "lora", "lora_dropout": 0.2}], ids=["cached features", "lora"])
def test_a_killed_run_goes_on_to_the_same_end(workdir, small, road):
    config = small.model_copy(update={**road, "checkpoint_every_s": 0.0})
    finetune(workdir, config, run_folder=workdir / "whole", on_event=lambda event: None)
    if (workdir / "features").exists():
        (workdir / "features").rename(workdir / "features-of-whole")
    config.write(workdir / "config.json")
    rng, num_killed = random.Random(0), 0
    for _ in range(4):
        command = [sys.executable, "-c", KILLED_RUN, workdir, workdir / "config.json", rng.randint(2, 7)]
        num_killed += subprocess.run([str(part) for part in command], check=False).returncode == -9
    assert num_killed >= 2
    finetune(workdir, config, run_folder=workdir / "parts", on_event=lambda event: None)
    whole, parts = (load_file(workdir / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert (workdir / "parts/log.jsonl").read_bytes() == (workdir / "whole/log.jsonl").read_bytes()
