"""Laws of models that work together: votes, the box of a locator, what a record says of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import make_plan, make_volume, model_by_hand

from voxdino.core.errors import ResourceError, UsageError
from voxdino.core.io import read_label_map, write_volume
from voxdino.inference import memory
from voxdino.inference.cases import find_cases
from voxdino.inference.postprocess import FILE_NAME, Postprocessing, Rule
from voxdino.inference.run import predict_cases
from voxdino.inference.settings import PredictSettings
from voxdino.inference.team import MARGIN_MM, Team, load_team
from voxdino.inference.tune import tune
from voxdino.preparation.case import Case


def lesion_logits(image):
    """Everything above 0 is a lesion."""
    return torch.cat((torch.zeros_like(image), torch.full_like(image, -9.0), image * 10), dim=1)


def liver_logits(image):
    return torch.cat((torch.zeros_like(image), image * 10, torch.full_like(image, -9.0)), dim=1)


def segment(team, volume):
    return team.segment(volume, PredictSettings(amp="off", gate="off"), case="c").array


@pytest.fixture
def volume():
    """Ones everywhere; a bright cube of 3 voxels a side."""
    volume = make_volume((60, 50, 20))
    volume.array[:] = 1
    volume.array[0, 30:33, 20:23, 9:12] = 90
    return volume


def test_the_locator_gives_the_box_and_the_others_see_only_what_is_in_it(volume):
    plan = make_plan(tile=(64, 64))
    locator = model_by_hand(lambda image: lesion_logits(image - 1), plan)  # normalised: the cube alone is above 1
    found = segment(Team((model_by_hand(liver_logits, plan),), locator=locator), volume)
    spacing = np.array(volume.grid.spacing)
    low = np.floor(np.array([30, 20, 9]) - np.ceil(MARGIN_MM / spacing)).clip(0).astype(int)
    high = np.minimum(np.array([33, 23, 12]) + np.ceil(MARGIN_MM / spacing), volume.grid.shape).astype(int)
    expected = np.zeros(volume.grid.shape, np.uint8)
    expected[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = 5
    np.testing.assert_array_equal(found, expected)
    assert (found == 0).any()


def test_where_the_locator_finds_nothing_all_is_looked_at(volume):
    plan = make_plan(tile=(64, 64))
    blind = model_by_hand(lambda image: lesion_logits(image * 0 - 1), plan)
    assert (segment(Team((model_by_hand(liver_logits, plan),), locator=blind), volume) == 5).all()


def test_a_locator_of_another_kind_of_images_is_refused():
    volumes, pictures = make_plan(), make_plan(ndim=2, slice_axis=None)
    with pytest.raises(UsageError, match="is for 2-D images"):
        Team((model_by_hand(liver_logits, volumes),), locator=model_by_hand(liver_logits, pictures))


def test_who_predicts_decides_the_digest(model):
    other = replace(model, digest="other", name="second")
    teams = [
        Team((model,)),
        Team((model, other)),
        Team((model,), locator=other),
        Team((model,), after=Postprocessing(rules={"liver": Rule(largest=True)})),
    ]
    assert len({team.digest for team in teams}) == len(teams)
    assert teams[0].digest == model.digest
    assert [team.name for team in teams[:3]] == ["first", "first + second", "first in second"]
    assert teams[1].licence == "DINOv3 License"


def test_a_model_that_votes_with_itself_predicts_as_it_does_alone(model):
    volume = make_volume()
    np.testing.assert_array_equal(segment(Team((model, model)), volume), segment(Team((model,)), volume))


def test_what_was_chosen_for_a_run_is_applied_unless_told_not_to(run_folder):
    volume = make_volume()
    Postprocessing(rules={"liver": Rule(min_volume=1e9)}).write(run_folder / FILE_NAME)
    device = torch.device("cpu")
    plain = load_team([run_folder], clean_up=False, device=device)
    cleaned = segment(load_team([run_folder], device=device), volume)
    expected = segment(plain, volume)
    assert (expected == 5).any()
    np.testing.assert_array_equal(cleaned, np.where(expected == 5, 0, expected))


def test_tuning_measures_haste_and_writes_what_helps(model, run_folder, tmp_path):
    cases = []
    for number in range(2):
        image = make_volume((11, 9, 3), seed=number)
        write_volume(tmp_path / "in" / f"c{number}.nii.gz", image)
        predict_cases(find_cases([tmp_path / "in" / f"c{number}.nii.gz"]), model, tmp_path / "reference")
        cases.append(
            Case(f"c{number}", (tmp_path / "in" / f"c{number}.nii.gz",), tmp_path / f"reference/c{number}.nii.gz")
        )
    chosen, cost = tune(model, run_folder, cases)
    assert (cost.num_cases, cost.dice) == (2, 1.0)
    assert 0 < cost.dice_fast <= 1
    assert not chosen.rules
    assert "held-back cases" in cost.in_words()
    assert Postprocessing.of_run(run_folder) == chosen
    fast = read_label_map(run_folder / "tuning" / "fast" / "c0.nii.gz").array
    usual = read_label_map(run_folder / "tuning" / "usual" / "c0.nii.gz").array
    np.testing.assert_array_equal(usual, read_label_map(cases[0].label).array)
    assert fast.shape == usual.shape


def test_the_need_is_told_before_the_work_and_grows_with_the_image_not_with_the_classes(model, tmp_path):
    needs = []
    for number, shape in enumerate([(9, 11, 6), (90, 110, 60)]):
        write_volume(tmp_path / f"c{number}.nii.gz", make_volume(shape))
        needs.append(memory.needed_bytes(find_cases([tmp_path / f"c{number}.nii.gz"])[0], model, PredictSettings())[0])
    voxels = 90 * 110 * 60 - 9 * 11 * 6
    assert 4 * voxels <= needs[1] - needs[0] <= 12 * voxels
    notes = []
    predict_cases(find_cases([tmp_path / "c0.nii.gz"]), model, tmp_path / "out", on_note=notes.append)
    assert "9 x 11 x 6 voxels need about" in notes[0] and "are free" in notes[0]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_ends_all_the_same_is_said_with_need_and_limit(model, tmp_path, monkeypatch, error):
    write_volume(tmp_path / "c.nii.gz", make_volume())

    def starve(*_, **__):
        raise error

    monkeypatch.setattr(Team, "segment", starve)
    with pytest.raises(ResourceError, match=r"memory ended: 9 x 11 x 6 voxels need about .* are free"):
        predict_cases(find_cases([tmp_path / "c.nii.gz"]), model, tmp_path / "out")
    assert not (tmp_path / "out" / "c.nii.gz").exists()


def test_a_bug_is_not_taken_for_the_end_of_memory(model, tmp_path, monkeypatch):
    write_volume(tmp_path / "c.nii.gz", make_volume())

    def fail(*_, **__):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(Team, "segment", fail)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        predict_cases(find_cases([tmp_path / "c.nii.gz"]), model, tmp_path / "out")


def test_the_next_case_is_not_read_ahead_where_both_would_not_fit(model, tmp_path, monkeypatch):
    from voxdino.inference import run

    for number in range(3):
        write_volume(tmp_path / "in" / f"c{number}.nii.gz", make_volume(seed=number))
    whole = predict_cases(find_cases([tmp_path / "in"]), model, tmp_path / "whole").record
    monkeypatch.setattr(run, "available_memory", lambda: 1)
    assert predict_cases(find_cases([tmp_path / "in"]), model, tmp_path / "out").record == whole
