"""Laws of low-rank adapters."""

import pytest
import torch

from voxdino.core.errors import ConfigError
from voxdino.models.lora import LORA_TARGETS, LoraAdapter, add_lora, merge_lora, merged_state


def stir(vit):
    """Let the adapters do something."""
    for name, value in vit.named_parameters():
        if "adapter.up" in name:
            torch.nn.init.normal_(value, std=0.1)


@pytest.mark.parametrize("ffn, num_layers", [("mlp", 4), ("swiglu", 5)])
def test_output_is_unchanged_at_the_start(new_vit, ffn, num_layers):
    vit = new_vit(ffn=ffn)
    images = torch.randn(2, 3, 8, 12)
    expected = vit(images).maps[-1]
    assert add_lora(vit, rank=3) == num_layers * 3
    torch.testing.assert_close(vit(images).maps[-1], expected, rtol=0, atol=0)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_merged_weights_give_the_same_output_and_the_plain_backbone(new_vit, ffn):
    vit = new_vit(ffn=ffn)
    plain_names = list(vit.state_dict())
    images = torch.randn(2, 3, 8, 12)
    before = vit(images).maps[-1]
    add_lora(vit, rank=3, alpha=6.0, dropout=0.5)
    stir(vit)
    adapted = vit(images).maps[-1]
    assert (adapted - before).abs().max() > 1e-2
    assert merge_lora(vit) > 0
    torch.testing.assert_close(vit(images).maps[-1], adapted, rtol=0, atol=1e-5)
    assert list(vit.state_dict()) == plain_names
    assert merge_lora(vit) == 0


def test_a_state_is_merged_as_a_model_is(vit):
    add_lora(vit, rank=3, alpha=5.0)
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.adapter.up.weight.normal_()
    state = merged_state(vit.state_dict(), alpha=5.0)
    merge_lora(vit)
    assert set(state) == set(vit.state_dict())
    for key, value in vit.state_dict().items():
        torch.testing.assert_close(state[key], value)


def test_only_the_adapters_train_and_keep_their_names(vit):
    own = dict(vit.named_parameters())
    add_lora(vit, rank=2)
    trainable = {name for name, value in vit.named_parameters() if value.requires_grad}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert trainable == {
        f"blocks.{i}.{layer}.adapter.{half}.weight" for i in range(3) for layer in layers for half in ("down", "up")
    }
    assert set(own) <= set(dict(vit.named_parameters()))  # no name of the backbone moved
    vit(torch.randn(1, 3, 8, 8)).cls_token.square().sum().backward()
    assert all(value.grad is None for value in own.values())


def test_dropout_acts_in_training_only(vit):
    add_lora(vit, rank=2, dropout=0.5)
    stir(vit)
    images = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(vit(images).cls_token, vit(images).cls_token)
    vit.train()
    assert not torch.allclose(vit(images).cls_token, vit(images).cls_token)


def test_adapter_by_hand():
    adapter = LoraAdapter(2, 1, rank=1, alpha=3.0, dropout=0.0)
    adapter.load_state_dict({"down.weight": torch.tensor([[1.0, 2.0]]), "up.weight": torch.tensor([[5.0]])})
    assert adapter(torch.tensor([[1.0, 1.0]])).item() == 3 * 5 * (1 + 2)


def test_sizes_are_the_published_ones():
    from voxdino.models.backbones.vit import ViT
    from voxdino.models.registry import BACKBONES

    with torch.device("meta"):
        vit = ViT(BACKBONES["dinov3_vits16"])
        add_lora(vit, rank=16)
    assert sum(p.numel() for p in vit.parameters() if p.requires_grad) == pytest.approx(1.18e6, rel=0.01)


def test_targets_can_be_chosen(vit):
    assert add_lora(vit, targets=("qkv",)) == 3
    assert set(LORA_TARGETS) == {"qkv", "proj", "fc1", "fc2", "w1", "w2", "w3"}


@pytest.mark.parametrize("settings", [{"rank": 0}, {"dropout": 1.0}, {"targets": ("patch_embed",)}])
def test_impossible_settings_are_refused(vit, settings):
    with pytest.raises(ConfigError, match="cannot be built"):
        add_lora(vit, **settings)
