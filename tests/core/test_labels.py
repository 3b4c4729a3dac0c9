"""Label ids become class indices and come back, whatever their type, order and gaps; nothing undeclared passes."""

import numpy as np
import pytest

from voxdino.core.errors import DatasetError, LabelError
from voxdino.core.labels import IGNORE_INDEX, WIDE_IGNORE_INDEX, LabelSet, Region, map_values

SET = LabelSet(names=("background", "liver", "tumour"), ids=(0, 5, 90), ignore_id=7)
DTYPES = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64]


def drawn(ids, dtype, shape=(5, 3, 7)):
    return np.random.default_rng(0).choice(ids, shape).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["C", "F", "strided"])
def test_ids_come_back_from_indices(dtype, layout):
    array = drawn([0, 5, 90, 7], dtype)
    array = {"C": array, "F": np.asfortranarray(array), "strided": array[::2, :, ::-1]}[layout]
    indices = SET.to_indices(array)
    assert indices.dtype == np.uint8
    assert indices.shape == array.shape
    expected = np.vectorize({0: 0, 5: 1, 90: 2, 7: IGNORE_INDEX}.get)(array)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(SET.to_ids(indices), array)


def test_the_input_is_never_changed():
    array = drawn([0, 5, 90], np.uint8)
    before = array.copy()
    SET.to_ids(SET.to_indices(array))
    np.testing.assert_array_equal(array, before)


def test_masks_of_truth_values_are_labels():
    labels = LabelSet(names=("background", "lesion"), ids=(0, 1))
    np.testing.assert_array_equal(labels.to_indices(np.array([[True, False]])), [[1, 0]])


@pytest.mark.parametrize("largest", [255, 256, 65_535, 65_536, 2**53 + 1, 2**63])
def test_large_ids_are_exact_and_take_the_smallest_type(largest):
    labels = LabelSet(names=("background", "one", "other"), ids=(0, largest - 1, largest))
    array = np.array([0, largest, largest - 1], dtype=np.uint64)
    ids = labels.to_ids(labels.to_indices(array))
    np.testing.assert_array_equal(ids, array)
    assert ids.dtype == np.min_scalar_type(largest)
    with pytest.raises(LabelError):
        labels.to_indices(np.array([largest - 2], dtype=np.uint64))


def test_from_255_classes_on_indices_are_16_bit():
    for num_classes, dtype, ignored in ((254, np.uint8, 255), (255, np.uint16, 65535), (300, np.uint16, 65535)):
        labels = LabelSet(
            names=tuple(f"c{i}" for i in range(num_classes)), ids=tuple(range(num_classes)), ignore_id=60_000
        )
        indices = labels.to_indices(np.array([num_classes - 1, 60_000], dtype=np.uint16))
        assert indices.dtype == dtype
        assert indices.tolist() == [num_classes - 1, ignored]
        assert labels.ignore_index == ignored
        with pytest.raises(LabelError, match=r"59999 \(1 voxel\)"):
            labels.to_indices(np.array([59_999], dtype=np.uint16))
    assert (IGNORE_INDEX, WIDE_IGNORE_INDEX) == (255, 65535)


@pytest.mark.parametrize("dtype", DTYPES)
def test_undeclared_values_are_listed_with_their_counts(dtype):
    array = np.array([[0, 5, 6], [6, 1, 90]], dtype=dtype)
    with pytest.raises(LabelError) as caught:
        SET.to_indices(array, where="case_07.nii.gz")
    message = str(caught.value)
    for word in ("case_07.nii.gz", "1 (1 voxel), 6 (2 voxels)", "0 background, 5 liver, 90 tumour", "Fix: ", "--map"):
        assert word in message
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64])
def test_negative_labels_never_wrap_round(dtype):
    with pytest.raises(LabelError, match=r"-1 \(1 voxel\)"):
        SET.to_indices(np.array([0, -1], dtype=dtype))


def test_masks_of_0_and_255_are_offered_a_mapping():
    labels = LabelSet(names=("background", "lesion"), ids=(0, 1))
    array = np.array([0, 255, 255], dtype=np.uint8)
    with pytest.raises(LabelError, match=r"255 \(2 voxels\).*if 255 means 'lesion', say --map 255=1"):
        labels.to_indices(array)
    np.testing.assert_array_equal(labels.to_indices(map_values(array, ((255, 1),))), [0, 1, 1])


def test_mapping_happens_all_at_once_and_widens_the_type():
    array = np.array([0, 1, 2], dtype=np.uint8)
    assert map_values(array, ((1, 2), (2, 1))).tolist() == [0, 2, 1]
    assert map_values(array, ((1, 300),)).tolist() == [0, 300, 2]
    assert map_values(array, ((-1, 0), (900, 0))).tolist() == [0, 1, 2]
    assert array.tolist() == [0, 1, 2]


def test_many_undeclared_values_are_cut_short():
    with pytest.raises(LabelError, match="and 192 more"):
        LabelSet(names=("b", "x"), ids=(0, 1)).to_indices(np.arange(202, dtype=np.uint8))


def test_facts_of_a_set():
    assert SET.num_classes == SET.num_outputs == 3
    assert SET.foreground == (("liver", 5), ("tumour", 90))
    assert SET.region_members() == ()


def test_nnunet_classes_are_read_in_their_order():
    labels = LabelSet.from_nnunet({"background": 0, "tumour": 2, "liver": 1, "ignore": 3})
    assert labels.names == ("background", "tumour", "liver")
    assert labels.ids == (0, 2, 1)
    assert labels.ignore_id == 3


def test_nnunet_regions_become_outputs():
    labels = LabelSet.from_nnunet({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}, [1, 2, 3])
    assert labels.ids == (0, 1, 2, 3)
    assert labels.names[3] == "enhancing"
    assert labels.num_classes == 4
    assert labels.num_outputs == 3
    assert labels.regions[1] == Region(name="core", ids=(2, 3))
    assert labels.region_ids == (1, 2, 3)
    assert labels.region_members() == ((1, 2, 3), (2, 3), (3,))


@pytest.mark.parametrize(
    ("labels", "order", "words"),
    [
        ({"liver": 1}, None, "background"),
        ({"background": 0, "liver": "1"}, None, "'liver' is '1', not a whole number"),
        ({"background": 0, "liver": True}, None, "not a whole number"),
        ({"background": 0, "liver": 1.0}, None, "not a whole number"),
        ({"background": 0, "liver": 1, "other": 1}, None, "the same id"),
        ({"background": 0, "liver": -1}, None, "negative"),
        ({"background": 0}, None, "one class"),
        ({"background": 0, "whole": [1, 2], "core": 2}, None, "regions_class_order needs 2 ids"),
        ({"background": 0, "whole": [1, 2], "core": 2}, [1, 9], "id 9"),
        ({"background": 0, "liver": 1, "ignore": 1}, None, "ignore id 1"),
    ],
)
def test_wrong_nnunet_labels_are_refused(labels, order, words):
    with pytest.raises(DatasetError) as caught:
        LabelSet.from_nnunet(labels, order, where="dataset.json")
    assert words in str(caught.value)
    assert str(caught.value).startswith("dataset.json: ")
    assert caught.value.exit_code == 3


def test_a_set_survives_its_file(tmp_path):
    labels = LabelSet.from_nnunet({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
    labels.write(tmp_path / "labels.json")
    assert LabelSet.read(tmp_path / "labels.json") == labels
