"""Decisions follow from facts, carry their reasons, survive their file, and give way to the user."""

import json

import nibabel
import numpy as np
import pytest
from small_sets import AFFINE, LABELS, KnownBackbone, make_plan, save_nifti, write_folder, write_nnunet

from voxdino.core.errors import ConfigError, DatasetError, UsageError, WeightsError
from voxdino.core.io.options import ReadOptions
from voxdino.preparation import decisions
from voxdino.preparation.check import survey
from voxdino.preparation.dataset import read_dataset
from voxdino.preparation.fingerprint import CaseFacts, Fingerprint, Intensity, Structures, medians_by_axis
from voxdino.preparation.intensity import IMAGENET_MEAN, choose_channels
from voxdino.preparation.memory import BackboneProbe
from voxdino.preparation.plan import Plan
from voxdino.preparation.plan import make_plan as plan_for

INTENSITY = Intensity(num_voxels=1000, lower=-120.0, median=40.0, upper=260.0, mean=60.0, sd=50.0)


def fingerprint_of(
    shapes, spacings=None, *, extent=20.0, channels=("T1",), orientation="RAS", unit="mm", dtype="int16"
):
    spacings = spacings or [(1.0,) * len(shapes[0])] * len(shapes)
    structures = {"1": Structures(num_components=1, smallest=extent, percentile_5=extent)}
    cases = tuple(
        CaseFacts(
            id=f"c{n}",
            shape=shape,
            spacing=spacing,
            orientation=orientation if len(shape) == 3 else "",
            unit=unit,
            dtype=dtype,
            sources={},
            num_voxels={"0": 10, "1": 10},
            structures=structures,
            intensity=(INTENSITY,) * len(channels),
            foreground=(INTENSITY,) * len(channels),
        )
        for n, (shape, spacing) in enumerate(zip(shapes, spacings, strict=True))
    )
    return Fingerprint(
        dataset="set",
        layout="nnunet",
        channels=channels,
        num_channels=len(channels),
        labels=LABELS,
        read_options=ReadOptions(),
        cases=cases,
        median_shape=medians_by_axis(cases, shapes),
        median_spacing=medians_by_axis(cases, spacings),
        anisotropy=None,
        structures=structures,
        foreground=(INTENSITY,) * len(channels),
    )


@pytest.mark.parametrize(
    "shape, spacing, orientation, is_ct, axis",
    [
        ((30, 200, 200), (5.0, 0.7, 0.7), "SAR", True, "S"),
        ((200, 30, 200), (0.7, 4.0, 0.7), "RAS", False, "A"),
        ((25, 250, 250), (3.0, 1.0, 1.0), "LPS", False, "R"),
        ((160, 200, 40), (1.0, 1.0, 1.0), "IPR", False, "R"),
        ((36, 51, 35), (1.0, 1.0, 1.0), "RAS", False, "S"),
        ((200, 500, 500), (1.0, 1.0, 1.0), "RAS", True, "S"),
        ((1, 200, 210), (1.0, 1.0, 1.0), "RAS", False, "R"),
    ],
)
def test_slices_run_along_the_coarsest_axis_else_the_fewest(shape, spacing, orientation, is_ct, axis):
    facts = fingerprint_of([shape] * 3, [spacing] * 3, orientation=orientation)
    found, reason = decisions.choose_slice_axis(facts, is_ct=is_ct)
    assert found == axis and any(character.isdigit() for character in reason)


def test_in_plane_spacing_is_the_median_of_all_scans_and_none_for_pictures():
    shapes, own = [(100, 100, 30)] * 3, [(0.6, 0.6, 5.0), (0.8, 0.8, 5.0), (0.9, 0.9, 4.0)]
    assert decisions.choose_spacing(fingerprint_of(shapes, own), "S")[0] == (0.8, 0.8)
    nearly = [(0.80, 0.80, 5.0), (0.81, 0.81, 3.0), (0.80, 0.80, 7.0)]
    assert decisions.choose_spacing(fingerprint_of(shapes, nearly), "S")[0] == (0.8, 0.8)  # for scans to come
    assert decisions.choose_spacing(fingerprint_of([(9, 9)] * 3, unit="px"), None)[0] is None
    rows_differ = [(0.6, 1.0, 5.0), (0.8, 1.0, 5.0), (0.9, 1.0, 4.0)]  # R, A: columns, rows
    assert decisions.choose_spacing(fingerprint_of(shapes, rows_differ), "S")[0] == (1.0, 0.8)


