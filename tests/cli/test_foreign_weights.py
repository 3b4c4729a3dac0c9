"""`voxdino weights import` of a whole model says what it is, what was not mapped, and how to go on from it."""

import json

import pytest
import torch

from voxdino.cli import main
from voxdino.models.weights import load_backbone


@pytest.fixture
def proxy(tmp_path):
    """DINO-Med3D's first stage, with a tensor that nobody knows."""
    vit, _ = load_backbone("random:tiny")
    state = {f"backbone.model.{key}": value for key, value in vit.state_dict().items()}
    state |= {"head.weight": torch.zeros(2, 128, 1, 1), "head.bias": torch.zeros(2)}
    torch.save({"model_state_dict": state, "norm_stats": {"mean": 0.25, "std": 0.5}}, tmp_path / "stage1.pth")
    return tmp_path / "stage1.pth"


def test_import_and_inspect_say_what_a_whole_model_is(proxy, tmp_path, capsys):
    folder = ["--weights-folder", str(tmp_path / "weights")]
    assert main(["weights", "import", str(proxy), *folder]) == 0
    shown = capsys.readouterr().out
    assert "DINO-Med3D, stage 1" in shown
    assert "linear, 2 outputs, taps 3; 0.00 M parameters beside the backbone" in shown
    assert 'norm_stats {"mean": 0.25, "std": 0.5}' in shown
    assert "--set initial_weights=stage1" in shown
    assert "--set decoder=linear --set 'taps=[3]' --set tap_norm=false" in shown
    assert main(["weights", "inspect", str(tmp_path / "weights" / "stage1.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "not mapped    nothing" in shown and "patch 16" in shown


def test_a_card_as_json_holds_the_model(proxy, tmp_path, capsys):
    assert main(["weights", "import", str(proxy), "--weights-folder", str(tmp_path / "weights"), "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["model"]["config"]["backbone"] == card["name"] == "stage1"
    assert card["model"]["unmapped"] == []
