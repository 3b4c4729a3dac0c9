"""Laws of scoring files: every pair on its own grid, failures listed, the record complete, the table readable."""

import json

import numpy as np
import pytest

from voxdino.core.errors import DatasetError, GeometryError, UsageError
from voxdino.core.geometry import Grid
from voxdino.core.io import write_label_map
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet, Region
from voxdino.core.volume import LabelMap
from voxdino.evaluation.evaluate import evaluate, pair_files
from voxdino.evaluation.measure import Measures, score_label_maps
from voxdino.evaluation.report import report_rows, report_table
from voxdino.evaluation.scores import Scores

LABELS = LabelSet(names=("background", "liver", "lesion"), ids=(0, 5, 9), ignore_id=17)
GRID = Grid.from_spacing((12, 10, 6), (1.0, 2.0, 3.0))


def label_map(lesion=True, shift=0, grid=GRID):
    array = np.zeros(grid.shape, np.uint8)
    array[2 + shift : 8 + shift, 2:7, 1:5] = 5
    if lesion:
        array[4:6, 3:5, 2:3] = 9
    return LabelMap(array, grid)


def write_pairs(folder, maps):
    """(case, prediction, reference) for every {case: (prediction, reference)}."""
    for case, (prediction, reference) in maps.items():
        write_label_map(folder / "predictions" / f"{case}.nii.gz", prediction)
        write_label_map(folder / "references" / f"{case}.nii.gz", reference)
    references = {case: folder / "references" / f"{case}.nii.gz" for case in maps}
    return pair_files(folder / "predictions", references)


def test_cases_structures_and_metrics_are_all_there(tmp_path):
    maps = {
        "a": (label_map(), label_map()),
        "b": (label_map(shift=1), label_map()),
        "c": (label_map(lesion=False), label_map()),
    }
    seen = []
    pairs = write_pairs(tmp_path, maps)
    scores = evaluate(pairs, LABELS, num_workers=2, on_progress=lambda *told: seen.append(told))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    rows = {(row.case, row.structure): row for row in scores.cases}
    assert rows["a", "liver"].values["dice"] == rows["a", "lesion"].values["nsd"] == 1.0
    assert rows["c", "lesion"].outcome == "missed"
    assert rows["c", "lesion"].values["hd95"] is None
    assert rows["c", "lesion"].values["dice"] == 0.0
    assert rows["a", "lesion"].values["volume"] == pytest.approx(4 * 6 / 1000)
    assert scores.mean("dice", "lesion") == pytest.approx(np.mean([1.0, rows["b", "lesion"].values["dice"], 0.0]))
    mean_of_c = np.mean([rows["c", name].values["dice"] for name in ("liver", "lesion")])
    case_means = [1.0, np.mean([rows["b", n].values["dice"] for n in ("liver", "lesion")]), mean_of_c]
    assert scores.mean() == pytest.approx(np.mean(case_means))
    hd95 = next(row for row in scores.summary if (row.structure, row.metric) == ("lesion", "hd95"))
    assert (hd95.num_cases, hd95.num_undefined, hd95.unit) == (3, 1, "mm")
    assert hd95.definition == scores.definitions["hd95"]
    assert any("fewer than 50" in warning for warning in scores.warnings)


def test_the_record_survives_its_file(tmp_path):
    pairs = write_pairs(tmp_path, {"a": (label_map(lesion=False), label_map(lesion=False))})
    scores = evaluate(pairs, LABELS)
    scores.write(tmp_path / "scores.json")
    assert Scores.read(tmp_path / "scores.json") == scores
    raw = json.loads((tmp_path / "scores.json").read_text())
    assert "undefined" in raw["rules"]["dice"]
    assert raw["cases"][1]["values"]["dice"] is None
    assert raw["counts"][1] == {"structure": "lesion", "both": 0, "missed": 0, "false_alarm": 0, "absent": 1}
    assert any("lesion is in no reference" in warning for warning in raw["warnings"])


def test_the_number_of_workers_changes_nothing(tmp_path):
    pairs = write_pairs(tmp_path, {f"c{i}": (label_map(shift=i % 3), label_map()) for i in range(5)})
    assert evaluate(pairs, LABELS, num_workers=1) == evaluate(pairs, LABELS, num_workers=3)


