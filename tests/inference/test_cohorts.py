"""Laws of predicting, preparing and scoring in a cohort: the same results as in one process, resumable, mergeable."""

import json
import subprocess
import sys

import numpy as np
import pytest
from small_models import make_volume

from voxdino.cohort.crew import LocalCrew
from voxdino.cohort.dispatch import Cohort
from voxdino.cohort.predicting import Models, Spread
from voxdino.core.errors import ImageError, PartialError, ResourceError, UsageError
from voxdino.core.io import write_label_map, write_volume
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.core.locks import lock_folder
from voxdino.core.shards import Shard, file_of
from voxdino.core.volume import LabelMap
from voxdino.evaluation import evaluate as evaluating
from voxdino.evaluation.evaluate import evaluate
from voxdino.inference import ledger, memory
from voxdino.inference.cases import find_cases
from voxdino.inference.ledger import PredictRecord
from voxdino.inference.load import load_model
from voxdino.inference.run import predict_cases, predict_one
from voxdino.inference.settings import PredictSettings
from voxdino.preparation.phantoms import draw_phantoms
from voxdino.preparation.workers import Outcome

USUAL = PredictSettings(amp="off")


@pytest.fixture
def images(tmp_path):
    for number in range(5):
        write_volume(tmp_path / "in" / f"c{number}.nii.gz", make_volume(seed=number))
    return tmp_path / "in"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".lock")}


def predict(images, run_folder, out, cases=None, **how):
    return predict_cases(cases or find_cases([images]), load_model(run_folder), out, settings=USUAL, **how)


def local(run_folder):
    return Spread(Cohort(LocalCrew(2)), Models((run_folder,), device="cpu"))


def test_workers_leave_the_bytes_of_one_process_and_set_bad_cases_aside(images, run_folder, tmp_path):
    (images / "c3.nii.gz").write_bytes(b"no image")
    with pytest.raises(PartialError) as alone:
        predict(images, run_folder, tmp_path / "alone")
    with pytest.raises(PartialError) as together:
        predict(images, run_folder, tmp_path / "together", spread=local(run_folder))
    assert together.value.fact == alone.value.fact
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
    write_volume(images / "c3.nii.gz", make_volume(seed=3))
    (tmp_path / "together" / "c1.nii.gz").unlink()
    summary = predict(images, run_folder, tmp_path / "together", spread=local(run_folder))
    assert (summary.num_done, summary.num_kept) == (2, 3)
    predict(images, run_folder, tmp_path / "alone")
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")


def test_workers_that_memory_does_not_hold_together_are_refused_before_they_start(
    images, run_folder, tmp_path, monkeypatch
):
    cases, model = find_cases([images]), load_model(run_folder)
    monkeypatch.setattr(memory, "available_memory", lambda: int(1.5 * memory.needed_bytes(cases[0], model, USUAL)[0]))
    with pytest.raises(ResourceError, match="use fewer workers: --on local:1") as caught:
        predict(images, run_folder, tmp_path / "out", spread=local(run_folder))
    assert "and 1 more at the same time need about" in caught.value.fact
    how = PredictRecord(model="", model_digest="", licence="", settings=USUAL, read_options=ReadOptions())
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match="are free"):  # on whatever machine the worker is
        predict_one(cases[0], None, load_model(run_folder), how, tmp_path / "out")


def test_workers_have_ended_when_the_folder_is_free_again(images, run_folder, tmp_path):
    free, out = [], tmp_path / "out"

    def spread(items, how, folder, model):
        try:
            yield items[0][0], ImageError("bad")
        finally:
            with pytest.raises(ResourceError, match="another run"), lock_folder(folder):
                pass
            free.append(folder)

    with pytest.raises(ImageError) as caught:
        predict(images, run_folder, out, spread=spread, strict=True)
    assert free == [out] and caught.value.fact == "bad"


