"""Laws of cleaning up: what each rule does, and that only what helps is chosen."""

import numpy as np
import pytest

from voxdino.core.geometry import Grid
from voxdino.core.labels import LabelSet
from voxdino.core.volume import LabelMap
from voxdino.inference.postprocess import Postprocessing, Rule, choose_postprocessing, mean_dice

LABELS = LabelSet(names=("background", "liver", "lesion"), ids=(0, 5, 9))
SPACING = (1.0, 2.0, 0.5)  # a voxel is 1 mm³


def label_map(array):
    array = np.asarray(array, dtype=np.uint8)
    return LabelMap(array, Grid.from_spacing(array.shape, SPACING[: array.ndim]))


def organ(*extra, hole=False):
    """A liver of 4 x 3 x 5 voxels, with more of it (value 5) at the given voxels."""
    array = np.zeros((9, 8, 7), np.uint8)
    array[1:5, 2:5, 1:6] = 5
    if hole:
        array[2, 3, 3] = 0
    for place in extra:
        array[place] = 5
    return array


def cleaned(array, **rule):
    given = label_map(array)
    before = given.array.copy()
    found = Postprocessing(rules={"liver": Rule(**rule)}).apply(given, LABELS)
    np.testing.assert_array_equal(given.array, before)
    assert found.grid is given.grid
    return found.array


def test_only_the_largest_component_stays():
    np.testing.assert_array_equal(cleaned(organ((7, 7, 6), (0, 0, 0)), largest=True), organ())


@pytest.mark.parametrize("min_volume, stays", [(1.5, True), (2.0, True), (2.1, False)])
def test_components_below_a_volume_go_and_those_at_it_stay(min_volume, stays):
    two = ((7, 7, 6), (7, 7, 5), (8, 0, 0))
    np.testing.assert_array_equal(cleaned(organ(*two), min_volume=min_volume), organ(*two[:2]) if stays else organ())


def test_volumes_are_in_cubic_millimetres():
    array = organ((7, 7, 6))
    fine = LabelMap(array, Grid.from_spacing(array.shape, (0.5, 0.5, 0.5)))
    rules = Postprocessing(rules={"liver": Rule(min_volume=0.5)})
    np.testing.assert_array_equal(rules.apply(fine, LABELS).array, organ())


def test_enclosed_background_is_filled_but_no_other_class():
    np.testing.assert_array_equal(cleaned(organ(hole=True), fill_holes=True), organ())
    array = organ(hole=True)
    array[2, 3, 3] = 9
    np.testing.assert_array_equal(cleaned(array, fill_holes=True), array)


def test_what_is_open_to_one_side_is_no_hole():
    array = organ(hole=True)
    array[1, 3, 3] = 0
    np.testing.assert_array_equal(cleaned(array, fill_holes=True), array)


def test_pictures_are_cleaned_in_two_dimensions():
    array = np.zeros((7, 8), np.uint8)
    array[1:5, 1:6] = 5
    array[2, 2] = 0
    array[6, 7] = 5
    expected = array.copy()
    expected[2, 2], expected[6, 7] = 5, 0
    np.testing.assert_array_equal(cleaned(array, largest=True, fill_holes=True), expected)


@pytest.mark.parametrize("rule", [{}, {"largest": True}, {"fill_holes": True}, {"min_volume": 3.0}])
def test_cleaning_twice_changes_nothing_more_and_an_absent_class_is_no_matter(rule):
    once = cleaned(organ((7, 7, 6), hole=True), **rule)
    np.testing.assert_array_equal(cleaned(once, **rule), once)
    np.testing.assert_array_equal(cleaned(np.zeros((3, 4, 5)), **rule), np.zeros((3, 4, 5)))


def choose(*pairs):
    maps = [(label_map(found), label_map(truth)) for found, truth in pairs]
    return choose_postprocessing(lambda: maps, LABELS), maps


def test_a_rule_is_chosen_where_it_raises_dice_and_its_evidence_is_true():
    noisy = organ((7, 7, 6), (8, 0, 0))
    chosen, maps = choose((noisy, organ()), (organ(hole=True), organ()))
    assert set(chosen.rules) == {"liver"}
    assert chosen.rules["liver"].fill_holes
    evidence = chosen.evidence["liver"]
    assert evidence.num_cases == 2
    assert evidence.before < evidence.after == 1
    after = [(chosen.apply(found, LABELS), truth) for found, truth in maps]
    assert mean_dice(maps, LABELS) < mean_dice(after, LABELS) == 1


def test_nothing_is_chosen_where_nothing_helps():
    two_parts = organ((7, 7, 6), (7, 7, 5))
    chosen, maps = choose((two_parts, two_parts), (organ(), organ()))
    assert chosen == Postprocessing()
    assert chosen.apply(maps[0][0], LABELS) is maps[0][0]


def test_what_helps_one_case_but_harms_two_is_not_chosen():
    two_parts = organ((7, 7, 6), (7, 7, 5))
    far = organ((8, 0, 0), (8, 1, 0), (8, 2, 0), (8, 3, 0), (8, 4, 0))
    chosen, _ = choose((far, organ()), (two_parts, two_parts), (two_parts, two_parts))
    assert "liver" not in chosen.rules


def test_what_was_never_there_may_go():
    false_alarm = np.zeros((9, 8, 7), np.uint8)
    false_alarm[4, 4, 4] = 5
    empty = np.zeros((9, 8, 7), np.uint8)
    chosen, _ = choose((false_alarm, empty), (organ(), organ()))
    assert chosen.rules["liver"].min_volume > 1
    assert not chosen.apply(label_map(false_alarm), LABELS).array.any()


def test_rules_survive_the_file(tmp_path):
    rules = Postprocessing(rules={"liver": Rule(min_volume=12.5, largest=True)})
    rules.write(tmp_path / "postprocessing.json")
    assert Postprocessing.of_run(tmp_path) == rules
    assert Postprocessing.of_run(tmp_path / "other") == Postprocessing()