def test_grids_must_agree_and_a_failed_case_is_listed(tmp_path):
    moved = Grid(GRID.shape, GRID.affine + np.eye(4, k=3) * 0.5)
    smaller = Grid.from_spacing((12, 10, 7), (1.0, 2.0, 3.0))
    maps = {
        "good": (label_map(), label_map()),
        "moved": (label_map(grid=moved), label_map()),
        "other": (label_map(grid=smaller), label_map()),
    }
    pairs = write_pairs(tmp_path, maps)
    scores = evaluate(pairs, LABELS)
    assert scores.num_cases == 1
    messages = {failed.case: failed.message for failed in scores.failed}
    assert "0.5 mm away" in messages["moved"]
    assert "12 x 10 x 7 voxels, but its reference has 12 x 10 x 6" in messages["other"]
    with pytest.raises(GeometryError):
        evaluate(pairs, LABELS, strict=True)
    assert evaluate(pairs, LABELS, ReadOptions(geometry_tolerance=0.6)).num_cases == 2
    assert evaluate(pairs, LABELS, ReadOptions(trust_array_order=True)).num_cases == 2


def test_undeclared_labels_and_damaged_files_fail_by_name(tmp_path):
    strange = LabelMap(label_map().array + np.uint8(1), GRID)
    pairs = write_pairs(tmp_path, {"a": (strange, label_map()), "b": (label_map(), label_map())})
    pairs[1][1].write_bytes(pairs[1][1].read_bytes()[:-12])
    scores = evaluate(pairs, LABELS)
    assert scores.num_cases == 0
    assert [failed.case for failed in scores.failed] == ["a", "b"]
    assert "undeclared label values" in scores.failed[0].message
    assert all(str(tmp_path) not in failed.message for failed in scores.failed)
    assert scores.mean() is None


def test_ignored_voxels_do_not_count():
    reference = LABELS.to_indices(label_map().array)
    prediction = reference.copy()
    prediction[0, 0, 0] = 1
    prediction[4:6] = 0
    reference[0, 0, 0] = LABELS.ignore_index
    reference[4:6] = LABELS.ignore_index
    rows = score_label_maps(prediction, reference, GRID, LABELS)
    assert rows[0].values["dice"] == 1.0


def test_regions_are_scored_as_unions():
    labels = LabelSet(
        names=("background", "oedema", "core"),
        ids=(0, 1, 2),
        regions=(Region(name="whole", ids=(1, 2)), Region(name="core", ids=(2,))),
        region_ids=(1, 2),
    )
    reference = np.zeros((6, 6), np.uint8)
    reference[1:5, 1:5], reference[2:4, 2:4] = 1, 2
    prediction = np.where(reference == 2, 1, reference).astype(np.uint8)  # the core called oedema
    rows = score_label_maps(prediction, reference, Grid.from_spacing((6, 6), unit="px"), labels)
    assert [(row.structure, row.values["dice"], row.outcome) for row in rows] == [
        ("whole", 1.0, "both"),
        ("core", 0.0, "missed"),
    ]


def test_a_value_mapping_meant_for_the_references_leaves_predictions_alone(tmp_path):
    binary = LabelSet(names=("background", "mole"), ids=(0, 1))
    array = (label_map().array > 0).astype(np.uint8)
    pairs = write_pairs(tmp_path, {"a": (LabelMap(array, GRID), LabelMap(array * np.uint8(255), GRID))})
    assert evaluate(pairs, binary).num_cases == 0
    assert evaluate(pairs, binary, ReadOptions(label_map=((255, 1),))).mean() == 1.0


def test_pictures_are_scored_in_pixels(tmp_path):
    array = np.zeros((9, 8), np.uint8)
    array[2:6, 2:5] = 1
    for name in ("p", "r"):
        write_label_map(tmp_path / name / "a.png", LabelMap(array, Grid.from_spacing((9, 8), unit="px")))
    labels = LabelSet(names=("background", "mole"), ids=(0, 1))
    scores = evaluate(pair_files(tmp_path / "p", {"a": tmp_path / "r" / "a.png"}), labels)
    assert (scores.length_unit, scores.volume_unit) == ("px", "px")
    assert scores.mean("volume", "mole") == 12