def test_workers_get_paths_that_hold_in_any_working_folder(images, model, tmp_path, monkeypatch):
    sent = []

    def over_cases(cohort, task, items, names):
        sent.extend(items)
        yield Outcome(0, None, None)

    monkeypatch.setattr(Cohort, "over_cases", over_cases)
    monkeypatch.chdir(tmp_path)
    [case, *_] = find_cases([images.relative_to(tmp_path)])
    how = PredictRecord(model="", model_digest="", licence="", settings=USUAL, read_options=ReadOptions())
    [(ended, _)] = Spread(Cohort(LocalCrew(1)), Models(()))([(case, None)], how, tmp_path, model)
    assert ended is case and not case.images[0].is_absolute()
    assert sent[0][0].images == (images / "c0.nii.gz",)


def test_shards_at_the_same_time_and_then_a_plain_call_make_one_record(images, run_folder, tmp_path):
    cases, out = find_cases([images]), tmp_path / "out"
    for number in (1, 2):
        shard = Shard(number, 2)
        with lock_folder(out, part=str(Shard(3 - number, 2))):  # the other one is at work
            summary = predict(images, run_folder, out, shard.of(cases), shard=shard)
        assert summary.num_done == len(shard.of(cases))
        with pytest.raises(ResourceError, match="another run"), lock_folder(out, part=str(shard)):
            predict(images, run_folder, out, shard.of(cases), shard=shard)
        with pytest.raises(ResourceError, match="another run"), lock_folder(out, part=str(shard)):
            predict(images, run_folder, out)  # it would merge records that are still being written
        with pytest.raises(ResourceError, match="another run"), lock_folder(out):
            predict(images, run_folder, out, shard.of(cases), shard=shard)
    assert PredictRecord.read(out / "predictions.1of2.json").cases.keys() == {"c0", "c2", "c4"}
    whole = predict(images, run_folder, out)
    assert (whole.num_done, whole.num_kept) == (0, 5)
    predict(images, run_folder, tmp_path / "alone")
    assert contents(out) == contents(tmp_path / "alone")


def test_records_of_a_cohort_take_a_small_share_of_the_time_however_long_they_are(tmp_path, monkeypatch):
    how = PredictRecord(model="", model_digest="", licence="", settings=USUAL, read_options=ReadOptions())
    now, num_records = [0.0], [0]

    class SlowRecord(PredictRecord):
        def write(self, path):
            now[0] += 3.0
            num_records[0] += 1

    monkeypatch.setattr(ledger.time, "monotonic", lambda: now[0])
    book = ledger.Ledger(tmp_path, SlowRecord(**dict(how)), {})
    book.write()
    while now[0] < 1000.0:
        now[0] += 0.1  # a case
        book.write_now_and_then()
    assert num_records[0] > 1 and 3.0 * num_records[0] < 0.03 * now[0]


def test_a_shard_made_otherwise_is_refused_or_replaced(images, run_folder, tmp_path):
    cases, shard = find_cases([images]), Shard(1, 2)
    predict(images, run_folder, tmp_path, shard.of(cases), shard=shard)
    mirrored = USUAL.model_copy(update={"mirror": True})
    with pytest.raises(UsageError, match="made with another settings"):
        predict_cases(cases, load_model(run_folder), tmp_path, settings=mirrored)
    again = predict_cases(cases, load_model(run_folder), tmp_path, settings=mirrored, overwrite=True)
    assert again.num_done == 5
    assert not list(tmp_path.glob("predictions.*of*.json"))


def test_pairs_are_scored_alike_wherever_and_bad_ones_are_listed(tmp_path):
    labels = LabelSet(names=("background", "liver"), ids=(0, 1))
    pairs = []
    for number in range(4):
        volume = make_volume(seed=number)
        for side, level in (("prediction", 10), ("reference", 0)):
            path = tmp_path / side / f"c{number}.nii.gz"
            write_label_map(path, LabelMap((volume.array[0] > level).astype(np.uint8), volume.grid))
        pairs.append((f"c{number}", tmp_path / "prediction" / path.name, path))
    (tmp_path / "prediction" / "c2.nii.gz").write_bytes(b"no image")
    scores = evaluate(pairs, labels, over_cases=Cohort(LocalCrew(2)).over_cases)
    assert scores == evaluate(pairs, labels)
    assert [case.case for case in scores.failed] == ["c2"]


