"""From what runs leave behind to a page: scores, curves, several runs compared, and what is refused."""

import json

import nibabel
import numpy as np
import pytest
from pages import HOSTILE

from voxdino.cli import main
from voxdino.core.errors import ConfigError, DatasetError
from voxdino.core.labels import LabelSet
from voxdino.evaluation.evaluate import evaluate
from voxdino.report.html import render
from voxdino.report.make import make_page

RUN = {
    "config": {"recipe": "linear", "seed": 0, "augment": {"flips": "auto"}, "stages": [{"name": "a"}]},
    "backbone": {"name": "tiny", "licence": "Apache-2.0", "digest": "0"},
    "num_parameters": {"trained": 1200, "all": 1234567},
    "device": "cpu",
    "python": "3.12",
    "fold": 1,
    "split": {"train": ["a", "b"], "val": ["c"]},
    "pretrained_on": ["c"],
    "outcome": {"num_steps": 500, "elapsed_s": 90.0, "best_dice": 0.8, "best_step": 400, "ended_by": "time"},
    "identity": {},
}


def label_map(seed, num_wrong):
    rng = np.random.default_rng(seed)
    array = np.zeros((7, 9, 5), np.uint8)
    array[1:6, 2:8, 1:4] = 1
    array[2:4, 3:6, 2:4] = 2
    wrong = rng.integers(0, array.size, num_wrong)
    array.reshape(-1)[wrong] = 0
    return array


@pytest.fixture
def dataset(tmp_path):
    """Ten cases in a folder with a table, one of hostile name, and predictions that get worse."""
    lines = ["id,image,label"]
    (tmp_path / "data").mkdir()
    (tmp_path / "predictions").mkdir()
    for number in range(10):
        name = f"case_{number}" if number else "<b onload=x>"
        for kind, array in (("image", label_map(0, 0) * 90 + number), ("label", label_map(0, 0))):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "data" / f"{kind}{number}.nii.gz")
        nibabel.save(
            nibabel.Nifti1Image(label_map(1, 3 * number), np.eye(4)), tmp_path / "predictions" / f"{name}.nii.gz"
        )
        lines.append(f"{name},image{number}.nii.gz,label{number}.nii.gz")
    (tmp_path / "data" / "cases.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


LABELS = LabelSet(names=("background", "liver", "<i>lesion</i>"), ids=(0, 1, 2))


def write_scores(folder, seed, worse, missing=None, groups=None):
    """scores.json of ten label maps, `worse` voxels wrong in case 9."""
    files = folder / "files"
    files.mkdir(parents=True)
    pairs = []
    for number in range(10):
        paths = [files / f"{kind}{number}.nii.gz" for kind in ("p", "r")]
        nibabel.save(nibabel.Nifti1Image(label_map(seed + number, worse + number), np.eye(4)), paths[0])
        nibabel.save(nibabel.Nifti1Image(label_map(0, 0), np.eye(4)), paths[1])
        pairs.append((f"case_{number}", *paths))
    if missing is not None:
        pairs[missing][1].write_bytes(b"not an image")
    evaluate(pairs, LABELS, num_workers=1, groups=groups).write(folder / "scores.json")
    return folder


def write_run(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({**RUN, **changes}))
    rows = [{"step": step, "loss": 1 / step, "grad_norm": 1.0} for step in range(1, 501)]
    looks = [{"step": step, "dice": 0.7 + step / 5000, "per_class": {"x": 0.7, "y": None}} for step in (100, 200, 400)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + looks) + '{"step": 5')
    return folder


def titles(page):
    return [section.title for section in page.sections]


def section(page, title):
    return next(section for section in page.sections if section.title == title)


