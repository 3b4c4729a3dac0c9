"""Pretraining as a whole: stages follow each other, a stopped run goes on bit for bit, its result is a backbone."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from small_pretraining import HEAD, distillation, draw_pool, gram, pretraining, self_distillation

from voxdino.core.errors import CheckpointError, ConfigError, DatasetError, DivergedError, PartialError, StoppedError
from voxdino.core.safe_files import digest_file
from voxdino.models.weights import load_backbone, write_backbone
from voxdino.models.weights_card import pack_seen
from voxdino.pretraining import step as step_module
from voxdino.pretraining.checks import GramTeacher, fitted, gram_teacher_of, named_weights
from voxdino.pretraining.config import Resolution
from voxdino.pretraining.learning import Descent
from voxdino.pretraining.networks import Network
from voxdino.pretraining.pool import Pool
from voxdino.pretraining.pool_build import build_pool
from voxdino.pretraining.pool_slices import PoolConfig
from voxdino.pretraining.pool_sources import PoolSource
from voxdino.pretraining.run import TEACHER, pretrain
from voxdino.pretraining.samples import Samples
from voxdino.pretraining.schedules import constant
from voxdino.pretraining.step import SelfDistillation, parameter_groups
from voxdino.pretraining.views import ViewConfig
from voxdino.pretraining.watch import Watch
from voxdino.training.distributed import World

STAGES = {
    "three stages": (
        self_distillation("adapt", accumulate=2),
        gram(gram_refresh=2),
        self_distillation("highres", gram_weight=constant(1.5), gram_teacher="kept"),
    ),
    "distilled, then adapted": (distillation(accumulate=2), self_distillation("adapt")),
}


def run(workdir, config, name, listen=lambda event: None, **settings):
    return pretrain(workdir, config, run_folder=workdir / name, device="cpu", on_event=listen, **settings)


def interrupt_at(step):
    def listen(event):
        if event.kind == "step" and event.done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return listen


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", STAGES)
def test_a_run_stopped_anywhere_goes_on_to_the_same_bits(workdir, name):
    config = pretraining(*STAGES[name])
    num_steps = sum(stage.num_steps for stage in config.stages)
    assert run(workdir, config, "whole").num_steps == num_steps
    for step in (2, 3, 5):  # in a stage, at the end of one, in the next
        with pytest.raises(StoppedError):
            run(workdir, config, "parts", interrupt_at(step))
    run(workdir, config.model_copy(update={"num_workers": 2}), "parts")
    whole, parts = (load_file(workdir / part / TEACHER) for part in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert rows(workdir / "whole") == rows(workdir / "parts")
    assert run(workdir, config, "whole").was_finished
    (workdir / "whole" / TEACHER).unlink()  # written again, from the checkpoint
    assert not run(workdir, config, "whole").was_finished
    again = load_file(workdir / "whole" / TEACHER)
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_a_gram_teacher_of_an_earlier_moment_is_what_the_teacher_was_then(workdir, monkeypatch):
    config = pretraining(
        self_distillation("adapt", num_steps=5), gram(num_steps=2, gram_teacher="earlier", gram_moment=0.4)
    )
    with pytest.raises(StoppedError):
        run(workdir, config, "run", interrupt_at(2))
    then = load_file(workdir / "run" / TEACHER)
    with pytest.raises(StoppedError):
        run(workdir, config, "run", interrupt_at(6))  # in the second stage
    anchors = []
    original = SelfDistillation.begin
    monkeypatch.setattr(SelfDistillation, "begin", lambda self, *args: [anchors.append(args[1]), original(self, *args)])
    run(workdir, config, "run")
    put_aside = load_file(workdir / "run/teacher-00000002.safetensors")
    end = load_file(workdir / "run" / TEACHER)
    assert load_backbone(workdir / "run/teacher-00000002.safetensors")[1].pretraining.num_steps == 2
    for name, value in put_aside.items():
        assert torch.equal(value, then[name]) and torch.equal(anchors[-1].state_dict()[name], value)
    assert any(not torch.equal(value, end[name]) for name, value in put_aside.items())


@pytest.mark.parametrize(
    "teachers, wanted",
    [
        (("", "earlier"), [None, GramTeacher(step=2)]),
        (("", "earlier", "kept"), [None, GramTeacher(step=2), GramTeacher(step=2)]),
        (("", "", "earlier"), [None, None, GramTeacher(step=12)]),
        (("earlier",), [GramTeacher()]),
        (("start", "kept"), [GramTeacher(), GramTeacher()]),
        (("", "kept"), [None, GramTeacher()]),
        (("old.pth", "kept", "start"), [GramTeacher("old.pth"), GramTeacher("old.pth"), GramTeacher()]),
    ],
)
def test_whose_similarities_a_stage_keeps_depends_on_the_stages_before(teachers, wanted):
    stages = [
        self_distillation(str(n), num_steps=10, gram_weight=constant(float(bool(one))), gram_teacher=one)
        for n, one in enumerate(teachers)
    ]
    assert [gram_teacher_of(stages, stage) for stage in stages] == wanted
    assert named_weights(pretraining(*stages)) == [one for one in ("old.pth",) if one in teachers]


def test_the_result_is_a_backbone_that_learned(workdir):
    run(workdir, pretraining(self_distillation("adapt")), "run")
    before, start = load_backbone("random:tiny")
    after, card = load_backbone(workdir / "run" / TEACHER)
    assert card.licence == start.licence and card.pretraining.start == start.name
    assert card.pretraining.num_steps == 3 and card.pretraining.sources == {"blocks": {"cases": 3, "slices": 18}}
    moved = [name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])]
    assert {"cls_token", "mask_token", "norm.weight", "patch_embed.proj.weight"} <= set(moved)
    assert torch.isfinite(after(torch.randn(1, 3, 32, 32)).cls_token).all()


def test_the_card_knows_which_files_were_seen(workdir, pool_folder):
    run(workdir, pretraining(self_distillation("adapt")), "run")
    facts = load_backbone(workdir / "run" / TEACHER)[1].pretraining
    seen = [digest_file(path) for path in (pool_folder.parent / "data").glob("*.nii.gz")]
    assert len(seen) == 3 and all(facts.holds(digest) for digest in seen)
    assert not facts.holds("0" * 64) and not facts.holds("f" * 64)


def test_what_start_and_teachers_were_is_inherited(workdir, tmp_path_factory):
    run(workdir, pretraining(self_distillation("adapt")), "first")
    first = workdir / "first" / TEACHER
    other = tmp_path_factory.mktemp("other")
    folder = draw_pool(other, first_index=3)
    again = pretraining(self_distillation("adapt"), backbone=str(first))
    pretrain(folder, again, run_folder=folder / "second", device="cpu", on_event=lambda event: None)
    distilled = pretraining(distillation(teachers=(str(first),)))
    pretrain(folder, distilled, run_folder=folder / "pupil", device="cpu", on_event=lambda event: None)
    earlier = load_backbone(first)[1].pretraining
    for name in ("second", "pupil"):
        facts = load_backbone(folder / name / TEACHER)[1].pretraining
        assert all(facts.holds(digest_file(path)) for path in (other / "data").glob("*.nii.gz"))
        assert len(facts.seen) == 2 * len(earlier.seen)
        assert pack_seen((), [facts.seen, earlier.seen]) == facts.seen  # nothing was forgotten
    assert load_backbone(folder / "pupil" / TEACHER)[1].pretraining.teachers == ("first",)


def test_a_distilled_backbone_inherits_its_teachers_licence(workdir, tmp_path):
    teacher, card = load_backbone("random:tiny")
    path = tmp_path / "licensed.safetensors"
    write_backbone(path, teacher.state_dict(), card.model_copy(update={"licence": "DINOv3 License"}))
    run(workdir, pretraining(distillation(teachers=(str(path),))), "run")
    assert load_backbone(workdir / "run" / TEACHER)[1].licence == "DINOv3 License"
    record = (workdir / "run/run.json").read_text()
    assert "licensed.safetensors" in record and str(tmp_path) not in record


def test_portions_keep_the_meaning_of_the_batch(workdir):
    """Without KoLeo, whose neighbours lie within a portion, and without anything random in the network."""
    plain = {"koleo_weight": 0.0, "drop_path": 0.0, "rope_rescale": None}
    for number in (1, 2):
        run(workdir, pretraining(self_distillation("adapt", accumulate=number, **plain)), str(number))
    one, two = (rows(workdir / name) for name in ("1", "2"))
    for row, other in zip(one, two, strict=True):
        for key in ("dino_global", "dino_local", "ibot", "grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=2e-4)


def test_gram_anchoring_holds_the_patches(workdir):
    fast = {"num_steps": 20, "teacher_momentum": constant(0.5), "learning_rate": constant(3e-3)}
    free = pretraining(self_distillation("adapt", **fast))
    anchored = pretraining(self_distillation("gram", gram_weight=constant(100.0), **fast))
    terms = {}
    for name, config in (("free", free), ("anchored", anchored)):
        run(workdir, config, name)
        terms[name] = load_backbone(workdir / name / TEACHER)[0]
    start = load_backbone("random:tiny")[0]
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    drift = {}
    for name, backbone in terms.items():
        with torch.no_grad():
            own, old = (torch.nn.functional.normalize(one.tokens(images).patches, dim=-1) for one in (backbone, start))
        drift[name] = float((own @ own.mT - old @ old.mT).square().mean())
    assert drift["anchored"] < 0.7 * drift["free"]


def test_the_last_layers_of_the_heads_wait(workdir, monkeypatch):
    seen = []
    original = Descent.step

    def spy(self, *args, **kwargs):
        before = self.network.dino_head.last_layer.weight.detach().clone()
        told = original(self, *args, **kwargs)
        seen.append(bool(torch.equal(before, self.network.dino_head.last_layer.weight)))
        return told

    monkeypatch.setattr(Descent, "step", spy)
    run(workdir, pretraining(self_distillation("adapt", frozen_last_layer=0.5, num_steps=4)), "run")
    assert seen == [True, True, False, False]


def test_not_a_number_leaves_everything_as_it_was_and_three_in_a_row_end_the_run(workdir, monkeypatch):
    original = step_module.ibot_loss
    calls = []

    def broken(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) * (float("nan") if len(calls) in (2, 5, 6, 7) else 1.0)

    monkeypatch.setattr(step_module, "ibot_loss", broken)
    with pytest.raises(DivergedError, match="3 times in a row, at step 7"):
        run(workdir, pretraining(self_distillation("adapt", num_steps=9)), "run")
    told = [row for row in rows(workdir / "run") if "alarm" not in row]
    assert [row.get("skipped", False) for row in told] == [False, True, False, False, True, True, True]


def test_leaving_off_in_time_says_so_and_the_same_call_goes_on(workdir):
    config = pretraining(self_distillation("adapt"))
    with pytest.raises(PartialError, match="left off in time at step 0"):
        run(workdir, config, "run", stop_after_s=0.0)
    assert run(workdir, config, "run").num_steps == 3


def test_compiling_reaches_every_network_of_blocks_that_runs(workdir, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compiled.append(block))
    depth = load_backbone("random:tiny")[0].depth
    for number, stage in enumerate((self_distillation("adapt", num_steps=1), distillation(num_steps=1))):
        run(workdir, pretraining(stage, compile=True), str(number))
    assert len(set(map(id, compiled))) == 2 * (2 * depth)  # student and teacher of both


def test_looking_does_not_change_the_run(workdir):
    config = pretraining(self_distillation("adapt"))
    run(workdir, config, "blind")
    run(workdir, config.model_copy(update={"watch_every": 2}), "seeing")
    blind, seeing = (load_file(workdir / name / TEACHER) for name in ("blind", "seeing"))
    assert all(torch.equal(blind[key], seeing[key]) for key in blind)
    watched = [row for row in rows(workdir / "seeing") if "watch" in row]
    assert [row["step"] for row in watched] == [0, 2, 3] and watched[0]["watch"]["rank"] > 1
    assert (workdir / "seeing/pictures/pca-00000003.png").is_file()


def test_what_does_not_fit_is_refused(workdir, tmp_path_factory):
    config = pretraining(self_distillation("adapt"))
    with pytest.raises(DatasetError, match="no finished pool"):
        run(tmp_path_factory.mktemp("empty"), config, "run")
    sized = pretraining(self_distillation("adapt"), views=ViewConfig(num_locals=2, global_size=64))
    with pytest.raises(ConfigError, match=r"views\.global_size: sizes of crops are the stages'"):
        run(workdir, sized, "run")
    with pytest.raises(ConfigError, match="KoLeo needs neighbours, a portion has one image"):
        run(workdir, pretraining(self_distillation("adapt", accumulate=4)), "run")
    shared_out = pretraining(self_distillation("adapt"), distillation(), parallel="fsdp")
    with pytest.raises(ConfigError, match="parallel=fsdp: a distillation cannot share"):
        run(workdir, shared_out, "run")
    with pytest.raises(ValueError, match="gram_size 16 is smaller than global_size 32"):
        Resolution(global_size=32, local_size=16, gram_size=16)
    with pytest.raises(ConfigError, match="no vision transformer"):
        run(workdir, config.model_copy(update={"backbone": "random:dinov3_convnext_tiny"}), "run")
    with pytest.raises(CheckpointError, match="nothing to resume"):
        run(workdir, config, "run", resume="require")
    run(workdir, config, "run")
    with pytest.raises(CheckpointError, match="seed was 0, is 1"):
        run(workdir, config.model_copy(update={"seed": 1}), "run")


def test_crops_are_made_of_whole_patches_and_that_is_said(workdir):
    config = pretraining(self_distillation("adapt"), distillation())
    assert fitted(config, 16) == (config, ())
    other, told = fitted(config, 14)
    assert [stage.resolutions[0] for stage in other.stages] == [
        Resolution(global_size=28, local_size=14, gram_size=70)
    ] * 2
    changes = "crops in whole patches of 14 px: 32 -> 28, 16 -> 14, 64 -> 70"
    assert told == (f"stage adapt: {changes}", f"stage distil: {changes}")
    odd = self_distillation("adapt", resolutions=(Resolution(global_size=30, local_size=20),))
    notes = []
    run(workdir, pretraining(odd), "run", lambda event: notes.append(event.text) if event.kind == "note" else None)
    assert notes[0] == "stage adapt: crops in whole patches of 16 px: 30 -> 32, 20 -> 16"


def test_settings_may_change_until_something_is_saved(workdir):
    config = pretraining(self_distillation("adapt"), watch_every=1)

    def fail_at_two(event):
        if event.kind == "step" and event.done == 2:
            raise RuntimeError("pulled out")

    with pytest.raises(RuntimeError, match="pulled out"):
        run(workdir, config, "run", fail_at_two)
    run(workdir, config.model_copy(update={"seed": 1}), "run")
    assert [row["step"] for row in rows(workdir / "run") if "watch" in row] == [0, 1, 2, 3]


def test_a_look_that_is_no_number_is_written_as_none(workdir, monkeypatch):
    monkeypatch.setattr(Watch, "look", lambda self, *args: {"rank": 2.0, "spread": 1.0, "odd": float("nan")})
    run(workdir, pretraining(self_distillation("adapt"), watch_every=3), "run")
    assert [row["watch"] for row in rows(workdir / "run") if "watch" in row] == 2 * [
        {"rank": 2.0, "spread": 1.0, "odd": None}
    ]


def test_a_portion_holds_the_same_images_however_many_processes_share_it(pool_folder):
    stage = self_distillation("adapt", batch_size=8, accumulate=2)

    def portions(size):
        """The norms of the global crops of each portion, from all processes together."""
        found = []
        for rank in range(size):
            samples = Samples(Pool(pool_folder / "pool"), pretraining(stage), World(rank, size, torch.device("cpu")))
            found.append(samples.portions(samples.slices(stage, 0), stage, 0, 16))
        return [
            {round(float(crop.double().norm()), 3) for portion in parts for crop in portion.views.globals}
            for parts in zip(*found, strict=True)
        ]

    alone = portions(1)
    assert len(alone) == 2 and not alone[0] & alone[1]
    assert portions(2) == portions(4) == alone


def test_sources_of_one_name_are_kept_apart_and_a_teacher_is_named(workdir, pool_folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    source = PoolSource(name="blocks", path=str(pool_folder.parent / "data"), leave_out=("1",))
    build_pool([source], other, PoolConfig(max_similarity=None), num_workers=1)
    run(workdir, pretraining(self_distillation("adapt")), "run")
    start = str(workdir / "run" / TEACHER)
    run(other, pretraining(distillation(teachers=(start,)), backbone=start), "run")
    card = load_backbone(other / "run" / TEACHER)[1]
    assert [counts["cases"] for counts in card.pretraining.sources.values()] == [3, 2]
    assert list(card.pretraining.sources) == ["blocks", "blocks (2)"]
    assert card.source.endswith("from run, taught by run")


def test_heads_have_a_rate_of_their_own():
    backbone = load_backbone("random:tiny")[0]
    network = Network(backbone.requires_grad_(True), HEAD, HEAD)
    stage = self_distillation("adapt", layer_decay=0.5, patch_rate=0.2, head_rate=10.0)
    names = {parameter: name for name, parameter in network.named_parameters()}
    factors = {names[one]: group["factor"] for group in parameter_groups(network, stage) for one in group["params"]}
    assert factors["dino_head.mlp.0.weight"] == factors["ibot_head.last_layer.weight"] == 10
    assert factors["backbone.norm.weight"] == 1
    assert factors[f"backbone.blocks.{backbone.depth - 1}.norm1.weight"] == 0.5
    assert factors["backbone.patch_embed.proj.weight"] == pytest.approx(0.5 ** (backbone.depth + 1) * 0.2)
