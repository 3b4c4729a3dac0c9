"""One pass over the files finds what is wrong with them, and their facts are right."""

import numpy as np
import pytest
from PIL import Image
from small_sets import AFFINE, LABELS, draw_case, save_nifti, save_picture, write_folder, write_json, write_nnunet

from voxdino.core.geometry import Grid
from voxdino.core.io.options import ReadOptions
from voxdino.core.volume import LabelMap, Volume
from voxdino.preparation.check import survey
from voxdino.preparation.dataset import read_dataset
from voxdino.preparation.findings import Finding, gather_findings
from voxdino.preparation.fingerprint import Fingerprint, describe_case

ALL_ROWS = ["image,label", *(f"images/{c}.png,masks/{c}.png" for c in "abcde")]


def findings_of(root, options=ReadOptions()):  # noqa: B008
    report, fingerprint = survey(read_dataset(root, options), num_workers=1)
    assert all(finding.fact and finding.consequence and finding.fix for finding in report.findings)
    return report, fingerprint, {(finding.code, finding.severity) for finding in report.findings}


def test_a_sound_data_set_has_no_findings(tmp_path):
    report, fingerprint, found = findings_of(write_nnunet(tmp_path / "set"))
    assert found == set() and report.num_cases == 5 and report.bad_cases == 0
    assert [case.id for case in fingerprint.cases] == [f"case_{n:02d}" for n in range(5)]
    assert fingerprint.median_shape == {"R": 11, "A": 9, "S": 7} and fingerprint.anisotropy == pytest.approx(4 / 3)


def test_the_fingerprint_is_the_same_for_any_number_of_workers_and_from_its_file(tmp_path):
    dataset = read_dataset(write_nnunet(tmp_path / "set", channels=("T1", "T2")))
    one, two = survey(dataset, num_workers=1), survey(dataset, num_workers=2)
    assert one == two
    one[1].write(tmp_path / "fingerprint.json")
    assert Fingerprint.read(tmp_path / "fingerprint.json").digest() == two[1].digest()


def test_facts_of_a_case_by_hand(tmp_path):
    label = np.zeros((8, 6, 5), np.uint8)
    label[1:4, 1:6, 2:4] = 2  # 3 x 5 x 2 voxels of 1.5 x 1 x 2 mm: 4.5 x 5 x 4 mm
    label[7, 0, 0] = 1  # one voxel: counted, not measured
    image = np.arange(240, dtype=np.int16).reshape(1, 8, 6, 5)
    grid = Grid((8, 6, 5), AFFINE)
    facts, samples = describe_case("x", Volume(image, grid), LabelMap(label, grid), {}, labels=LABELS)
    assert facts.num_voxels == {"0": 209, "1": 1, "2": 30} and facts.orientation == "RAS"
    np.testing.assert_allclose(facts.spacing, (1.5, 1, 2))
    assert (facts.structures["1"].num_components, facts.structures["1"].smallest) == (1, None)
    assert (facts.structures["2"].num_components, facts.structures["2"].smallest) == (1, 4.5)
    inside = image[0][label > 0]
    assert facts.foreground[0].num_voxels == 31 and facts.foreground[0].mean == pytest.approx(inside.mean())
    assert facts.intensity[0].median == np.median(image) and len(samples.intensities[0]) == 31


def test_intensity_facts_agree_with_numpy_for_integers_and_floats():
    rng = np.random.default_rng(0)
    grid = Grid.from_spacing((12, 11, 10))
    for values in (rng.normal(0, 300, grid.shape).astype(np.int16), rng.normal(0, 300, grid.shape).astype(np.float32)):
        facts = describe_case("x", Volume(values[None], grid), None, {})[0].intensity[0]
        expected = [*np.percentile(values, (0.5, 50, 99.5)), values.mean(dtype=float), values.std(dtype=float)]
        np.testing.assert_allclose([facts.lower, facts.median, facts.upper, facts.mean, facts.sd], expected, rtol=1e-5)


def test_set_wide_foreground_statistics_are_those_of_all_labelled_voxels(tmp_path):
    dataset = read_dataset(write_nnunet(tmp_path / "set"))
    pooled = np.concatenate([draw_case(n)[0][draw_case(n)[1] > 0] for n in range(5)]).astype(float)
    facts = survey(dataset, num_workers=1)[1].foreground[0]
    expected = [len(pooled), *np.percentile(pooled, (0.5, 50, 99.5)), pooled.mean(), pooled.std()]
    np.testing.assert_allclose(
        [facts.num_voxels, facts.lower, facts.median, facts.upper, facts.mean, facts.sd], expected
    )


