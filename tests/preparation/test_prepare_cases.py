"""Preparing loses nothing and can be undone; a run can be killed, repeated and shared among workers."""

import json
import shutil
from itertools import permutations, product

import numpy as np
import pytest
from small_sets import AFFINE, LABELS, draw_case, make_plan, save_nifti, write_nnunet

from voxdino.core.arrays import ArrayFile
from voxdino.core.errors import (
    DatasetError,
    GeometryError,
    ImageError,
    LabelError,
    PartialError,
    PlanError,
    ResourceError,
)
from voxdino.core.geometry import Grid
from voxdino.core.labels import LabelSet
from voxdino.core.locks import lock_folder
from voxdino.core.safe_files import Manifest
from voxdino.core.shards import Shard
from voxdino.core.volume import LabelMap, Volume
from voxdino.preparation import case_record
from voxdino.preparation import prepare as module
from voxdino.preparation.check import survey
from voxdino.preparation.dataset import read_dataset
from voxdino.preparation.intensity import ChannelPolicy
from voxdino.preparation.prepare import (
    CaseRecord,
    normalise,
    prepare,
    prepare_case,
    restore_labels,
    smallest_lossless,
)

ORDERS = list(permutations(range(3)))
FLIPS = list(product([False, True], repeat=3))
OBLIQUE = np.array([[1.4, -0.3, 0.1, 5], [0.35, 0.95, -0.4, -2], [0.1, 0.2, 2.1, 9], [0, 0, 0, 1]])


def case_of(shape=(7, 6, 5), affine=OBLIQUE, channels=1, dtype=np.int16, seed=0):
    rng = np.random.default_rng(seed)
    grid = Grid(shape, affine)
    image = rng.integers(-500, 500, (channels, *shape)).astype(dtype)
    return Volume(image, grid), LabelMap(rng.integers(0, 3, shape).astype(np.uint8), grid)


def turned(volume, label, order, flips):
    """The same patient, stored in another axis order."""
    axes = [axis for axis, flip in enumerate(flips) if flip]
    grid = volume.grid.transposed(order, flips)
    image = np.flip(volume.array.transpose(0, *(1 + axis for axis in order)), [1 + axis for axis in axes])
    return Volume(image.copy(), grid), LabelMap(np.flip(label.array.transpose(order), axes).copy(), grid)


@pytest.mark.parametrize("slice_axis", ["S", "A", "R"])
def test_all_48_orientations_prepare_to_the_same_case_and_go_back_bit_for_bit(slice_axis):
    plan = make_plan(slice_axis=slice_axis)
    volume, label = case_of()
    first = prepare_case("x", volume, label, plan)
    for order, flips in product(ORDERS, FLIPS):
        stored, stored_label = turned(volume, label, order, flips)
        prepared = prepare_case("x", stored, stored_label, plan)
        np.testing.assert_array_equal(prepared.image, first.image)
        np.testing.assert_array_equal(prepared.label, first.label)
        assert prepared.scaling == first.scaling
        back = restore_labels(prepared.label, prepared.geometry)
        np.testing.assert_array_equal(back.array, stored_label.array)
        assert back.grid.same_as(stored.grid, 1e-9)


@pytest.mark.parametrize("shape", [(9, 7), (1, 5), (3, 1)])
def test_pictures_become_one_slice_and_go_back(shape):
    rng = np.random.default_rng(0)
    grid = Grid.from_spacing(shape, unit="px")
    volume = Volume(rng.integers(0, 255, (3, *shape)).astype(np.uint8), grid)
    label = LabelMap(rng.integers(0, 3, shape).astype(np.uint8), grid)
    prepared = prepare_case("x", volume, label, make_plan(ndim=2, slice_axis=None))
    assert prepared.image.shape == (3, 1, *shape) and prepared.geometry.native_shape == (1, *shape)
    np.testing.assert_array_equal(restore_labels(prepared.label, prepared.geometry).array, label.array)


