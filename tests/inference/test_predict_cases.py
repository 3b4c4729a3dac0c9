"""Laws of predicting many cases: resumable to the same bytes, one bad case stops nobody, inputs stay untouched."""

import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from small_models import make_card, make_plan, make_segmenter, make_volume

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
from voxdino.core.io import read_label_map, read_volume, write_label_map, write_volume
from voxdino.core.safe_files import digest_file
from voxdino.core.volume import Volume
from voxdino.inference import ledger, memory, run, team
from voxdino.inference.cases import find_cases
from voxdino.inference.ledger import RECORD_NAME, PredictRecord
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
    monkeypatch.setattr(team, "predict_volume", None)
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
        owner, name = {
            "before case": (team, "predict_volume"),
            "after output": (run, "measure_volumes"),
            "in record": (ledger.Ledger, "write_now_and_then"),
        }[point]
        original, count = getattr(owner, name), [0]

        def kill(*arguments, **settings):
            count[0] += 1
            if count[0] == number:
                raise Killed
            return original(*arguments, **settings)

        patch.setattr(owner, name, kill)
        patch.setattr(ledger.Ledger, "write", _only_first(ledger.Ledger.write))  # a killed run has no last word
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
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match=r"9 x 11 x 6 voxels need about .* 1000 bytes are free"):
        predict_cases(cases, model, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.nii.gz"))


@pytest.fixture
def two_channels(tmp_path):
    channels = tuple(make_plan().channels[0].model_copy(update={"name": n, "source": i}) for i, n in enumerate("ab"))
    plan = make_plan(channels=channels, input_builder="channels")
    save_model(tmp_path / "two", make_segmenter(plan), plan, make_card())
    return load_model(tmp_path / "two")


def frames(seed=0):
    """A volume of two channels."""
    first, second = make_volume(seed=seed), make_volume(seed=seed + 1)
    return Volume(np.concatenate([first.array, second.array]), first.grid)


def test_a_wrong_number_of_channels_is_refused_with_both_numbers(model, two_channels, tmp_path):
    write_volume(tmp_path / "in" / "scan_0000.nii.gz", make_volume())
    files = [tmp_path / "in" / "scan_0000.nii.gz"]
    with pytest.raises(ImageError, match="has 1 channel, the model needs 2"):
        predict_cases(find_cases(files, num_channels=2), two_channels, tmp_path / "out")
    write_volume(tmp_path / "in" / "scan_0002.nii.gz", make_volume())
    with pytest.raises(ImageError, match="has 3 channels, the model needs 2"):
        predict_cases(find_cases([tmp_path / "in"], num_channels=2), two_channels, tmp_path / "out")
    write_volume(tmp_path / "4d.nrrd", frames())
    with pytest.raises(ImageError, match="has 2 channels, the model needs 1"):
        predict_cases(find_cases([tmp_path / "4d.nrrd"]), model, tmp_path / "one")


@pytest.mark.parametrize("from_data_set", [True, False])
def test_channels_kept_as_frames_of_one_file_are_predicted_as_they_were_trained(two_channels, tmp_path, from_data_set):
    write_volume(tmp_path / "in" / "scan.nii.gz", frames())
    files = tmp_path / "in" / "scan.nii.gz"
    cases = [Case("scan", (files,), None, frames_as_channels=True)]
    if not from_data_set:
        cases = find_cases([files], num_channels=2)
    predict_cases(cases, two_channels, tmp_path / "out")
    for i in range(2):
        write_volume(tmp_path / "split" / f"scan_000{i}.nii.gz", make_volume(seed=i))
    predict_cases(find_cases([tmp_path / "split"], num_channels=2), two_channels, tmp_path / "other")
    label = read_label_map(tmp_path / "out" / "scan.nii.gz")
    assert (label.array == read_label_map(tmp_path / "other" / "scan.nii.gz").array).all()


@pytest.mark.parametrize(("suffix", "written"), [(".mhd", ".mha"), (".nhdr", ".nrrd"), (".NII.GZ", ".nii.gz")])
def test_every_volume_gets_a_format_that_holds_label_maps(model, tmp_path, suffix, written):
    (tmp_path / "in").mkdir()
    path, volume = tmp_path / "in" / f"scan{suffix}", make_volume()
    write_volume(tmp_path / f"scan{written}", volume)
    packed = (tmp_path / f"scan{written}").read_bytes()
    if suffix == ".mhd":
        at = packed.index(b"LOCAL\n")
        path.write_bytes(packed[:at] + b"scan.zraw\n")
        path.with_suffix(".zraw").write_bytes(packed[at + 6 :])
    elif suffix == ".nhdr":
        header, _, data = packed.partition(b"\n\n")
        path.write_bytes(header + b"\ndata file: scan.raw.gz\n")
        path.with_name("scan.raw.gz").write_bytes(data)
    else:
        path.write_bytes(packed)
    predict_cases(find_cases([path]), model, tmp_path / "out")
    label = read_label_map(tmp_path / "out" / f"scan{written}")
    assert label.grid.same_as(volume.grid)


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


def named(cases):
    return [(case.id, [image.name for image in case.images]) for case in cases]


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def test_files_are_grouped_into_cases(tmp_path):
    touch(tmp_path, "b_0000.nii.gz", "b_0001.nii.gz", "a.nii.gz", "notes.txt", "c_12.nii")
    cases = find_cases([tmp_path], num_channels=2)
    assert named(cases) == [
        ("a", ["a.nii.gz"]),
        ("b", ["b_0000.nii.gz", "b_0001.nii.gz"]),
        ("c_12", ["c_12.nii"]),
    ]
    assert [case.images for case in find_cases([tmp_path / "b_0000.nii.gz"], num_channels=2)] == [cases[1].images]
    assert find_cases(sorted(tmp_path.glob("b*")), num_channels=2) == [cases[1]]


def test_numbered_files_are_channels_only_of_a_model_that_has_several(tmp_path):
    touch(tmp_path, "a_0000.nii.gz", "scan_0000.nii.gz", "scan_0001.nii.gz", "scan_0002.nii.gz")
    scans = [(f"scan_000{i}", [f"scan_000{i}.nii.gz"]) for i in range(3)]
    assert named(find_cases([tmp_path])) == [("a", ["a_0000.nii.gz"]), *scans]
    assert named(find_cases([tmp_path / "scan_0001.nii.gz"])) == [scans[1]]


def test_a_gap_among_the_channels_is_named(two_channels, tmp_path):
    write_volume(tmp_path / "in" / "s_0001.nii.gz", make_volume())
    touch(tmp_path / "in", "t_0000.nii.gz", "t_0002.nii.gz")
    assert named(find_cases([tmp_path / "in"], num_channels=2)) == [
        ("s_0001", ["s_0001.nii.gz"]),
        ("t", ["t_0000.nii.gz", "t_0001.nii.gz", "t_0002.nii.gz"]),
    ]


@pytest.mark.parametrize("names", [("a.nii.gz", "a_0000.nii.gz"), ("b.nii", "b.nii.gz"), ("c.png", "c.tif")])
def test_two_files_of_one_case_name_are_both_named(tmp_path, names):
    with pytest.raises(UsageError, match=f"{names[0]} and {names[1]}"):
        find_cases([touch(tmp_path, *names)])


def test_whatever_cannot_be_read_is_a_failed_case_and_not_passed_over(model, images, tmp_path):
    (images / "gone.nii.gz").symlink_to(images / "nowhere.nii.gz")
    os.mkfifo(images / "pipe.nii.gz")
    with pytest.raises(PartialError, match=r"2 of 5 cases failed: .*gone.*does not exist.*pipe.*is a named pipe"):
        predict_cases(find_cases([images]), model, tmp_path / "out")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EIO])