def spoil_image(root, number, change):
    image, _ = draw_case(number)
    save_nifti(root / "imagesTr" / f"case_{number:02d}_0000.nii.gz", change(image))


def spoil_label(root, number, change):
    _, label = draw_case(number)
    save_nifti(root / "labelsTr" / f"case_{number:02d}.nii.gz", change(label))


def cut_in_half(root):
    path = root / "imagesTr" / "case_01_0000.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD_CASES = {
    "A1": cut_in_half,
    "A10": lambda root: spoil_image(root, 1, lambda a: np.where(a > 0, np.float32("nan"), a).astype(np.float32)),
    "A28": lambda root: spoil_label(root, 1, lambda a: a[:-1]),
    "A29": lambda root: save_nifti(root / "labelsTr" / "case_01.nii.gz", draw_case(1)[1], np.diag([1.5, 1, 2, 1])),
    "C7": lambda root: spoil_label(root, 1, lambda a: (a > 0).astype(np.uint8) * 255),
    "D1": lambda root: spoil_label(root, 1, lambda a: a * np.float32(0.75)),
    "D2": lambda root: spoil_label(root, 1, lambda a: a * 3),
}


@pytest.mark.parametrize("code", BAD_CASES)
def test_a_bad_case_is_set_aside_by_name_and_the_others_are_kept(tmp_path, code):
    description = {"labels": {"background": 0, "liver": 1}} if code == "C7" else {}
    root = write_nnunet(tmp_path / "set", 6, description=description)
    if code == "C7":
        for number in range(6):
            spoil_label(root, number, lambda a: (a > 0).astype(np.uint8))
    BAD_CASES[code](root)
    report, fingerprint, found = findings_of(root)
    assert found == {(code, "error")}
    assert "case_01" in report.errors[0].where and not report.errors[0].where.startswith("/")
    assert len(fingerprint.cases) == 5 and report.bad_cases == 1


def test_oddities_are_warnings(tmp_path):
    root = write_nnunet(
        tmp_path / "set", 6, description={"labels": {"background": 0, "liver": 1, "tumour": 2, "cyst": 3}}
    )
    spoil_image(root, 1, np.zeros_like)
    spoil_label(root, 2, np.zeros_like)
    image = (root / "imagesTr" / "case_03_0000.nii.gz").read_bytes()
    (root / "imagesTr" / "case_04_0000.nii.gz").write_bytes(image)
    report, fingerprint, found = findings_of(root)
    assert found == {("A11", "warning"), ("D5", "warning"), ("D15", "warning")}
    facts = " ".join(finding.fact for finding in report.findings)
    assert "constant (0 everywhere)" in facts and "class 'cyst' (id 3) is in no label file" in facts
    assert len(fingerprint.cases) == 6


def test_one_image_on_both_sides_of_a_given_split_is_a_leak(tmp_path):
    root = write_nnunet(tmp_path / "set", 4)
    image = (root / "imagesTr" / "case_00_0000.nii.gz").read_bytes()
    (root / "imagesTr" / "case_03_0000.nii.gz").write_bytes(image)
    for val, words in ((["case_03"], "training and in validation"), (["case_01"], "counts twice")):
        train = sorted({f"case_{n:02d}" for n in range(4)} - set(val))
        write_json(root / "splits_final.json", [{"train": train, "val": val}])
        (finding,) = findings_of(root)[0].findings
        assert finding.code == "D15" and words in finding.consequence


def test_a_set_without_foreground_or_with_too_few_cases_is_refused(tmp_path):
    root = write_nnunet(tmp_path / "set", 2)
    assert findings_of(root)[2] == {("D18", "error")}
    root = write_nnunet(tmp_path / "other", 3)
    for number in range(3):
        spoil_label(root, number, np.zeros_like)
    assert ("D5", "error") in findings_of(root)[2]


@pytest.mark.parametrize("num_cases", [3, 4])
def test_too_few_cases_for_the_usual_folds_are_told_with_the_setting_that_helps(tmp_path, num_cases):
    report, _, found = findings_of(write_nnunet(tmp_path / "set", num_cases))
    assert found == {("D18", "warning")}
    assert f"--set plan.num_folds=N with N from 2 to {num_cases}" in report.findings[0].fix


