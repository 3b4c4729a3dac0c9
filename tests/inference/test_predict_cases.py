"""Laws of predicting many cases: resumable to the same bytes, one bad case stops nobody, inputs stay untouched."""

import json

import numpy as np
import pytest
from conftest import make_card, make_plan, make_segmenter, make_volume

from voxdino.core.errors import (
    CheckpointError,
    DatasetError,
    ImageError,
    PartialError,
    ResourceError,
    SafetyError,
    UsageError,
)
from voxdino.core.geometry import Grid
from voxdino.core.io import read_label_map, read_volume, write_volume
from voxdino.core.volume import Volume
from voxdino.inference import run
from voxdino.inference.cases import find_cases
from voxdino.inference.load import load_model, save_model
from voxdino.inference.predictor import PredictSettings
from voxdino.inference.run import predict_cases
from voxdino.preparation.case import Case


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for i in range(3):
        write_volume(folder / f"case_{i}_0000.nii.gz", make_volume(seed=i))
    return folder


@pytest.fixture
def cases(images):
    return find_cases([images])


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def test_every_case_is_predicted_on_its_own_grid_and_recorded(model, images, cases, tmp_path):
    before, seen = contents(images), []
    summary = predict_cases(cases, model, tmp_path / "out", on_progress=lambda *told: seen.append(told))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert (summary.num_done, summary.num_kept) == (3, 0)
    for i in range(3):
        image = read_volume(images / f"case_{i}_0000.nii.gz")
        label = read_label_map(tmp_path / "out" / f"case_{i}.nii.gz")
        np.testing.assert_allclose(label.grid.affine, image.grid.affine, atol=1e-6)
        assert set(np.unique(label.array)) <= {0, 5, 9}
        entry = summary.record.cases[f"case_{i}"]
        volumes = {
            name: (label.array == value).sum() * 0.7 * 0.9 * 3 / 1000 for name, value in (("liver", 5), ("lesion", 9))
        }
        assert entry.volumes == pytest.approx(volumes, abs=1e-4)
        assert entry.unit == "ml"
    assert contents(images) == before
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["licence"] == "DINOv3 License"


def test_the_same_call_again_keeps_everything_and_computes_nothing(model, cases, tmp_path, monkeypatch):
    predict_cases(cases, model, tmp_path / "out")
    before = contents(tmp_path / "out")
    monkeypatch.setattr(run, "predict_volume", None)
    assert predict_cases(cases, model, tmp_path / "out").num_kept == 3
    assert contents(tmp_path / "out") == before


class Killed(BaseException):
    """As SIGKILL: nothing of ours catches it."""