@pytest.mark.parametrize(
    "shape, extent, patch, tokens, low, high",
    [
        ((35, 51, 36), 12.0, 14, 256, 3.5, 4.5),  # small crops of a hippocampus: many times larger
        ((512, 512, 90), 10.0, 16, 1024, 1.0, 1.0),  # CT on a GPU: the slice as it is
        ((512, 512, 90), 10.0, 14, 256, 1.0, 1.0),  # on a CPU: never below native where structures are small
        ((512, 512, 90), 300.0, 16, 256, 0.45, 0.55),  # only large structures: the slice may shrink
        ((192, 256), 24.0, 14, 256, 1.0, 1.0),  # pictures of skin
        ((28, 28), 10.0, 16, 256, 4.5, 8.0),
    ],
)
def test_magnification_lets_small_structures_span_tokens_as_far_as_one_can_pay(shape, extent, patch, tokens, low, high):
    facts = fingerprint_of([shape] * 3, extent=extent, unit="mm" if len(shape) == 3 else "px")
    axis = "S" if len(shape) == 3 else None
    value, reason = decisions.choose_magnification(facts, axis, None, patch, tokens)
    assert low <= value <= high and "tokens" in reason
    finer = decisions.choose_magnification(fingerprint_of([shape] * 3, extent=extent / 2), axis, None, patch, tokens)[0]
    assert finer >= value


@pytest.mark.parametrize("shape", [(35, 51, 36), (512, 512, 90), (192, 256), (600, 50, 20), (2000, 3000)])
@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("tokens", [256, 1024])
def test_crops_lie_in_the_slice_and_cost_no_more_than_allowed(shape, patch, tokens):
    facts = fingerprint_of([shape] * 3, extent=8.0)
    axis = "S" if len(shape) == 3 else None
    magnification, _ = decisions.choose_magnification(facts, axis, None, patch, tokens)
    crop, _ = decisions.choose_crop(facts, axis, None, magnification, patch, tokens)
    rows, columns = decisions.slice_sizes(facts, axis, None)[2]
    assert 1 <= crop[0] <= rows and 1 <= crop[1] <= columns
    grid = make_plan(magnification=magnification, crop=crop, patch_size=patch).input_size
    assert (grid[0] // patch) * (grid[1] // patch) <= 1.1 * tokens


def test_channels_follow_the_modality():
    ct, mr = choose_channels(fingerprint_of([(9, 9, 9)], channels=("CT", "T2 FLAIR")), "channels")[0]
    assert (ct.kind, ct.lower, ct.upper, ct.mean, ct.sd) == ("ct", -120.0, 260.0, 60.0, 50.0)
    assert (mr.kind, mr.source, mr.lower) == ("mr", 1, None)
    photo = fingerprint_of([(9, 9)], channels=("", "", ""), unit="px", dtype="uint8").model_copy(
        update={"channels": ()}
    )
    red, _, blue = choose_channels(photo, "rgb")[0]
    assert red.kind == "photo" and (red.upper, red.mean) == (255.0, 255 * IMAGENET_MEAN[0]) and blue.source == 2
    windows = choose_channels(fingerprint_of([(9, 9, 9)], channels=("CT",)), "windows")[0]
    assert (windows[0].kind, windows[0].lower, windows[0].upper) == ("window", -160.0, 240.0) and len(windows) == 3


@pytest.mark.parametrize(
    "name, is_ct", [("CT", True), ("ct_native", True), ("PET/CT", True), ("ADC", False), ("octant", False)]
)
def test_ct_is_known_by_its_name(name, is_ct):
    (channel,), _ = choose_channels(fingerprint_of([(9, 9, 9)], channels=(name,)), "neighbours")
    assert (channel.kind == "ct") == is_ct


def plan_of(root, settings=None, **more):
    dataset = read_dataset(root)
    _, fingerprint = survey(dataset, num_workers=1)
    return plan_for(fingerprint, dataset, settings=settings, memory=KnownBackbone(), **more), fingerprint


def test_every_decision_has_a_reason_and_the_file_gives_the_plan_back(tmp_path):
    plan, fingerprint = plan_of(write_nnunet(tmp_path / "set"))
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert set(stored) == set(Plan.model_fields) - {"reasons"}
    assert all(set(entry) == {"value", "reason"} and entry["reason"] for entry in stored.values())
    assert plan.fingerprint_digest == fingerprint.digest()
    assert (plan.context_slices, plan.input_builder, plan.batch_size, plan.patch_size) == (1, "neighbours", 4, 16)


def test_an_edited_plan_is_read_and_a_misspelt_or_bare_one_refused(tmp_path):
    plan, path = make_plan(), tmp_path / "plan.json"
    plan.write(path)
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "magnification": {"value": 3, "reason": "mine"}}))
    assert Plan.read(path).magnification == 3.0 and Plan.read(path).reasons["magnification"] == "mine"
    for change, words in (
        ({"magnificaton": {"value": 3}}, "Did you mean 'magnification'"),
        ({"magnification": 3}, '"value"'),
        ({"magnification": {"value": "3"}}, "magnification"),
        ({"magnification": {"value": 0}}, "above 0"),
        ({"slice_axis": {"value": None}}, "slice_axis"),
    ):
        path.write_text(json.dumps({**stored, **change}))
        with pytest.raises(ConfigError, match=words) as caught:
            Plan.read(path)
        assert "plan.json" in str(caught.value)


