"""A whole run on small volumes: what it leaves behind, what it refuses, and that it repeats itself."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from voxdino.core.errors import CheckpointError, ConfigError, InputError, PlanError, ResourceError, StoppedError
from voxdino.core.locks import lock_folder
from voxdino.core.safe_files import read_json
from voxdino.finetuning.model import effective_plan
from voxdino.finetuning.recipes import RECIPES
from voxdino.finetuning.run import finetune
from voxdino.inference.load import load_model
from voxdino.preparation.plan import Plan

ROADS = {
    "cached features": {},
    "images": {"cache": "off"},
    "lora": {"adaptation": "lora"},
    "last block": {"adaptation": "last_k", "last_k": 1},
    "full": {"adaptation": "full"},
    "linear probe": {"decoder": "linear"},
    "detail in 2-D, cached": {"detail": "slices", "detail_width": 4},
    "detail in 2-D, images": {"detail": "slices", "detail_width": 4, "cache": "off"},
    "slabs, cached": {"decoder": "upernet3d", "slab": 4, "batch_size": 1},
    "slabs and detail, cached": {"decoder": "upernet3d", "detail": "volume", "detail_width": 4, "slab": 3},
    "slabs and detail, images": {"decoder": "upernet3d", "detail": "volume", "detail_width": 4, "cache": "off"},
    "depth adapters": {"decoder": "upernet3d", "depth_adapter": 8, "slab": 3, "slices_at_once": 3},
    "depth adapters in 2-D": {"depth_adapter": 8, "slab": 3},
    "detail in 3-D beside a 2-D decoder": {"detail": "volume", "detail_width": 4, "slab": 3},
    "without features": {"blank_features": True, "detail": "slices", "detail_width": 4},
}


def weights(run_folder):
    return load_file(run_folder / "model.safetensors")


def interrupt_at(kind, count, number=signal.SIGTERM):
    """A listener that sends this process a signal at the count-th event of a kind."""
    seen = 0

    def listen(event):
        nonlocal seen
        seen += event.kind == kind
        if event.kind == kind and seen == count:
            os.kill(os.getpid(), number)

    return listen


@pytest.mark.parametrize("road", ROADS)
def test_every_road_trains_and_leaves_a_model_that_loads(workdir, small, road):
    config = small.model_copy(update=ROADS[road])
    summary = finetune(workdir, config, run_folder=workdir / "runs/one", on_event=lambda event: None)
    assert summary.ended_by == "steps" and summary.num_steps == 8 and 0 <= summary.best_dice <= 1
    names = {path.name for path in (workdir / "runs/one").iterdir()}
    assert {"run.json", "plan.json", "model.json", "model.safetensors", "log.jsonl", "curves.png"} <= names
    model = load_model(workdir / "runs/one")
    assert model.plan == effective_plan(config, Plan.read(workdir / "plan.json"))
    image = torch.zeros(1, 1, model.plan.slab + 2 * model.plan.context_slices, *model.plan.crop)
    assert torch.isfinite(model.segmenter(image).logits).all()


def test_frozen_means_that_the_backbone_does_not_change(workdir, small):
    for name, update in (("frozen", {}), ("full", {"adaptation": "full"})):
        finetune(workdir, small.model_copy(update=update), run_folder=workdir / name, on_event=lambda event: None)
    key = next(key for key in weights(workdir / "frozen") if key.startswith("backbone.blocks.0") and "qkv" in key)
    from voxdino.models.weights import load_backbone

    original = load_backbone("random:tiny")[0].state_dict()[key.removeprefix("backbone.")]
    assert torch.equal(weights(workdir / "frozen")[key].float(), original)
    assert not torch.equal(weights(workdir / "full")[key].float(), original)


@pytest.mark.parametrize("road", ["cached features", "lora"])
def test_the_same_seed_gives_the_same_model_whatever_the_readers(workdir, small, road):
    for name, readers in (("one", 0), ("two", 3)):
        config = small.model_copy(update={**ROADS[road], "num_workers": readers})
        finetune(workdir, config, run_folder=workdir / name, on_event=lambda event: None)
    one, two = weights(workdir / "one"), weights(workdir / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "road, kind, count", [("cached features", "step", 5), ("cached features", "encode", 2), ("images", "step", 3)]
)
def test_a_run_stopped_by_a_signal_goes_on_to_the_same_end(workdir, small, road, kind, count):
    config = small.model_copy(update=ROADS[road])
    finetune(workdir, config, run_folder=workdir / "whole", on_event=lambda event: None)
    if (workdir / "features").exists():
        (workdir / "features").rename(workdir / "features-of-whole")
    with pytest.raises(StoppedError) as caught:
        finetune(workdir, config, run_folder=workdir / "parts", on_event=interrupt_at(kind, count))
    assert caught.value.exit_code == 143
    finetune(workdir, config, run_folder=workdir / "parts", resume="require", on_event=lambda event: None)
    whole, parts = weights(workdir / "whole"), weights(workdir / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert (workdir / "parts/log.jsonl").read_bytes() == (workdir / "whole/log.jsonl").read_bytes()


def test_decoders_with_other_taps_share_a_workdir(workdir, small):
    for name, update in (("four taps", {}), ("one", {"decoder": "linear"}), ("chosen", {"taps": (0, 1, 1, 2)})):
        config = small.model_copy(update=update)
        assert finetune(workdir, config, run_folder=workdir / name, on_event=lambda event: None).num_steps == 8
    assert len({cache.name for cache in (workdir / "features").iterdir()}) == 6  # validation and training each


def test_a_signal_before_the_first_slab_is_a_stop(workdir, small):
    config = small.model_copy(update=ROADS["slabs and detail, cached"])
    with pytest.raises(StoppedError, match="while caching features"):
        finetune(workdir, config, run_folder=workdir / "one", on_event=interrupt_at("encode", 1))
    assert finetune(workdir, config, run_folder=workdir / "one", on_event=lambda event: None).num_steps == 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_batch_of_features_is_a_stop(workdir, small, number):
    with pytest.raises(StoppedError, match="while caching features") as caught:
        finetune(workdir, small, run_folder=workdir / "one", on_event=interrupt_at("encode", 1, number))
    assert caught.value.exit_code == 128 + number
    assert finetune(workdir, small, run_folder=workdir / "one", on_event=lambda event: None).num_steps == 8


def test_a_finished_run_says_so_and_does_nothing(workdir, small):
    first = finetune(workdir, small, run_folder=workdir / "one", on_event=lambda event: None)
    before = {path: path.stat().st_mtime_ns for path in (workdir / "one").rglob("*") if path.name != ".lock"}
    again = finetune(workdir, small, run_folder=workdir / "one", on_event=lambda event: None)
    assert again.was_finished and not first.was_finished
    assert again.best_dice == first.best_dice
    assert before == {path: path.stat().st_mtime_ns for path in before}


DAMAGE = [
    ("splits.json", "5", "no list of folds"),
    ("splits.json", None, "voxdino prepare DATASET"),
    ("one/run.json", "{}", "is damaged.*delete it"),
    ("one/run.json", "[]", "is damaged.*delete it"),
    ("one/features.json", "{}", "'folder' is missing.*delete it"),
    ("one/log.jsonl", "garbage\n", "line 1 is damaged.*delete this line"),
    ("prepared/manifest.json", None, "voxdino prepare DATASET"),
    ("prepared/manifest.json", "[]", "voxdino prepare DATASET"),
    ("prepared/cases/case_00.image.b2nd", None, r"case_00\.image\.b2nd.*voxdino prepare DATASET"),
]


@pytest.fixture
def stopped(workdir, small):
    """A workdir whose run "one" was stopped at its second step."""
    with pytest.raises(StoppedError):
        finetune(workdir, small, run_folder=workdir / "one", on_event=interrupt_at("step", 2))
    return workdir


def test_damaged_state_is_named_with_what_to_do(stopped, small):
    for name, content, message in DAMAGE:
        path = stopped / name
        before = path.read_bytes()
        path.unlink() if content is None else path.write_text(content)
        if "cases" in name:
            (stopped / "features").rename(stopped / "features-aside")  # cached, images are not read again
        with pytest.raises(InputError, match=message):
            finetune(stopped, small, run_folder=stopped / "one", on_event=lambda event: None)
        path.write_bytes(before)
    finetune(stopped, small, run_folder=stopped / "one", resume="require", on_event=lambda event: None)


def test_cached_features_that_were_cut_short_are_made_again(stopped, small):
    for cache in (stopped / "features").iterdir():
        (cache / "view_000.bin").write_bytes((cache / "view_000.bin").read_bytes()[:-9])
    finetune(stopped, small, run_folder=stopped / "one", on_event=lambda event: None)


def test_the_backbone_is_trained_as_asked(workdir, small):
    asked = {"drop_path": 0.1, "rope_rescale": 1.5, "gradient_checkpointing": True}
    config = small.model_copy(update={"adaptation": "full", "num_epochs": 1, "steps_per_epoch": 1, **asked})
    finetune(workdir, config, run_folder=workdir / "one", on_event=lambda event: None)
    backbone = load_model(workdir / "one").segmenter.backbone
    assert {name: getattr(backbone, name) for name in asked} == asked


def test_changed_settings_are_named_and_refused(workdir, small):
    finetune(workdir, small, run_folder=workdir / "one", on_event=lambda event: None)
    changed = small.model_copy(update={"learning_rate": 1e-4, "num_workers": 5})
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.001, is 0\.0001\.") as caught:
        finetune(workdir, changed, run_folder=workdir / "one", on_event=lambda event: None)
    assert "num_workers" not in str(caught.value)


def test_there_must_be_something_to_resume(workdir, small):
    with pytest.raises(CheckpointError, match="nothing to resume"):
        finetune(workdir, small, run_folder=workdir / "one", resume="require", on_event=lambda event: None)


def test_two_runs_in_one_folder_are_refused(workdir, small):
    with lock_folder(workdir / "one"), pytest.raises(ResourceError, match="another run works in this folder"):
        finetune(workdir, small, run_folder=workdir / "one", on_event=lambda event: None)


def test_a_fold_that_is_not_there_is_refused(workdir, small):
    with pytest.raises(ConfigError, match="no fold 7; the splits have 5"):
        finetune(workdir, small, run_folder=workdir / "one", fold=7, on_event=lambda event: None)


def test_a_backbone_of_another_patch_size_is_refused(workdir, small):
    plan = Plan.read(workdir / "plan.json")
    plan.model_copy(update={"patch_size": 14}).write(workdir / "plan.json")
    with pytest.raises(PlanError, match="tokens of 14 pixels"):
        finetune(workdir, small, run_folder=workdir / "one", on_event=lambda event: None)


def test_features_of_a_backbone_that_trains_are_not_cached(workdir, small):
    config = small.model_copy(update={"adaptation": "lora", "cache": "on"})
    with pytest.raises(ConfigError, match="cannot be cached"):
        finetune(workdir, config, run_folder=workdir / "one", on_event=lambda event: None)


def test_a_cuda_device_that_is_not_there_is_refused_with_the_command_that_works(workdir, small):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ResourceError, match="--device cpu"):
        finetune(workdir, small, run_folder=workdir / "one", device="cuda", on_event=lambda event: None)


def test_no_path_of_this_machine_stands_in_the_run(workdir, small, tmp_path):
    finetune(workdir, small, run_folder=workdir / "runs/one", on_event=lambda event: None)
    for path in (workdir / "runs/one").rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_run_json_tells_what_was_done(workdir, small):
    finetune(workdir, small, run_folder=workdir / "one", fold=2, on_event=lambda event: None)
    record = read_json(workdir / "one/run.json")
    assert record["config"]["learning_rate"] == 1e-3 and record["fold"] == 2
    assert len(record["split"]["val"]) == 1 and len(record["split"]["train"]) == 4
    assert record["outcome"]["ended_by"] == "steps"
    assert record["num_parameters"]["trained"] < record["num_parameters"]["all"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_is_and_when_to_take_it(name):
    assert RECIPES[name]().recipe == name
    assert "Take it" in (RECIPES[name].__doc__ or "")
    json.dumps(RECIPES[name]().to_json())
