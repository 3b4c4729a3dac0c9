"""Every recipe trains, stops and goes on to the same bits; the recipe `auto` chooses with a reason."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from voxdino.core.errors import CheckpointError, ConfigError, DatasetError, StoppedError
from voxdino.core.safe_files import read_json, write_json
from voxdino.finetuning.choose import choose_recipe
from voxdino.finetuning.cost import cost_of
from voxdino.finetuning.model import effective_plan, model_config
from voxdino.finetuning.recipes import RECIPES
from voxdino.finetuning.run import finetune
from voxdino.inference.load import load_model
from voxdino.preparation.dataset import read_dataset
from voxdino.preparation.fingerprint import Fingerprint
from voxdino.preparation.plan import Plan
from voxdino.preparation.prepare import prepare

SMALL = {"num_epochs": 1, "steps_per_epoch": 4, "batch_size": 2, "cached_views": 1, "validation_slices": 5}
SMALL |= {"num_workers": 1, "amp": "off"}
NARROW = {"decoder_width": 8, "detail_width": 4}


def small_recipe(name, **changes):
    """The recipe with few, small steps and small slabs."""
    config = RECIPES[name]()
    update = {**SMALL, **NARROW, **changes}
    if config.backbone != "none":
        update["backbone"] = "random:tiny"
    if config.slab is not None:
        update["slab"] = 3
    if config.first is not None:
        update["first"] = config.first.model_copy(update=SMALL)
    return config.model_copy(update=update)


def run(workdir, config, name, listen=lambda event: None):
    return finetune(workdir, config, run_folder=workdir / name, on_event=listen)


def interrupt_at(step, stages):
    """A listener that sends this process a signal at a step of the last stage."""
    seen = 0

    def listen(event):
        nonlocal seen
        seen += event.kind == "step" and event.done == step
        if seen == stages:
            seen += 1
            os.kill(os.getpid(), signal.SIGTERM)

    return listen


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_stops_and_goes_on_to_the_same_model(workdir, name):
    config = small_recipe(name)
    assert run(workdir, config, "whole").num_steps == 4
    with pytest.raises(StoppedError):
        run(workdir, config, "parts", interrupt_at(2, stages=1 + (config.first is not None)))
    run(workdir, config, "parts")
    whole, parts = (load_file(workdir / part / "model.safetensors") for part in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    model = load_model(workdir / "whole")
    image = torch.randn(1, 1, model.plan.slab + 2 * model.plan.context_slices, *model.plan.crop)
    assert torch.isfinite(model.segmenter(image).logits).all()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_on_pictures_too(pictures, name):
    assert run(pictures, small_recipe(name, steps_per_epoch=2), "one").num_steps == 2
    model = load_model(pictures / "one")
    assert model.plan.slab == 1
    assert model.segmenter(torch.randn(1, 3, 1, *model.plan.crop)).logits.shape == (1, 2, 1, *model.plan.crop)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_is_and_when_to_take_it(name):
    assert RECIPES[name]().recipe == name
    told = RECIPES[name].__doc__ or ""
    assert "Take it" in told and ("arXiv" in told.split("\n")[0] or "Ours" in told or "Not in the paper" in told)
    assert type(RECIPES[name]()).from_json(json.loads(json.dumps(RECIPES[name]().to_json()))) == RECIPES[name]()


def test_the_second_stage_starts_from_the_backbone_that_the_first_adapted(workdir):
    config = small_recipe("dinomed3d")
    run(workdir, config, "one")
    key = "backbone.blocks.0.attn.qkv.weight"
    first, second = (load_file(workdir / f"one/{stage}model.safetensors")[key].float() for stage in ("stage1/", ""))
    from voxdino.models.weights import load_backbone

    torch.manual_seed(config.seed)
    original = load_backbone("random:tiny")[0].state_dict()[key.removeprefix("backbone.")]
    assert torch.equal(first, second) and not torch.equal(first, original)
    assert read_json(workdir / "one/stage1/run.json")["config"]["recipe"] == "dinomed3d_stage1"


def test_fewer_training_cases_are_part_of_more(workdir):
    trained = {}
    for count in (1, 2, 3):
        run(workdir, small_recipe("segdino_v2", num_train_cases=count), f"n{count}")
        split = read_json(workdir / f"n{count}/run.json")["split"]
        trained[count] = set(split["train"])
        assert len(trained[count]) == count and len(split["val"]) == 1
    assert trained[1] < trained[2] < trained[3]


def test_a_slab_that_nothing_sees_is_refused(workdir):
    with pytest.raises(ConfigError, match="nothing in the model sees several slices"):
        run(workdir, small_recipe("segdino_v2", slab=4), "one")


def facts(workdir, **changes):
    """(fingerprint, plan) of the small volumes, with some facts changed."""
    fingerprint = Fingerprint.read(workdir / "fingerprint.json")
    return fingerprint.model_copy(update=changes), Plan.read(workdir / "plan.json")


def test_few_slices_or_thick_ones_are_segmented_one_by_one(workdir):
    fingerprint, plan = facts(workdir)
    name, _, reason = choose_recipe(fingerprint, plan, num_train=4)
    assert name == "segdino_v2" and "too few for a 3-D decoder" in reason
    assert choose_recipe(fingerprint, plan, num_train=40)[0] == "segdino_v2_lora"


def test_volumes_get_a_3d_decoder_and_pictures_do_not(workdir):
    fingerprint, plan = facts(workdir)
    many = fingerprint.model_copy(update={"median_shape": {"R": 20, "A": 15, "S": 40}}, deep=True)
    assert choose_recipe(many, plan, num_train=4)[0] == "frozen_detail3d"
    pictures = plan.model_copy(update={"slice_axis": None, "ndim": 2})
    assert choose_recipe(fingerprint, pictures, num_train=500)[0] == "segdino_v2_lora"
    name, _, reason = choose_recipe(fingerprint, pictures, num_train=8)
    assert name == "segdino_v2" and "8 to train on, too few to adapt" in reason


def test_little_memory_takes_slices_one_by_one(workdir):
    fingerprint, plan = facts(workdir)
    many = fingerprint.model_copy(update={"median_shape": {"R": 20, "A": 15, "S": 40}}, deep=True)
    large = plan.model_copy(update={"crop": (512, 512)})
    assert choose_recipe(many, large, num_train=40, memory_bytes=1 << 40)[0] == "frozen_detail3d"
    name, _, reason = choose_recipe(many, large, num_train=40, memory_bytes=20 << 30)
    assert name == "segdino_v2_lora" and "there are 20.0 GiB" in reason
    name, _, reason = choose_recipe(many, large, num_train=40, memory_bytes=1 << 30)
    assert name == "segdino_v2" and "adapting the backbone would take" in reason


def test_a_backbone_without_lora_stays_frozen(workdir):
    fingerprint, plan = facts(workdir)
    name, _, reason = choose_recipe(fingerprint, plan, num_train=40, abilities=frozenset())
    assert name == "segdino_v2" and "takes no LoRA" in reason


@pytest.mark.parametrize("extent, num_components, drawn_by", [(3.0, 20, "lesion"), (3.0, 5, None), (40.0, 20, None)])
def test_many_small_pieces_a_case_are_drawn_by_lesion(workdir, extent, num_components, drawn_by):
    fingerprint, plan = facts(workdir)
    structures = dict(fingerprint.structures)
    changed = {"num_components": num_components, "smallest": extent, "percentile_5": extent}
    structures["2"] = structures["2"].model_copy(update=changed)
    fingerprint = fingerprint.model_copy(update={"structures": structures})
    settings, reason = choose_recipe(fingerprint, plan, num_train=4)[1:]
    assert settings.get("quotas.by") == drawn_by and ("'core' comes in" in reason) == (drawn_by is not None)


def test_what_the_user_set_of_the_plan_outlasts_the_recipe(workdir):
    plan = Plan.read(workdir / "plan.json").model_copy(update={"reasons": {}})
    config = RECIPES["dinomed3d"]().model_copy(update={"batch_size": 3, "magnification_scale": 2.0})
    given = {"slab": 4, "batch_size": 8, "magnification": 1.5}
    planned = effective_plan(config, plan)
    assert (planned.slab, planned.batch_size, planned.magnification) == (16, 3, 2.0 * plan.magnification)
    reasons = dict.fromkeys(given, "set by the user (planned was another)")
    kept = effective_plan(config, plan.model_copy(update={**given, "reasons": reasons}))
    assert (kept.slab, kept.batch_size, kept.magnification) == (4, 8 // 4, 1.5)  # the plan counts slices


def test_adapters_of_a_first_stage_are_refused_as_the_second_would_lose_them(workdir):
    config = small_recipe("dinomed3d")
    config = config.model_copy(update={"first": config.first.model_copy(update={"depth_adapter": 4})})
    with pytest.raises(ConfigError, match="would not outlast it"):
        run(workdir, config, "one")
    assert not (workdir / "one" / "run.json").exists()


def test_the_first_releases_pyramid_keeps_its_scales(workdir):
    plan = Plan.read(workdir / "plan.json").model_copy(update={"magnification": 4.0})
    config = RECIPES["segdino_v2"]()
    released = config.model_copy(update={"decoder_settings": {"pyramid": "first_release"}})
    scales = [model_config(c, plan, None, torch.device("cpu")).pyramid_scales for c in (config, released)]
    assert scales == [(4, 2, 1, 1), (8, 4, 2, 1)]


def test_costs_are_counted_without_computing():
    """By hand: SegDINO's published decoder; LoRA, adapters and the whole backbone on top of it."""
    costs = {name: cost_of(RECIPES[name](), device="cuda") for name in ("segdino_v2", "segdino_v1", "segdino_v2_full")}
    assert costs["segdino_v2"].num_trained == 928_905 + 129  # the published head has one output, this has two
    assert costs["segdino_v1"].num_trained == 2_213_793 + 513
    backbone = costs["segdino_v2_full"].num_parameters - (3_299_593 + 257)
    assert costs["segdino_v2"].num_parameters - costs["segdino_v2"].num_trained == backbone
    assert costs["segdino_v2_full"].memory_bytes > 16 * costs["segdino_v2_full"].num_trained
    assert costs["segdino_v2"].memory_bytes < costs["segdino_v2_full"].memory_bytes


