"""Sets of labelled images: MedMNIST arrays and CSV tables, their splits, and what is refused."""

import numpy as np
import pytest

from voxdino.core.errors import ConfigError, DatasetError, SafetyError
from voxdino.core.geometry import Grid
from voxdino.core.io import write_volume
from voxdino.core.safe_files import write_json
from voxdino.core.volume import Volume
from voxdino.preparation.classification import is_classification_set, label_texts, load_image, open_classification_set

SIZES = {"train": 6, "val": 3, "test": 4}


def write_arrays(path, shape, labels=1, **changes):
    arrays = {}
    for part, number in SIZES.items():
        rng = np.random.default_rng(number)
        arrays[f"{part}_images"] = rng.integers(0, 256, (number, *shape), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(number * labels, dtype=np.uint8).reshape(number, labels) % (
            3 - (labels > 1)
        )
    np.savez_compressed(path, **{key: value for key, value in (arrays | changes).items() if value is not None})
    return path, arrays


def write_table(folder, rows, *, header="file,label", volumes=False):
    """A set of pictures (or volumes); each row begins with a file's name."""
    folder.mkdir(exist_ok=True)
    shape, spacing = ((3, 4, 5), (1.0, 2.0, 4.0)) if volumes else ((7, 5), (1.0, 1.0))
    for number, row in enumerate(rows):
        array = np.full((1, *shape), number, dtype=np.uint8)
        grid = Grid.from_spacing(shape, spacing) if volumes else Grid.from_spacing(shape, unit="px")
        write_volume(folder / row.split(",")[0], Volume(array, grid))
    (folder / "labels.csv").write_text("\n".join((header, *rows)) + "\n")
    return folder


@pytest.mark.parametrize(
    "shape, ndim, channels", [((9, 7), 2, 1), ((9, 7, 3), 2, 3), ((6, 7, 8), 3, 1)], ids=["grey", "colour", "volume"]
)
def test_arrays_of_medmnist_are_opened_with_their_own_splits(tmp_path, shape, ndim, channels):
    path, arrays = write_arrays(tmp_path / "smallmnist.npz", shape)
    found = open_classification_set(path)
    assert (found.name, found.kind, found.ndim, found.class_names) == ("smallmnist", "single", ndim, ("0", "1", "2"))
    assert {split: len(cases) for split, cases in found.splits.items()} == SIZES and not found.has_groups
    np.testing.assert_array_equal(found.labels("test"), [0, 1, 2, 0])
    image = load_image(found.splits["val"][2])
    expected = arrays["val_images"][2]
    np.testing.assert_array_equal(image.array, np.moveaxis(expected, -1, 0) if channels == 3 else expected[None])
    assert image.array.shape[0] == channels and image.spacing == (1.0,) * ndim


def test_several_labels_per_array_image_are_zeros_and_ones(tmp_path):
    found = open_classification_set(write_arrays(tmp_path / "chest.npz", (5, 5), labels=4)[0])
    assert found.kind == "multi" and found.num_classes == 4
    np.testing.assert_array_equal(found.labels("val"), np.arange(12).reshape(3, 4) % 2)
    assert label_texts(found.splits["val"][0], found) == "1|3"


def test_another_file_under_the_same_name_is_read_anew(tmp_path):
    path, _ = write_arrays(tmp_path / "set.npz", (5, 5))
    before = open_classification_set(path)
    load_image(before.splits["train"][0])
    write_arrays(path, (5, 5), train_images=np.full((6, 5, 5), 9, np.uint8))
    after = open_classification_set(path)
    assert (load_image(after.splits["train"][0]).array == 9).all() and after.digest != before.digest


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"test_labels": None}, r"has no test_labels \(found: test_images"),
        ({"val_images": np.zeros((3, 6, 6, 6, 6), np.uint8)}, r"val_images is uint8 of 3 x 6 x 6 x 6 x 6: no 8-bit"),
        ({"train_images": np.zeros((6, 5, 5))}, r"train_images is float64"),
        ({"train_labels": np.zeros((5, 1), np.uint8)}, r"train_labels is uint8 of 5 x 1 for 6 images"),
        ({"train_labels": np.full((6, 1), -1)}, r"train_labels is int64 of 6 x 1 for 6 images"),
        ({"train_labels": np.zeros((6, 2), np.uint8)}, "different numbers of labels"),
        ({"train_images": np.zeros((6, 5, 4), np.uint8)}, "images of different sizes"),
        ({"train_labels": np.array([{}] * 6)}, r"cannot be read as \.npz"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, changes, words):
    with pytest.raises(DatasetError, match=words):
        open_classification_set(write_arrays(tmp_path / "set.npz", (5, 5), **changes)[0])


def test_files_that_are_no_set_are_refused(tmp_path):
    (tmp_path / "set.npz").write_bytes(b"hello")
    with pytest.raises(DatasetError, match=r"set\.npz: cannot be read as \.npz"):
        open_classification_set(tmp_path / "set.npz")
    with pytest.raises(DatasetError, match=r"is no set of labelled images.*labels\.csv"):
        open_classification_set(tmp_path)
    assert not is_classification_set(tmp_path) and is_classification_set(tmp_path / "set.npz")


