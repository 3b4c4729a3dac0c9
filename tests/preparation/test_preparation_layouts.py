"""Every layout gives the same kind of data set; a bad description is refused with file, fact and fix."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from small_sets import draw_case, save_nifti, write_folder, write_json, write_msd, write_nnunet

from voxdino.core.errors import DatasetError, GeometryError, InputError, LabelError, SafetyError
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.preparation.dataset import read_case, read_dataset

OPTIONS = ReadOptions()


def test_nnunet_msd_and_folder_hold_the_same_voxels(tmp_path):
    nnunet = read_dataset(write_nnunet(tmp_path / "nnunet", 3, channels=("T1", "T2")))
    msd = read_dataset(write_msd(tmp_path / "msd", 3, num_channels=2))
    rows = [f"nnunet/imagesTr/case_{n:02d}_0000.nii.gz;nnunet/imagesTr/case_{n:02d}_0001.nii.gz" for n in range(3)]
    lines = [f"{images},nnunet/labelsTr/case_{n:02d}.nii.gz" for n, images in enumerate(rows)]
    (tmp_path / "mine.csv").write_text("image,label\n" + "\n".join(lines) + "\n")
    folder = read_dataset(tmp_path)
    assert nnunet.channels == ("T1", "T2") and msd.channels == ("MR0", "MR1") and folder.channels == ()
    assert nnunet.labels == msd.labels and folder.labels is None
    for number in range(3):
        cases = [read_case(dataset.cases[number], OPTIONS, dataset.labels) for dataset in (nnunet, msd, folder)]
        image, label = draw_case(number)
        for volume, labels in cases:
            np.testing.assert_array_equal(volume.array, np.stack([image, image + 1]))
            np.testing.assert_array_equal(labels.array, label)


def test_cases_of_test_folders_are_kept_apart(tmp_path):
    root = write_nnunet(tmp_path / "set", 3)
    save_nifti(root / "imagesTs" / "later_0000.nii.gz", draw_case(9)[0])
    dataset = read_dataset(root)
    assert [case.id for case in dataset.test_cases] == ["later"] and dataset.test_cases[0].label is None
    assert [case.id for case in dataset.cases] == ["case_00", "case_01", "case_02"]


def test_cases_listed_in_dataset_json_are_found(tmp_path):
    listed = {
        f"c{n}": {"images": [f"imagesTr/case_{n:02d}_0000.nii.gz"], "label": f"labelsTr/case_{n:02d}.nii.gz"}
        for n in range(3)
    }
    dataset = read_dataset(write_nnunet(tmp_path / "set", 3, description={"dataset": listed}))
    assert [case.id for case in dataset.cases] == ["c0", "c1", "c2"]


def test_regions_and_the_ignore_label_are_understood(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    description = {"labels": labels, "regions_class_order": [1, 2]}
    found = read_dataset(write_nnunet(tmp_path / "set", 3, description=description)).labels
    assert found.ignore_id == 3 and [region.name for region in found.regions] == ["whole", "core"]


def test_a_split_column_makes_one_fold_and_a_test_set(tmp_path):
    rows = [
        "image,label,split",
        *(f"images/{c}.png,masks/{c}.png,{s}" for c, s in zip("abcd", ("train", "train", "val", "test"), strict=True)),
    ]
    dataset = read_dataset(write_folder(tmp_path / "set", rows))
    assert [(split.train, split.val) for split in dataset.splits] == [(("a", "b"), ("c",))]
    assert [case.id for case in dataset.test_cases] == ["d"]


def test_ids_tell_equal_file_names_in_different_folders_apart(tmp_path):
    for side in ("train", "val"):
        save_nifti(tmp_path / "images" / side / "1.nii.gz", draw_case(1)[0])
        save_nifti(tmp_path / "labels" / side / "1.nii.gz", draw_case(1)[1])
    rows = "".join(f"images/{side}/1.nii.gz,labels/{side}/1.nii.gz\n" for side in ("train", "val"))
    (tmp_path / "dataset.csv").write_text("image,label\n" + rows)
    assert [case.id for case in read_dataset(tmp_path).cases] == ["train_1", "val_1"]


def test_labels_json_and_the_caller_name_the_classes(tmp_path):
    root = write_folder(tmp_path / "set", ["image,label", "images/a.png,masks/a.png"])
    write_json(root / "labels.json", {"background": 0, "mole": 1})
    assert read_dataset(root).labels.names == ("background", "mole")
    named = LabelSet(names=("background", "naevus"), ids=(0, 1))
    assert read_dataset(root, labels=named).labels == named


def test_names_may_have_spaces_and_any_letters_and_the_working_folder_may_change(tmp_path, monkeypatch):
    root = write_nnunet(tmp_path / "Größe Lunge", 3)
    for folder in ("imagesTr", "labelsTr"):
        for path in (root / folder).iterdir():
            path.rename(path.with_name(path.name.replace("case", "fäll 肺")))
    monkeypatch.chdir(tmp_path)
    dataset = read_dataset(Path("Größe Lunge"))
    monkeypatch.chdir("/")
    volume, _ = read_case(dataset.cases[0], OPTIONS, dataset.labels)
    assert dataset.cases[0].id == "fäll 肺_00" and volume.num_channels == 1


def edit(root, **changes):
    path = root / "dataset.json"
    write_json(path, {**json.loads(path.read_text()), **changes})


def drop(root, key):
    path = root / "dataset.json"
    value = json.loads(path.read_text())
    del value[key]
    write_json(path, value)


NNUNET_REFUSALS = {
    "a missing key": (lambda root: drop(root, "file_ending"), "'file_ending' is missing"),
    "a misspelt key": (lambda root: (drop(root, "labels"), edit(root, label={})), "Did you mean 'label'"),
    "a near miss of an optional key": (lambda root: edit(root, regions_class_oder=[1]), "'regions_class_order'"),
    "channels that are a list": (lambda root: edit(root, channel_names=["CT"]), '{"0": "CT"}'),
    "channels that start at 1": (lambda root: edit(root, channel_names={"1": "CT"}), "numbers from 0 on"),
    "an unknown ending": (lambda root: edit(root, file_ending=".nii.g"), "Did you mean '.nii.gz'"),
    "no background": (lambda root: edit(root, labels={"liver": 1}), "background"),
    "an image without label": (lambda root: (root / "labelsTr" / "case_01.nii.gz").unlink(), "case_01"),
    "a missing channel": (lambda root: edit(root, channel_names={"0": "T1", "1": "T2"}), "case_00 (has 0000)"),
    "a surplus channel": (
        lambda root: save_nifti(root / "imagesTr" / "case_01_0003.nii.gz", draw_case(1)[0]),
        "case_01 (has 0000, 0003)",
    ),
    "no case": (lambda root: [path.unlink() for path in root.glob("*Tr/*")], "no case with a label"),
    "dataset.json gone": (lambda root: (root / "dataset.json").unlink(), "dataset.json is not"),
    "an array": (lambda root: (root / "dataset.json").write_text("[]"), "not an object"),
    "an empty file": (lambda root: (root / "dataset.json").write_text(""), "empty"),
    "a trailing comma": (lambda root: (root / "dataset.json").write_text('{\n "a": 1,}'), "line 2, column 8"),
    "a key twice": (lambda root: (root / "dataset.json").write_text('{"a": 1, "a": 2}'), "twice"),
    "splits that are no list": (lambda root: write_json(root / "splits_final.json", {}), "splits"),
    "splits with a wrong key": (
        lambda root: write_json(root / "splits_final.json", [{"train": [], "valid": []}]),
        "val",
    ),
}


@pytest.mark.parametrize("name", NNUNET_REFUSALS)
def test_a_bad_nnunet_data_set_is_refused(tmp_path, name):
    root = write_nnunet(tmp_path / "set", 3)
    spoil, words = NNUNET_REFUSALS[name]
    spoil(root)
    with pytest.raises(InputError) as caught:
        read_dataset(root)
    assert words in str(caught.value) and caught.value.fix and "set" in str(caught.value.where)
    assert caught.value.exit_code == 3


def msd_entry(image):
    return [{"image": image, "label": "labelsTr/case_00.nii.gz"}]


@pytest.mark.parametrize(
    "training, kind, words",
    [
        (msd_entry("../secret.nii.gz"), SafetyError, "outside|leads"),
        (msd_entry("/etc/passwd"), SafetyError, "leads"),
        (msd_entry("https://example.org/a.nii.gz"), SafetyError, "URL"),
        (msd_entry("imagesTr/none.nii.gz"), DatasetError, "none.nii.gz"),
        (msd_entry("imagesTr/" + "x" * 5000 + ".nii.gz"), DatasetError, "do not exist"),
        (msd_entry("imagesTr/link/a.nii.gz"), InputError, "cannot be followed"),
        ([{"image": "imagesTr/case_00.nii.gz"}], DatasetError, "no label for case_00"),
        ([{"image": "imagesTr/case_00.nii.gz", "lable": "x"}], DatasetError, "Did you mean 'label'"),
        ("imagesTr", DatasetError, "training"),
    ],
)
def test_bad_entries_of_an_msd_data_set_are_refused(tmp_path, training, kind, words):
    root = write_msd(tmp_path / "set", 2)
    (root / "imagesTr" / "link").symlink_to(root / "imagesTr" / "link")
    edit(root, training=training)
    with pytest.raises(kind, match=words) as caught:
        read_dataset(root)
    assert caught.value.fix


def test_a_link_out_of_the_folder_needs_permission(tmp_path):
    root = write_msd(tmp_path / "set", 2)
    image = root / "imagesTr" / "case_00.nii.gz"
    image.rename(tmp_path / "outside.nii.gz")
    image.symlink_to(tmp_path / "outside.nii.gz")
    with pytest.raises(SafetyError, match="--allow-external"):
        read_dataset(root)
    assert len(read_dataset(root, ReadOptions(allow_external=True)).cases) == 2


def test_all_missing_files_are_listed_at_once(tmp_path):
    root = write_msd(tmp_path / "set", 3)
    for name in ("case_00", "case_02"):
        (root / "imagesTr" / f"{name}.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"2 files .*case_00.*case_02"):
        read_dataset(root)


@pytest.mark.parametrize(
    "rows, words",
    [
        (["image,lable", "images/a.png,masks/a.png"], "Did you mean 'lable'"),
        (["image,label,grp", "images/a.png,masks/a.png,1"], "Did you mean 'group'"),
        (["image,label,image", "images/a.png,masks/a.png,x"], "twice"),
        (["image;label", "images/a.png;masks/a.png"], "no 'image'"),
        (["image,label", "images/a.png"], "line 2 does not have 2 cells"),
        (["image,label,split", "images/a.png,masks/a.png,valid"], "Did you mean 'val'"),
        (["image,label,split", "images/a.png,,train"], "without a label"),
        (["image,label", ",masks/a.png"], "names no image"),
        (["image,label", "images/z.png,masks/a.png"], "images/z.png"),
        (["id,image,label", "x/y,images/a.png,masks/a.png"], "file name"),
        (["id,image,label", "x,images/a.png,masks/a.png", "x,images/b.png,masks/b.png"], "several cases"),
        ([""], "no 'image'"),
    ],
)
def test_a_bad_table_is_refused(tmp_path, rows, words):
    with pytest.raises(DatasetError, match=words) as caught:
        read_dataset(write_folder(tmp_path / "set", rows))
    assert caught.value.fix


def test_a_table_in_another_encoding_and_several_tables_are_refused(tmp_path):
    root = write_folder(tmp_path / "set", ["image,label", "images/a.png,masks/a.png"])
    (root / "dataset.csv").rename(root / "one.csv")
    assert len(read_dataset(root).cases) == 1
    (root / "two.csv").write_bytes("image,label\nimages/größe.png,x".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"2 CSV files: one.csv, two.csv"):
        read_dataset(root)
    with pytest.raises(DatasetError, match="UTF-8"):
        read_dataset(root / "two.csv")
    assert len(read_dataset(root / "one.csv").cases) == 1


def test_the_description_itself_may_be_named_and_other_files_may_not(tmp_path):
    root = write_nnunet(tmp_path / "set", 3)
    assert read_dataset(root / "dataset.json").cases == read_dataset(root / "labelsTr" / "..").cases
    with pytest.raises(DatasetError, match="no description"):
        read_dataset(root / "labelsTr" / "case_00.nii.gz")


def test_a_named_pipe_in_place_of_the_table_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "dataset.csv")
    with pytest.raises(DatasetError, match="named pipe"):
        read_dataset(tmp_path)


def test_columns_that_are_not_ours_are_told(tmp_path):
    root = write_folder(tmp_path / "set", ["image,label,age", "images/a.png,masks/a.png,61"])
    assert "'age'" in read_dataset(root).findings[0].fact


@pytest.mark.parametrize("path", ["hippocampu", "hippocampu/deeper", "x" * 5000])
def test_a_wrong_path_names_the_nearest_folder(tmp_path, path):
    (tmp_path / "hippocampus").mkdir()
    with pytest.raises(DatasetError) as caught:
        read_dataset(tmp_path / path)
    assert caught.value.fix
    assert "Did you mean 'hippocampus'" in str(caught.value) or len(path) > 1000


def test_a_folder_without_a_data_set_says_what_is_there(tmp_path):
    (tmp_path / "scan.dcm").write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"Found: scan.dcm"):
        read_dataset(tmp_path)


def test_strangers_and_lonely_labels_are_told_and_left_aside(tmp_path):
    root = write_nnunet(tmp_path / "set", 3, description={"numTraining": 4})
    (root / "imagesTr" / "notes.txt").write_text("x")
    save_nifti(root / "labelsTr" / "other.nii.gz", draw_case(1)[1])
    findings = {finding.where: finding.severity for finding in read_dataset(root).findings}
    assert findings == {"imagesTr/notes.txt": "note", "labelsTr/other.nii.gz": "warning", "dataset.json": "warning"}


@pytest.mark.parametrize("shift", [(0.5, 0, 0), (0, -3, 0)])
def test_a_label_beside_its_image_is_refused_unless_asked_for(tmp_path, shift):
    root = write_nnunet(tmp_path / "set", 3)
    affine = np.array([[1.5, 0, 0, -7], [0, 1, 0, 3], [0, 0, 2, 11], [0, 0, 0, 1]])
    affine[:3, 3] += shift
    save_nifti(root / "labelsTr" / "case_00.nii.gz", draw_case(0)[1], affine)
    dataset = read_dataset(root)
    with pytest.raises(GeometryError, match=r"away from case_00_0000.*--geometry-tol"):
        read_case(dataset.cases[0], OPTIONS, dataset.labels)
    for options in (ReadOptions(geometry_tolerance=4.0), ReadOptions(trust_array_order=True)):
        volume, label = read_case(dataset.cases[0], options, dataset.labels)
        assert label.grid is volume.grid


@pytest.mark.parametrize(
    "affine, words",
    [
        (np.diag([-1.5, 1, 2, 1]), "axes run LAS"),
        (np.array([[1.5, 0, 0, -7], [0, 1, 0, 3], [0, 0, 3, 11], [0, 0, 0, 1.0]]), "spacing is 1.5 x 1 x 3 mm"),
    ],
)
def test_the_message_says_how_the_grids_differ(tmp_path, affine, words):
    root = write_nnunet(tmp_path / "set", 3)
    save_nifti(root / "labelsTr" / "case_00.nii.gz", draw_case(0)[1], affine)
    with pytest.raises(GeometryError, match=words):
        read_case(read_dataset(root).cases[0], OPTIONS, None)


def test_rounding_in_the_affine_is_accepted_and_shapes_are_not(tmp_path):
    root = write_nnunet(tmp_path / "set", 3)
    affine = np.array([[1.5, 0, 0, -7], [0, 1, 0, 3], [0, 0, 2, 11], [0, 0, 0, 1]]) + 1e-5 * np.eye(4)
    affine[3, 3] = 1
    save_nifti(root / "labelsTr" / "case_00.nii.gz", draw_case(0)[1], affine)
    save_nifti(root / "labelsTr" / "case_01.nii.gz", draw_case(1)[1][:, :-1])
    dataset = read_dataset(root)
    volume, label = read_case(dataset.cases[0], OPTIONS, dataset.labels)
    assert label.grid is volume.grid
    with pytest.raises(GeometryError, match=r"11 x 8 x 7 voxels, but case_01_0000.nii.gz has 11 x 9 x 7"):
        read_case(dataset.cases[1], OPTIONS, dataset.labels)


def test_undeclared_values_are_counted(tmp_path):
    root = write_nnunet(tmp_path / "set", 3)
    label = draw_case(0)[1]
    label[0, 0, :2] = 9
    save_nifti(root / "labelsTr" / "case_00.nii.gz", label)
    dataset = read_dataset(root)
    with pytest.raises(LabelError, match=r"case_00.*9 \(2 voxels\)"):
        read_case(dataset.cases[0], OPTIONS, dataset.labels)


def test_two_folders_of_the_same_names_are_a_data_set(tmp_path):
    for name in ("b", "a"):
        image, label = draw_case(ord(name))
        save_nifti(tmp_path / "images" / f"{name}.nii.gz", image)
        save_nifti(tmp_path / "masks" / f"{name}.nii.gz", label)
    save_nifti(tmp_path / "images" / "new.nii.gz", draw_case(3)[0])
    dataset = read_dataset(tmp_path)
    assert [case.id for case in dataset.cases] == ["a", "b"]
    assert [case.id for case in dataset.test_cases] == ["new"] and dataset.splits is None
    (tmp_path / "images" / "a.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"labels without an image of the same name: a\."):
        read_dataset(tmp_path)
