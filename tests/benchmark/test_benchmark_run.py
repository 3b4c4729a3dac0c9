"""A grid is measured once, whatever happens in between; what is bad is named and the others go on."""

import json
import shutil

import pytest
import torch
from small_benchmark import SIZES, draw_all, draw_blobs, draw_pictures, opened, toy_grid

from voxdino.benchmark.classification import ClassificationData, linear
from voxdino.benchmark.encoders import Encoder
from voxdino.benchmark.grid import Cell, EncoderEntry, TaskEntry
from voxdino.benchmark.page import report_page
from voxdino.benchmark.run import run_grid
from voxdino.benchmark.segmentation import SegmentationData
from voxdino.benchmark.standing import Standing
from voxdino.cli import main as voxdino
from voxdino.core.errors import EXIT_PARTIAL, UsageError
from voxdino.core.safe_files import digest_file
from voxdino.models.weights import load_backbone
from voxdino.models.weights_card import PretrainingFacts, pack_seen

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("few_draws")

PICTURES = TaskEntry(name="pictures", data="pictures.npz", probe="linear", resolutions=(16,))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return draw_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """The toy grid, measured."""
    folder = tmp_path_factory.mktemp("bench")
    told = []
    return folder, run_grid(toy_grid(), root, folder, device="cpu", say=told.append), told


