"""Lesions: matched by hand and by brute force, summed over cases, split by size; nothing of it where nobody asks."""

import numpy as np
import pytest
from scipy import ndimage

from voxdino.core.geometry import Grid
from voxdino.core.io import write_label_map
from voxdino.core.labels import LabelSet
from voxdino.core.volume import LabelMap
from voxdino.evaluation.evaluate import evaluate
from voxdino.evaluation.lesions import lesion_scores, match_lesions, summarise_lesions
from voxdino.evaluation.measure import Measures, score_label_maps
from voxdino.evaluation.metrics import LESION_METRICS, USUAL_METRICS
from voxdino.evaluation.report import lesion_rows, lesion_table, report_rows
from voxdino.evaluation.scores import LesionScores, Scores
from voxdino.evaluation.statistics import pooled_interval

LABELS = LabelSet(names=("background", "organ", "lesion"), ids=(0, 1, 2), ignore_id=9)


def picture(*rows):
    return np.array([[mark == "#" for mark in row] for row in rows])


REFERENCE = picture("##....#.#", "##....#..", ".....#...", "..##.....")
PREDICTION = picture(".##......", ".......#.", "........#", "##.##...#")


def test_two_small_pictures_by_hand():
    """Reference: 4 voxels, 3 in a diagonal, 1 alone, 2. Predicted: 2 on the first, 4 beside the second, 2 alone, 2."""
    lesions = match_lesions(PREDICTION, REFERENCE)
    assert sorted(zip(lesions.num_voxels.tolist(), lesions.found.tolist(), strict=True)) == [
        (1, False),
        (2, True),
        (3, False),
        (4, True),
    ]
    assert (lesions.num_predicted, lesions.num_true) == (4, 2)
    assert (lesions.recall, lesions.precision, lesions.f1) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "share, num_found, num_true", [(0.0, 2, 2), (0.25, 2, 2), (0.26, 1, 2), (0.5, 1, 2), (0.6, 0, 0)]
)
def test_a_lesion_may_have_to_be_covered_more(share, num_found, num_true):
    lesions = match_lesions(PREDICTION, REFERENCE, min_overlap=share)
    assert (lesions.found.sum(), lesions.num_true) == (num_found, num_true)


def test_merging_and_splitting_are_no_mistakes():
    apart, together = picture("##.##"), picture("#####")
    merged, split = match_lesions(together, apart), match_lesions(apart, together)
    assert merged.found.tolist() == [True, True] and (merged.num_predicted, merged.num_true) == (1, 1)
    assert split.found.tolist() == [True] and (split.num_predicted, split.num_true) == (2, 2)
    assert merged.f1 == split.f1 == 1.0


def test_corners_connect():
    mask = np.zeros((2, 3, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True
    assert match_lesions(mask, mask).num_voxels.tolist() == [2]
    assert match_lesions(mask[0], mask[0]).num_voxels.tolist() == [1]


def test_empty_masks_are_undefined_or_nothing_as_the_rules_say():
    empty, full = np.zeros((3, 4), bool), np.ones((3, 4), bool)
    both, missed, invented = match_lesions(empty, empty), match_lesions(empty, full), match_lesions(full, empty)
    np.testing.assert_equal([both.recall, both.precision, both.f1], [np.nan] * 3)
    np.testing.assert_equal([missed.recall, missed.precision, missed.f1], [0.0, np.nan, 0.0])
    np.testing.assert_equal([invented.recall, invented.precision, invented.f1], [np.nan, 0.0, 0.0])


@pytest.mark.parametrize("shape", [(40, 31), (9, 21, 26)], ids=["2d", "3d"])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_matching_equals_brute_force(shape, share):
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), 1.0)
    other = noise + ndimage.gaussian_filter(rng.standard_normal(shape), 1.0)
    masks = noise > 1.2 * noise.std(), other > 1.2 * other.std()
    structure = np.ones((3,) * len(shape))
    expected = []
    for mask, by in (masks, masks[::-1]):
        numbered, num = ndimage.label(mask, structure)
        each = [numbered == index for index in range(1, num + 1)]
        expected.append([(int(one.sum()), (one & by).any() and (one & by).sum() >= share * one.sum()) for one in each])
    assert len(expected[0]) > 5
    lesions = match_lesions(masks[1], masks[0], min_overlap=share)
    assert sorted(zip(lesions.num_voxels.tolist(), lesions.found.tolist(), strict=True)) == sorted(expected[0])
    assert (lesions.num_predicted, lesions.num_true) == (len(expected[1]), sum(hit for _, hit in expected[1]))