def test_scores_become_structures_cases_volumes_failures_and_definitions(tmp_path):
    page = make_page([write_scores(tmp_path / "one", 1, 2, missing=4)])
    assert titles(page) == [
        "Scores by structure",
        "Dice by structure",
        "Dice by case, lowest first",
        "Agreement of volumes: <i>lesion</i>",
        "Agreement of volumes: liver",
        "What failed",
        "Every case",
        "Definitions",
    ]
    by_case = [row.interval.mean for row in section(page, "Dice by case, lowest first").rows]
    assert by_case == sorted(by_case) and len(by_case) == 9
    assert section(page, "What failed").items[0].file == "case_4"
    assert str(tmp_path) not in render(page)
    points = section(page, "Agreement of volumes: liver").points
    assert {round(point.reference, 6) for point in points} == {round((5 * 6 * 3 - 2 * 3 * 2) / 1000, 6)}


def test_a_run_shows_curves_cost_settings_and_what_its_backbone_has_seen(tmp_path):
    page = make_page([write_run(tmp_path / "linear_fold1")])
    assert titles(page) == ["Validation Dice", "Training loss", "Cost", "Settings"]
    assert "1 held-back cases (first: c)" in page.warnings[0]
    validation, loss = section(page, "Validation Dice"), section(page, "Training loss")
    assert [(series.name, len(series.points)) for series in validation.series] == [("mean", 3), ("x", 3), ("y", 0)]
    (curve,) = loss.series  # 500 steps in blocks of 3; the gradient's norm is no loss
    assert len(curve.points) == 167 and curve.points[0].y == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert ("stages.0.name", "a") in section(page, "Settings").rows
    running = make_page([write_run(tmp_path / "running", outcome=None)])
    assert any("has not ended" in warning for warning in running.warnings)


def test_several_runs_are_compared_case_by_case(tmp_path):
    good, bad, same = (
        write_scores(tmp_path / n, s, w) for n, s, w in (("good", 1, 0), ("bad", 50, 40), ("same", 90, 0))
    )
    page = make_page([good, bad, same])
    tests = section(page, "Paired tests").rows
    assert [(row[0], row[1]) for row in tests] == [("good", "bad"), ("good", "same"), ("bad", "same")]
    assert tests[0][2].low > 0.03 and tests[0][4] < 0.02 < tests[1][4]
    words = section(page, "In words").paragraphs
    assert words[0].startswith("good is better than bad by ") and "cannot be told apart" in words[1]
    ranks = section(page, "Mean ranks over the cases")
    assert dict(zip(ranks.names, ranks.mean_ranks, strict=True))["bad"] == 3.0


def test_cases_of_a_patient_are_compared_as_one_and_older_scores_case_by_case(tmp_path):
    patients = {f"case_{number}": f"p{min(number, 5)}" for number in range(10)}
    results = [
        write_scores(tmp_path / n, s, w, groups=patients) for n, s, w in (("a", 1, 0), ("b", 50, 40), ("c", 9, 5))
    ]
    page = make_page(results)
    p, note = section(page, "Paired tests").rows[0][3], section(page, "Paired tests").note
    assert p == pytest.approx(2 / 2**6) and "over the 6 patients (10 cases) that all results share" in note
    assert "in each of 6 patients" in section(page, "Mean ranks over the patients").note
    for folder in results:
        value = json.loads((folder / "scores.json").read_text())
        assert value.pop("groups") == patients
        (folder / "scores.json").write_text(json.dumps(value))
    older = section(make_page(results), "Paired tests")
    assert older.rows[0][3] == pytest.approx(2 / 2**10) and "over the 10 cases that all results share" in older.note


def paired(tmp_path, *groups):
    """The paired tests of two results whose cases belong to these patients."""
    results = (
        write_scores(tmp_path / f"{place}", seed, worse, groups=of_one)
        for place, (seed, worse, of_one) in enumerate(zip((1, 50), (0, 40), groups, strict=True))
    )
    return section(make_page(list(results)), "Paired tests")


