"""Predicting DICOM scans: on their own grid, kept when nothing changed, without a trace of the patient."""

import gzip

import dicom_files as made
import numpy as np
import pytest

from voxdino.core.errors import PartialError
from voxdino.core.io import read_grid, read_label_map
from voxdino.inference import run
from voxdino.inference.cases import find_cases
from voxdino.inference.run import predict_cases


def test_a_scan_is_predicted_on_its_own_grid_and_leaves_no_trace_of_the_patient(model, tmp_path, monkeypatch):
    scans, out = tmp_path / "scans", tmp_path / "out"
    made.write(scans / "one", made.series(made.numbered((9, 11, 6))))
    made.write_zip(scans / "two.zip", made.series(made.numbered((9, 11, 6))))
    broken = made.series(made.numbered((9, 11, 6)))
    del broken[2]
    made.write(scans / "three", broken)
    cases = find_cases([scans])
    with pytest.raises(PartialError, match="gap between") as caught:
        predict_cases(cases, model, out)
    for name in ("one", "two"):
        assert read_label_map(out / f"{name}.nii.gz").grid.same_as(read_grid(scans / "one")[0])
    written = [path.read_bytes() for path in out.iterdir()]
    written += [gzip.decompress(data) for data in written if data[:2] == b"\x1f\x8b"]
    everything = b"\n".join([*written, str(caught.value).encode()])
    assert [seed for seed in made.SEEDS if seed.encode() in everything] == []
    monkeypatch.setattr(run, "predict_volume", None)
    assert predict_cases(cases[:1], model, out).num_kept == 1


def test_a_picture_in_dicom_becomes_a_picture(model, tmp_path):
    dataset = made.series(made.numbered((9, 11, 1)))[0]
    del dataset.ImagePositionPatient, dataset.ImageOrientationPatient
    made.write(tmp_path / "in", [dataset])
    assert run.output_file(find_cases([tmp_path / "in"])[0], tmp_path / "out").name == "in.png"
    made.write(tmp_path / "in", made.series(made.numbered((9, 11, 2))))
    assert run.output_file(find_cases([tmp_path / "in"])[0], tmp_path / "out").name == "in.nii.gz"


def test_a_change_of_any_slice_is_noticed(model, tmp_path):
    folder = made.write(tmp_path / "one", made.series(made.numbered((9, 11, 6))))
    cases = find_cases([folder])
    predict_cases(cases, model, tmp_path / "out")
    data = bytearray((folder / "003.dcm").read_bytes())
    data[-20] ^= 1
    (folder / "003.dcm").write_bytes(data)
    assert predict_cases(cases, model, tmp_path / "out").num_done == 1
    assert np.isin(read_label_map(tmp_path / "out" / "one.nii.gz").array, (0, 5, 9)).all()
