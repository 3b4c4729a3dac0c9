"""The commands on a few phantoms: one road, the same command again, and what each of them refuses."""

import inspect
import json
import shutil
from pathlib import Path

import pytest

from voxdino.cli import main
from voxdino.cli.predict import predict
from voxdino.inference.settings import PredictSettings
from voxdino.preparation.phantoms import draw_phantoms

TINY = ["--backbone", "random:tiny", "--device", "cpu", "--workers", "1"]
PLAN = ["--set", "plan.magnification=1.0", "--set", "plan.batch_size=2", "--set", "plan.num_folds=3"]
TRAINING = ["adaptation=full", "decoder_width=8", "num_epochs=1", "steps_per_epoch=3", "batch_size=2"]
SMALL = ["--recipe", "segdino_v2", *TINY, *PLAN, *(word for item in TRAINING for word in ("--set", item))]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_cases=3, seed=4)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    import torch

    torch.set_num_threads(1)  # tests run side by side
    folder = tmp_path_factory.mktemp("work")
    assert main(["run", str(phantoms), "--workdir", str(folder), *SMALL]) == 0
    return folder


@pytest.fixture
def run_folder(workdir: Path) -> Path:
    return workdir / "runs" / "segdino_v2_fold0"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def placed(args: list[str], places: dict[str, Path]) -> list[str]:
    """The arguments with the first place they name put in."""
    for name, place in places.items():
        args = [arg.replace(name, str(place)) if arg.startswith(name) else arg for arg in args]
    return args


def test_one_command_leads_from_scans_to_scores(workdir, run_folder):
    facts = ["check.json", "fingerprint.json", "plan.json", "splits.json", "check.png", "prepared/manifest.json"]
    results = ["run.json", "model.safetensors", "model.json", "log.jsonl", "curves.png", "scores.json", "picture.png"]
    assert all((workdir / name).is_file() for name in facts) and all((run_folder / name).is_file() for name in results)
    held_back = json.loads((workdir / "splits.json").read_text())[0]["val"]
    assert sorted(path.name for path in (run_folder / "validation").glob("*.nii.gz")) == [
        f"{case}.nii.gz" for case in held_back
    ]


def test_the_same_command_again_does_nothing_twice(workdir, run_folder, phantoms, capsys):
    before = files(run_folder)
    assert main(["run", str(phantoms), "--workdir", str(workdir), *SMALL, "--json"]) == 0
    shown = capsys.readouterr()
    assert files(run_folder) == before
    assert "finished before" in shown.err and "were there already" in shown.err
    told = json.loads(shown.out)
    assert told["run"]["was_finished"] and {row["metric"] for row in told["scores"]["summary"]} >= {"dice", "hd95"}