def test_the_table_has_a_row_per_structure(tmp_path):
    maps = {c: (label_map(shift=s, lesion=c != "b"), label_map()) for c, s in (("a", 0), ("b", 1), ("c", 2))}
    scores = evaluate(write_pairs(tmp_path, maps), LABELS)
    header, rows = report_rows(scores)
    assert header == (
        "structure",
        "Dice",
        "HD95 (mm)",
        "NSD at 1 mm",
        "volume error (ml)",
        "missed",
        "false alarms",
    )
    assert [row[0] for row in rows] == ["liver", "lesion", "mean"]
    assert all(len(row) == len(header) for row in rows)
    assert rows[1][2].endswith("(1 undefined)")
    assert rows[1][-2:] == ("1 of 3", "0")
    table = report_table(scores)
    assert table.row_count == 3
    assert "fewer than 50" in str(table.caption)


def test_missing_predictions_are_listed(tmp_path):
    pairs = write_pairs(tmp_path, {"a": (label_map(), label_map())})
    with pytest.raises(DatasetError, match="no prediction for 2 of 3 cases: b, c"):
        pair_files(tmp_path / "predictions", dict.fromkeys("abc", pairs[0][2]))
    with pytest.raises(DatasetError, match="no prediction to score"):
        evaluate([], LABELS)


def test_an_unknown_metric_gets_the_nearest_name(tmp_path):
    pairs = write_pairs(tmp_path, {"a": (label_map(), label_map())})
    with pytest.raises(UsageError, match="Did you mean 'hd95'"):
        evaluate(pairs, LABELS, metrics=["hd59"])
    assert set(evaluate(pairs, LABELS, metrics=["dice"]).definitions) == {"dice"}


def test_both_rules_for_empty_masks_and_their_counts(tmp_path):
    maps = {
        "both": (label_map(), label_map()),
        "missed": (label_map(lesion=False), label_map()),
        "invented": (label_map(), label_map(lesion=False)),
        "neither": (label_map(lesion=False), label_map(lesion=False)),
    }
    pairs = write_pairs(tmp_path, maps)
    plain, scored = evaluate(pairs, LABELS), evaluate(pairs, LABELS, empty="score")
    count = next(one for one in scored.counts if one.structure == "lesion")
    assert (count.both, count.missed, count.false_alarm, count.absent) == (1, 1, 1, 1)
    assert plain.mean("dice", "lesion") == pytest.approx((1 + 0 + 0) / 3)
    assert scored.mean("dice", "lesion") == pytest.approx((1 + 0 + 0 + 1) / 4)
    diagonal = np.linalg.norm([12 * 1, 10 * 2, 6 * 3])
    assert scored.mean("hd95", "lesion") == pytest.approx((0 + diagonal + diagonal + 0) / 4)
    assert plain.empty == "undefined" and scored.empty == "score"
    assert scored.definitions["hd95"] == f"{plain.definitions['hd95']}:empty-scored"
    assert all(row.num_undefined == 0 for row in scored.summary)
    assert "lesion: in neither mask in 1 cases" in str(report_table(plain).caption)
    assert f"hd95 = {scored.definitions['hd95']}" in str(report_table(scored).caption)


def test_intervals_over_patients_keep_the_mean_and_widen_with_alike_cases(tmp_path):
    maps = {f"p{i}s{j}": (label_map(shift=i % 4), label_map()) for i in range(5) for j in range(3)}
    pairs = write_pairs(tmp_path, maps)
    by_case = evaluate(pairs, LABELS)
    by_patient = evaluate(pairs, LABELS, groups={case: case[:2] for case in maps if case[1] != "4"})
    assert (by_case.num_patients, by_patient.num_patients) == (None, 4 + 3)  # the cases of no group are their own
    for one, other in zip(by_case.summary, by_patient.summary, strict=True):
        assert one.mean == pytest.approx(other.mean) and one.num_cases == other.num_cases == 15
    widths = [
        next(row.high - row.low for row in scores.summary if (row.structure, row.metric) == ("liver", "dice"))
        for scores in (by_case, by_patient)
    ]
    assert widths[1] > 1.3 * widths[0]
    assert "7 patients" in str(report_table(by_patient).caption)
    assert any("7 patients: intervals" in warning for warning in by_patient.warnings)