@pytest.mark.parametrize("axis, letters", [("S", "SPL"), ("A", "PIL"), ("R", "LIP")])
def test_slices_lie_as_a_reader_sees_them(axis, letters):
    """Rows run down to the patient's back or feet, columns to his left (or back), as in every DICOM viewer."""
    volume, label = case_of(affine=np.diag([1.0, 1, 1, 1]))
    geometry = prepare_case("x", volume, label, make_plan(slice_axis=axis)).geometry
    assert volume.grid.transposed(geometry.order, geometry.flips).orientation == letters


def test_single_slices_keep_their_rank():
    volume, label = case_of(shape=(6, 5, 1))
    prepared = prepare_case("x", volume, label, make_plan())
    assert prepared.image.shape[1] == 1
    assert restore_labels(prepared.label, prepared.geometry).array.shape == (6, 5, 1)


def test_label_ids_with_gaps_become_class_indices_and_undeclared_ones_are_refused():
    labels = LabelSet(names=("background", "a", "b"), ids=(0, 7, 300), ignore_id=9)
    grid = Grid.from_spacing((2, 2, 1))
    volume = Volume(np.zeros((1, 2, 2, 1), np.int16), grid)
    label = LabelMap(np.array([[0, 7], [300, 9]], np.uint16)[..., None], grid)
    prepared = prepare_case("x", volume, label, make_plan(labels=labels))
    assert sorted(prepared.label.ravel().tolist()) == [0, 1, 2, 255]
    with pytest.raises(LabelError, match=r"x: .*8"):
        prepare_case("x", volume, LabelMap(label.array + np.uint16(1), grid), make_plan(labels=labels))


def test_prepare_does_not_change_its_input():
    volume, label = case_of()
    before = volume.array.copy(), label.array.copy()
    prepare_case("x", volume, label, make_plan(in_plane_spacing=(0.5, 0.5)))
    np.testing.assert_array_equal(volume.array, before[0])
    np.testing.assert_array_equal(label.array, before[1])


def test_in_plane_spacing_is_met_and_the_slice_axis_never_resampled():
    volume, label = case_of(shape=(20, 30, 5), affine=np.diag([0.5, 0.8, 5.0, 1]))
    prepared = prepare_case("x", volume, label, make_plan(in_plane_spacing=(1.0, 1.0)))
    assert prepared.image.shape == (1, 5, 24, 10) == (1, *prepared.label.shape)
    np.testing.assert_allclose(prepared.geometry.prepared_spacing, (5.0, 1.0, 1.0))
    assert prepared.geometry.native_shape == (5, 30, 20)
    same = prepare_case("x", volume, label, make_plan(in_plane_spacing=(0.81, 0.505)))  # within 2 %
    assert same.image.shape == (1, 5, 30, 20)
    constant = Volume(np.full_like(volume.array, 300), volume.grid)
    resampled = prepare_case("x", constant, label, make_plan(in_plane_spacing=(1.0, 0.7))).image
    np.testing.assert_allclose(resampled, 300, rtol=1e-6)


@pytest.mark.parametrize(
    "values, dtype",
    [
        (np.array([0.0, 255.0]), np.uint8),
        (np.array([-1000, 3000], np.int32), np.int16),
        (np.array([0, 65535], np.int64), np.uint16),
        (np.array([-40000.0, 40000.0]), np.float32),
        (np.array([0.5, 1.0]), np.float32),
        (np.array([True, False]), np.uint8),
        (np.array([0, 2**24], np.uint32), np.float32),
    ],
)
def test_images_are_kept_in_the_smallest_type_that_holds_them(values, dtype):
    stored = smallest_lossless(values)
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored.astype(float), values.astype(float))


def test_mr_is_scaled_by_its_own_percentiles_and_a_constant_image_becomes_zeros():
    volume, label = case_of(shape=(30, 20, 10))
    prepared = prepare_case("x", volume, label, make_plan())
    values = normalise(prepared.image, prepared.scaling)
    lower, upper = np.percentile(volume.array, (0.5, 99.5))
    assert (prepared.scaling[0].lower, prepared.scaling[0].upper) == pytest.approx((lower, upper))
    assert abs(values.mean()) < 1e-4 and values.std() == pytest.approx(1, abs=1e-4) and values.dtype == np.float32
    constant = Volume(np.full((1, 4, 3, 2), 7, np.int16), Grid.from_spacing((4, 3, 2)))
    prepared = prepare_case("x", constant, None, make_plan())
    assert (normalise(prepared.image, prepared.scaling) == 0).all() and prepared.label is None