def test_predictions_of_the_same_cases_score_the_same(workdir, run_folder, phantoms, tmp_path, capsys):
    case = json.loads((workdir / "splits.json").read_text())[0]["val"][0]
    image = phantoms / "imagesTr" / f"{case}_0000.nii.gz"
    assert main(["predict", str(image), "--run", str(run_folder), "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert "ml" in capsys.readouterr().out
    assert (tmp_path / f"{case}.nii.gz").read_bytes() == (run_folder / "validation" / f"{case}.nii.gz").read_bytes()
    assert main(["evaluate", str(tmp_path), str(phantoms), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["cases"] == [row for row in json.loads((run_folder / "scores.json").read_text())["cases"]
                               if row["case"] == case]  # fmt: skip


def test_cases_that_the_backbone_was_pretrained_on_are_named(run_folder, phantoms, tmp_path, capsys):
    from voxdino.inference.load import ModelCard
    from voxdino.models.weights_card import PretrainingFacts, pack_seen

    folder = run_folder / "validation"
    record = json.loads((folder / "predictions.json").read_text())["cases"]
    first, *others = record
    card = ModelCard.read(run_folder / "model.json")
    evaluate = [
        "evaluate",
        str(folder),
        str(phantoms),
        "--metrics",
        "dice",
        "--out",
        str(tmp_path / "s.json"),
        "--json",
    ]
    for number, seen in enumerate([(), (first,), tuple(record)]):
        digests = [digest for case in seen for digest in record[case]["inputs"].values()]
        facts = PretrainingFacts(
            recipe="adapt", start="tiny", num_steps=1, pool_digest="", sources={}, seen=pack_seen(digests)
        )
        backbone = card.backbone.model_copy(update={"pretraining": facts})
        card.model_copy(update={"backbone": backbone}).write(tmp_path / str(number) / "model.json")
        assert main([*evaluate, "--run", str(tmp_path / str(number))]) == 0
        told = [text for text in json.loads(capsys.readouterr().out)["warnings"] if "pretrained on" in text]
        assert len(told) == bool(seen)
        assert all(f"{len(seen)} of {1 + len(others)} cases (first: {first}) were in the pool" in text for text in told)
    assert main(["evaluate", str(phantoms / "labelsTr"), str(phantoms), "--run", str(run_folder)]) == 2
    assert "not of voxdino predict" in capsys.readouterr().err


def test_tuning_says_what_helps_and_haste_says_what_it_costs(run_folder, phantoms, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(run_folder, run, ignore=shutil.ignore_patterns("checkpoint"))
    assert main(["tune", str(phantoms), "--run", str(run), "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fast"]["num_cases"] > 0 and 0 <= told["fast"]["dice_fast"] <= 1
    for name, found in told["postprocessing"]["evidence"].items():
        assert found["after"] > found["before"], name
    image = next((phantoms / "imagesTr").glob("*_0000.nii.gz"))
    args = ["predict", str(image), "--out", str(tmp_path / "out"), "--device", "cpu", "--fast"]
    assert main([*args, "--run", str(run)]) == 0
    assert "times as fast" in capsys.readouterr().err
    assert main([*args, "--run", str(run), "--mirror"]) == 2
    assert main([*args, "--run", str(run_folder), "--run", str(run), "--overwrite", "--no-clean-up"]) == 0
    assert "not measured" in capsys.readouterr().err


def test_one_bad_image_does_not_stop_the_others(run_folder, phantoms, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    good = phantoms / "imagesTr" / "phantom_000_0000.nii.gz"
    (images / good.name).write_bytes(good.read_bytes())
    (images / "broken_0000.nii.gz").write_bytes(good.read_bytes()[:-30])
    args = ["predict", str(images), "--run", str(run_folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*args, "--json"]) == 6
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert told["error"]["exit_code"] == 6 and list(told["record"]["failed"]) == ["broken"]
    assert (tmp_path / "out" / "phantom_000.nii.gz").is_file() and "broken_0000.nii.gz" in shown.err
    assert main([*args, "--strict"]) == 3


def test_a_folder_of_references_needs_to_be_told_its_labels(run_folder, phantoms, capsys):
    folders = [str(phantoms / "labelsTr"), str(phantoms / "labelsTr")]
    assert main(["evaluate", *folders, "--out", str(run_folder.parent / "s.json")]) == 2
    assert "--labels" in capsys.readouterr().err
    labels = [
        "--labels",
        str(phantoms / "dataset.json"),
        "--metrics",
        "dice",
        "--out",
        str(run_folder.parent / "s.json"),
    ]
    assert main(["evaluate", *folders, *labels]) == 0
    assert "1.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args",
    [
        ["prepare", "DATA", "--workdir", "NEW", *TINY[:2], *PLAN, "--dry-run"],
        ["run", "DATA", "--workdir", "NEW", *SMALL, "--dry-run"],
        ["finetune", "--workdir", "WORK", "--name", "other", "--dry-run"],
        ["predict", "DATA/imagesTr", "--run", "RUN", "--out", "NEW", "--dry-run"],
        ["check", "DATA"],
    ],
    ids=lambda args: args[0],
)
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(args, workdir, run_folder, phantoms, tmp_path, capsys):
    places = {"DATA": phantoms, "NEW": tmp_path / "new", "WORK": workdir, "RUN": run_folder}
    before = files(workdir)
    assert main(placed(args, places)) == 0
    assert capsys.readouterr().out
    assert files(workdir) == before and not (tmp_path / "new").exists()


def test_a_dry_run_refuses_what_could_not_be_built(phantoms, tmp_path, capsys):
    impossible = [*SMALL, "--set", "taps=[0,1,2,9]", "--dry-run"]
    assert main(["run", str(phantoms), "--workdir", str(tmp_path / "new"), *impossible]) == 3
    assert "do not fit a backbone of" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "args, code, words",
    [
        (["finetune", "--workdir", "NOWHERE"], 3, "voxdino prepare"),
        (["finetune", "--workdir", "WORK", "--recipe", "segdino_v3"], 2, "Did you mean 'segdino_v2'?"),
        (["finetune", "--workdir", "WORK", "--set", "decoder_widht=64"], 2, "Did you mean 'decoder_width'?"),
        (["finetune", "--workdir", "WORK", "--set", "plan.crop=[64,64]"], 2, "voxdino prepare"),
        (["finetune", "--workdir", "WORK", "--fold", "9", *TINY], 3, "fold 9"),
        (["finetune", "--workdir", "WORK", "--name", "m", "--backbone", "dinov3_vits16"], 3, "voxdino weights pull"),
        (["finetune", "--workdir", "WORK", "--name", "m", "--backbone", "no_such.pth"], 3, "no_such.pth"),
        (["finetune", "--workdir", "WORK", "--time-budget", "soon"], 2, "10m"),
        (
            ["run", "DATA", "--workdir", "WORK", *TINY, "--set", "plan.magnifcation=2"],
            2,
            "Did you mean 'magnification'?",
        ),
        (["prepare", "DATA", "--workdir", "WORK", "--set", "decoder=linear"], 2, "voxdino finetune"),
        (["predict", "DATA/imagesTr", "--run", "NOWHERE", "--out", "NEW"], 3, "no such run folder"),
        (["predict", "NOWHERE", "--run", "RUN", "--out", "NEW"], 3, "no such file or folder"),
        (["evaluate", "DATA/labelsTr", "DATA", "--metrics", "dize", "--out", "NEW"], 2, "Did you mean 'dice'?"),
        (["weights", "inspect", "NOWHERE"], 3, "no such file"),
        (["weights", "pull", "dinov3_vits"], 2, "Did you mean 'dinov3_vits16"),
        (["list", "recipe"], 2, "recipes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refusals_name_the_way_on(args, code, words, workdir, run_folder, phantoms, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VOXDINO_WEIGHTS", str(tmp_path / "weights"))
    places = {"DATA": phantoms, "NEW": tmp_path / "new", "WORK": workdir, "RUN": run_folder, "NOWHERE": tmp_path / "no"}
    assert main(placed(args, places)) == code, capsys.readouterr().err
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in told and told.startswith("voxdino: ") and " Fix: " in told


def test_a_workdir_belongs_to_one_data_set(workdir, tmp_path, capsys):
    other = draw_phantoms(tmp_path / "other", num_cases=3, seed=5)
    before = files(workdir)
    assert main(["prepare", str(other), "--workdir", str(workdir), *TINY[:2], *PLAN]) == 2
    assert "'phantoms'" in capsys.readouterr().err and files(workdir) == before


def test_a_case_that_cannot_be_used_is_set_aside_and_told(phantoms, tmp_path, capsys):
    data = draw_phantoms(tmp_path / "data", num_cases=4, seed=4)
    broken = data / "imagesTr" / "phantom_002_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-100])
    args = ["prepare", str(data), "--workdir", str(tmp_path / "work"), *TINY[:2], *PLAN]
    assert main(args) == 6
    assert "phantom_002_0000.nii.gz" in capsys.readouterr().err
    splits = (tmp_path / "work" / "splits.json").read_text()
    assert "phantom_003" in splits and "phantom_002" not in splits
    assert main([*args, "--strict"]) == 3


@pytest.mark.parametrize("table", ["recipes", "backbones", "decoders", "inputs", "readers", "metrics"])
def test_every_table_is_listed_with_a_line_about_each_entry(table, capsys):
    assert main(["list", table, "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)[table]
    assert entries and all(entries.values())
    assert main(["list", table]) == 0
    assert all(name in capsys.readouterr().out for name in list(entries)[:1])


def test_weights_are_imported_listed_and_inspected(tmp_path, capsys):
    from safetensors.torch import save_file

    from voxdino.models.weights import load_backbone

    vit, _ = load_backbone("random:tiny")
    source = tmp_path / "mine.safetensors"
    save_file(dict(vit.state_dict()), source)
    folder = ["--weights-folder", str(tmp_path / "weights")]
    heads = ["--set", f"num_heads={vit.config.num_heads}"]
    assert main(["weights", "import", str(source), *heads, *folder]) == 0
    shown = capsys.readouterr()
    assert "--backbone mine" in shown.out and "licence" in shown.err
    assert main(["weights", "list", *folder, "--json"]) == 0
    assert [card["name"] for card in json.loads(capsys.readouterr().out)["here"]] == ["voxdino_tiny", "mine"]
    assert main(["weights", "inspect", str(tmp_path / "weights" / "mine.safetensors")]) == 0
    assert "patch 16" in capsys.readouterr().out


def test_doctor_says_what_the_machine_offers(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VOXDINO_WEIGHTS", str(tmp_path))
    assert main(["doctor", "--workdir", str(tmp_path / "w"), "--json"]) == 0
    names = {fact["name"] for fact in json.loads(capsys.readouterr().out)}
    assert names >= {"voxdino", "python", "torch", "cpu", "memory", "disk", "workdir", "weights"}


@pytest.mark.shared
def test_doctor_compares_with_reference_values(shared_folder, capsys):
    assert main(["doctor", "--reference-values", str(shared_folder / "reference-values")]) == 0
    shown = capsys.readouterr()
    assert "segdino_v2_decoder" in shown.out and "within tolerance" in shown.err


def test_doctor_fails_above_the_tolerance(monkeypatch, tmp_path, capsys):
    from voxdino.models.reference import ReferenceResult

    found = [ReferenceResult("vit", 3e-3, 1e-5, False), ReferenceResult("later", None, 1e-5, False, "not built yet")]
    monkeypatch.setattr("voxdino.models.reference.check_reference_values", lambda *_: found)
    assert main(["doctor", "--reference-values", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "FAILED" in shown.out and "vit: voxdino computes something else" in shown.err


def test_predicting_more_cases_is_expected_to_take_longer(workdir, run_folder):
    import torch

    from voxdino.cli.budget import predicting_s
    from voxdino.inference.load import load_model

    model = load_model(run_folder)
    few, many = (
        predicting_s(workdir, model.plan, ids, model.segmenter, torch.device("cpu"))
        for ids in (["phantom_000"], ["phantom_000", "phantom_001", "phantom_002"])
    )
    assert 0 < few < many < 300


@pytest.mark.parametrize(
    "args", [["NEW", "DATA"], ["DATA/labelsTr", "NEW"], ["DATA/dataset.json", "DATA"]], ids=" ".join
)
def test_evaluate_names_a_folder_that_is_not_there(args, phantoms, tmp_path, capsys):
    assert main(["evaluate", *placed(args, {"DATA": phantoms, "NEW": tmp_path / "new"})]) == 3
    told = capsys.readouterr().err
    assert "folder" in told and " Fix: " in told


def test_another_data_set_of_the_same_name_is_another_data_set(workdir, tmp_path, capsys):
    other = draw_phantoms(tmp_path / "phantoms", num_cases=3, seed=5)
    for path in [*other.glob("*/phantom_*")]:
        path.rename(path.with_name(path.name.replace("phantom", "scan")))
    assert main(["prepare", str(other), "--workdir", str(workdir), *TINY[:2], *PLAN]) == 2
    assert "another data set of that name" in capsys.readouterr().err


def test_without_a_recipe_one_is_chosen_and_the_reason_told(workdir, phantoms, capsys):
    assert main(["finetune", "--workdir", str(workdir), "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "recipe frozen_detail3d: volumes of" in shown.err and "frozen_detail3d_fold0" in shown.out


def test_the_defaults_of_predict_are_those_of_its_settings():
    options = inspect.signature(predict).parameters
    names = {"slices_at_once": "tiles_at_once"}  # named after what a user sees
    told = {field: options[names.get(field, field)].default for field in PredictSettings.model_fields}
    assert told == PredictSettings().model_dump()