def test_more_slices_keep_more_memory():
    few, many = (cost_of(RECIPES["frozen_detail3d"]().model_copy(update={"slab": slab})) for slab in (8, 32))
    assert 2.5 * few.memory_bytes < many.memory_bytes < 4.5 * few.memory_bytes
    assert few.num_trained == many.num_trained


def test_a_run_can_start_from_another_ones_weights(workdir):
    run(workdir, small_recipe("segdino_v2"), "first")
    notes = []
    config = small_recipe("segdino_v2", initial_weights=str(workdir / "first"), learning_rate=1e-12, ema_decay=0.0)
    run(workdir, config, "second", lambda event: notes.append(event.text))
    first, second = (load_file(workdir / name / "model.safetensors") for name in ("first", "second"))
    assert any(text.startswith("starts from first") for text in notes)
    for key in first:
        torch.testing.assert_close(second[key], first[key], rtol=1e-4, atol=1e-6)
    record = read_json(workdir / "second/run.json")
    assert record["config"]["initial_weights"] == "first" and len(record["identity"]["initial_weights"]) == 64


def test_both_stages_learn_from_the_same_few_cases(workdir):
    run(workdir, small_recipe("dinomed3d", num_train_cases=1), "one")
    splits = [read_json(workdir / f"one/{stage}run.json")["split"]["train"] for stage in ("stage1/", "")]
    assert splits[0] == splits[1] and len(splits[0]) == 1


