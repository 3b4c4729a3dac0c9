"""A new model starts from another one's weights wherever they fit, and says what did not."""

import re

import pytest
import torch
from foreign_states import make_foreign
from safetensors.torch import save_file

from voxdino.core.errors import CheckpointError, WeightsError
from voxdino.core.safe_files import Manifest, write_json
from voxdino.models.backbones.build import build_backbone
from voxdino.models.compose import build_segmenter
from voxdino.models.initial import load_initial
from voxdino.models.weights import import_weights


@pytest.fixture
def imported(new_vit, tmp_path):
    """Import the state of a foreign model; returns the original and a builder of new segmenters like it."""

    def make(system, **changes):
        original, state = make_foreign(system, new_vit(depth=4), **changes)
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "theirs.safetensors")
        card = import_weights(tmp_path / "theirs.safetensors", tmp_path / "weights")
        assert card.model is not None

        def build(**settings):
            config = card.model.config.model_copy(update=settings)
            return build_segmenter(config, build_backbone(card.config)).eval()

        return original, build, tmp_path / "weights"

    return make


def test_a_model_like_it_takes_everything_and_computes_the_same(imported):
    original, build, folder = imported("DINO-Med3D, stage 2")
    segmenter = build()
    report = load_initial(segmenter, "theirs", weights_folder=folder)
    assert sum(report.taken.values()) == len(segmenter.state_dict())
    assert not (report.anew or report.unused or report.adapters_merged)
    assert report.backbone_changed
    assert re.fullmatch(
        r"starts from theirs: backbone \(\d+ tensors\), decoder .*, detail .*, refine .*", *report.told()
    )
    image = torch.randn(1, 1, 4, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(segmenter(image).logits, original(image).logits)


def test_another_number_of_classes_starts_the_classifier_anew_and_says_so(imported):
    original, build, folder = imported("SegDINO v2")
    segmenter = build(num_outputs=5)
    before = segmenter.decoder.to_logits.weight.clone()
    report = load_initial(segmenter, "theirs", weights_folder=folder)
    assert "classifier starts anew: 3 outputs there, 5 here" in report.told()
    assert torch.equal(segmenter.decoder.to_logits.weight, before)
    assert torch.equal(segmenter.decoder.project[0].weight, original.decoder.project[0].weight)


def test_another_decoder_takes_the_backbone_alone(imported):
    _, build, folder = imported("SegDINO v2")
    segmenter = build(decoder="linear")
    bias = segmenter.decoder.to_logits.bias.clone()
    report = load_initial(segmenter, "theirs", weights_folder=folder)
    assert set(report.taken) == {"backbone"}
    assert report.anew == {"decoder": "made for decoder tpa_sad"}
    assert report.told()[-1] == "not used of it: decoder"
    assert torch.equal(segmenter.decoder.to_logits.bias, bias)


def test_a_decoder_of_another_width_is_not_taken_in_part(imported):
    original, build, folder = imported("SegDINO v2")
    with torch.no_grad():
        original.decoder.intra[0].gate.fill_(1)
    segmenter = build(decoder_width=8)
    report = load_initial(segmenter, "theirs", weights_folder=folder)
    assert report.anew["decoder"].startswith(
        "decoder.project.0.weight is 16 x 24 x 1 x 1 there, 8 x 24 x 1 x 1 here and "
    )
    assert all(block.gate.item() == 0 for block in segmenter.decoder.intra)


@pytest.mark.parametrize(
    "settings", [{"adaptation": "frozen"}, {"lora_rank": 3}, {"lora_alpha": 4.0}], ids=["none", "rank", "scale"]
)
def test_adapters_that_do_not_fit_are_merged_so_that_the_features_stay(settings, imported):
    original, build, folder = imported("DINO-Med3D, stage 2")
    segmenter = build(**settings)
    report = load_initial(segmenter, "theirs", weights_folder=folder)
    assert report.adapters_merged
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        for ours, theirs in zip(segmenter.backbone(images).maps, original.backbone(images).maps, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_backbone_that_stays_as_it_was_is_told(imported, new_vit, tmp_path):
    _, build, folder = imported("SegDINO v2")
    segmenter = build()
    load_initial(segmenter, "theirs", weights_folder=folder)
    assert not load_initial(segmenter, "theirs", weights_folder=folder).backbone_changed
    save_file(new_vit(depth=4).state_dict(), tmp_path / "vit.safetensors")
    report = load_initial(segmenter, tmp_path / "vit.safetensors")
    assert report.backbone_changed and report.source == "vit.safetensors"
    assert (set(report.taken), report.anew) == ({"backbone"}, {"decoder": "it has none"})


def test_a_run_folder_is_a_source_and_a_damaged_one_is_refused(imported, tmp_path):
    original, build, _ = imported("SegDINO v2")
    run = tmp_path / "run"
    run.mkdir()
    save_file(original.state_dict(), run / "model.safetensors")
    write_json(run / "model.json", {"model": original.config.to_json()})
    Manifest.of(run, ("model.json", "model.safetensors")).write(run)
    segmenter = build()
    report = load_initial(segmenter, run)
    assert (report.source, sum(report.taken.values())) == ("run", len(original.state_dict()))
    (run / "model.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        load_initial(segmenter, run)


def test_weights_of_which_nothing_fits_are_refused(imported, new_vit, tmp_path):
    _, build, _ = imported("SegDINO v2")
    save_file(new_vit(embed_dim=32, depth=5).state_dict(), tmp_path / "other.safetensors")
    segmenter = build()
    before = {key: value.clone() for key, value in segmenter.state_dict().items()}
    with pytest.raises(WeightsError, match="no part of it fits this model"):
        load_initial(segmenter, tmp_path / "other.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in segmenter.state_dict().items())
