"""Laws of the adapters along the slice axis, alone and inside a backbone."""

import pytest
import torch

from voxdino.core.errors import ConfigError
from voxdino.models.backbones.depth_adapter import DepthAdapter, add_depth_adapters
from voxdino.models.lora import add_lora


def stir(module):
    """Let the adapters do something."""
    for name, value in module.named_parameters():
        if "up.weight" in name:
            torch.nn.init.normal_(value, std=0.3)


def stirred(dim=6, width=5):
    torch.manual_seed(3)
    adapter = DepthAdapter(dim, width=width)
    stir(adapter)
    return adapter


@pytest.mark.parametrize("num_slices", [1, 3, 6])
def test_nothing_changes_at_the_start(vit, num_slices):
    images = torch.randn(6, 3, 8, 12)
    expected = vit(images)
    assert add_depth_adapters(vit, width=4) == 3
    adapted = vit(images, num_slices=num_slices)
    for a, b in zip((*adapted.maps, adapted.cls_token), (*expected.maps, expected.cls_token), strict=True):
        assert (a - b).abs().max() <= 1e-6


def test_after_training_a_slice_feels_its_neighbours_and_no_other_case(vit):
    add_depth_adapters(vit, width=4, blocks=[1])
    stir(vit)
    images = torch.randn(8, 3, 8, 8)  # two cases of four slices
    changed = images.clone()
    changed[1] += 1
    moved = [
        (a - b).abs().max() > 1e-6
        for a, b in zip(
            vit(images, taps=[2], num_slices=4).maps[0], vit(changed, taps=[2], num_slices=4).maps[0], strict=True
        )
    ]
    assert moved == [True, True, True, False, False, False, False, False]  # one adapter reaches one slice each side


def test_every_further_adapter_reaches_one_slice_further(vit):
    add_depth_adapters(vit, width=4, blocks=[0, 2])
    stir(vit)
    images = torch.randn(6, 3, 8, 8)
    changed = images.clone()
    changed[0] += 1
    before, after = (vit(x, num_slices=6).cls_token for x in (images, changed))
    assert [(a - b).abs().max() > 1e-6 for a, b in zip(before, after, strict=True)] == [True] * 3 + [False] * 3


def test_without_slices_beside_it_a_slice_sees_zeros_there(vit):
    add_depth_adapters(vit, width=4)
    stir(vit)
    images = torch.randn(3, 3, 8, 8)
    together = vit(images, num_slices=1).cls_token
    torch.testing.assert_close(together[1:2], vit(images[1:2], num_slices=1).cls_token, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together, vit(images, num_slices=3).cls_token, atol=1e-4)


def test_slices_turned_over_give_turned_tokens_when_the_kernel_is_turned_too():
    adapter, x = stirred(), torch.randn(2 * 4, 3, 6)
    expected = adapter(x, 4).unflatten(0, (2, 4))
    with torch.no_grad():
        adapter.along_depth.weight.copy_(adapter.along_depth.weight.flip(2))
    turned = adapter(x.unflatten(0, (2, 4)).flip(1).flatten(0, 1), 4).unflatten(0, (2, 4)).flip(1)
    torch.testing.assert_close(turned, expected)


def test_tokens_mix_with_those_at_their_place_only():
    adapter, x = stirred(), torch.randn(3, 4, 6)
    changed = x.clone()
    changed[0, 2] += 1
    difference = (adapter(x, 3) - adapter(changed, 3)).abs().amax(-1)
    assert (difference > 1e-6).nonzero().tolist() == [[0, 2], [1, 2]]


def test_by_hand():
    adapter = DepthAdapter(1, width=1)
    with torch.no_grad():
        for layer, weight in ((adapter.down, 1.0), (adapter.up, 2.0)):
            layer.weight.fill_(weight)
            layer.bias.zero_()
        adapter.along_depth.weight.copy_(torch.tensor([10.0, 20.0, 30.0]).reshape(1, 1, 3, 1))
        adapter.along_depth.bias.zero_()
    out = adapter(torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1), 3).flatten()
    torch.testing.assert_close(out, torch.tensor([2.0 * (20 + 60), 2.0 * (10 + 40 + 90), 2.0 * (20 + 60)]))


def test_names_of_the_backbone_stay_and_only_the_adapters_train_when_it_is_frozen(vit):
    own = dict(vit.named_parameters())
    vit.requires_grad_(False)
    assert add_depth_adapters(vit, width=4, blocks=(0, 2)) == 2
    assert set(own) <= set(dict(vit.named_parameters()))
    layers = ("down", "along_depth", "up")
    trained = {name for name, value in vit.named_parameters() if value.requires_grad}
    assert trained == {
        f"blocks.{i}.depth_adapter.{layer}.{kind}" for i in (0, 2) for layer in layers for kind in ("weight", "bias")
    }
    vit(torch.randn(4, 3, 8, 8), num_slices=2).cls_token.square().sum().backward()
    assert all(value.grad is None for value in own.values())
    assert vit.blocks[0].depth_adapter.up.weight.grad.abs().sum() > 0


def test_it_goes_together_with_lora(vit):
    add_lora(vit, rank=2)
    add_depth_adapters(vit, width=4)
    kinds = {name.split(".")[2] for name, value in vit.named_parameters() if value.requires_grad}
    assert kinds == {"attn", "mlp", "depth_adapter"}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("at_once", [1, 2, 4, 100])
def test_images_through_a_block_a_few_at_a_time_give_the_same_features_and_gradients(vit, at_once, checkpointing):
    add_depth_adapters(vit, width=4)
    stir(vit)
    images = torch.randn(6, 3, 8, 8)
    gradients = []
    for settings in ({}, {"images_at_once": at_once}):
        vit.zero_grad()
        vit.gradient_checkpointing = checkpointing and bool(settings)
        features = vit(images, num_slices=3, **settings)
        features.maps[-1].square().sum().backward()
        gradients.append((features.maps[0].detach(), vit.blocks[0].depth_adapter.down.weight.grad.clone()))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_images_that_are_no_whole_cases_are_refused(vit):
    with pytest.raises(ConfigError, match="5 images are no cases of 2 slices"):
        vit(torch.zeros(5, 3, 8, 8), num_slices=2)


@pytest.mark.parametrize("settings", [{"width": 0}, {"blocks": [3]}, {"blocks": [-1]}, {"blocks": []}])
def test_impossible_settings_are_refused(vit, settings):
    with pytest.raises(ConfigError, match="cannot be built"):
        add_depth_adapters(vit, **settings)