def test_a_removed_background_does_not_count_in_the_scaling():
    inside = np.random.default_rng(0).normal(500, 50, 2000).astype(np.float32)
    for num_outside in (1000, 9000):
        values = np.concatenate([np.zeros(num_outside, np.float32), inside]).reshape(1, -1, 10, 10)
        volume = Volume(values, Grid.from_spacing(values.shape[1:]))
        (scaling,) = prepare_case("x", volume, None, make_plan()).scaling
        assert scaling.mean == pytest.approx(500, abs=5) and scaling.sd == pytest.approx(50, abs=5)


def test_fixed_policies_are_used_as_they_are_and_channels_may_repeat():
    volume, _ = case_of()
    window = ChannelPolicy(name="w", source=0, kind="window", lower=-100, upper=100, mean=0, sd=50)
    prepared = prepare_case("x", volume, None, make_plan(channels=(window, window)))
    expected = np.clip(prepared.image[0].astype(np.float32), -100, 100) / 50
    np.testing.assert_allclose(normalise(prepared.image, prepared.scaling), np.stack([expected] * 2), rtol=1e-6)


def test_missing_channels_and_the_wrong_kind_of_image_are_refused():
    volume, _ = case_of()
    picture = Volume(np.zeros((1, 4, 5), np.uint8), Grid.from_spacing((4, 5), unit="px"))
    second = ChannelPolicy(name="T2", source=1, kind="mr")
    with pytest.raises(ImageError, match="x: 1 channels, the plan needs 2"):
        prepare_case("x", volume, None, make_plan(channels=(second,)))
    with pytest.raises(PlanError, match="is a picture, but the plan is for volumes"):
        prepare_case("x", picture, None, make_plan())
    with pytest.raises(PlanError, match="is a volume, but the plan is for pictures"):
        prepare_case("x", volume, None, make_plan(ndim=2, slice_axis=None))


# ---- the folder `prepared` ----


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if not path.name.startswith(".lock") and path.is_file()
    }


@pytest.fixture
def dataset(tmp_path):
    return read_dataset(write_nnunet(tmp_path / "set", channels=("T1", "T2")))


PLAN = make_plan(
    channels=(ChannelPolicy(name="T1", source=0, kind="mr"), ChannelPolicy(name="T2", source=1, kind="mr"))
)


def test_what_is_written_is_what_was_prepared(dataset, tmp_path):
    summary = prepare(dataset, PLAN, tmp_path / "work", num_workers=1)
    assert (summary.num_prepared, summary.num_kept) == (5, 0)
    Manifest.read(summary.folder).verify(summary.folder)
    for number, case in enumerate(dataset.cases):
        image, label = draw_case(number)
        grid = Grid(image.shape, AFFINE)
        prepared = prepare_case(case.id, Volume(np.stack([image, image + 1]), grid), LabelMap(label, grid), PLAN)
        np.testing.assert_array_equal(ArrayFile(summary.folder / f"cases/{case.id}.image.b2nd")[:], prepared.image)
        np.testing.assert_array_equal(ArrayFile(summary.folder / f"cases/{case.id}.label.b2nd")[:], prepared.label)
        record = CaseRecord.read(summary.folder / f"cases/{case.id}.json")
        assert record.scaling == prepared.scaling and record.geometry == prepared.geometry
        assert record.num_voxels == {str(n): int((prepared.label == n).sum()) for n in range(3)}
        assert record.foreground_slices == tuple(np.flatnonzero((prepared.label > 0).any((1, 2))).tolist())
        for index, voxels in record.locations.items():
            assert sorted(map(tuple, voxels)) == sorted(map(tuple, np.argwhere(prepared.label == int(index))))


