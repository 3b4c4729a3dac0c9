"""Files of other authors' models: opened safely, imported whole, named by themselves, loaded as a backbone."""

import numpy as np
import pytest
import torch
from foreign_states import make_foreign

from voxdino.core.errors import SafetyError, UsageError, WeightsError
from voxdino.models.foreign import SYSTEMS
from voxdino.models.tensor_files import read_tensors
from voxdino.models.weights import import_weights, inspect_weights, list_weights, load_backbone
from voxdino.models.weights_card import WeightsCard

WRAPPED = {
    "DINO-Med3D, stage 1": "model_state_dict",
    "DINO-Med3D, stage 2": "model_state_dict",
    "MedDINOv3, fine-tuned": "network_weights",
}


@pytest.fixture
def saved(new_vit, tmp_path):
    """A .pth file as the system's authors write it, and the model that is in it."""

    def save(system, name="theirs.pth", **beside):
        original, state = make_foreign(system, new_vit(depth=4))
        content = {WRAPPED[system]: state, **beside} if system in WRAPPED else state
        torch.save(content, tmp_path / name)
        return original, tmp_path / name

    return save


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_file_is_imported_whole_and_its_name_stands_for_its_backbone(system, saved, tmp_path):
    original, path = saved(system)
    card = import_weights(path, tmp_path / "weights", "mine")
    assert card.model is not None
    assert (card.model.system, card.model.config.backbone, card.name) == (system, "mine", "mine")
    assert list_weights(tmp_path / "weights") == (card,)
    stored, _ = read_tensors(tmp_path / "weights" / "mine.safetensors")
    assert set(stored) == set(original.state_dict())
    backbone, loaded = load_backbone("mine", weights_folder=tmp_path / "weights")
    assert loaded == card
    images = torch.randn(1, 3, 16, 24)
    with torch.no_grad():
        expected = original.backbone(images).maps[-1]
        tolerance = (
            0.1 if system.startswith("MedDINOv3") else 1e-4
        )  # whose options (norm_eps) are others than ours here
        torch.testing.assert_close(backbone(images).maps[-1], expected, rtol=0, atol=tolerance)
    assert import_weights(path, tmp_path / "weights", "mine") == card


def test_what_lies_beside_the_weights_is_kept_where_it_says_how_they_were_trained(saved):
    _, path = saved(
        "DINO-Med3D, stage 1",
        norm_stats={"mean": np.float64(0.25), "std": np.float32(0.5)},
        num_classes=np.int64(3),
        label_mapping={0: 0, 255: 1},
        optimizer_state_dict={"state": {0: torch.zeros(2)}},
    )
    facts = inspect_weights(path).model.facts
    assert facts == {
        "norm_stats": '{"mean": 0.25, "std": 0.5}',
        "num_classes": "3",
        "label_mapping": '{"0": 0, "255": 1}',
    }


def test_scalars_of_numpy_are_read_without_numpy_and_other_objects_are_refused(tmp_path):
    numbers = [np.float64(-1.5), np.float32(0.5), np.float16(2.0), np.int64(-7), np.uint8(200), np.bool_(True)]
    torch.save({"state_dict": {"a": torch.zeros(1)}, "numbers": numbers}, tmp_path / "numbers.pth")
    _, facts = read_tensors(tmp_path / "numbers.pth")
    assert facts == {"checkpoint.numbers": "[-1.5, 0.5, 2.0, -7, 200, true]"}
    torch.save({"state_dict": {"a": torch.zeros(1)}, "array": np.zeros(3)}, tmp_path / "array.pth")
    with pytest.raises(SafetyError, match="other than tensors"):
        read_tensors(tmp_path / "array.pth")
    torch.save({"state_dict": {"a": torch.zeros(1)}, "text": np.array(["x"])[0]}, tmp_path / "text.pth")
    with pytest.raises(WeightsError, match="no torch checkpoint"):
        read_tensors(tmp_path / "text.pth")


def test_a_whole_model_in_a_file_without_a_name_is_not_called_after_its_backbone(saved, tmp_path):
    _, path = saved("SegDINO v2", "model.pth")
    with pytest.raises(UsageError, match="need a name"):
        import_weights(path, tmp_path / "weights")


def test_an_imported_model_that_lost_a_tensor_is_refused(saved, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    _, path = saved("SegDINO v2")
    folder = tmp_path / "weights"
    import_weights(path, folder)
    with safe_open(folder / "theirs.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors, _ = read_tensors(folder / "theirs.safetensors")
    del tensors["decoder.intra.0.gate"]
    save_file(tensors, tmp_path / "changed.safetensors", metadata=metadata)
    with pytest.raises(WeightsError, match=r"intra\.0\.gate is missing"):
        load_backbone(tmp_path / "changed.safetensors")


def test_settings_fit_the_model_and_cards_come_back_from_json(saved):
    _, path = saved("DINO-Med3D, stage 2")
    card = inspect_weights(path)
    assert WeightsCard.from_json(card.to_json()) == card
    assert card.model.settings() == {
        "decoder": "upernet3d",
        "taps": [0, 1, 2, 3],
        "decoder_width": 8,
        "decoder_settings": {"release_kernels": True},
        "tap_norm": False,
        "detail": "volume",
        "detail_width": 4,
        "adaptation": "lora",
        "lora_rank": 2,
    }


def test_the_teacher_checkpoint_of_meddinov3_is_a_backbone_with_its_own_options(new_vit, tmp_path):
    vit = new_vit(qkv_bias=False, mask_k_bias=False, rope_dtype="bfloat16", norm_eps=1e-6)
    teacher = {f"backbone.{key}": value for key, value in vit.state_dict().items()}
    teacher |= {"dino_head.mlp.0.weight": torch.zeros(3, 3), "ibot_head.last_layer.weight": torch.zeros(3, 3)}
    torch.save({"teacher": teacher}, tmp_path / "model.pth")
    card = import_weights(tmp_path / "model.pth", tmp_path / "weights", "meddinov3")
    assert card.model is None
    assert (card.config.norm_eps, card.config.rope_dtype, card.config.qkv_bias) == (1e-6, "bfloat16", False)
    backbone, _ = load_backbone("meddinov3", weights_folder=tmp_path / "weights")
    images = torch.randn(1, 3, 8, 12)
    torch.testing.assert_close(backbone(images).maps[-1], vit(images).maps[-1])
