"""Weights rounded once and packed: the same logits, the model itself unchanged."""

import copy

import pytest
import torch
from torch import nn

from voxdino.inference import rounded
from voxdino.inference.rounded import PackedLinear, can_pack, rounded_weights
from voxdino.models.backbones.blocks import AdaptableLinear, Mlp

CPU = torch.device("cpu")
needs_packing = pytest.mark.skipif(not can_pack(), reason="oneDNN packs no bfloat16 weights here")


@pytest.fixture(params=["packed", "plain"])
def packing(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(rounded, "can_pack", lambda: False)
    elif not can_pack():
        pytest.skip("oneDNN packs no bfloat16 weights here")
    return request.param


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_weights_rounded_once_give_the_logits_of_weights_rounded_at_every_call(model, packing):
    crops = torch.randn(2, 1, 3, 8, 8)
    before = {name: value.clone() for name, value in model.segmenter.state_dict().items()}
    with torch.inference_mode():
        exact = model.segmenter(crops).logits
        with bf16():
            once, always = rounded_weights(model.segmenter, CPU)(crops).logits, model.segmenter(crops).logits
    if packing == "plain":
        assert torch.equal(once, always)
    assert (once - exact).abs().mean() < 1.2 * (always - exact).abs().mean()
    assert (once - always).abs().max() < 0.05 * exact.std()
    assert all(value.dtype == before[name].dtype for name, value in model.segmenter.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.segmenter.state_dict().items())


@needs_packing
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_packed_layer_gives_the_values_of_the_layer(with_bias):
    layer, x = AdaptableLinear(24, 40, bias=with_bias), torch.randn(3, 7, 24)
    with torch.inference_mode(), bf16():
        torch.testing.assert_close(PackedLinear(layer)(x), layer(x), rtol=2**-7, atol=1e-3)
        torch.testing.assert_close(PackedLinear(layer, "gelu")(x), nn.functional.gelu(layer(x)), rtol=2**-6, atol=4e-3)


@needs_packing
def test_the_masked_bias_of_keys_stays_masked():
    layer, x = AdaptableLinear(6, 9, mask_k_bias=True), torch.zeros(1, 6)
    with torch.inference_mode(), bf16():
        assert PackedLinear(layer)(x)[0, 3:6].tolist() == [0.0] * 3
        assert torch.equal(PackedLinear(layer)(x), layer(x))


@needs_packing
def test_only_plain_layers_are_packed(model):
    block = model.segmenter.backbone.blocks[0]
    block.mlp.fc1.adapter = nn.Linear(block.mlp.fc1.in_features, block.mlp.fc1.out_features)
    packed = rounded_weights(model.segmenter, CPU).backbone.blocks
    assert isinstance(packed[0].attn.qkv, PackedLinear)
    assert isinstance(packed[0].mlp, Mlp)
    assert type(packed[0].mlp.fc1) is AdaptableLinear
    assert isinstance(packed[0].mlp.fc2, PackedLinear)
    assert all(isinstance(other.mlp, nn.Sequential) for other in packed[1:])
    again = copy.deepcopy(packed)
    assert again[0].attn.qkv is packed[0].attn.qkv
    assert type(block.attn.qkv) is AdaptableLinear


def test_code_that_reads_the_weight_of_a_layer_still_can(model):
    class Foreign(nn.Linear):
        pass

    reader = nn.Module()
    reader.qkv, reader.other = nn.Linear(4, 4), Foreign(4, 4)
    model.segmenter.foreign = reader
    there = rounded_weights(model.segmenter, CPU).foreign
    assert there.qkv.weight.dtype == there.other.weight.dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this processor has no bfloat16 arithmetic")
def test_torch_still_packs_where_the_processor_can_and_asking_draws_no_random_number():
    state = torch.get_rng_state()
    can_pack.cache_clear()
    assert can_pack()
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_packed_for_another_device(model):
    there = rounded_weights(model.segmenter, torch.device("meta"))
    assert not any(isinstance(module, PackedLinear) for module in there.modules())
