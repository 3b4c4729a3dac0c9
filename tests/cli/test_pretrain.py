"""From a folder of scans to a backbone and a model that uses it: the four commands of the how-to, on phantoms."""

import json
from pathlib import Path

import pytest
import torch

from voxdino.cli import main
from voxdino.cli.steps import at_hand
from voxdino.models.weights import load_backbone
from voxdino.preparation.phantoms import draw_phantoms

HEADS = [word for head in ("dino", "ibot") for word in ("--set", f"{head}_head.num_prototypes=32")]
SMALL = ["--steps", "2", "--batch", "2", "--device", "cpu", "--set", "views.num_locals=1", *HEADS]
SIZES = ["--set", "stages.0.resolutions.0.global_size=32", "--set", "stages.0.resolutions.0.local_size=16"]
PLAN = ["plan.magnification=1.0", "plan.batch_size=2", "plan.num_folds=3", "num_epochs=1", "steps_per_epoch=2"]
RUN = ["--recipe", "linear_probe", "--device", "cpu", "--workers", "1", *(w for item in PLAN for w in ("--set", item))]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # tests run side by side
    return draw_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_cases=3, seed=4)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    folder = tmp_path_factory.mktemp("work")
    assert main(["pool", f"scans={phantoms / 'imagesTr'}", "--workdir", str(folder), "--workers", "1"]) == 0
    assert main(["pretrain", "--workdir", str(folder), "--backbone", "random:tiny", *SMALL, *SIZES]) == 0
    return folder


def test_four_commands_lead_from_scans_to_a_model_and_say_what_it_has_seen(workdir, phantoms, capsys):
    teacher = str(workdir / "runs/adapt/teacher.safetensors")
    assert main(["run", str(phantoms), "--workdir", str(workdir), "--backbone", teacher, *RUN]) == 0
    said = " ".join(capsys.readouterr().err.split())  # lines are broken to the terminal's width
    assert "1 of 1 held-back cases" in said and "were in the pool that adapt was pretrained on" in said
    before = ["--backbone", "random:tiny", "--name", "before"]
    assert main(["run", str(phantoms), "--workdir", str(workdir), *RUN, *before]) == 0
    record = json.loads((workdir / "runs/linear_probe_fold0/run.json").read_text())
    assert len(record["pretrained_on"]) == 1 and record["backbone"]["name"] == "adapt"
    assert "pretrained on" not in " ".join(capsys.readouterr().err.split())


def test_a_kind_for_one_source_goes_before_that_for_all(phantoms, tmp_path, capsys):
    some = draw_phantoms(tmp_path / "some", num_cases=1, seed=5) / "imagesTr"
    words = ["pool", f"scans={phantoms / 'imagesTr'}", f"some={some}", "--workdir", str(tmp_path / "w")]
    assert main([*words, "--modality", "other", "--modality", "some=ct", "--workers", "1"]) == 0
    cases = [json.loads(line) for line in (tmp_path / "w/pool/cases.jsonl").read_text().splitlines()]
    assert {(case["source"], kind) for case in cases for kind in case["kinds"]} == {("scans", "mr"), ("some", "ct")}


def test_the_same_commands_again_do_nothing_twice(workdir, phantoms, capsys):
    assert main(["pretrain", "--workdir", str(workdir), "--backbone", "random:tiny", *SMALL, *SIZES, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["was_finished"]


def test_a_teacher_makes_it_a_distillation(workdir, capsys):
    words = ["pretrain", "--workdir", str(workdir), "--teacher", "random:tiny", "--backbone", "random:tiny"]
    assert main([*words, "--steps", "2", "--batch", "2", "--device", "cpu", *SIZES]) == 0
    assert "distil" in capsys.readouterr().out
    assert load_backbone(workdir / "runs/distil/teacher.safetensors")[1].pretraining.recipe == "distil"


def test_without_other_weights_it_starts_from_the_backbone_of_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VOXDINO_WEIGHTS", str(tmp_path))
    at_hand.cache_clear()
    for words, backbone in (([], "voxdino_tiny"), (["--set", "backbone=dinov3_vits16"], "dinov3_vits16")):
        assert main(["pretrain", "--workdir", str(tmp_path), *words, "--dry-run", "--json"]) == 0
        told = capsys.readouterr()
        assert json.loads(told.out)["config"]["backbone"] == backbone
        assert ("comes with voxdino" in told.err) == (not words)


@pytest.mark.parametrize(
    "words, status, told",
    [
        (["pool", "nowhere"], 3, "nowhere"),
        (["pool", "a=DATA", "--weight", "b=2"], 2, "no source is called 'b'"),
        (["pool", "a=DATA", "--weight", "2"], 2, "--weight: '2' is not KEY=VALUE. Fix: write --weight NAME=2."),
        (["pool", "a=DATA", "--modality", "mri"], 3, "modality"),
        (["pool", "a=DATA", "--modality", "b=ct"], 2, "no source is called 'b'"),
        (["pool", "a=DATA", "--modality", "ct", "--modality", "other"], 2, "one holds for all"),
        (["pretrain", "--stop-after", "soon"], 2, "--stop-after: 'soon' is no length of time"),
        (["pretrain", "--workdir", "EMPTY"], 3, "no finished pool"),
        (["pretrain", "--recipe", "adopt"], 2, "'adapt'"),
        (["pretrain", "--recipe", "adapt", "--teacher", "random:tiny"], 2, "has no teacher but itself"),
        (["pretrain", "--recipe", "anchored", "--teacher", "random:tiny"], 2, "has no teacher but itself"),
        (["pretrain", "--set", "stages.0.koleo=1"], 2, "koleo_weight"),
    ],
)
def test_what_cannot_be_is_refused(words, status, told, phantoms, tmp_path, capsys):
    words = [word.replace("DATA", str(phantoms)).replace("EMPTY", str(tmp_path)) for word in words]
    extra = [] if "--workdir" in words else ["--workdir", str(tmp_path / "w")]
    backbone = ["--backbone", "random:tiny", "--device", "cpu"] if words[0] == "pretrain" else []
    assert main([*words, *extra, *backbone]) == status
    assert told in capsys.readouterr().err