def test_scores_of_shards_are_taken_by_a_plain_call_while_files_and_settings_are_the_same(tmp_path, monkeypatch):
    labels = LabelSet(names=("background", "liver"), ids=(0, 1))
    pairs = []
    for number in range(4):
        array = (make_volume(seed=number).array[0] > 0).astype(np.uint8)
        for side in ("prediction", "reference"):
            write_label_map(tmp_path / side / f"c{number}.nii.gz", LabelMap(array, make_volume().grid))
        pairs.append((f"c{number}", *(tmp_path / side / f"c{number}.nii.gz" for side in ("prediction", "reference"))))
    files = [file_of(tmp_path / "scores.json", Shard(number, 2)) for number in (1, 2)]
    for number, file in enumerate(files, start=1):
        evaluate(Shard(number, 2).of(pairs, key=lambda pair: pair[0]), labels, keep=file)
    array[:] = 1
    write_label_map(tmp_path / "prediction" / "c3.nii.gz", LabelMap(array, make_volume().grid))  # predicted anew
    alone, scored = evaluate(pairs, labels), []
    score = evaluating._score_files
    monkeypatch.setattr(evaluating, "_score_files", lambda *given: scored.append(given[0]) or score(*given))
    assert evaluate(pairs, labels, kept=files) == alone and scored == ["c3"]
    evaluate(pairs, labels, kept=files, tolerance_mm=2.0, num_workers=1)
    assert scored == ["c3", "c0", "c1", "c2", "c3"]


def voxdino(*args):
    done = subprocess.run([sys.executable, "-m", "voxdino", *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_the_commands_predict_in_shards_and_over_processes(images, run_folder, tmp_path):
    out = tmp_path / "out"
    for number in (1, 2):
        voxdino("predict", images, "--run", run_folder, "--out", out, "--shard", f"{number}/2")
    told = voxdino("predict", images, "--run", run_folder, "--out", out, "--on", "local:2", "--json")
    assert json.loads(told.stdout)["num_kept"] == 5
    assert "5 of 5 cases" in told.stderr
    assert voxdino("predict", images, "--run", run_folder, "--out", out, "--shard", "9/9").stdout == ""


@pytest.mark.slow
def test_preparing_over_processes_leaves_the_bytes_of_one(tmp_path):
    draw_phantoms(tmp_path / "set", num_cases=4)
    for where, how in (("alone", ("--workers", "1")), ("together", ("--on", "local:2"))):
        voxdino("prepare", tmp_path / "set", "--workdir", tmp_path / where, "--set", "plan.num_folds=2", *how)
    assert contents(tmp_path / "together" / "prepared" / "cases") == contents(tmp_path / "alone" / "prepared" / "cases")


@pytest.mark.slow
def test_the_commands_prepare_and_score_in_shards(tmp_path):
    scans = draw_phantoms(tmp_path / "set", num_cases=4)
    work, alone = tmp_path / "together", tmp_path / "alone"
    command = ("prepare", scans, "--workers", "1", "--set", "plan.num_folds=2")
    voxdino(*command, "--workdir", alone)
    first = voxdino(*command, "--workdir", work, "--shard", "1/2")
    assert "2 cases prepared" in first.stderr and not (work / "prepared" / "manifest.json").exists()
    second = voxdino(*command, "--workdir", work, "--shard", "2/2")
    assert "is kept as it is" in second.stderr and "2 cases prepared" in second.stderr
    assert "0 cases prepared" in voxdino(*command, "--workdir", work).stderr
    assert contents(work / "prepared" / "cases") == contents(alone / "prepared" / "cases")
    assert (work / "prepared" / "manifest.json").read_bytes() == (alone / "prepared" / "manifest.json").read_bytes()
    truth = scans / "labelsTr"
    for number in (1, 2):
        voxdino("evaluate", truth, scans, "--out", tmp_path / "scores.json", "--shard", f"{number}/2")
    assert len(list(tmp_path.glob("scores.*of2.json"))) == 2 and not (tmp_path / "scores.json").exists()
    voxdino("evaluate", truth, scans, "--out", tmp_path / "scores.json")
    assert not list(tmp_path.glob("scores.*of*.json"))
    assert json.loads((tmp_path / "scores.json").read_text())["num_cases"] == 4