def test_five_patients_have_intervals_over_their_cases_and_a_warning(tmp_path):
    maps = {f"p{i}s{j}": (label_map(shift=i % 4), label_map()) for i in range(5) for j in range(3)}
    pairs, groups = write_pairs(tmp_path, maps), {case: case[:2] for case in maps}
    options = {"metrics": ("dice", "lesion_recall", "meddinov3:hd95")}
    by_case, by_patient = evaluate(pairs, LABELS, **options), evaluate(pairs, LABELS, groups=groups, **options)
    assert (by_patient.summary, by_patient.lesions) == (by_case.summary, by_case.lesions)
    assert by_patient.num_patients is None and by_patient.groups == groups
    assert any("5 patients are too few to draw from" in told for told in by_patient.warnings)


def test_patients_without_a_value_are_not_drawn_over(tmp_path):
    maps = {
        f"p{i}s{j}": (label_map(lesion=i < 3 and j > 0, shift=i % 4), label_map(lesion=i < 3))
        for i in range(7)
        for j in range(2)
    }
    pairs, groups = write_pairs(tmp_path, maps), {case: case[:2] for case in maps}
    by_case, by_patient = (evaluate(pairs, LABELS, metrics=("dice",), groups=given) for given in (None, groups))
    ends = [{row.structure: (row.low, row.high) for row in one.summary} for one in (by_case, by_patient)]
    assert ends[0]["lesion"] == ends[1]["lesion"] and ends[0]["liver"] != ends[1]["liver"]
    assert by_patient.num_patients == 7
    assert next(told for told in by_patient.warnings if "fewer than 6 patients" in told).startswith("lesion: ")


def test_lesions_of_a_patient_are_resampled_together(tmp_path):
    maps = {f"p{i}s{j}": (label_map(lesion=i > 0), label_map()) for i in range(8) for j in range(2)}
    pairs = write_pairs(tmp_path, maps)
    options = {"metrics": ("lesion_recall",)}
    by_case = evaluate(pairs, LABELS, **options).lesions[1]
    by_patient = evaluate(pairs, LABELS, groups={case: case[:2] for case in maps}, **options).lesions[1]
    assert by_case.num_reference == by_patient.num_reference == 16
    assert by_case.recall.value == by_patient.recall.value == 0.875
    assert by_patient.recall.low < by_case.recall.low


def test_papers_average_over_classes_after_cases(tmp_path):
    maps = {"a": (label_map(shift=1), label_map()), "b": (label_map(lesion=False), label_map(lesion=False))}
    scores = evaluate(write_pairs(tmp_path, maps), LABELS, metrics=("dice", "nnunet:dice"))
    rows = {(row.case, row.structure): row.values["dice"] for row in scores.cases}
    lesion, liver = rows["a", "lesion"], (rows["a", "liver"] + rows["b", "liver"]) / 2
    assert scores.mean("nnunet:dice") == pytest.approx((liver + lesion) / 2)
    assert scores.mean("dice") == pytest.approx(((rows["a", "liver"] + lesion) / 2 + rows["b", "liver"]) / 2)


def test_segdino_columns_are_in_its_pixels_and_refuse_volumes(tmp_path):
    array = np.zeros((2, 128, 64), np.uint8)
    array[0, 20:60, 10:40], array[1, 20:60, 13:40] = 1, 1
    labels = LabelSet(names=("background", "mole"), ids=(0, 1))
    grid = Grid.from_spacing((128, 64), (0.5, 0.5))
    (row,) = score_label_maps(*array, grid, labels, measures=Measures(metrics=("hd", "segdino:hd95", "segdino:dice")))
    assert row.values["hd"] == pytest.approx(3 * 0.5)
    assert row.values["segdino:hd95"] == pytest.approx(3 * 256 / 64)
    assert row.values["segdino:dice"] == pytest.approx(2 * 27 / (27 + 30))
    scores = evaluate(write_pairs(tmp_path, {"a": (label_map(), label_map())}), LABELS, metrics=("segdino:dice",))
    assert "pictures of 256 x 256" in scores.failed[0].message
