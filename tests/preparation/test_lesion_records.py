"""Connected components in a case's record: all of them where few, a fair share where many, each with its own voxels."""

import numpy as np
import pytest
from scipy import ndimage
from small_sets import LABELS, make_plan, write_nnunet

from voxdino.preparation import case_record
from voxdino.preparation.case_record import pack_lesions
from voxdino.preparation.dataset import read_dataset
from voxdino.preparation.prepare import CaseRecord, prepare


def lesions_of(label, name="x"):
    numbers, packed = pack_lesions(name, label, LABELS)
    return numbers, {index: case_record._unpack_lesions(text, label.shape) for index, text in packed.items()}


def blobs(shape, threshold, seed=0):
    """Smoothed noise cut at a threshold: components of all sizes, some of them touching the border."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.2)
    return noise > threshold * noise.std()


def by_scipy(mask):
    """Sorted (voxels, box) of the components of a mask, 26 neighbours."""
    numbered, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    boxes = [tuple((one.start, one.stop) for one in box) for box in ndimage.find_objects(numbered)]
    return sorted(zip(np.bincount(numbered.ravel())[1:].tolist(), boxes, strict=True))


@pytest.mark.parametrize("shape", [(13, 30, 41), (1, 60, 47)], ids=["volume", "picture"])
@pytest.mark.parametrize("block", [1 << 22, 501])
def test_few_components_are_all_there_with_size_box_and_voxels(shape, block, monkeypatch):
    monkeypatch.setattr(case_record, "_BLOCK", block)
    label = np.zeros(shape, np.uint8)
    label[blobs(shape, 1.3)] = 1
    label[blobs(shape, 1.6, seed=1)] = 2
    label[0, :3, :5] = LABELS.ignore_index
    numbers, found = lesions_of(label)
    for index in (1, 2):
        lesions, numbered = found[str(index)], ndimage.label(label == index, np.ones((3, 3, 3)))[0]
        assert numbers[str(index)] == len(lesions) == numbered.max() > 5
        assert sorted((one.num_voxels, one.box) for one in lesions) == by_scipy(label == index)
        seen = set()
        for one in lesions:
            here = numbered[tuple(one.voxels.T)]
            assert len(one.voxels) == len(np.unique(one.voxels, axis=0)) == min(one.num_voxels, 16)
            assert len(set(here)) == 1 and here[0] > 0
            seen.add(int(here[0]))
        assert len(seen) == len(lesions)


def test_diagonal_neighbours_are_one_component_and_touching_classes_are_two():
    label = np.zeros((3, 4, 5), np.uint8)
    label[0, 0, 0] = label[1, 1, 1] = 1
    label[2, 2, 2] = 2
    numbers, found = lesions_of(label)
    assert numbers == {"1": 1, "2": 1}
    assert found["1"][0].num_voxels == 2 and found["1"][0].box == ((0, 2), (0, 2), (0, 2))
    assert found["2"][0].voxels.tolist() == [[2, 2, 2]]


def test_of_many_components_200_are_kept_over_all_sizes():
    label = np.zeros((9, 120, 120), np.uint8)
    label[::2, ::2, ::4] = 1  # single voxels
    label[::2, ::12, ::4] = 0
    label[::2, ::12, ::12] = 1
    label[::2, ::12, 1::12] = 1  # a tenth of the components, of two voxels
    numbers, found = lesions_of(label)
    assert numbers["1"] == ndimage.label(label, np.ones((3, 3, 3)))[1] > 2000
    sizes = np.array([one.num_voxels for one in found["1"]])
    expected = np.mean([size for size, _ in by_scipy(label)])
    assert len(sizes) == 200 and sizes.mean() == pytest.approx(expected, abs=0.01)
    depths = np.array([one.voxels[0, 0] for one in found["1"]])
    assert np.bincount(depths)[::2].min() > 20  # of 40 on average: from everywhere


def test_the_draw_is_the_same_for_a_case_and_another_for_another():
    label = blobs((9, 80, 80), 1.0).astype(np.uint8)
    assert pack_lesions("x", label, LABELS) == pack_lesions("x", label, LABELS) != pack_lesions("y", label, LABELS)


def test_no_foreground_is_no_lesion():
    label = np.full((2, 3, 4), LABELS.ignore_index, np.uint8)
    label[0] = 0
    assert pack_lesions("x", label, LABELS) == ({}, {})


def test_the_label_map_is_left_as_it_was():
    label = blobs((5, 20, 20), 1.0).astype(np.uint8)
    before = label.copy()
    label.setflags(write=False)
    pack_lesions("x", label, LABELS)
    np.testing.assert_array_equal(label, before)


def test_prepare_writes_them(tmp_path):
    dataset = read_dataset(write_nnunet(tmp_path / "set"))
    folder = prepare(dataset, make_plan(), tmp_path / "work", num_workers=1).folder
    for case in dataset.cases:
        record = CaseRecord.read(folder / f"cases/{case.id}.json")
        assert record.is_whole and set(record.num_lesions) == set(record.lesions) == set(record.locations)
        for index, lesions in record.lesions.items():
            assert sum(one.num_voxels for one in lesions) == record.num_voxels[index]
