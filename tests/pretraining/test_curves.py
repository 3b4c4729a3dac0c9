"""Thirty seeded steps of every stage lose what they always lost: a refactor keeps these numbers.

After a change that is meant to change them: `python tests/pretraining/test_curves.py` writes the new ones.
"""

import json
import tempfile
from pathlib import Path

import pytest
from small_pretraining import distillation, draw_pool, gram, pretraining, self_distillation

from voxdino.pretraining.config import Resolution
from voxdino.pretraining.run import pretrain
from voxdino.pretraining.schedules import constant

STORED = Path(__file__).with_name("curves.json")
MIXED = (
    Resolution(global_size=48, local_size=16, gram_size=64, weight=0.7),
    Resolution(global_size=64, local_size=32, gram_size=96, weight=0.3),
)
STAGES = {
    "adapt": self_distillation("adapt", num_steps=30, frozen_last_layer=0.1),
    "gram": gram(num_steps=30, gram_refresh=10),
    "highres": self_distillation("highres", num_steps=30, gram_weight=constant(1.5), resolutions=MIXED),
    "distil": distillation(num_steps=30),
}


def curve(name, folder):
    """Every fifth step's terms."""
    pretrain(folder, pretraining(STAGES[name]), run_folder=folder / name, device="cpu", on_event=lambda event: None)
    rows = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in ("stage", "grad_norm")} for row in rows[4::5]]


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_loses_what_it_always_lost(workdir, name):
    found, stored = curve(name, workdir), json.loads(STORED.read_text())[name]
    assert len(found) == len(stored) == 6
    for row, wanted in zip(found, stored, strict=True):
        assert row == pytest.approx(wanted, rel=5e-3, abs=5e-4)
    assert found[-1] != pytest.approx(found[0], rel=5e-3, abs=5e-4)  # it does learn


def store():
    with tempfile.TemporaryDirectory() as name:
        folder = draw_pool(Path(name))
        STORED.write_text(json.dumps({stage: curve(stage, folder) for stage in STAGES}, indent=1) + "\n")


if __name__ == "__main__":
    store()
