"""A grid is measured once, whatever happens in between; what is bad is named and the others go on."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_benchmark import SIZES, draw_all, draw_blobs, draw_pictures, opened, toy_grid

from voxdino.benchmark import matching, run
from voxdino.benchmark.bench import Bench
from voxdino.benchmark.classification import ClassificationData, linear
from voxdino.benchmark.encoders import Encoder
from voxdino.benchmark.estimate import Estimate
from voxdino.benchmark.grid import Cell, EncoderEntry, TaskEntry
from voxdino.benchmark.page import report_page
from voxdino.benchmark.run import run_grid
from voxdino.benchmark.segmentation import Model, SegmentationData
from voxdino.benchmark.standing import Standing
from voxdino.cli import main as voxdino
from voxdino.core.errors import EXIT_PARTIAL, DivergedError, UsageError
from voxdino.core.geometry import Grid as VoxelGrid
from voxdino.core.io import write_volume
from voxdino.core.safe_files import digest_file
from voxdino.core.volume import LabelMap, Volume
from voxdino.models.weights import load_backbone
from voxdino.models.weights_card import PretrainingFacts, pack_seen

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("few_draws")

PICTURES = TaskEntry(name="pictures", data="pictures.npz", probe="linear", resolutions=(16,))
FAULTS = {"corruptions": ("noise", "blur"), "strengths": (2, 5)}


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


def test_a_cell_left_out_for_time_takes_those_with_it_that_lean_on_it(root, tmp_path, monkeypatch):
    entry = EncoderEntry(name="p", source="pixels:16")
    tasks = (PICTURES.model_copy(update={"name": "long", **FAULTS, "shots": (2,)}), PICTURES)
    grid = toy_grid(tasks=tasks, encoders=(entry,), seeds=(0,))

    def seconds(cell, *_, first, fits):
        return Estimate(1e6 if cell.task == "long" and fits and cell.shots is None else 0.0, 0)

    monkeypatch.setattr(run, "estimate", seconds)
    outcome = run_grid(grid, root, tmp_path, device="cpu", budget_s=1e5)
    assert [str(one.cell) for one in outcome.results] == ["pictures: p at 16 px"]
    assert len(outcome.missing) == 1 + 2 * 2 + 1


def test_what_one_corruption_takes_too_long_for_leaves_the_others(root, tmp_path, monkeypatch):
    entry = EncoderEntry(name="p", source="pixels:16")
    grid = toy_grid(tasks=(PICTURES.model_copy(update=FAULTS),), encoders=(entry,), seeds=(0,))
    monkeypatch.setattr(run, "estimate", lambda cell, *_, **__: Estimate(1e6 * (cell.corruption == "noise"), 0))
    outcome = run_grid(grid, root, tmp_path, device="cpu", budget_s=1e5)
    assert [one.cell.corruption for one in outcome.results] == [None, "blur", "blur"]


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
    cell = Cell(task="pictures", encoder="seen", resolution=16)
    result = data.measure(cell, encoder, data.fit(cell, encoder, linear))
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


def test_cells_of_other_folds_have_other_results(root, tmp_path):
    names = set()
    for fold in (0, 1):
        grid = toy_grid(tasks=(MASKS.model_copy(update={"fold": fold}),))
        bench = Bench(grid, root, tmp_path, torch.device("cpu"))
        names |= {bench.path(cell) for cell in bench.cells}
    assert len(names) == 2 * 2


def write_table(folder, rows):
    """Pictures of a folder with their label, split and site."""
    folder.mkdir()
    for name in {row.split(",")[0] for row in rows}:
        value = 30 * int(name[0]) + 20
        grid = VoxelGrid.from_spacing((20, 20), (1.0, 1.0))
        write_volume(folder / name, Volume(np.full((1, 20, 20), value, np.uint8), grid))
    (folder / "labels.csv").write_text("\n".join(("file,label,split,group", *rows)) + "\n")
    return PICTURES.model_copy(update={"data": folder.name})


def test_images_that_change_places_are_another_set(tmp_path):
    entry = write_table(
        tmp_path / "set", [f"{n}.png,{n % 2},{s},g{n}" for n, s in enumerate(("train", "train", "val", "test"))]
    )
    before = ClassificationData.open(entry, tmp_path, tmp_path, torch.device("cpu")).digest
    one, other, third = (tmp_path / "set" / name for name in ("0.png", "1.png", "third.png"))
    for old, new in ((one, third), (other, one), (third, other)):
        old.rename(new)
    assert ClassificationData.open(entry, tmp_path, tmp_path, torch.device("cpu")).digest != before


def test_volumes_whose_voxels_changed_beside_their_headers_are_another_set(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    rows = ["file,label,split"]
    for number, split in enumerate(("train", "train", "val", "test")):
        packed = folder / "packed.nrrd"
        write_volume(
            packed, Volume(np.full((1, 6, 6, 4), number, np.int16), VoxelGrid.from_spacing((6, 6, 4), (1.0, 1.0, 2.0)))
        )
        header, _, voxels = packed.read_bytes().partition(b"\n\n")
        (folder / f"{number}.nhdr").write_bytes(header + f"\ndata file: {number}.raw.gz\n".encode())
        (folder / f"{number}.raw.gz").write_bytes(voxels)
        packed.unlink()
        rows.append(f"{number}.nhdr,{number % 2},{split}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    entry = PICTURES.model_copy(update={"data": "set"})
    before = ClassificationData.open(entry, tmp_path, tmp_path, torch.device("cpu")).digest
    shutil.copy(folder / "1.raw.gz", folder / "0.raw.gz")
    assert ClassificationData.open(entry, tmp_path, tmp_path, torch.device("cpu")).digest != before


def test_holding_out_the_site_of_all_validation_cases_chooses_with_others(tmp_path):
    rows = (
        [f"{n}.png,{n % 2},train,a" for n in range(5)] + [f"{n}.png,{n % 2},val,b" for n in (5, 6)] + ["7.png,1,test,c"]
    )
    entry = write_table(tmp_path / "set", rows).model_copy(update={"hold_out": "group"})
    data = ClassificationData.open(entry, tmp_path, tmp_path, torch.device("cpu"))
    train, val, test = data.ids("b")
    assert len(test) == 2 and val and len(train) + len(val) == 6 and not {*train, *val} & set(test)
    train, val, test = data.ids("a")
    assert len(test) == 5 and (len(train), len(val)) == (1, 2)
    assert not Bench(toy_grid(tasks=(entry,)), tmp_path, tmp_path / "bench", torch.device("cpu")).failed


def test_a_picture_without_a_patient_is_none_of_the_patient_of_its_name(tmp_path):
    rows = [f"{n}.png,{n % 2},{s},{g}" for n, s, g in ((0, "train", "a"), (1, "train", "b"), (2, "val", "c"))]
    rows += ["3.png,1,test,", "4.png,0,test,3.png", "5.png,1,test,3.png"]
    entry = write_table(tmp_path / "set", rows)
    (result,) = one_task(tmp_path, tmp_path / "bench", data=entry.data, probe="knn", resolutions=(16,)).results
    assert result.cases[0] == "3.png" and len(set(result.groups)) == 2 and result.groups[1] == result.groups[2]


def test_a_mask_without_a_patient_is_none_of_the_patient_of_its_name(root, tmp_path):
    data = opened_masks(root, tmp_path)
    first, *others = data.dataset.cases
    cases = (first, *(replace(case, group=first.id) for case in others))
    splits = ((data.splits[0][0], tuple(case.id for case in cases)),)
    data = replace(data, dataset=replace(data.dataset, cases=cases), splits=splits)

    def empty(name, volume, keep):
        return LabelMap(np.zeros(volume.array.shape[1:], np.uint8), volume.grid)

    cell = Cell(task="masks", encoder="pixels:16", resolution=64)
    result = data.measure(cell, opened("pixels:16"), Model(empty, None, 1, {}))
    assert result.cases[0] == first.id and len(set(result.groups)) == 2 and len(set(result.groups[1:])) == 1


@pytest.mark.parametrize("error", [UsageError, DivergedError])
def test_a_cell_that_cannot_be_measured_is_named_and_the_others_go_on(root, tmp_path, monkeypatch, error):
    measure = Bench.measure

    def fail(self, cell):
        if cell.encoder == "tiny":
            raise error("cannot be done.")
        return measure(self, cell)

    monkeypatch.setattr(Bench, "measure", fail)
    outcome = run_grid(toy_grid(tasks=(PICTURES,)), root, tmp_path, device="cpu")
    assert len(outcome.results) == 1 and list(outcome.failed.values()) == ["cannot be done."]


def test_tasks_that_ask_for_what_is_not_there_are_named(root, tmp_path):
    no_fold = MASKS.model_copy(update={"name": "no_fold", "fold": 9})
    no_groups = PICTURES.model_copy(update={"name": "no_groups", "hold_out": "group"})
    outcome = run_grid(toy_grid(tasks=(PICTURES, no_fold, no_groups)), root, tmp_path, device="cpu")
    assert list(outcome.failed) == ["no_fold", "no_groups"] and len(outcome.results) == 2


@pytest.mark.parametrize("task", [PICTURES, MASKS], ids=["pictures", "masks"])
def test_a_probe_of_clean_images_is_asked_of_corrupted_ones(root, tmp_path, monkeypatch, task):
    entry = EncoderEntry(name="p", source="pixels:16")
    plain = run_grid(toy_grid(tasks=(task,), encoders=(entry,)), root, tmp_path, device="cpu")
    cells = set((tmp_path / "cells").iterdir())
    grid = toy_grid(tasks=(task.model_copy(update=FAULTS),), encoders=(entry,))
    fits, data = [], ClassificationData if task is PICTURES else SegmentationData
    fit = data.fit
    monkeypatch.setattr(data, "fit", lambda *arguments: (fits.append(1), fit(*arguments))[1])
    outcome = run_grid(grid, root, tmp_path, device="cpu")
    assert len(fits) == 1 and cells < set((tmp_path / "cells").iterdir())  # one probe; the clean cell stays what it was
    assert outcome.results[:1] == plain.results and len(outcome.results) == 1 + 2 * 2
    standing = Standing(outcome)
    found = standing.robustness(grid.tasks[0], "p")
    assert {name: list(one) for name, one in found.scores.items()} == {"noise": [2, 5], "blur": [2, 5]}
    assert found.clean == standing.board[task.name][0].score.mean
    assert len({(one.probabilities, tuple(one.scores.items())) for one in outcome.results}) == 5
    told = []
    again = run_grid(grid, root, tmp_path, device="cpu", say=told.append)
    assert again.results == outcome.results and told[-1] == "all 5 cells are measured"
    titles = [section.title for section in report_page(standing).sections]
    assert {"Corruptions", f"{task.name}: noise", f"{task.name}: blur"} < set(titles)


def one_task(root, folder, **values):
    """The result of a task for raw pixels at one resolution."""
    task = TaskEntry(name="t", **values)
    grid = toy_grid(tasks=(task,), encoders=(EncoderEntry(name="p", source="pixels:16"),), seeds=(0,))
    return run_grid(grid, root, folder, device="cpu")


@pytest.mark.parametrize("data", ["pictures.npz", "volumes.npz"])
def test_images_of_the_same_class_are_found(root, tmp_path, data):
    outcome = one_task(root, tmp_path, data=data, probe="retrieval", resolutions=(32,), slices=2)
    (result,) = outcome.results
    assert set(result.scores["recall@1"]) <= {0.0, 1.0} and result.num_train == SIZES["train"]
    means = {name: np.mean(values) for name, values in result.scores.items()}
    assert means["map@10"] > 0.6 and means["recall@1"] <= means["recall@5"] <= means["recall@10"]
    page = report_page(Standing(outcome))
    assert "All numbers: retrieval" in [section.title for section in page.sections]


def test_the_masks_of_one_case_are_carried_to_its_likes(tmp_path, monkeypatch):
    pooled, class_shares = [], matching.class_shares
    monkeypatch.setattr(matching, "class_shares", lambda *a, **k: (pooled.append(a), class_shares(*a, **k))[1])
    draw_blobs(tmp_path / "masks")
    for case in range(1, 6):  # all alike
        for kind in ("image", "label"):
            shutil.copy(tmp_path / f"masks/{kind}/case_0.png", tmp_path / f"masks/{kind}/case_{case}.png")
    outcome = one_task(tmp_path, tmp_path / "bench", data="masks", probe="correspondence", resolutions=(160,))
    (result,) = outcome.results
    assert result.num_train == 1 and min(result.scores["dice"]) > 0.8 and result.validation > 0.8
    assert len(set(result.scores["dice"])) == 1 and result.settings["source"] not in result.cases
    assert any(tmp_path.glob("bench/sets/*/maps/*/*.safetensors"))
    assert len(pooled) == 1  # once, however many cases the masks are carried to


def test_shots_of_a_probe_that_takes_none_are_refused_before_anything_is_measured(root, tmp_path):
    with pytest.raises(UsageError, match="take shots out"):
        one_task(root, tmp_path, data="masks", probe="correspondence", resolutions=(160,), shots=(2,))