def case_of(*lesions, num_predicted=0, num_true=0):
    return LesionScores(
        volumes=tuple(volume for volume, _ in lesions),
        found=tuple(found for _, found in lesions),
        num_predicted=num_predicted,
        num_true=num_true,
    )


def test_all_cases_together_and_by_size():
    cases = [
        case_of((2.0, False), (20.0, True), num_predicted=3, num_true=1),
        case_of(),
        case_of((3.0, False), (30.0, True), (400.0, True), (20000.0, True), num_predicted=3, num_true=3),
    ]
    found = summarise_lesions("lesion", cases, unit="mm³", min_overlap=0.0)
    assert (found.num_reference, found.num_found, found.num_predicted, found.num_true) == (6, 4, 6, 4)
    assert found.recall.value == pytest.approx(4 / 6) and found.precision.value == pytest.approx(4 / 6)
    assert found.f1.value == pytest.approx(4 / 6)
    thirds = [(one.low, one.high, one.num, one.num_found) for one in found.by_tercile]
    assert thirds == [(None, 3.0, 2, 0), (3.0, 30.0, 2, 2), (30.0, None, 2, 2)]
    fixed = [(one.low, one.high, one.num, one.recall.value) for one in found.by_volume]
    assert fixed == [(None, 10.0, 2, 0.0), (10.0, 100.0, 2, 1.0), (100.0, 1000.0, 1, 1.0), (10000.0, None, 1, 1.0)]


def test_equal_sizes_make_one_third_and_no_lesion_none():
    same = summarise_lesions("lesion", [case_of((5.0, True), (5.0, False))], unit="px", min_overlap=0.0)
    assert [(one.low, one.high, one.num) for one in same.by_tercile] == [(None, 5.0, 2)]
    none = summarise_lesions("lesion", [case_of(num_predicted=2), case_of()], unit="px", min_overlap=0.0)
    assert none.recall.value is None and none.by_tercile == none.by_volume == ()
    assert (none.precision.value, none.f1.value) == (0.0, 0.0)


def test_pooled_intervals_hold_the_value_narrow_with_cases_and_repeat_themselves():
    rng = np.random.default_rng(0)

    def interval(num_cases):
        whole = rng.integers(0, 9, num_cases)
        counts = np.stack([rng.binomial(whole, 0.7), whole], axis=1).astype(float)
        return counts, pooled_interval(counts, lambda sums: sums[:, 0] / np.maximum(sums[:, 1], 1))

    (counts, few), (_, many) = interval(10), interval(400)
    for value, low, high in (few, many):
        assert low < value < high
    assert 0.65 < many[1] < 0.7 < many[2] + 0.03 and many[2] - many[1] < 0.5 * (few[2] - few[1])
    assert few == pooled_interval(counts, lambda sums: sums[:, 0] / np.maximum(sums[:, 1], 1))
    assert pooled_interval(counts[:1], lambda sums: sums[:, 0])[1:] == (None, None)


def test_volumes_are_in_cubic_millimetres_and_single_slices_keep_their_thickness():
    label = np.zeros((5, 6, 4), np.uint8)
    label[:2, :3, 1] = 2
    for array in (label, label[:, :, 1:2]):
        grid = Grid.from_spacing(array.shape, (0.5, 2.0, 3.0))
        rows = score_label_maps(array, array, grid, LABELS, measures=Measures(metrics=LESION_METRICS))
        assert rows[1].lesions.volumes == (18.0,) and rows[1].lesions.found == (True,)
        assert rows[0].lesions.volumes == () and rows[0].values["lesion_f1"] is None


def write_pairs(folder, cases, suffix=".nii.gz", **grid):
    pairs = []
    for name, maps in cases.items():
        files = [folder / which / f"{name}{suffix}" for which in ("p", "r")]
        for path, array in zip(files, maps, strict=True):
            write_label_map(path, LabelMap(array, Grid.from_spacing(array.shape, **grid)))
        pairs.append((name, *files))
    return pairs