def test_five_patients_are_compared_case_by_case_and_the_page_says_so(tmp_path):
    patients = {f"case_{number}": f"p{number // 2}" for number in range(10)}
    few = paired(tmp_path, patients, patients)
    assert few.rows[0][3] == pytest.approx(2 / 2**10) and "over the 10 cases that all results share" in few.note
    assert "5 patients are too few to draw from: intervals and tests are over their 10 cases" in few.note


def test_results_that_name_different_patients_are_compared_case_by_case_and_the_page_says_so(tmp_path):
    patients = {f"case_{number}": f"p{min(number, 6)}" for number in range(10)}
    unlike = paired(tmp_path, patients, patients | {"case_3": "p6"})
    assert unlike.rows[0][3] == pytest.approx(2 / 2**10) and "over the 10 cases that all results share" in unlike.note
    assert "name different patients for 1 of them (first: case_3)" in unlike.note


def test_runs_that_differ_in_their_seed_alone_are_summed_up(tmp_path):
    folders = []
    for seed in (0, 1, 2):
        folder = write_run(write_scores(tmp_path / f"seed{seed}", seed, 5), config={**RUN["config"], "seed": seed})
        folders.append(folder)
    other = write_run(write_scores(tmp_path / "other", 9, 5), config={**RUN["config"], "recipe": "dpt"})
    row = section(make_page([*folders, other]), "Repeated with other seeds").rows
    assert len(row) == 1 and row[0][:2] == ("seed0, seed1, seed2", 3) and row[0][3] > 0


def test_results_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [write_run(tmp_path / side / "run") for side in ("a", "b")]
    assert make_page(folders).subtitle == "a/run, b/run"
    assert make_page([folders[0], folders[0]]).subtitle == "run (1), run (2)"


def test_only_shared_cases_are_compared_and_the_page_says_so(tmp_path):
    page = make_page([write_scores(tmp_path / "a", 1, 0), write_scores(tmp_path / "b", 2, 0, missing=3)])
    assert "they share 9, over which they are compared" in page.warnings[0]
    assert "over the 9 cases that all results share" in section(page, "Paired tests").note


def test_the_command_scores_then_reports_with_pictures_of_lowest_middle_and_highest(dataset, capsys):
    labels = dataset / "labels.json"
    labels.write_text(json.dumps({"background": 0, "liver": 1, "<i>lesion</i>": 2}))
    predictions = dataset / "predictions"
    assert main(["evaluate", str(predictions), str(dataset / "data"), "--labels", str(labels), "--workers", "1"]) == 0
    assert main(["report", str(predictions), "--dataset", str(dataset / "data"), "--title", HOSTILE]) == 2
    assert "does not say what its label values mean" in capsys.readouterr().err
    with_images = ["--dataset", str(dataset / "data"), "--labels", str(labels)]
    assert main(["report", str(predictions), *with_images, "--title", HOSTILE]) == 0
    html = (predictions / "report" / "report.html").read_text()
    assert html.count("data:image/png") == 3 and "Lowest: case_9" in html and "Highest: &lt;b onload=x&gt;" in html
    assert "<i>" not in html and "<b " not in html
    assert len(html) < 2_000_000
    capsys.readouterr()
    assert main(["report", str(predictions), str(predictions), "--out", str(dataset / "both"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == str(dataset / "both" / "page.json")


def test_what_is_no_result_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"holds neither run\.json nor scores\.json"):
        make_page([tmp_path])
    folder = write_run(tmp_path / "run")
    (folder / "log.jsonl").write_text('{"loss": 1.0}\n')
    with pytest.raises(ConfigError, match="line 1 is damaged"):
        make_page([folder])
    (folder / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="the key 'config' is missing"):
        make_page([folder])
    assert main(["report", str(tmp_path / "nowhere")]) == 3


def test_pictures_of_other_cases_are_refused(tmp_path, dataset):
    scored = write_scores(tmp_path / "scored", 1, 2)
    with pytest.raises(DatasetError, match="no scored case has its image in the data set and its prediction here"):
        make_page([scored], dataset=dataset / "data", labels=LABELS)