def test_an_input_that_goes_while_it_is_read_fails_alone(model, cases, tmp_path, monkeypatch, number):
    def digest(path):
        if path == cases[1].images[0]:
            raise OSError(number, os.strerror(number), str(path))
        return digest_file(path)

    monkeypatch.setattr(ledger, "digest_image", digest)
    with pytest.raises(PartialError, match=rf"1 of 3 .*{os.strerror(number)}"):
        predict_cases(cases, model, tmp_path / "out")


def test_a_full_disk_stops_everything(model, cases, tmp_path, monkeypatch):
    def write(*_, **__):
        raise ResourceError("the disk is full")

    monkeypatch.setattr(run, "write_prediction", write)
    with pytest.raises(ResourceError):
        predict_cases(cases, model, tmp_path / "out")


def test_records_name_no_folder(model, images, cases, tmp_path):
    (images / "case_1_0000.nii.gz").write_bytes(b"no image")
    with pytest.raises(PartialError):
        predict_cases(cases, model, tmp_path / "out")
    text = (tmp_path / "out" / "predictions.json").read_text()
    assert '"case_1_0000.nii.gz: ' in text and str(tmp_path) not in text


def test_what_another_model_predicted_does_not_stay_when_a_case_fails(model, images, cases, tmp_path):
    predict_cases(cases, model, tmp_path / "out")
    (images / "case_1_0000.nii.gz").write_bytes(b"no image")
    with pytest.raises(PartialError):
        predict_cases(cases[1:], model, tmp_path / "out", settings=PredictSettings(mirror=True), overwrite=True)
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["case_2.nii.gz"]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "case_1.nii.gz").write_bytes(b"another program's")
    with pytest.raises(PartialError):
        predict_cases(cases, model, tmp_path / "foreign", overwrite=True)
    assert not (tmp_path / "foreign" / "case_1.nii.gz").exists()


