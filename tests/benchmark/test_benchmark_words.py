"""Words follow from numbers: an encoder that does not beat its floors is said to fail."""

from dataclasses import replace

import numpy as np
import pytest
from small_benchmark import classified, opened, outcome_of, segmented

from voxdino.benchmark.grid import Cell
from voxdino.benchmark.page import leaderboard, report_page
from voxdino.benchmark.standing import Standing
from voxdino.benchmark.tasks import TASKS
from voxdino.benchmark.words import findings, warnings
from voxdino.report.html import render

LEVELS = np.linspace(0.0, 0.1, 40)


@pytest.fixture(scope="module")
def encoders():
    return [
        opened("random:tiny", name="ours", claimed="ours.safetensors"),
        opened("random:tiny", name="random"),
        opened("pixels:16", name="pixels"),
    ]


def standing_of(encoders, means, **scores):
    """scores: task -> mean Dice of each encoder."""
    noise = np.random.default_rng(0).normal(0, 0.005, (len(encoders), len(LEVELS)))
    results = [
        segmented(encoder.name, mean + LEVELS + noise[place], task=task)
        for task, of_task in (means | scores).items()
        for place, (encoder, mean) in enumerate(zip(encoders, of_task, strict=True))
    ]
    return Standing(outcome_of(results, encoders, dict.fromkeys(means | scores, "patch_linear")))


def test_an_encoder_that_beats_its_floors_is_praised_with_the_numbers(encoders):
    overall, task = findings(standing_of(encoders, {"organs": (0.8, 0.6, 0.5)}))
    assert overall.endswith("in 1 of 1 tasks.")
    assert "ours reaches Dice 0.8" in task and "It beats random weights (0.65" in task and "fail" not in task


def test_an_encoder_that_does_not_beat_pixels_is_said_to_fail(encoders):
    overall, _, task = findings(standing_of(encoders, {"organs": (0.8, 0.6, 0.5), "membranes": (0.3, 0.2, 0.3)}))
    assert overall.endswith("in 1 of 2 tasks; not in membranes.")
    assert "It fails to beat the raw pixels" in task and "could have shown" in task
    assert "Dice below 0.5" in task


def test_a_difference_that_so_few_cases_cannot_show_is_no_failure(encoders):
    noise = np.random.default_rng(1).normal(0, 0.2, (2, 6))
    results = [
        segmented(one.name, 0.5 + shift + noise[place])
        for place, (one, shift) in enumerate(zip(encoders[:2], (0.1, 0.0), strict=True))
    ]
    told = findings(Standing(outcome_of(results, encoders[:2], {"organs": "patch_linear"})))[-1]
    assert "It lies above random weights, but not beyond chance" in told


def test_a_floor_that_is_better_is_said_to_be_better(encoders):
    assert "It fails: the raw pixels are better" in findings(standing_of(encoders, {"m": (0.3, 0.2, 0.5)}))[-1]


def test_leaks_and_few_cases_are_warned_of(encoders):
    standing = standing_of(encoders, {"organs": (0.8, 0.6, 0.5)})
    leaky = standing.outcome.results[0].model_copy(update={"leaked": ("case_0", "case_3")})
    outcome = outcome_of([leaky, *standing.outcome.results[1:]], encoders, {"organs": "patch_linear"})
    few, leak = warnings(Standing(outcome))
    assert "40 test cases" in few and "2 of 40 test cases were in the pretraining of ours" in leak


@pytest.mark.parametrize(
    ("num_patients", "told"),
    [
        (40, ["organs: 40 test patients: intervals"]),
        (60, []),
        (3, ["organs: 3 patients or sites are too few to draw from: intervals and tests are over their 120 cases"]),
    ],
)
def test_few_patients_are_warned_of_however_many_cases_they_have(encoders, num_patients, told):
    groups = tuple(f"p{place % num_patients}" for place in range(120))
    result = segmented("ours", np.linspace(0.4, 0.9, 120)).model_copy(update={"groups": groups})
    found = warnings(Standing(outcome_of([result], encoders[:1], {"organs": "patch_linear"})))
    assert len(found) == len(told) and all(words.startswith(start) for words, start in zip(found, told, strict=True))


def test_the_resolution_is_chosen_on_validation_not_on_test(encoders):
    low = segmented("ours", LEVELS + 0.5, resolution=112).model_copy(update={"validation": 0.9})
    high = segmented("ours", LEVELS + 0.8, resolution=224).model_copy(update={"validation": 0.2})
    standing = Standing(outcome_of([low, high], encoders[:1], {"organs": "patch_linear"}))
    assert standing.board["organs"][0].result.cell.resolution == 112


def test_the_leaderboard_has_a_row_for_each_task_and_a_column_for_each_encoder(encoders):
    table = leaderboard(standing_of(encoders, {"a": (0.8, 0.6, 0.5), "b": (0.3, 0.2, 0.5)}))
    assert [row[0] for row in table.rows] == ["a", "b"]
    assert [column.title for column in table.columns[-3:]] == ["ours", "random", "pixels"]
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_hostile_names_stay_text(encoders):
    name = "<script>alert(1)</script>"
    page = report_page(standing_of(encoders, {name: (0.8, 0.6, 0.5), "b": (0.3, 0.2, 0.5)}))
    assert name not in render(page) and "&lt;script&gt;" in render(page)


@pytest.mark.parametrize(("chosen_by", "best"), [("auroc", 224), ("brier", 112)])
def test_the_resolution_is_the_one_of_the_best_validation_score_whichever_way_is_better(chosen_by, best, monkeypatch):
    linear = TASKS["linear"]
    monkeypatch.setitem(TASKS, "linear", replace(linear, chosen_by=chosen_by))
    labels = np.arange(30) % 2
    results = [
        classified("ours", labels, np.linspace(0.1, 0.9, 30)).model_copy(
            update={"validation": value, "cell": Cell(task="t", encoder="ours", resolution=resolution)}
        )
        for resolution, value in ((112, 0.1), (224, 0.3))
    ]
    encoder = opened("pixels:16", name="ours")
    assert Standing(outcome_of(results, [encoder], {"t": "linear"})).board["t"][0].result.cell.resolution == best


def test_the_note_of_the_leaderboard_names_what_each_kind_of_task_is_chosen_by(encoders):
    found = segmented("ours", LEVELS + 0.5, task="t")
    told = {
        probe: leaderboard(Standing(outcome_of([result], encoders[:1], {"t": probe}))).note
        for probe, result in (
            ("retrieval", found.model_copy(update={"scores": {"map@10": found.scores["dice"]}})),
            ("patch_linear", found),
        )
    }
    assert "in retrieval the mAP at 10;" in told["retrieval"] and "AUROC;" not in told["retrieval"]
    assert "in segmentation the Dice;" in told["patch_linear"]