@pytest.mark.parametrize("point", ["before case", "after output", "in record"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_killed_at_any_point_the_same_command_ends_with_the_same_bytes(
    model, cases, tmp_path, monkeypatch, number, point
):
    predict_cases(cases, model, tmp_path / "whole")
    with monkeypatch.context() as patch:
        target = {"before case": "predict_volume", "after output": "measure_volumes", "in record": "write_record"}[
            point
        ]
        owner = run._Ledger if target == "write_record" else run
        name = "write_now_and_then" if target == "write_record" else target
        original, count = getattr(owner, name), [0]

        def kill(*arguments, **settings):
            count[0] += 1
            if count[0] == number:
                raise Killed
            return original(*arguments, **settings)

        patch.setattr(owner, name, kill)
        patch.setattr(run._Ledger, "write", _only_first(run._Ledger.write))  # a killed run has no last word
        with pytest.raises(Killed):
            predict_cases(cases, model, tmp_path / "out")
    (tmp_path / "out" / ".tmp-aaaaaa-99999999-bb.nii.gz").write_bytes(b"half")
    predict_cases(cases, model, tmp_path / "out")
    ours, whole = contents(tmp_path / "out"), contents(tmp_path / "whole")
    ours.pop(".tmp-aaaaaa-99999999-bb.nii.gz", None)  # of another machine, young: left alone
    assert ours == whole


def _only_first(write):
    done = []

    def first(self, failed=None):
        if done:
            return self.record
        done.append(True)
        return write(self, failed)

    return first


def test_a_damaged_output_is_made_again(model, cases, tmp_path):
    predict_cases(cases, model, tmp_path / "out")
    before = contents(tmp_path / "out")
    path = tmp_path / "out" / "case_1.nii.gz"
    path.write_bytes(path.read_bytes()[:-9])
    summary = predict_cases(cases, model, tmp_path / "out")
    assert (summary.num_done, summary.num_kept) == (1, 2)
    assert contents(tmp_path / "out") == before


def test_a_changed_input_is_predicted_again(model, images, cases, tmp_path):
    predict_cases(cases, model, tmp_path / "out")
    old = contents(tmp_path / "out")
    write_volume(images / "case_1_0000.nii.gz", make_volume(seed=77))
    assert predict_cases(cases, model, tmp_path / "out").num_done == 1
    new = contents(tmp_path / "out")
    assert {name for name in old if old[name] != new[name]} == {"case_1.nii.gz", "predictions.json"}


def test_a_bad_case_is_named_and_the_others_are_done(model, images, cases, tmp_path):
    path = images / "case_1_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PartialError, match=r"1 of 3 cases failed: .*case_1_0000") as caught:
        predict_cases(cases, model, tmp_path / "out")
    assert caught.value.exit_code == 6
    assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} == {"case_0.nii.gz", "case_2.nii.gz"}
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert set(record["failed"]) == {"case_1"}
    write_volume(path, make_volume(seed=1))
    assert predict_cases(cases, model, tmp_path / "out").num_done == 1
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["failed"] == {}


def test_a_prediction_of_a_file_that_went_bad_does_not_stay(model, images, cases, tmp_path):
    predict_cases(cases, model, tmp_path / "out")
    (images / "case_1_0000.nii.gz").write_bytes(b"")
    with pytest.raises(PartialError):
        predict_cases(cases, model, tmp_path / "out")
    assert not (tmp_path / "out" / "case_1.nii.gz").exists()


def test_strict_stops_at_the_first_bad_case_and_a_single_case_gives_its_own_error(model, images, cases, tmp_path):
    (images / "case_0_0000.nii.gz").write_bytes(b"no image")
    with pytest.raises(ImageError, match="case_0_0000"):
        predict_cases(cases, model, tmp_path / "strict", strict=True)
    assert not list((tmp_path / "strict").glob("*.nii.gz"))
    with pytest.raises(ImageError):
        predict_cases(cases[:1], model, tmp_path / "single")


def test_predictions_of_another_model_or_settings_are_not_replaced_unless_asked(model, cases, tmp_path):
    predict_cases(cases, model, tmp_path / "out")
    with pytest.raises(UsageError, match="another settings"):
        predict_cases(cases, model, tmp_path / "out", settings=PredictSettings(mirror=True))
    plan = make_plan()
    save_model(tmp_path / "other", make_segmenter(plan, decoder="tpa_sad", decoder_width=8), plan, make_card())
    other = load_model(tmp_path / "other")
    with pytest.raises(UsageError, match=r"another model \(first\)"):
        predict_cases(cases, other, tmp_path / "out")
    assert predict_cases(cases, other, tmp_path / "out", overwrite=True).num_done == 3


def test_files_that_are_not_ours_are_not_replaced(model, cases, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "case_2.nii.gz").write_bytes(b"somebody's work")
    with pytest.raises(UsageError, match=r"case_2\.nii\.gz"):
        predict_cases(cases, model, tmp_path / "out")
    assert (tmp_path / "out" / "case_2.nii.gz").read_bytes() == b"somebody's work"


def test_an_input_is_never_the_output(model, tmp_path):
    write_volume(tmp_path / "scan.nii.gz", make_volume())
    with pytest.raises(SafetyError, match="would replace this input"):
        predict_cases(find_cases([tmp_path / "scan.nii.gz"]), model, tmp_path)
    with pytest.raises(SafetyError):
        predict_cases([Case("../scan", (tmp_path / "scan.nii.gz",), None)], model, tmp_path / "out")


def test_too_little_memory_is_said_before_any_work(model, cases, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match=r"9 x 11 x 6 voxels need about .* 1000 bytes are free"):
        predict_cases(cases, model, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_a_missing_channel_is_named(tmp_path):
    plan = make_plan(
        channels=tuple(make_plan().channels[0].model_copy(update={"name": n, "source": i}) for i, n in enumerate("ab")),
        input_builder="channels",
    )
    save_model(tmp_path / "two", make_segmenter(plan), plan, make_card())
    write_volume(tmp_path / "scan_0000.nii.gz", make_volume())
    with pytest.raises(ImageError, match="channel"):
        predict_cases(find_cases([tmp_path / "scan_0000.nii.gz"]), load_model(tmp_path / "two"), tmp_path / "out")


def test_pictures_become_png_label_maps(tmp_path):
    plan = make_plan(ndim=2, slice_axis=None)
    save_model(tmp_path / "flat", make_segmenter(plan), plan, make_card())
    array = np.random.default_rng(0).integers(0, 255, (1, 9, 14)).astype(np.uint8)
    write_volume(tmp_path / "in" / "photo.tif", Volume(array, Grid.from_spacing((9, 14), unit="px")))
    summary = predict_cases(find_cases([tmp_path / "in"]), load_model(tmp_path / "flat"), tmp_path / "out")
    assert read_label_map(tmp_path / "out" / "photo.png").array.shape == (9, 14)
    assert summary.record.cases["photo"].unit == "px"


def test_two_runs_do_not_share_a_folder(model, cases, tmp_path):
    def second(*_):
        with pytest.raises(ResourceError, match="another run works in this folder"):
            predict_cases(cases, model, tmp_path / "out")

    predict_cases(cases, model, tmp_path / "out", on_progress=second)


def test_no_case_is_an_error(model, tmp_path):
    with pytest.raises(UsageError, match="no case to predict"):
        predict_cases([], model, tmp_path / "out")


def test_files_are_grouped_into_cases(tmp_path):
    for name in ("b_0000.nii.gz", "b_0001.nii.gz", "a.nii.gz", "notes.txt", "c_12.nii"):
        (tmp_path / name).write_bytes(b"x")
    cases = find_cases([tmp_path])
    assert [(case.id, [image.name for image in case.images]) for case in cases] == [
        ("a", ["a.nii.gz"]),
        ("b", ["b_0000.nii.gz", "b_0001.nii.gz"]),
        ("c_12", ["c_12.nii"]),
    ]
    assert [case.images for case in find_cases([tmp_path / "b_0000.nii.gz"])] == [cases[1].images]


def test_inputs_that_are_missing_empty_or_double_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="no such file or folder"):
        find_cases([tmp_path / "absent.nii.gz"])
    with pytest.raises(DatasetError, match="holds no image"):
        find_cases([tmp_path])
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "scan.nii.gz").write_bytes(b"x")
    with pytest.raises(UsageError, match="several inputs are called scan"):
        find_cases([tmp_path / "x", tmp_path / "y"])


def test_nan_scores_set_the_case_aside(model, cases, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise CheckpointError("the model gives NaN")

    monkeypatch.setattr(run, "predict_volume", broken)
    with pytest.raises(PartialError, match="case_0: the model gives NaN"):
        predict_cases(cases, model, tmp_path / "out")