@pytest.mark.parametrize("volumes, suffix, ndim", [(False, ".png", 2), (True, ".nii.gz", 3)])
def test_a_table_names_files_labels_splits_and_groups(tmp_path, volumes, suffix, ndim):
    rows = [f"b{suffix},ill,train,p1", f"a{suffix},well,train,p1", f"c{suffix},ill,val,p2", f"d{suffix},well,test,"]
    found = open_classification_set(
        write_table(tmp_path / "set", rows, header="file,label,split,group", volumes=volumes)
    )
    assert (found.kind, found.ndim, found.class_names, found.has_groups) == ("single", ndim, ("ill", "well"), True)
    assert [case.id for case in found.splits["train"]] == [f"b{suffix}", f"a{suffix}"]
    np.testing.assert_array_equal(found.labels("train"), [0, 1])
    image = load_image(found.splits["val"][0])
    assert (image.array == 2).all() and image.spacing == ((1.0, 2.0, 4.0) if volumes else (1.0, 1.0))


def test_without_splits_fifths_are_dealt_evenly_over_classes_and_groups_stay_whole(tmp_path):
    rows = [f"{n:02d}.png,{'ill' if n % 10 < 2 else 'well'},{n // 2}" for n in range(50)]
    folder = write_table(tmp_path / "set", rows, header="file,label,group")
    found = open_classification_set(folder)
    assert {split: len(cases) for split, cases in found.splits.items()} == {"train": 30, "val": 10, "test": 10}
    assert [int((found.labels(split) == 0).sum()) for split in ("train", "val", "test")] == [6, 2, 2]
    groups = [{case.group for case in cases} for cases in found.splits.values()]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert open_classification_set(folder) == found


def test_with_train_and_test_alone_a_fifth_of_train_chooses(tmp_path):
    rows = [f"{n:02d}.png,{n % 2},{'test' if n < 5 else 'train'}" for n in range(25)]
    found = open_classification_set(write_table(tmp_path / "set", rows, header="file,label,split"))
    assert {split: len(cases) for split, cases in found.splits.items()} == {"train": 16, "val": 4, "test": 5}


def test_several_labels_are_separated_by_bars_and_may_be_none(tmp_path):
    rows = ["a.png,edema|mass,train", "b.png,,val", "c.png,mass,test"]
    found = open_classification_set(write_table(tmp_path / "set", rows, header="file,label,split"))
    assert (found.kind, found.class_names) == ("multi", ("edema", "mass"))
    assert [cases[0].labels for cases in found.splits.values()] == [(1, 1), (0, 0), (0, 1)]
    assert [label_texts(cases[0], found) for cases in found.splits.values()] == ["edema|mass", "", "mass"]


def test_numbers_are_classes_in_their_order_and_classes_json_says_the_rest(tmp_path):
    rows = ["a.png,2,train", "b.png,10,val", "c.png,2,test"]
    folder = write_table(tmp_path / "set", rows, header="file,label,split")
    assert open_classification_set(folder).class_names == ("2", "10")
    write_json(folder / "classes.json", {"kind": "ordinal", "classes": ["1", "2", "10"]})
    told = open_classification_set(folder)
    assert (told.kind, told.num_classes, told.labels("val").tolist()) == ("ordinal", 3, [2])
    write_json(folder / "classes.json", {"kind": "ordinal", "classes": ["1", "2", "11"]})
    with pytest.raises(DatasetError, match=r"has the label '10', which classes\.json does not name"):
        open_classification_set(folder)
    write_json(folder / "classes.json", {"kinds": "ordinal", "classes": ["1", "2"]})
    with pytest.raises(ConfigError, match=r"unknown key 'kinds'\. Did you mean 'kind'"):
        open_classification_set(folder)


@pytest.mark.parametrize(
    "rows, header, words",
    [
        (["a.png,x,p"], "file,label,grup", "unknown column 'grup'. Did you mean 'group'"),
        (["a.png,x"], "image,label", "no 'file'"),
        (["a.png,x,train"], "file,label,split", "has 1 classes"),
        (["a.png,x,train", "b.png,y,valid", "c.png,y,test"], "file,label,split", "line 3: the split is 'valid'"),
        (["a.png,x,train", "b.png,y,val"], "file,label,split", "has no test case"),
        (["a.png,x,train,p", "b.png,y,val,q", "c.png,y,test,p"], "file,label,split,group", "group p is both in train"),
        (["a.png,x", "b.png,y"], "file,label", "2 cases are too few"),
        (["a.png,x", "a.png,y"], "file,label", "names a.png twice"),
        (["a.png,x,train", "b.png,,val", "c.png,y,test"], "file,label,split", "line 3: 0 labels in a set of one label"),
    ],
)
def test_tables_that_cannot_be_believed_are_refused(tmp_path, rows, header, words):
    with pytest.raises(DatasetError, match=words):
        open_classification_set(write_table(tmp_path / "set", rows, header=header))


def test_paths_stay_in_the_folder_and_files_are_there(tmp_path):
    folder = write_table(tmp_path / "set", ["a.png,x"])
    (folder / "labels.csv").write_text("file,label\n../b.png,x\na.png,y\n")
    with pytest.raises(SafetyError, match="leads outside"):
        open_classification_set(folder)
    (folder / "labels.csv").write_text("file,label\nb.png,x\na.png,y\n")
    with pytest.raises(DatasetError, match=r"line 2: b\.png is not there"):
        open_classification_set(folder)


def test_grades_of_arrays_are_named_in_a_file_of_their_own(tmp_path):
    path, _ = write_arrays(tmp_path / "grades.npz", (5, 5))
    plain = open_classification_set(path)
    write_json(tmp_path / "grades.json", {"kind": "ordinal", "classes": ["none", "mild", "severe"]})
    told = open_classification_set(path)
    assert (told.kind, told.class_names) == ("ordinal", ("none", "mild", "severe")) and told.digest != plain.digest
    write_json(tmp_path / "grades.json", {"kind": "ordinal", "classes": ["none", "mild"]})
    with pytest.raises(DatasetError, match=r"its grades\.json names 2 classes of kind ordinal; that is another set"):
        open_classification_set(path)
