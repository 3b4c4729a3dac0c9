"""Crops: the voxels asked for, real neighbours, padding beyond the volume; damage is named."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from voxdino.core.errors import DatasetError, InputError
from voxdino.core.safe_files import Manifest, digest_file
from voxdino.data.loader import assemble
from voxdino.data.sampling import Quotas, Sampler
from voxdino.data.store import IGNORED, CaseStore, padding_values
from voxdino.preparation.prepare import normalise


def whole(store, case_id):
    """The normalised image and the label of a whole case, the plain way."""
    box = [(0, size) for size in store.shape(case_id)]
    return normalise(store.read_image(case_id, box), store.record(case_id).scaling), store.read_label(case_id, box)


def test_the_store_knows_its_cases_and_their_shapes(store):
    assert store.ids == ("case_0", "case_1", "case_2")
    assert store.shape("case_1") == (6, 11, 14)  # slices along S, rows along A-P, columns along R-L
    assert store.cut("case_1", [(0, 1), (0, 4), (0, 4)]).spacing == store.record("case_1").geometry.prepared_spacing


@pytest.mark.parametrize("box", [((2, 3), (0, 11), (0, 13)), ((1, 4), (3, 8), (2, 10)), ((0, 1), (10, 11), (12, 13))])
def test_a_crop_holds_the_voxels_asked_for(store, box):
    image, label = whole(store, "case_0")
    crop = store.cut("case_0", box)
    index = tuple(slice(*ends) for ends in box)
    np.testing.assert_array_equal(crop.image, image[(slice(None), *index)])
    np.testing.assert_array_equal(crop.label, label[index])


def test_context_slices_are_the_real_neighbours_and_repeat_only_at_the_ends(store):
    image, _ = whole(store, "case_0")
    middle = store.cut("case_0", [(2, 4), (0, 11), (0, 13)], context=1)
    np.testing.assert_array_equal(middle.image, image[:, 1:5])
    assert middle.label.shape[0] == 2
    for ends, wanted in (((0, 1), [0, 0, 1]), ((5, 6), [4, 5, 5])):
        np.testing.assert_array_equal(store.cut("case_0", [ends, (0, 11), (0, 13)], 1).image, image[:, wanted])


def test_beyond_the_volume_lies_air_and_nothing_to_learn(store):
    image, label = whole(store, "case_0")
    crop = store.cut("case_0", [(2, 3), (-2, 14), (-1, 15)])
    inside = (slice(2, 13), slice(1, 14))
    np.testing.assert_array_equal(crop.image[:, 0][(slice(None), *inside)], image[:, 2])
    np.testing.assert_array_equal(crop.label[0][inside], label[2])
    outside = np.ones(crop.label.shape[1:], dtype=bool)
    outside[inside] = False
    assert (crop.label[0][outside] == IGNORED).all()
    assert (crop.image[0, 0][outside] == -2.0).all()  # (0 - 100) / 50
    assert (crop.image[1, 0][outside] == 2.0).all()  # (200 - 100) / 50
    np.testing.assert_array_equal(crop.padding, padding_values(store.record("case_0").scaling))


def test_a_slab_longer_than_the_volume_repeats_the_ends_and_ignores_them(store):
    image, _ = whole(store, "case_0")
    crop = store.cut("case_0", [(-1, 8), (0, 11), (0, 13)])
    np.testing.assert_array_equal(crop.image, image[:, [0, 0, 1, 2, 3, 4, 5, 5, 5]])
    assert (crop.label[0] == IGNORED).all() and (crop.label[7:] == IGNORED).all()
    assert (crop.label[2] != IGNORED).all()


def test_the_ignore_label_of_the_file_is_ignored(store):
    _, label = whole(store, "case_0")
    assert (label == IGNORED).sum() == 1 and set(np.unique(label)) == {IGNORED, 0, 1}


def test_many_threads_read_what_one_reads(store):
    sampler = Sampler([store.extent(name) for name in store.ids], (9, 9), 1, Quotas(), seed=0)
    draws = [sampler.draw(1, index) for index in range(60)]
    alone = [store.cut(draw.case_id, draw.box, 1).image for draw in draws]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda draw: store.cut(draw.case_id, draw.box, 1).image, draws))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_batch_says_where_it_comes_from(store):
    sampler = Sampler([store.extent(name) for name in store.ids], (9, 8), 2, Quotas(), seed=0)
    batch = assemble(store, [sampler.draw(1, index) for index in range(5)], context=1, seed=0)
    assert batch.image.shape == (5, 2, 4, 9, 8) and batch.label.shape == (5, 2, 9, 8)
    assert len(set(batch.seeds)) == 5 and set(batch.case_ids) == set(store.ids)


def test_a_missing_folder_and_an_unknown_case_say_what_to_do(store, tmp_path):
    with pytest.raises(DatasetError, match="voxdino prepare"):
        CaseStore(tmp_path)
    with pytest.raises(DatasetError, match=r"no prepared case 'case_9'\. Did you mean 'case_"):
        store.record("case_9")


def test_a_damaged_case_is_named(places, tmp_path):
    shutil.copytree(places, tmp_path / "prepared")
    path = tmp_path / "prepared/cases/case_1.image.b2nd"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match="case_1"):
        CaseStore(tmp_path / "prepared").cut("case_1", [(0, 1), (0, 4), (0, 4)])


@pytest.mark.parametrize("suffix", [".image.b2nd", ".label.b2nd", ".json"])
@pytest.mark.parametrize("damage", ["a bit", "missing"])
def test_damage_is_found_before_the_file_is_first_used(places, tmp_path, suffix, damage):
    shutil.copytree(places, tmp_path / "prepared")
    path = tmp_path / f"prepared/cases/case_1{suffix}"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    store = CaseStore(tmp_path / "prepared")
    path.write_bytes(content) if damage == "a bit" else path.unlink()
    store.cut("case_0", [(0, 1), (0, 4), (0, 4)])
    with pytest.raises(DatasetError, match=rf"case_1{re.escape(suffix)}: .*`voxdino prepare DATASET`"):
        store.cut("case_1", [(0, 1), (0, 4), (0, 4)])


def test_a_file_is_checked_once(places, monkeypatch):
    store = CaseStore(places)
    checked = []
    monkeypatch.setattr(type(store.manifest), "verify", lambda self, folder, names: checked.extend(names))
    for _ in range(3):
        store.cut("case_1", [(0, 1), (0, 4), (0, 4)])
    assert sorted(checked) == [f"cases/case_1{suffix}" for suffix in (".image.b2nd", ".json", ".label.b2nd")]


@pytest.mark.parametrize("change", ["a key less", "a key more"])
def test_a_case_of_another_version_says_prepare_again(places, tmp_path, change):
    folder = tmp_path / "prepared"
    shutil.copytree(places, folder)
    path = folder / "cases/case_1.json"
    record = json.loads(path.read_text())
    record = {**record, "new_key": 1} if change == "a key more" else {k: record[k] for k in record if k != "geometry"}
    path.write_text(json.dumps(record))
    files = Manifest.read(folder).files
    Manifest({**files, "cases/case_1.json": (digest_file(path), path.stat().st_size)}).write(folder)
    with pytest.raises(
        DatasetError, match=r"case_1\.json: was prepared by another version .*`voxdino prepare DATASET`"
    ):
        CaseStore(folder).extent("case_1")
    assert CaseStore(folder).extent("case_0").case_id == "case_0"