def test_settings_come_first_and_other_decisions_follow_from_them(tmp_path):
    root = write_nnunet(tmp_path / "set")
    plan, _ = plan_of(root)
    forced, _ = plan_of(root, {"magnification": "1.5", "num_folds": "3", "channels.0.lower": "-100", "slice_axis": "A"})
    assert (forced.magnification, forced.num_folds, forced.slice_axis) == (1.5, 3, "A")
    assert forced.channels[0].lower == -100 and forced.channels[0].upper == plan.channels[0].upper
    assert forced.crop != plan.crop and "set by the user (planned was" in forced.reasons["magnification"]
    windows, _ = plan_of(root, {"input_builder": "windows"})
    assert [channel.kind for channel in windows.channels] == ["window"] * 3 and windows.context_slices == 0
    assert plan_of(root, {"batch_size": "2"})[0].batch_size == 2
    with pytest.raises(UsageError, match="Did you mean 'magnification'"):
        plan_of(root, {"magnificaton": "2"})


def test_nothing_usable_is_nothing_to_plan_for(tmp_path):
    dataset = read_dataset(write_nnunet(tmp_path / "set"))
    fingerprint = survey(dataset, num_workers=1)[1].model_copy(update={"cases": ()})
    with pytest.raises(DatasetError, match="nothing to plan for"):
        plan_for(fingerprint, dataset, memory=KnownBackbone())


def test_digests_tell_what_changed():
    plan = make_plan()
    assert plan.digest() == make_plan(reasons={"crop": "other words"}).digest() != make_plan(batch_size=3).digest()
    assert plan.preparation_digest() == make_plan(batch_size=3, magnification=1.0).preparation_digest()
    assert plan.preparation_digest() != make_plan(slice_axis="R").preparation_digest()


def test_pictures_and_single_slices_are_planned_as_such(tmp_path):
    rows = ["image,label", *(f"images/{c}.png,masks/{c}.png" for c in "abcd")]
    plan, _ = plan_of(write_folder(tmp_path / "pictures", rows))
    assert (plan.ndim, plan.slice_axis, plan.input_builder, plan.context_slices) == (2, None, "rgb", 0)
    root = write_nnunet(tmp_path / "set", shape=(12, 10, 1))
    plan, _ = plan_of(root)
    assert (plan.ndim, plan.slice_axis, plan.input_builder, plan.context_slices) == (3, "S", "repeat", 0)


def test_given_splits_set_the_number_of_folds(tmp_path):
    root = write_nnunet(tmp_path / "set", 4)
    fold = {"train": ["case_00", "case_01"], "val": ["case_02", "case_03"]}
    (root / "splits_final.json").write_text(json.dumps([fold] * 2))
    assert plan_of(root)[0].num_folds == 2


def test_a_real_backbone_is_measured_in_its_own_process():
    with BackboneProbe("tiny") as probe:
        assert probe.describe().patch_size == 16 and probe.describe().num_parameters > 10_000
        batch, reason = probe.choose_batch((48, 64), "neighbours", 1, 3, 1)
    assert 1 <= batch <= 64 and "per sample of 48 x 64 px" in reason


def test_an_unknown_backbone_is_refused_and_the_nearest_named():
    with BackboneProbe("dinov3_vits17") as probe, pytest.raises(WeightsError, match="'dinov3_vits16'"):
        probe.describe()


def test_oblique_cases_count_by_the_axis_they_are_nearest_to(tmp_path):
    root = write_nnunet(tmp_path / "set", 3)
    turned = AFFINE[:, [2, 0, 1, 3]]
    for path in (*(root / "imagesTr").iterdir(), *(root / "labelsTr").iterdir()):
        if "case_01" in path.name:
            array = np.asanyarray(nibabel.load(path).dataobj).transpose(2, 0, 1)
            save_nifti(path, array, turned)
    plan, _ = plan_of(root)
    assert plan.in_plane_spacing == pytest.approx((1.0, 1.5)) and plan.crop == (9, 11)