def test_a_prediction_corrected_by_hand_is_kept_aside(model, cases, tmp_path):
    predict_cases(cases, model, tmp_path / "out")
    before, path, notes = contents(tmp_path / "out"), tmp_path / "out" / "case_1.nii.gz", []
    for name in ("case_1.edited.nii.gz", "case_1.edited-2.nii.gz"):
        label = read_label_map(path)
        write_label_map(path, replace(label, array=np.where(label.array == 0, 9, 0).astype(np.uint8)))
        edited = path.read_bytes()
        assert predict_cases(cases, model, tmp_path / "out", on_note=notes.append).num_done == 1
        assert notes[-1].endswith(f"kept as {name}")
        assert (tmp_path / "out" / name).read_bytes() == edited
    assert contents(tmp_path / "out").items() >= before.items()


def test_a_label_map_of_somebody_else_is_kept_aside_and_our_own_unrecorded_one_is_not(model, cases, tmp_path):
    out = tmp_path / "out"
    predict_cases(cases[:2], model, out)
    theirs = (out / f"{cases[0].id}.nii.gz").read_bytes()
    (out / f"{cases[2].id}.nii.gz").write_bytes(theirs)
    ours = PredictRecord.read(out / RECORD_NAME)
    kept = {name: case for name, case in ours.cases.items() if name != cases[0].id}
    ours.model_copy(update={"cases": kept}).write(out / RECORD_NAME)  # killed before it was recorded
    notes = []
    assert predict_cases(cases, model, out, on_note=notes.append).num_done == 2
    assert [path.name for path in out.glob("*.edited*")] == [f"{cases[2].id}.edited.nii.gz"]
    assert (out / f"{cases[2].id}.edited.nii.gz").read_bytes() == theirs
    assert any(f"kept as {cases[2].id}.edited.nii.gz" in note for note in notes)


@pytest.mark.parametrize("place", ["", "predictions"])
def test_predictions_do_not_go_into_the_folder_of_a_scan(model, tmp_path, place):
    scan = tmp_path / "scan"
    scan.mkdir()
    with pytest.raises(UsageError, match="lies in the folder of a scan"):
        predict_cases([Case("scan", (scan,), None)], model, scan / place)
    assert not list(scan.iterdir())


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

    monkeypatch.setattr(team, "predict_volume", broken)
    with pytest.raises(PartialError, match="case_0: the model gives NaN"):
        predict_cases(cases, model, tmp_path / "out")
