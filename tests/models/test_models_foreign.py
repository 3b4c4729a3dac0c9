"""Models of other authors: recognised by their keys, complete or refused, and computing the same in our code."""

import pytest
import torch
from foreign_states import LAYOUTS, NUM_OUTPUTS, make_foreign

from voxdino.core.errors import WeightsError
from voxdino.models.backbones.build import backbone_from_state
from voxdino.models.compose import build_segmenter
from voxdino.models.foreign import SYSTEMS, convert_model, recognise


@pytest.fixture
def foreign(new_vit):
    return lambda system, **changes: make_foreign(system, new_vit(depth=4, mask_k_bias=True), **changes)


def convert(state, **further):
    return convert_model(state, name="theirs", **further)


def test_every_system_has_a_layout_to_test():
    assert set(LAYOUTS) == set(SYSTEMS)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_is_recognised_and_nothing_is_lost(system, foreign):
    segmenter, state = foreign(system)
    assert recognise(state) == system
    model = convert(state)
    assert model.description.system == system
    assert model.description.unmapped == ()
    expected = segmenter.state_dict()
    assert set(model.tensors) == set(expected)
    assert all(torch.equal(model.tensors[key], value) for key, value in expected.items())
    own = [value for key, value in expected.items() if not key.startswith("backbone.") or ".adapter." in key]
    assert model.description.num_parameters == sum(value.numel() for value in own)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_converted_model_computes_what_the_original_does(system, foreign):
    segmenter, state = foreign(system)
    model = convert(state)
    config = model.description.config
    settings = {"norm_eps": 1e-5, "rope_dtype": "float32"}  # those of the original here; MedDINOv3's are its own
    rebuilt = build_segmenter(config, type(segmenter.backbone)(model.backbone.config.model_copy(update=settings)))
    rebuilt.load_state_dict(model.tensors)
    image = torch.randn(1, config.num_channels, 3 + 2 * config.context_slices, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt.eval()(image).logits, segmenter(image).logits)
    assert config.num_outputs == NUM_OUTPUTS
    assert config.taps == segmenter.taps


def test_a_proxy_head_of_one_class_is_read(foreign):
    state = foreign("DINO-Med3D, stage 1")[1]
    state |= {"head.weight": state["head.weight"][:1], "head.bias": state["head.bias"][:1]}
    model = convert(state)
    assert model.description.config.num_outputs == 1 and model.description.unmapped == ()
    assert model.tensors["decoder.to_logits.weight"].ndim == 2 and model.tensors["decoder.to_logits.bias"].shape == (1,)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_prefixes_of_parallel_and_compiled_training_are_taken_off(prefix, foreign):
    segmenter, state = foreign("SegDINO v2")
    model = convert({f"{prefix}{key}": value for key, value in state.items()})
    assert set(model.tensors) == set(segmenter.state_dict())


def test_what_has_no_place_is_listed_and_what_is_dropped_is_told_with_its_reason(foreign):
    _, state = foreign("DINO-Med3D, stage 2")
    model = convert({**state, "aux_head.weight": torch.zeros(2, 5)})
    assert model.description.unmapped == ("aux_head.weight (2 x 5)",)
    assert len(model.description.dropped) == 2
    assert model.description.dropped[0].startswith(
        "decoder.cls.weight (3 x 8 x 1 x 1 x 1): the UPerNet's own classifier"
    )
    assert "aux_head.weight" not in model.tensors


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_state_without_one_of_its_tensors_is_refused_by_name(system, foreign):
    _, state = foreign(system)
    marks = [key for key in state if not key.endswith(("cls_token", "bias_mask", "periods"))]
    left_out = [key for key in marks if "bias" in key and "decoder.cls" not in key][-1]
    del state[left_out]
    with pytest.raises(WeightsError, match="missing"):
        convert(state)


def test_a_decoder_without_its_backbone_is_refused(foreign):
    _, state = foreign("SegDINO v1")
    with pytest.raises(WeightsError, match="SegDINO v1 without its backbone"):
        convert({key: value for key, value in state.items() if key.startswith("head.")})


def test_numbers_that_are_none_are_refused(foreign):
    _, state = foreign("SegDINO v2")
    state["decoder.out_conv.bias"] = torch.full((NUM_OUTPUTS,), torch.nan)
    with pytest.raises(WeightsError, match="NaN"):
        convert(state)


def test_a_backbone_alone_is_no_foreign_model(new_vit):
    state = new_vit().state_dict()
    teacher = {f"backbone.{key}": value for key, value in state.items()}
    heads = {"dino_head.mlp.0.weight": torch.zeros(3, 3), "ibot_head.last_layer.weight": torch.zeros(3, 3)}
    assert recognise(state) is None
    assert recognise({**teacher, **heads}) is None


@pytest.mark.parametrize("form, enlarged", [("paper", False), ("release", True)])
def test_the_form_of_segdino_v1_follows_from_its_keys(form, enlarged, foreign):
    _, state = foreign("SegDINO v1", decoder_settings={"head_form": form})
    assert ("head.proj.weight" in state) == enlarged
    assert convert(state).description.config.decoder_settings == {"head_form": form}


def test_meddinov3_with_one_tap_is_its_ablation_and_its_backbone_has_the_authors_options(foreign):
    _, state = foreign("MedDINOv3, fine-tuned", decoder="primus_single")
    model = convert(state)
    assert model.description.config.decoder == "primus_single"
    assert (model.backbone.config.norm_eps, model.backbone.config.rope_dtype) == (1e-6, "bfloat16")
    assert convert(state, settings={"norm_eps": "1e-5"}).backbone.config.norm_eps == 1e-5


def test_segdino_at_24_blocks_reads_block_4_where_others_read_5(new_vit):
    _, state = make_foreign("SegDINO v2", new_vit(depth=24), taps=(4, 11, 17, 23))
    assert convert(state).description.config.taps == (4, 11, 17, 23)


def test_stage_2_without_peft_is_frozen(foreign):
    segmenter, state = foreign("DINO-Med3D, stage 2", adaptation="frozen")
    assert not any("lora" in key for key in state)
    plain = {key.replace("base_model.model.", ""): value for key, value in state.items()}
    model = convert(plain)
    assert model.description.config.adaptation == "frozen"
    assert set(model.tensors) == set(segmenter.state_dict())


def test_the_backbone_alone_has_the_adapters_merged(foreign):
    segmenter, state = foreign("DINO-Med3D, stage 2")
    model = convert(state)
    alone = backbone_from_state(model.backbone.config, model.backbone.tensors)
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        expected = segmenter.backbone(images).maps
        plain = alone(images).maps
    for ours, theirs in zip(plain, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert any("adapters" in note for note in model.backbone.notes)


def test_facts_beside_the_weights_are_kept_as_they_are(foreign):
    _, state = foreign("DINO-Med3D, stage 1")
    facts = {
        "checkpoint.norm_stats": '{"mean": 0.2, "std": 0.3}',
        "checkpoint.num_classes": "3",
        "checkpoint.epoch": "9",
    }
    kept = convert(state, facts=facts).description.facts
    assert kept == {"norm_stats": '{"mean": 0.2, "std": 0.3}', "num_classes": "3"}