def test_cases_of_another_plan_are_refused(workdir):
    plan = Plan.read(workdir / "plan.json")
    plan.model_copy(update={"crop": (16, 16)}).write(workdir / "plan.json")
    with pytest.raises(DatasetError, match=r"was prepared by another plan.*voxdino prepare"):
        run(workdir, small_recipe("segdino_v2"), "one")


def test_the_time_of_the_first_stage_counts_once_however_often_the_second_is_resumed(workdir):
    config = small_recipe("dinomed3d")
    with pytest.raises(StoppedError):
        run(workdir, config, "one", interrupt_at(2, stages=2))
    shutil.rmtree(workdir / "one/checkpoint")
    record = read_json(workdir / "one/stage1/run.json")
    record["outcome"]["elapsed_s"] = 1000.0
    write_json(workdir / "one/stage1/run.json", record)
    for step in (2, 3):
        with pytest.raises(StoppedError):
            run(workdir, config, "one", interrupt_at(step, stages=1))
    assert 1000 <= run(workdir, config, "one").elapsed_s < 1900


def test_the_second_stage_is_checked_before_the_first_takes_its_time(workdir):
    wrong = small_recipe("dinomed3d").model_copy(update={"decoder_settings": {"finest": 2}})
    with pytest.raises(ConfigError, match="has no setting 'finest'"):
        run(workdir, wrong, "one")
    with pytest.raises(CheckpointError, match="nothing to resume"):
        finetune(workdir, small_recipe("dinomed3d"), run_folder=workdir / "one", resume="require")
    with pytest.raises(ConfigError, match=r"first\.initial_weights"):
        run(workdir, small_recipe("dinomed3d", initial_weights="x"), "one")
    assert not (workdir / "one/stage1").exists()


def test_slices_larger_than_the_crop_are_seen_in_several_places(workdir, prepared):
    config = small_recipe("frozen_conv3d", num_train_cases=1)
    plan = Plan.read(workdir / "plan.json")
    small = plan.model_copy(update={"crop": (8, 8), "tile": (8, 8)})
    prepare(read_dataset(prepared.parent / "data"), small, workdir, num_workers=1)
    small.write(workdir / "plan.json")
    run(workdir, config, "one")
    assert len(read_json(workdir / "one/features.json")["records"]) >= 5  # of six tiles
