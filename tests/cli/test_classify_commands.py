"""Classification from the command line: a set in, probabilities out; public sets by name."""

import json

import numpy as np
import pytest

from voxdino.cli import main
from voxdino.preparation.public_sets import PUBLIC_SETS


@pytest.fixture
def pictures(tmp_path):
    """Class 1 is bright."""
    arrays = {}
    for part, number in (("train", 12), ("val", 6), ("test", 4)):
        y = np.arange(number) % 2
        noise = np.random.default_rng(number).integers(0, 80, (number, 8, 8))
        arrays[f"{part}_images"] = (noise + 150 * y[:, None, None]).astype(np.uint8)
        arrays[f"{part}_labels"] = y[:, None].astype(np.uint8)
    np.savez(tmp_path / "bright.npz", **arrays)
    return tmp_path / "bright.npz"


def test_a_set_is_learned_and_its_test_cases_get_probabilities(pictures, tmp_path, capsys):
    learn = ["finetune", "--data", str(pictures), "--workdir", str(tmp_path / "work"), "--backbone", "random:tiny"]
    learn += ["--set", "side=16", "--device", "cpu", "--name", "bright"]
    assert main([*learn, "--dry-run"]) == 0 and not (tmp_path / "work").exists()
    assert main(learn) == 0
    assert "next: voxdino predict" in capsys.readouterr().out
    run = str(tmp_path / "work" / "runs" / "bright")
    assert main(["predict", str(pictures), "--run", run, "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    surplus = ["--shard", "1/2", "--overwrite", "--gate", "off"]
    assert main(["predict", str(pictures), "--run", run, "--out", str(tmp_path / "no"), *surplus]) == 2
    assert "--gate, --shard, --overwrite: is for segmentation" in capsys.readouterr().err
    assert [case["predicted"] for case in told["cases"].values()] == [["0"], ["1"], ["0"], ["1"]]
    assert (tmp_path / "out" / "probabilities.csv").read_text().startswith("case,predicted,0,1\n")
    assert main(["evaluate", str(tmp_path / "out"), str(pictures), "--metrics", "auroc,accuracy", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert [one["score"]["value"] for one in scores["summary"]] == [1.0, 1.0]
    assert (tmp_path / "out" / "scores.json").is_file()
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "page")]) == 0
    assert "auroc:one-vs-rest-macro" in (tmp_path / "page" / "page.json").read_text()
    assert main(["evaluate", str(tmp_path / "out"), str(pictures), "--lesions"]) == 2
    assert "--lesions" in capsys.readouterr().err


def test_misspelt_recipes_and_sets_are_named(pictures, tmp_path, capsys):
    assert main(["finetune", "--data", str(pictures), "--recipe", "classify_liner"]) == 2
    assert "Did you mean 'classify_linear'" in capsys.readouterr().err
    assert main(["finetune", "--data", str(tmp_path)]) == 3
    assert "no set of labelled images" in capsys.readouterr().err


def test_public_sets_are_listed_and_need_consent(tmp_path, capsys):
    assert main(["data", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == PUBLIC_SETS.keys()
    assert main(["data", "list"]) == 0
    assert "CC BY-SA 4.0" in capsys.readouterr().out
    assert main(["data", "pull", "msd_heart", "--out", str(tmp_path / "data")]) == 2
    assert "--accept-licence" in capsys.readouterr().err and not (tmp_path / "data").exists()