@pytest.mark.parametrize("block", [1 << 22, 701])
def test_locations_of_large_structures_are_drawn_evenly(block, monkeypatch):
    monkeypatch.setattr(case_record, "_BLOCK", block)
    label = np.zeros((40, 30, 20), np.uint8)
    label[:, :20] = 1
    label[3, 25, :] = 255
    packed = case_record.pack_locations("x", label, LABELS)
    assert packed == case_record.pack_locations("x", label, LABELS) != case_record.pack_locations("y", label, LABELS)
    voxels = case_record._unpack(packed["1"], label.shape)
    assert set(packed) == {"1"} and len(voxels) == 2000 == len(np.unique(voxels, axis=0))
    assert (label[tuple(voxels.T)] == 1).all()
    per_slice = np.bincount(voxels[:, 0], minlength=40)
    assert per_slice.min() >= 48 and per_slice.max() <= 52


def test_a_slice_with_one_voxel_of_a_large_structure_is_known():
    label = np.zeros((5, 300, 300), np.uint8)
    label[1:3, :200] = 1
    label[4, 7, 7] = 1
    label[0, 1, 1] = LABELS.ignore_index
    assert case_record.foreground_slices(label, LABELS) == (1, 2, 4)


def test_the_bytes_do_not_depend_on_the_number_of_workers(dataset, tmp_path):
    for number in (1, 2):
        prepare(dataset, PLAN, tmp_path / str(number), num_workers=number)
    assert content(tmp_path / "1") == content(tmp_path / "2")


@pytest.mark.parametrize("spoil", ["image", "record", "one digit of a record", "label gone", "half a record", "stray"])
def test_a_repeated_run_keeps_what_is_whole_and_mends_the_rest(dataset, tmp_path, spoil):
    cases = prepare(dataset, PLAN, tmp_path / "work", num_workers=1).folder / "cases"
    whole = content(tmp_path / "work")
    if spoil == "image":
        data = bytearray((cases / "case_01.image.b2nd").read_bytes())
        data[-3] ^= 1
        (cases / "case_01.image.b2nd").write_bytes(data)
    elif spoil == "record":
        (cases / "case_01.json").unlink()
    elif spoil == "one digit of a record":
        record = CaseRecord.read(cases / "case_01.json")
        sick = record.scaling[0].model_copy(update={"mean": record.scaling[0].mean + 1})
        record.model_copy(update={"scaling": (sick, *record.scaling[1:])}).write(cases / "case_01.json")
    elif spoil == "label gone":
        (cases / "case_01.label.b2nd").unlink()
    elif spoil == "half a record":
        (cases / "case_01.json").write_text((cases / "case_01.json").read_text()[:300])
    else:
        (cases / "old.json").write_text("{}")
    (cases.parent / "manifest.json").unlink()
    summary = prepare(dataset, PLAN, tmp_path / "work", num_workers=1)
    assert summary.num_kept == (5 if spoil == "stray" else 4) and content(tmp_path / "work") == whole


