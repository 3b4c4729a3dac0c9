"""Lesion-wise scores on the command line: in the table and in JSON where asked for, and nowhere else."""

import json

import pytest

from voxdino.cli import main
from voxdino.preparation.phantoms import draw_phantoms


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return draw_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_cases=2, seed=4)


def test_lesions_are_told_where_asked_for(phantoms, tmp_path, capsys):
    scores = tmp_path / "scores.json"
    folders = [str(phantoms / "labelsTr"), str(phantoms), "--out", str(scores), "--workers", "1"]
    assert main(["evaluate", *folders]) == 0
    assert "Lesions" not in capsys.readouterr().out and json.loads(scores.read_text())["lesions"] == []
    assert main(["evaluate", *folders, "--lesions", "--metrics", "dice"]) == 0
    out = capsys.readouterr().out
    assert "Lesions" in out and "third: up to" in out and "a lesion is found when one of its voxels is marked" in out
    record = json.loads(scores.read_text())
    assert set(record["definitions"]) == {"dice", "lesion_recall", "lesion_precision", "lesion_f1"}
    lesion = next(one for one in record["lesions"] if one["structure"] == "lesion")
    assert lesion["num_found"] == lesion["num_reference"] > 0 and lesion["unit"] == "mm³"
    assert main(["evaluate", *folders, "--lesion-overlap", "0.5"]) == 0
    assert "50% of its voxels are marked" in capsys.readouterr().out


def test_lesion_metrics_are_listed_with_those_of_papers_and_of_classes(capsys):
    assert main(["list", "metrics"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("lesion_recall", "meddinov3:hd95", "auroc"))
