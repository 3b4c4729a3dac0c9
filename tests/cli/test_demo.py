"""The demo: whole without data, weights or network, and good enough to show."""

import json

import pytest

from voxdino.cli import main


def test_the_demo_goes_the_whole_road_and_says_what_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("the demo connects to something"))
    settings = {
        "NUM_PHANTOMS": 3,
        "PLAN": {"magnification": "1.0", "batch_size": "2", "num_folds": "3"},
        "TRAINING": {"adaptation": "full", "decoder_width": "8", "num_epochs": "1", "steps_per_epoch": "2"},
    }
    for name, value in settings.items():
        monkeypatch.setattr(f"voxdino.cli.demo.{name}", value)
    assert main(["demo", "--workdir", str(tmp_path), "--workers", "1"]) == 0
    shown = capsys.readouterr()
    assert "This was a demonstration" in shown.out and "voxdino weights pull" in shown.out
    assert (tmp_path / "runs" / "demo" / "picture.png").is_file()
    assert main(["demo", "--workdir", str(tmp_path), "--workers", "1"]) == 0
    assert "finished before" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_finds_the_organs_of_phantoms_it_has_not_seen(tmp_path, capsys):
    assert main(["demo", "--workdir", str(tmp_path), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    means = {row["structure"]: row["mean"] for row in scores["summary"] if row["metric"] == "dice"}
    assert means["mean"] >= 0.80 and means["liver"] >= 0.90 and min(means.values()) >= 0.45
