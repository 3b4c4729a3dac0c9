"""The files that say what label values mean: every dataset.json that `prepare` reads."""

import json

import pytest

from voxdino.cli import main
from voxdino.cli.references import read_groups, read_labels
from voxdino.core.errors import DatasetError
from voxdino.core.labels import LabelSet
from voxdino.evaluation.scores import Scores
from voxdino.preparation.phantoms import draw_phantoms

LABELS = LabelSet(names=("background", "liver", "tumour"), ids=(0, 1, 2))
BY_NAME = {"background": 0, "liver": 1, "tumour": 2}
BY_NUMBER = {"0": "background", "1": "liver", "2": "tumour"}


@pytest.mark.parametrize(
    "described",
    [
        {"labels": BY_NAME, "channel_names": {"0": "CT"}},
        {"labels": BY_NUMBER, "modality": {"0": "CT"}, "training": []},
        BY_NAME,
        BY_NUMBER,
    ],
    ids=["nnU-Net", "MSD", "labels.json", "labels.json by number"],
)
def test_labels_are_read_from_every_layout(described, tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(described))
    assert read_labels(path) == LABELS


def test_groups_are_read_from_a_table(tmp_path):
    path = tmp_path / "groups.csv"
    path.write_text("case,group\na, p1\nb,p1\n\nc,p2\n")
    assert read_groups(path, [("a", path, path)]) == {"a": "p1", "b": "p1", "c": "p2"}
    with pytest.raises(DatasetError, match="no row for 1 of 2 cases, among them case_b"):
        read_groups(path, [("a", path, path), ("case_b", path, path)])


@pytest.mark.parametrize(
    "text, words",
    [
        ("\n", "has the columns none"),
        ("case,patient\na,b\n", "has the columns case, patient"),
        ("case,group\na\n", "the row 'a' is not"),
        ("case,group\na,\n", "the row 'a,' is not"),
        ("case,group\na,p\na,q\n", "names a case twice"),
        ('case,group\n"a,p\n', "is no CSV table"),
    ],
)
def test_a_table_of_something_else_is_refused(text, words, tmp_path):
    path = tmp_path / "groups.csv"
    path.write_text(text)
    with pytest.raises(DatasetError, match=words):
        read_groups(path, [])
    with pytest.raises(DatasetError):
        read_groups(tmp_path / "missing.csv", [])


def test_evaluate_takes_papers_groups_and_a_rule_for_empty_masks(tmp_path, capsys):
    phantoms = draw_phantoms(tmp_path / "phantoms", num_cases=2, seed=4)
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (phantoms / "labelsTr").iterdir())
    groups = tmp_path / "groups.csv"
    groups.write_text("case,group\n" + "".join(f"{case},one\n" for case in cases))
    out = tmp_path / "scores.json"
    folders = [str(phantoms / "labelsTr"), str(phantoms), "--out", str(out), "--metrics", "dice"]
    options = [
        "--paper-compat",
        "meddinov3",
        "--paper-compat",
        "dinomed3d",
        "--empty",
        "score",
        "--groups",
        str(groups),
    ]
    assert main(["evaluate", *folders, *options]) == 0
    assert "meddinov3:hd95" in capsys.readouterr().out
    scores = Scores.read(out)
    paper = [f"meddinov3:{name}" for name in ("dice", "hd95", "nsd")] + ["dinomed3d:dice", "dinomed3d:hd95"]
    assert list(scores.definitions) == ["dice", *paper]
    assert (scores.num_patients, scores.empty, scores.num_cases) == (None, "score", len(cases))  # one is too few
    assert scores.groups == dict.fromkeys(cases, "one")
    assert main(["evaluate", *folders, "--groups", str(tmp_path / "none.csv")]) == 3
