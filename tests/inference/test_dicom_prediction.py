"""Predicting DICOM scans: on their own grid, kept when nothing changed, without a trace of the patient."""

import gzip
import os

import dicom_files as made
import numpy as np
import pydicom
import pytest
from small_models import LABELS

from voxdino.core.errors import ImageError, PartialError
from voxdino.core.io import read_grid, read_label_map
from voxdino.core.io.dicom.series import look_into
from voxdino.core.io.options import ReadOptions
from voxdino.inference.cases import find_cases
from voxdino.inference.outputs import OutputSettings
from voxdino.inference.run import predict_cases
from voxdino.inference.team import Team


def test_a_scan_is_predicted_on_its_own_grid_and_leaves_no_trace_of_the_patient(model, tmp_path):
    scans, out = tmp_path / "scans", tmp_path / "out"
    made.write(scans / "one", made.series(made.numbered((9, 11, 6))))
    made.write_zip(scans / "two.zip", made.series(made.numbered((9, 11, 6))))
    broken = made.series(made.numbered((9, 11, 6)))
    del broken[2]
    made.write(scans / "three", broken)
    cases = find_cases([scans])
    with pytest.raises(PartialError, match="gap between") as caught:
        predict_cases(cases, model, out)
    predict_cases(cases[:1], model, tmp_path / "plain", output=OutputSettings(format="nifti"))
    plain = read_label_map(tmp_path / "plain" / "one.nii.gz")
    assert plain.grid.same_as(read_grid(scans / "one")[0])
    assert len(np.unique(plain.array)) > 1
    segments = ReadOptions(segments=tuple(LABELS.foreground))
    for name in ("one", "two"):
        found = read_label_map(out / f"{name}.seg.dcm", options=segments, like=scans / "one")
        np.testing.assert_array_equal(found.array, plain.array)
    references = {*made.UIDS.values(), made.SERIES_UID}
    for path in (*out.iterdir(), *(tmp_path / "plain").iterdir()):
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        found = {seed for seed in made.SEEDS if seed.encode() in data}
        assert found == (references if path.suffix == ".dcm" else set())
    assert [seed for seed in made.SEEDS if seed in str(caught.value)] == []
    assert predict_cases(cases[:1], model, out).num_kept == 1


def test_the_patient_is_in_dicom_output_only_when_asked(model, tmp_path):
    cases = find_cases([made.write(tmp_path / "one", made.series(made.numbered((9, 11, 6))))])
    predict_cases(cases, model, tmp_path / "out", output=OutputSettings(format="rtstruct", keep_patient=True))
    written = pydicom.dcmread(tmp_path / "out" / "one.rtstruct.dcm")
    assert written.PatientName == made.IDENTIFIERS["PatientName"]
    assert "PatientAddress" not in written


def test_images_without_the_uids_that_output_refers_to_are_refused_before_the_work(model, tmp_path, monkeypatch):
    images = made.series(made.numbered((9, 11, 6)))
    for image in images:
        del image.StudyInstanceUID
    cases = find_cases([made.write(tmp_path / "one", images)])
    with pytest.raises(ImageError, match=r"no StudyInstanceUID.*--format nifti"), monkeypatch.context() as patched:
        patched.setattr(Team, "segment", None)
        predict_cases(cases, model, tmp_path / "out")
    predict_cases(cases, model, tmp_path / "out", output=OutputSettings(format="nifti"), overwrite=True)
    assert (tmp_path / "out" / "one.nii.gz").is_file()


@pytest.fixture
def headers_read(monkeypatch):
    """Names of the files whose headers are read."""
    names, read = [], pydicom.filereader.read_partial  # what every dcmread comes to

    def counting(file, *args, **kwargs):
        names.append(file._where.name)
        return read(file, *args, **kwargs)

    monkeypatch.setattr(pydicom.filereader, "read_partial", counting)
    return names


def grown_old(folder):
    """As files are that were not written this moment."""
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))
    return folder


@pytest.mark.parametrize("form, times", [("nifti", 1), ("dicom-seg", 2), ("rtstruct", 2)])
def test_headers_are_read_once_and_once_more_where_output_quotes_them(model, tmp_path, headers_read, form, times):
    folder = grown_old(made.write(tmp_path / "one", made.series(made.numbered((9, 11, 6)))))
    predict_cases(find_cases([folder]), model, tmp_path / "out", output=OutputSettings(format=form))
    assert sorted(headers_read) == sorted(file.name for file in folder.iterdir() for _ in range(times))


def test_headers_that_change_are_read_again(tmp_path):
    folder = grown_old(made.write(tmp_path / "one", made.series(made.numbered((9, 11, 6)))))
    grid, _ = read_grid(folder)
    thicker = made.AFFINE @ np.diag([1, 1, 2, 1])
    made.write(folder, made.series(made.numbered((9, 11, 6)), thicker))
    assert read_grid(folder)[0].spacing[2] == pytest.approx(2 * grid.spacing[2])  # just written
    grown_old(folder)  # of the same names, sizes, and times
    assert read_grid(folder)[0].spacing[2] == pytest.approx(2 * grid.spacing[2])
    (folder / "005.dcm").unlink()
    assert read_grid(folder)[0].shape[2] == 5


def test_what_is_remembered_of_headers_holds_nothing_of_the_patient(tmp_path):
    folder = grown_old(made.write(tmp_path / "one", made.series(made.numbered((9, 11, 6)))))
    remembered = str([vars(one) for one in look_into(folder).instances])
    assert look_into(folder) is look_into(folder)
    assert [seed for seed in made.SEEDS if seed in remembered] == [made.SERIES_UID]  # which tells series apart


def test_a_change_of_any_slice_is_noticed(model, tmp_path):
    folder = made.write(tmp_path / "one", made.series(made.numbered((9, 11, 6))))
    cases = find_cases([folder])
    predict_cases(cases, model, tmp_path / "out")
    data = bytearray((folder / "003.dcm").read_bytes())
    data[-20] ^= 1
    (folder / "003.dcm").write_bytes(data)
    assert predict_cases(cases, model, tmp_path / "out").num_done == 1
    assert np.isin(read_label_map(tmp_path / "out" / "one.seg.dcm").array, (0, 1, 2)).all()