def small_set(folder):
    """Three cases: two lesions of which the large one is found; none; one that is found only in a tenth of it."""
    reference, prediction = np.zeros((3, 12, 10, 8), np.uint8), np.zeros((3, 12, 10, 8), np.uint8)
    reference[0, 1:4, 1:4, 1:4], reference[0, 8, 8, 6] = 2, 2
    prediction[0, 1:4, 1:4, 1:3], prediction[0, 10, 1, 1] = 2, 2
    reference[2, 2:12, 2:3, 3:4], prediction[2, 11, 2, 3] = 2, 2
    reference[0, 8, 7, 6], prediction[0, 8, 7, 6] = 9, 2  # ignored: neither finds nor claims
    cases = {f"c{n}": (prediction[n], reference[n]) for n in range(3)}
    return write_pairs(folder, cases, spacing=(1.0, 1.0, 5.0))


def test_evaluate_lists_lesions_where_asked_and_only_there(tmp_path):
    pairs = small_set(tmp_path)
    plain = evaluate(pairs, LABELS)
    assert not plain.lesions and all(row.lesions is None for row in plain.cases)
    assert set(plain.definitions) == set(USUAL_METRICS)
    scores = evaluate(pairs, LABELS, metrics=(*USUAL_METRICS, *LESION_METRICS))
    rows = {(row.case, row.structure): row for row in scores.cases}
    assert rows["c0", "lesion"].values["lesion_recall"] == rows["c0", "lesion"].values["lesion_precision"] == 0.5
    assert rows["c1", "lesion"].values["lesion_f1"] is None
    assert rows["c0", "lesion"].lesions.volumes == (5.0, 135.0) and rows["c0", "lesion"].lesions.found == (False, True)
    organ, lesion = scores.lesions
    assert (organ.structure, organ.num_reference, organ.recall.value) == ("organ", 0, None)
    assert (lesion.unit, lesion.num_reference, lesion.num_found, lesion.num_predicted) == ("mm³", 3, 2, 3)
    assert scores.mean("lesion_recall", "lesion") == pytest.approx((0.5 + 1.0) / 2)
    assert [row.values for row in plain.cases] == [
        {name: value for name, value in row.values.items() if name in USUAL_METRICS} for row in scores.cases
    ]
    scores.write(tmp_path / "scores.json")
    assert Scores.read(tmp_path / "scores.json") == scores
    strict = evaluate(pairs, LABELS, metrics=("lesion_recall",), min_overlap=0.2)
    assert strict.lesions[1].num_found == 1 and strict.lesions[1].min_overlap == 0.2


def test_pictures_without_spacing_are_counted_in_pixels(tmp_path):
    array = REFERENCE.astype(np.uint8)
    labels = LabelSet(names=("background", "mole"), ids=(0, 1))
    pairs = write_pairs(tmp_path, {"a": (PREDICTION.astype(np.uint8), array)}, suffix=".png", unit="px")
    (mole,) = evaluate(pairs, labels, metrics=LESION_METRICS).lesions
    assert mole.unit == "px" and mole.by_volume[0].num == 4 and mole.recall.low is None


def test_the_table_of_lesions_tells_sizes_and_the_rule(tmp_path):
    pairs = small_set(tmp_path)
    scores = evaluate(pairs, LABELS, metrics=(*USUAL_METRICS, *LESION_METRICS), min_overlap=0.1)
    header, rows = lesion_rows(scores)
    assert all(len(row) == len(header) for row in rows)
    assert [row[0] for row in rows if row[0]] == ["organ", "lesion"]
    whole = next(row for row in rows if row[0] == "lesion")
    assert whole[1:4] == ("all", "3", "2") and whole[4].startswith("0.667 [") and whole[7] == "1 of 3"
    assert [row[1] for row in rows[2:]] == [
        "third: up to 5 mm³",
        "third: 5 to 50 mm³",
        "third: above 50 mm³",
        "up to 10 mm³",
        "10 to 100 mm³",
        "100 to 1000 mm³",
    ]
    table = lesion_table(scores)
    assert table.row_count == len(rows) and "10% of its voxels are marked" in str(table.caption)
    assert report_rows(scores)[0] == report_rows(evaluate(pairs, LABELS))[0]  # the usual table stays as it is


def test_lesion_scores_keep_each_lesion_with_its_own_fate():
    scores = lesion_scores(match_lesions(PREDICTION, REFERENCE), 2.0)
    assert scores.volumes == (2.0, 4.0, 6.0, 8.0) and scores.found == (False, True, False, True)
