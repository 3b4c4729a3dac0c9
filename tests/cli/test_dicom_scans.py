"""DICOM through the commands: a data set of scans and segmentations, scans to predict, and no trace of the patient."""

import json
from pathlib import Path

import dicom_files as made
import numpy as np
import pytest

from voxdino.cli import main
from voxdino.core.errors import EXIT_DONE, EXIT_INPUT
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.evaluation.evaluate import evaluate
from voxdino.inference.cases import find_cases
from voxdino.preparation.check import survey
from voxdino.preparation.dataset import read_dataset
from voxdino.preparation.scans import cases_of_scan

SHAPE = (24, 20, 5)
PLAN = ("magnification=1.0", "batch_size=2", "num_folds=2")
SETTINGS = ["--backbone", "random:tiny", "--workers", "1", *(word for one in PLAN for word in ("--set", f"plan.{one}"))]


def masks(seed):
    mask = np.zeros(SHAPE, bool)
    mask[4 + seed : 12 + seed, 5:14, 1:4] = True
    return {1: mask}


def image(seed):
    noise = np.random.default_rng(seed).integers(0, 60, SHAPE)
    return (noise + 300 * masks(seed)[1]).astype(np.int16)


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Four scans in nnU-Net's layout: folders of DICOM, with a DICOM SEG each."""
    root = tmp_path / "set"
    for seed in range(4):
        made.write(root / "imagesTr" / f"case_{seed}_0000", made.series(image(seed), intercept=-1024))
        path = root / "labelsTr" / f"case_{seed}.dcm"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(made.encode(made.segmentation(masks(seed))))
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".dcm"}
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def test_a_data_set_of_scans_and_segmentations_is_read_like_any_other(dataset):
    report, fingerprint = survey(read_dataset(dataset))
    assert report.errors == ()
    assert [case.shape for case in fingerprint.cases] == [SHAPE] * 4
    assert fingerprint.cases[0].num_voxels["1"] == masks(0)[1].sum()
    assert fingerprint.cases[0].spacing == pytest.approx((0.8, 1.5, 5.0))


def test_a_table_of_scans_may_name_folders_archives_and_contours(tmp_path):
    made.write(tmp_path / "a", made.series(image(0)))
    made.write_zip(tmp_path / "b.zip", made.series(image(1)))
    square = np.array([(3.5, 3.5, 2), (9.5, 3.5, 2), (9.5, 9.5, 2), (3.5, 9.5, 2)]) @ made.AFFINE[:3, :3].T
    (tmp_path / "a.dcm").write_bytes(made.encode(made.structures({"liver": [square + made.AFFINE[:3, 3]]})))
    (tmp_path / "b.dcm").write_bytes(made.encode(made.segmentation(masks(1))))
    (tmp_path / "dataset.csv").write_text("image,label\na,a.dcm\nb.zip,b.dcm\n")
    report, fingerprint = survey(read_dataset(tmp_path))
    assert [finding.code for finding in report.errors if finding.code != "D18"] == []
    assert [case.num_voxels["1"] for case in fingerprint.cases] == [36, masks(1)[1].sum()]


def test_a_folder_of_scans_is_a_case_per_series(tmp_path):
    other = made.series(image(1), series_uid=made.OTHER_SERIES_UID)
    scout = made.series(image(2)[..., :1], series_uid="1.2.3.4")[0]
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    for dataset in other:
        dataset.SeriesNumber = 8
    made.write(tmp_path / "in" / "one", made.series(image(0)))
    made.write(tmp_path / "in" / "two", [*made.series(image(0)), *other], names="IM{}")
    made.write(tmp_path / "in" / "three", [*made.series(image(0)), scout])
    made.write_zip(tmp_path / "in" / "four.zip", made.series(image(0)))
    (tmp_path / "in" / "notes").mkdir()
    found = find_cases([tmp_path / "in"])
    assert [case.id for case in found] == ["four", "one", "three", "two_3", "two_8"]
    assert [case.id for case in find_cases([tmp_path / "in" / "two"])] == ["two_3", "two_8"]
    assert [case.id for case in find_cases([tmp_path / "in" / "two"], series="8")] == ["two"]
    assert [case.id for case in find_cases([tmp_path / "in" / "two" / "IM0", tmp_path / "in" / "four.zip"])] == [
        "IM0",
        "four",
    ]
    (tmp_path / "in" / "one" / "000.dcm").write_bytes(b"\0" * 128 + b"DICM")
    assert cases_of_scan(tmp_path / "in" / "one")[0].images == (tmp_path / "in" / "one",)  # fails by name later


def test_check_lists_the_series_of_a_scan(tmp_path, capsys):
    gap = made.series(image(1), series_uid=made.OTHER_SERIES_UID)
    del gap[2]
    for dataset in gap:
        dataset.SeriesNumber = 8
    folder = made.write(tmp_path / "scan", [*made.series(image(0)), *gap])
    assert main(["check", str(folder)]) == EXIT_DONE
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "series 3: CT, 24 x 20 x 5 voxels at 0.8 x 1.5 x 5 mm, 5 files"
    assert told[1].startswith("series 8: CT, odd, 4 files: gap between")
    assert main(["check", str(folder), "--json"]) == EXIT_DONE
    assert [one["number"] for one in json.loads(capsys.readouterr().out)["series"]] == [3, 8]


def test_predictions_are_scored_against_segmentations_and_contours(tmp_path):
    made.write(tmp_path / "scan", made.series(image(0)))
    (tmp_path / "reference.dcm").write_bytes(made.encode(made.segmentation(masks(0))))
    (tmp_path / "prediction.dcm").write_bytes(made.encode(made.segmentation(masks(0), sparse=False)))
    labels = LabelSet(names=("background", "liver"), ids=(0, 1))
    pairs = [("a", tmp_path / "prediction.dcm", tmp_path / "reference.dcm")]
    scores = evaluate(pairs, labels, ReadOptions(segments=(("1", 1),)))
    assert scores.failed == ()
    assert scores.mean("dice", "liver") == 1


def test_no_trace_of_the_patient_is_left_by_checking_and_preparing(dataset, tmp_path, capfd):
    """Forty identifiers in every file: in what is written, also packed, and in all that is said."""
    work = tmp_path / "work"
    assert main(["prepare", str(dataset), "--workdir", str(work), *SETTINGS]) == EXIT_DONE
    scan = made.write(tmp_path / "scan", made.series(image(7)))
    assert main(["check", str(scan)]) == EXIT_DONE
    (scan / "001.dcm").unlink()
    assert main(["check", str(scan)]) == EXIT_INPUT
    first = dataset / "imagesTr" / "case_0_0000" / "000.dcm"
    first.write_bytes(first.read_bytes()[:700])
    assert main(["check", str(dataset)]) == EXIT_INPUT
    told = capfd.readouterr()
    assert "truncated" in told.out
    written = [path.read_bytes() for path in work.rglob("*") if path.is_file()]
    assert len(written) > 10
    everything = b"\n".join([*written, told.out.encode(), told.err.encode()])
    assert [seed for seed in made.SEEDS if seed.encode() in everything] == []
