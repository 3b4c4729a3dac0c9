"""Several processes, started by torchrun, train as one with the same images; shared-out weights are saved and read."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file
from small_pretraining import gram, pretraining, self_distillation

from voxdino.models.weights import load_backbone
from voxdino.pretraining.run import TEACHER, pretrain
from voxdino.pretraining.schedules import constant

SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from voxdino.pretraining.config import PretrainConfig
from voxdino.pretraining.run import pretrain

folder, name = Path(sys.argv[1]), sys.argv[2]
last = int(sys.argv[3]) if len(sys.argv) > 3 else None

def listen(event):
    if event.kind == "step" and event.done == last:
        os.kill(os.getpid(), signal.SIGTERM)

pretrain(folder, PretrainConfig.read(folder / f"{name}.json"), run_folder=folder / name, device="cpu", on_event=listen)
"""


def torchrun(workdir, config, name, *arguments, processes=2):
    """The exit status, and what was said."""
    config.write(workdir / f"{name}.json")
    (workdir / "run.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(workdir / "run.py"), str(workdir), name, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr[-3000:]


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def num_rows(folder):
    """The log's lines so far, the last one possibly half written."""
    return (folder / "log.jsonl").read_bytes().count(b"\n") if (folder / "log.jsonl").exists() else 0


CALM = {"drop_path": 0.0, "rope_rescale": None}  # what is drawn per process cannot be the same in one


def test_two_processes_learn_what_one_does(workdir):
    calm = {**CALM, "num_steps": 10, "learning_rate": constant(1e-4)}
    config = pretraining(self_distillation("adapt", **calm), gram(**calm))
    pretrain(workdir, config, run_folder=workdir / "one", device="cpu", on_event=lambda event: None)
    status, told = torchrun(workdir, config, "two")
    assert status == 0, told
    for row, other in zip(rows(workdir / "one"), rows(workdir / "two"), strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {"step", "stage"}:
            assert other[name] == pytest.approx(row[name], rel=1e-4, abs=1e-4)
    one, two = (load_file(workdir / name / TEACHER) for name in ("one", "two"))
    assert all((one[name] - two[name]).abs().max() < 1e-4 for name in one)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_several_processes_stop_together_and_go_on_to_one_plain_file(workdir, parallel):
    config = pretraining(self_distillation("adapt", **CALM), gram(**CALM), parallel=parallel)
    status, told = torchrun(workdir, config, "whole")
    assert status == 0, told
    assert torchrun(workdir, config, "parts", "5")[0] != 0  # a signal to one of them, in the second stage
    assert list((workdir / "parts/checkpoint").glob({"ddp": "step-*5", "fsdp": "shards-*5"}[parallel]))
    status, told = torchrun(workdir, config, "parts")
    assert status == 0, told
    whole, parts = (load_file(workdir / name / TEACHER) for name in ("whole", "parts"))
    assert all((whole[name] == parts[name]).all() for name in whole)
    plain = pretrain(
        workdir,
        config.model_copy(update={"parallel": "ddp"}),
        run_folder=workdir / "plain",
        device="cpu",
        on_event=lambda event: None,
    )
    assert plain.num_steps == 6
    alone = load_file(workdir / "plain" / TEACHER)
    assert all((alone[name] - whole[name]).abs().max() < 1e-4 for name in alone)
    assert load_backbone(workdir / "whole" / TEACHER)[1].pretraining.num_steps == 6


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_lose_nothing(workdir):
    """SIGKILL at random moments: the same call goes on, the teacher file is whole at any time, the end is the same."""
    stages = (self_distillation("adapt", num_steps=40), gram(num_steps=20))
    config = pretraining(*stages, checkpoint_every_s=0.0, watch_every=7)
    pretrain(workdir, config, run_folder=workdir / "whole", device="cpu", on_event=lambda event: None)
    config.write(workdir / "parts.json")
    (workdir / "run.py").write_text(SCRIPT)
    command = [sys.executable, str(workdir / "run.py"), str(workdir), "parts"]
    rng = random.Random(0)
    for last in sorted(rng.sample(range(1, 58), 20)):
        process = subprocess.Popen(command)
        while process.poll() is None and num_rows(workdir / "parts") < last:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))  # up to a step or two later, in the middle of whatever it does then
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        if (workdir / "parts" / TEACHER).exists():
            load_backbone(workdir / "parts" / TEACHER)
    subprocess.run(command, check=True)
    whole, parts = (load_file(workdir / name / TEACHER) for name in ("whole", "parts"))
    assert all((whole[name] == parts[name]).all() for name in whole)
    assert rows(workdir / "whole") == rows(workdir / "parts")