def modified(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_every_cell_has_a_result_and_probes_find_what_is_there(finished):
    _, outcome, told = finished
    assert len(outcome.results) == 2 * (2 + 2 + 1 + 1) and not outcome.failed and outcome.absent == ("later",)
    board = Standing(outcome).board
    assert {name: [one.score.mean > 0.6 for one in entries] for name, entries in board.items()} == {
        "pictures": [True, True],
        "volumes": [True, True],
        "masks": [True, True],
    }
    assert any("later is not there" in line for line in told) and any("12 cells to measure" in line for line in told)


def test_a_second_call_measures_nothing_and_says_the_same(root, finished):
    folder, outcome, _ = finished
    before = modified(folder / "cells") | modified(folder / "features")
    told = []
    again = run_grid(toy_grid(), root, folder, device="cpu", say=told.append)
    assert modified(folder / "cells") | modified(folder / "features") == before
    assert again.results == outcome.results and told[-1] == "all 12 cells are measured"
    assert report_page(Standing(again)) == report_page(Standing(outcome))


def test_a_damaged_result_is_measured_again_to_the_same_numbers(root, finished):
    folder, outcome, _ = finished
    path = sorted((folder / "cells").glob("*.json"))[0]
    path.write_text(path.read_text()[:-40])
    again = run_grid(toy_grid(), root, folder, device="cpu")
    assert [one.model_copy(update={"elapsed_s": 0.0}) for one in again.results] == [
        one.model_copy(update={"elapsed_s": 0.0}) for one in outcome.results
    ]


def test_other_images_are_measured_anew(tmp_path):
    draw_pictures(tmp_path / "pictures.npz")
    grid = toy_grid(tasks=(PICTURES,))
    first = run_grid(grid, tmp_path, tmp_path / "bench", device="cpu")
    draw_pictures(tmp_path / "pictures.npz", shape=(20, 24))
    second = run_grid(grid, tmp_path, tmp_path / "bench", device="cpu")
    assert len(list((tmp_path / "bench" / "cells").iterdir())) == 4
    assert first.results[0].probabilities != second.results[0].probabilities


def test_a_budget_leaves_cells_for_the_next_call(root, tmp_path):
    grid = toy_grid(tasks=(PICTURES,))
    none = run_grid(grid, root, tmp_path, device="cpu", budget_s=0.0)
    assert len(none.missing) == 2 and not none.results and none.error(tmp_path) is None
    assert not run_grid(grid, root, tmp_path, device="cpu").missing


def test_a_bad_data_set_is_named_and_the_others_go_on(root, tmp_path, capsys):
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    shutil.copy(root / "pictures.npz", tmp_path)
    grid = toy_grid(tasks=(PICTURES, PICTURES.model_copy(update={"name": "bad", "data": "bad.npz"})))
    grid.write(tmp_path / "grid.json")
    code = voxdino(
        ["benchmark", str(tmp_path / "grid.json"), "-w", str(tmp_path / "bench"), "--device", "cpu", "--json"]
    )
    result = json.loads(capsys.readouterr().out)
    assert code == EXIT_PARTIAL
    assert list(result["failed"]) == ["bad"] and str(tmp_path) not in result["failed"]["bad"]
    assert result["num_measured"] == 2 and (tmp_path / "bench" / "report" / "report.html").is_file()


@pytest.mark.parametrize(
    ("probe", "told"), [("lineer", "Did you mean 'linear'"), ("slice_mean", "3-D images; these are 2-D")]
)
def test_a_probe_that_does_not_fit_is_refused_with_what_does(root, tmp_path, probe, told):
    grid = toy_grid(tasks=(PICTURES.model_copy(update={"probe": probe}),))
    if probe == "lineer":
        with pytest.raises(UsageError, match=told):
            run_grid(grid, root, tmp_path, device="cpu")
    else:
        assert told in run_grid(grid, root, tmp_path, device="cpu").failed["pictures"]


def test_test_cases_that_pretraining_has_seen_are_named(tmp_path):
    draw_pictures(tmp_path / "pictures.npz")
    data = ClassificationData.open(PICTURES, tmp_path, tmp_path / "bench", torch.device("cpu"))
    backbone, card = load_backbone("random:tiny")
    seen = pack_seen([digest_file(tmp_path / "pictures.npz")])
    facts = PretrainingFacts(recipe="r", start="s", num_steps=1, pool_digest="d", sources={}, seen=seen)
    encoder = Encoder("seen", "random:tiny", card.model_copy(update={"pretraining": facts}), backbone.patch_size)
    result = data.measure(Cell(task="pictures", encoder="seen", resolution=16), encoder, linear)
    assert result.leaked == result.cases and len(result.cases) == SIZES["test"]


def test_a_quick_look_takes_data_sets_and_encoders(root, tmp_path, capsys):
    data = [str(root / "pictures.npz"), str(root / "masks")]
    assert not voxdino(
        ["benchmark", *data, "--encoders", "random:tiny,pixels:16", "-w", str(tmp_path), "--device", "cpu"]
    )
    printed = capsys.readouterr().out
    assert "random:tiny" in printed and "masks" in printed and "only floors were measured" in printed


def test_a_quick_look_without_encoders_says_what_is_missing(root, tmp_path, capsys):
    assert voxdino(["benchmark", str(root / "pictures.npz"), "-w", str(tmp_path)]) == UsageError.exit_code
    assert "--encoders" in capsys.readouterr().err


@pytest.mark.parametrize("probe", ["decoder_2d", "knn"])
def test_the_other_probes_measure_too(root, tmp_path, probe, monkeypatch):
    from voxdino.benchmark import decoders

    monkeypatch.setattr(decoders, "DECODER_EPOCHS", 1)
    monkeypatch.setattr(decoders, "DECODER_STEPS", 2)
    data, resolution = ("masks", 32) if probe == "decoder_2d" else ("pictures.npz", 16)
    task = TaskEntry(name="t", data=data, probe=probe, resolutions=(resolution,), shots=(1,))
    grid = toy_grid(tasks=(task,), encoders=(EncoderEntry(name="p", source="pixels:16"),), seeds=(0,))
    outcome = run_grid(grid, root, tmp_path, device="cpu")
    assert [one.num_train for one in outcome.results][1] == (1 if probe == "decoder_2d" else 2)
    assert not list(tmp_path.glob("sets/*/runs/*"))


MASKS = TaskEntry(name="masks", data="masks", probe="patch_linear", resolutions=(64,))


def opened_masks(root, folder, entry=MASKS):
    return SegmentationData.open(entry, root, folder, opened("pixels:16"), torch.device("cpu"))


def test_tasks_of_other_folds_never_share_a_folder(root, tmp_path):
    one, other = (opened_masks(root, tmp_path, MASKS.model_copy(update={"fold": fold})) for fold in (0, 1))
    assert one.folder != other.folder and one.digest == other.digest
    for data in (one, other):
        (split,) = json.loads((data.folder / "splits.json").read_text())
        train, val, test = data.ids(None)
        assert (split["train"], split["val"]) == (train, val) and not {*train, *val} & set(test)


def test_a_changed_mask_is_prepared_anew(tmp_path):
    draw_blobs(tmp_path / "masks")
    before = opened_masks(tmp_path, tmp_path / "bench")
    shutil.copy(tmp_path / "masks/label/case_1.png", tmp_path / "masks/label/case_0.png")
    after = opened_masks(tmp_path, tmp_path / "bench")
    assert before.folder != after.folder and before.digest != after.digest
    assert opened_masks(tmp_path, tmp_path / "bench").folder == after.folder