def test_a_picture_turned_by_exif_and_a_mask_that_is_not_are_set_aside(tmp_path):
    root = write_folder(tmp_path / "set", ALL_ROWS)
    for folder, name in (("images", "a"), ("images", "b"), ("masks", "b"), ("masks", "c")):
        path = root / folder / f"{name}.png"
        picture = Image.open(path)
        exif = picture.getexif()
        exif[0x0112] = 3  # half a turn: the shape stays
        picture.save(path, exif=exif)
    report, fingerprint, found = findings_of(root)
    assert ("C3", "error") in found and [error.where for error in report.errors] == ["images/a.png", "images/c.png"]
    assert "EXIF" in report.errors[0].fix and [case.id for case in fingerprint.cases] == ["b", "d", "e"]


def test_unsound_given_splits_are_findings(tmp_path):
    root = write_nnunet(tmp_path / "set", 3)
    write_json(root / "splits_final.json", [{"train": ["case_00"], "val": ["case_0x"]}])
    (finding,) = findings_of(root)[0].errors
    assert finding.code == "D18" and "case_0x" in finding.fact


def test_masks_as_jpeg_are_refused_once_and_taken_with_the_fix_named(tmp_path):
    rows = ["image,label", *(f"images/{c}.png,masks/{c}.jpg" for c in "abcde")]
    root = write_folder(tmp_path / "set", rows, foreground=255, suffix="jpg")
    report, fingerprint, found = findings_of(root)
    assert found == {("C6", "error")} and "--lossy-labels 127" in report.errors[0].fix and not fingerprint.cases
    report, fingerprint, found = findings_of(root, ReadOptions(lossy_threshold=127))
    assert {severity for _, severity in found} <= {"note"}
    assert fingerprint.labels.ids == (0, 1) and fingerprint.read_options.lossy_threshold == 127


def test_masks_of_0_and_255_are_refused_and_taken_with_the_fix_named(tmp_path):
    root = write_folder(tmp_path / "set", ALL_ROWS, foreground=255)
    report, _, found = findings_of(root)
    assert found == {("C7", "error")} and "--map 255=1" in report.errors[0].fix
    assert findings_of(root, ReadOptions(label_map=((255, 1),)))[1].labels.ids == (0, 1)


def test_values_found_in_masks_name_the_classes(tmp_path):
    root = write_folder(tmp_path / "set", ALL_ROWS, foreground=7)
    _, fingerprint, found = findings_of(root)
    assert found == set() and fingerprint.labels.ids == (0, 7) and fingerprint.labels.names == ("background", "7")


def test_smoothed_masks_are_no_label_maps(tmp_path):
    root = write_folder(tmp_path / "set", ALL_ROWS)
    save_picture(root / "masks" / "a.png", np.arange(540, dtype=np.uint16).astype(np.uint8).reshape(20, 27))
    report, _, found = findings_of(root)
    assert found == {("D2", "error")} and "different values" in report.errors[0].fact


def test_pictures_with_other_channels_are_named(tmp_path):
    root = write_folder(tmp_path / "set", ALL_ROWS)
    save_picture(root / "images" / "b.png", np.zeros((20, 27), np.uint8))
    report, fingerprint, found = findings_of(root)
    assert ("C11", "error") in found and report.errors[0].where == "images/b.png"
    assert [case.id for case in fingerprint.cases] == ["a", "c", "d", "e"] and fingerprint.num_channels == 3


def test_many_findings_of_a_kind_are_told_as_one_that_names_all_files():
    def finding(number, severity="error"):
        return Finding(severity=severity, code="D2", where=f"f{number}", fact=f"{number}", consequence="c", fix="f")

    (told,) = gather_findings([finding(n) for n in range(30)])
    assert told.where == "f0" and told.others == tuple(f"f{n}" for n in range(1, 30)) and "30 alike" in told.fact
    assert len(gather_findings([finding(n) for n in range(5)])) == 5
    mixed = gather_findings([finding(0, "note"), finding(1, "warning"), finding(2)])
    assert [each.severity for each in mixed] == ["error", "warning", "note"]


@pytest.mark.shared
def test_the_real_jpeg_masks_are_refused_first(shared_folder):
    report, fingerprint = survey(read_dataset(shared_folder / "data" / "isic2017"))
    (error,) = report.errors
    assert (error.code, report.bad_cases, fingerprint.cases) == ("C6", 2150, ()) and "--lossy-labels 127" in error.fix