def test_a_run_stopped_half_way_is_continued_to_the_same_end(dataset, tmp_path, monkeypatch):
    prepare(dataset, PLAN, tmp_path / "whole", num_workers=1)
    real, done = module._prepare_one, []

    def stop_at_third(item):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(item.case.id)
        return real(item)

    monkeypatch.setattr(module, "_prepare_one", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(dataset, PLAN, tmp_path / "work", num_workers=1)
    assert not (tmp_path / "work" / "prepared" / "manifest.json").exists()
    monkeypatch.setattr(module, "_prepare_one", real)
    assert prepare(dataset, PLAN, tmp_path / "work", num_workers=1).num_kept == 2
    assert content(tmp_path / "work") == content(tmp_path / "whole")


def test_another_plan_or_an_edited_source_prepares_again(dataset, tmp_path):
    work = tmp_path / "work"
    prepare(dataset, PLAN, work, num_workers=1)
    other = PLAN.model_copy(update={"slice_axis": "R"})
    assert prepare(dataset, other, work, num_workers=1).num_kept == 0
    assert prepare(dataset, other.model_copy(update={"batch_size": 9}), work, num_workers=1).num_kept == 5
    save_nifti(dataset.cases[2].images[0], draw_case(77)[0])
    assert prepare(dataset, other, work, num_workers=1).num_kept == 4


def test_a_source_edited_since_the_survey_is_named(dataset, tmp_path):
    _, fingerprint = survey(dataset, num_workers=1)
    (tmp_path / "work").mkdir()
    fingerprint.write(tmp_path / "work" / "fingerprint.json")
    plan = PLAN.model_copy(update={"fingerprint_digest": fingerprint.digest()})
    save_nifti(dataset.cases[2].images[0], draw_case(77)[0])
    with pytest.raises(PartialError, match=r"case_02_0000.nii.gz: changed since .*prepare again") as caught:
        prepare(dataset, plan, tmp_path / "work", num_workers=1)
    assert caught.value.exit_code == 6


def test_a_bad_case_is_set_aside_and_the_others_are_complete(dataset, tmp_path):
    save_nifti(dataset.cases[1].label, draw_case(1)[1][:-1])
    with pytest.raises(PartialError, match=r"1 of 5 cases .*case_01.nii.gz"):
        prepare(dataset, PLAN, tmp_path / "work", num_workers=1)
    folder = tmp_path / "work" / "prepared"
    Manifest.read(folder).verify(folder)
    assert sorted(path.stem for path in (folder / "cases").glob("*.json")) == [f"case_{n:02d}" for n in (0, 2, 3, 4)]
    with pytest.raises(GeometryError, match="case_01"):
        prepare(dataset, PLAN, tmp_path / "strict", num_workers=1, strict=True)


def test_nothing_but_bad_cases_is_an_error(dataset, tmp_path):
    for case in dataset.cases:
        case.images[0].write_bytes(b"no image")
    with pytest.raises(DatasetError, match="none of the 5 cases"):
        prepare(dataset, PLAN, tmp_path / "work", num_workers=1)


def test_a_case_that_left_the_data_set_leaves_the_folder(dataset, tmp_path):
    prepare(dataset, PLAN, tmp_path / "work", num_workers=1)
    summary = prepare(dataset.without({"case_03"}), PLAN, tmp_path / "work", num_workers=1)
    assert summary.num_kept == 4 and not list(summary.folder.glob("cases/case_03*"))
    Manifest.read(summary.folder).verify(summary.folder)


def test_one_run_at_a_time_works_in_a_folder(dataset, tmp_path):
    folder = tmp_path / "work" / "prepared"
    with lock_folder(folder), pytest.raises(ResourceError, match="another run"):
        prepare(dataset, PLAN, tmp_path / "work", num_workers=1)


def test_shards_at_the_same_time_and_then_a_plain_run_leave_the_bytes_of_one(dataset, tmp_path):
    alone = prepare(dataset, PLAN, tmp_path / "alone", num_workers=1).folder
    folder = tmp_path / "work" / "prepared"
    for number in (1, 2):
        with lock_folder(folder, part=str(Shard(3 - number, 2))):  # the other one is at work
            summary = prepare(dataset, PLAN, tmp_path / "work", num_workers=1, shard=Shard(number, 2))
            assert (summary.num_prepared, summary.num_kept) == ((3, 0), (2, 0))[number - 1]
            with pytest.raises(ResourceError, match="another run"):
                prepare(dataset, PLAN, tmp_path / "work", num_workers=1)
    assert not (folder / "manifest.json").exists()  # nobody has seen all of it
    summary = prepare(dataset, PLAN, tmp_path / "work", num_workers=1)
    assert (summary.num_prepared, summary.num_kept) == (0, 5) and content(folder) == content(alone)
    assert prepare(dataset, PLAN, tmp_path / "work", shard=Shard(9, 9)).num_prepared == 0  # more shards than cases


def test_sources_are_never_changed(dataset, tmp_path):
    before = content(dataset.root)
    prepare(dataset, PLAN, tmp_path / "work", num_workers=1)
    assert content(dataset.root) == before


def test_records_name_no_path_of_this_machine(dataset, tmp_path):
    folder = prepare(dataset, PLAN, tmp_path / "work", num_workers=1).folder
    for path in folder.rglob("*.json"):
        assert str(tmp_path) not in path.read_text()
        json.loads(path.read_text())
    shutil.rmtree(folder)


@pytest.mark.shared
def test_real_cases_come_back_whole(shared_folder, tmp_path):
    dataset = read_dataset(shared_folder / "data" / "hippocampus")
    few = dataset.without({case.id for case in dataset.cases[6:]})
    summary = prepare(few, make_plan(labels=dataset.labels), tmp_path / "work", num_workers=1)
    assert summary.num_prepared == 6
