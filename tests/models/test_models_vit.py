"""Laws of the vision transformer and of every one in the table."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from voxdino.core.errors import ConfigError
from voxdino.models.backbones import blocks
from voxdino.models.backbones.blocks import add_rows, attend, kept_rows, take_rows
from voxdino.models.backbones.rope import RotaryPositions, rope_periods, rotate
from voxdino.models.backbones.vit import ViT, ViTConfig, default_taps
from voxdino.models.registry import BACKBONES

VITS = [name for name, config in BACKBONES.items() if isinstance(config, ViTConfig)]


def shrunk(name):
    """The published configuration with fewer and narrower blocks."""
    config = BACKBONES[name]
    heads = {"depth": 2, "embed_dim": 16, "num_heads": 2, "ffn_hidden": 24}
    grid = {"position_grid": (4, 4)} if config.position_grid else {}
    return config.model_copy(update=heads | grid)


@pytest.mark.parametrize("name", VITS)
def test_every_backbone_gives_one_map_per_tap_on_any_grid(name):
    vit = ViT(shrunk(name)).train()
    patch = vit.patch_size
    features = vit(torch.randn(2, 3, 3 * patch, 5 * patch), taps=[0, 1])
    assert [tuple(m.shape) for m in features.maps] == [(2, 16, 3, 5)] * 2
    assert features.cls_token.shape == (2, 16)
    assert features.patch_size == (patch, patch)
    sum(m.square().sum() for m in features.maps).backward()
    assert all(p.grad is not None for n, p in vit.named_parameters() if n not in unused_in_forward(vit))


def unused_in_forward(vit):
    """Parameters of self-supervised training only."""
    return {name for name, _ in vit.named_parameters() if name.startswith(("mask_token", "local_cls_norm"))}


@pytest.mark.parametrize("name", VITS)
def test_every_backbone_has_an_unused_tap_set_of_four(name):
    taps = default_taps(BACKBONES[name].depth)
    assert len(set(taps)) == 4
    assert taps[-1] == BACKBONES[name].depth - 1


def test_default_taps_are_the_published_ones():
    assert default_taps(12) == (2, 5, 8, 11)
    assert default_taps(16) == (3, 7, 11, 15)
    assert default_taps(24) == (5, 11, 17, 23)


@pytest.mark.parametrize(
    "name, millions",
    [("dinov3_vits16", 21.6), ("dinov3_vits16plus", 28.7), ("dinov3_vitb16", 85.7), ("dinov2_vits14", 22.1)],
)
def test_published_configurations_have_the_published_size(name, millions):
    with torch.device("meta"):
        vit = ViT(BACKBONES[name])
    assert sum(p.numel() for p in vit.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_an_image_does_not_depend_on_its_batch(vit):
    images = torch.randn(3, 3, 12, 20)
    together = vit(images).maps[-1]
    torch.testing.assert_close(together[1:2], vit(images[1:2]).maps[-1], rtol=1e-5, atol=1e-5)


def test_patches_are_mapped_row_by_row(vit):
    images = torch.zeros(1, 3, 12, 20)
    images[..., 4:8, 16:20] = 5  # patch (1, 4)
    with torch.no_grad():
        for block in vit.blocks:
            block.ls1.gamma.zero_()
            block.ls2.gamma.zero_()
    energy = vit(images, taps=[2], tap_norm=False).maps[0].sub(vit(images * 0, taps=[2], tap_norm=False).maps[0])
    assert energy.abs().sum((0, 1)).nonzero().tolist() == [[1, 4]]


def test_taps_with_norm_are_the_normalised_raw_taps(vit):
    images = torch.randn(2, 3, 12, 20)
    raw, normed = vit(images, tap_norm=False), vit(images)
    for a, b in zip(raw.maps, normed.maps, strict=True):
        torch.testing.assert_close(vit.norm(a.movedim(1, -1)).movedim(-1, 1), b)
    tokens = vit.tokens(images)
    torch.testing.assert_close(tokens.patches.transpose(1, 2).reshape(2, 24, 3, 5), normed.maps[-1])
    torch.testing.assert_close(tokens.cls, normed.cls_token)
    assert tokens.registers.shape == (2, 4, 24)


def test_masked_patches_do_not_see_their_pixels(vit):
    images = torch.randn(1, 3, 8, 8)
    changed = images.clone()
    changed[..., :4, :4] += 3
    mask = torch.tensor([[True, False, False, False]])
    torch.testing.assert_close(vit(images, masks=mask).maps[-1], vit(changed, masks=mask).maps[-1])
    assert not torch.allclose(vit(images).maps[-1], vit(changed).maps[-1])


def test_the_bias_of_the_keys_is_off_and_gets_no_gradient(vit):
    images = torch.randn(1, 3, 8, 8)
    before = vit(images).cls_token
    keys = slice(24, 48)
    with torch.no_grad():
        vit.blocks[0].attn.qkv.bias[keys] += 9
    torch.testing.assert_close(vit(images).cls_token, before)
    vit(images).cls_token[:, 0].sum().backward()
    assert vit.blocks[0].attn.qkv.bias.grad[keys].abs().max() == 0
    assert vit.blocks[0].attn.qkv.bias.grad[:24].abs().max() > 0


def test_rotation_keeps_lengths_and_depends_on_the_offset_only():
    rope = RotaryPositions(16)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    rotation = rope((4, 6))
    turned_q, turned_k = (rotate(x.expand(1, 1, 24, 16), rotation)[0, 0] for x in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(24))
    scores = (turned_q @ turned_k.T).reshape(4, 6, 4, 6)
    torch.testing.assert_close(scores[0, 1, 2, 4], scores[1, 2, 3, 5], rtol=1e-4, atol=1e-4)
    assert not torch.isclose(scores[0, 1, 2, 4], scores[2, 4, 0, 1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotation_is_that_of_the_dossier_in_its_own_precision(dtype):
    rotation = RotaryPositions(8, dtype=dtype)((2, 3))
    x = torch.randn(2, 2, 6, 8).bfloat16()
    half_turned = torch.cat((-x[..., 4:], x[..., :4]), dim=-1)
    expected = x.to(rotation.sin.dtype) * rotation.cos + half_turned.to(rotation.sin.dtype) * rotation.sin
    assert torch.equal(rotate(x, rotation), expected.bfloat16())


def test_rotation_leaves_the_prefix_alone():
    x = torch.randn(2, 2, 5 + 6, 8)
    turned = rotate(x, RotaryPositions(8)((2, 3)))
    assert torch.equal(turned[:, :, :5], x[:, :, :5])
    assert not torch.allclose(turned[:, :, 5:], x[:, :, 5:])


def test_periods_by_hand():
    torch.testing.assert_close(rope_periods(16), torch.tensor([1.0, math.sqrt(10), 10, math.sqrt(1000)]))
    assert rope_periods(16, dtype="bfloat16")[1] == 3.15625  # as the MedDINOv3 reference file stores it


def test_position_augmentation_acts_only_in_training_and_where_asked(vit):
    images = torch.randn(1, 3, 12, 20)
    expected = vit(images).cls_token
    vit.rope_rescale = 2.0
    torch.testing.assert_close(vit(images).cls_token, expected)
    vit.train()
    assert not torch.allclose(vit(images).cls_token, expected)
    vit.rope_rescale = None
    torch.testing.assert_close(vit(images).cls_token, expected)


def test_drop_path_keeps_the_expectation_and_acts_only_in_training(vit):
    images = torch.randn(1, 3, 8, 8).expand(4, -1, -1, -1)
    vit.drop_path = 0.5
    exact = vit(images).cls_token
    torch.testing.assert_close(exact[0], exact[1])
    vit.train()
    torch.manual_seed(0)
    block, x = vit.blocks[0], torch.randn(1, 6, 24).expand(4, -1, -1)
    with torch.no_grad():
        block.ls2.gamma.zero_()
        rotation = vit.rope_embed((1, 1))
        mean = torch.stack([block(x, rotation, 0.5).mean(0) for _ in range(50)]).mean(0)
        torch.testing.assert_close(mean, block.eval()(x, rotation).mean(0), rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_neither_output_nor_gradients(vit):
    images = torch.randn(2, 3, 8, 12)
    gradients = []
    for vit.gradient_checkpointing in (False, True):
        vit.zero_grad()
        vit(images).maps[-1].square().sum().backward()
        gradients.append(vit.blocks[0].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("family", ["dinov3", "dinov2"])
def test_bfloat16_autocast_on_the_cpu_stays_near_float32(family, new_vit, dinov2_facts):
    vit = new_vit(**(dinov2_facts if family == "dinov2" else {}))
    images = torch.randn(2, 3, 12, 20)
    exact = vit(images).maps[-1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = vit(images).maps[-1]
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


def test_learned_positions_are_exact_on_their_grid_and_smooth_elsewhere(new_vit, dinov2_facts):
    vit = new_vit(**dinov2_facts)
    assert torch.equal(vit._positions((3, 3)), vit.pos_embed[:, 1:])
    with torch.no_grad():
        ramp = torch.arange(3.0).repeat_interleave(3)[None, :, None].expand(1, 9, 24)
        vit.pos_embed[:, 1:] = ramp
    finer = vit._positions((9, 5)).reshape(9, 5, 24)[:, 0, 0].detach()
    torch.testing.assert_close(finer[1::3], torch.arange(3.0))  # centres that coincide keep their value: edges agree
    assert (finer.diff() > 0).all()
    torch.testing.assert_close(finer + finer.flip(0), torch.full((9,), 2.0))


@pytest.mark.parametrize("num_planes", [3, 5, 7])
def test_a_widened_input_starts_as_the_pretrained_one_on_the_three_central_slices(new_vit, num_planes):
    vit, wide = new_vit(), new_vit()
    wide.widen_input(num_planes)
    slices = torch.randn(2, num_planes, 8, 12)
    middle = slices[:, num_planes // 2 - 1 : num_planes // 2 + 2]
    torch.testing.assert_close(wide(slices).maps[-1], vit(middle).maps[-1], rtol=0, atol=1e-6)
    assert wide.config.in_planes == num_planes


def test_a_widened_input_trains_in_a_frozen_backbone_and_hears_the_outer_slices_then(vit):
    vit.requires_grad_(False)
    vit.widen_input(5)
    names = {name for name, value in vit.named_parameters() if value.requires_grad}
    assert names == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    vit(torch.randn(1, 5, 8, 8)).cls_token.square().sum().backward()
    gradient = vit.patch_embed["proj"].weight.grad
    assert (gradient.abs().sum((0, 2, 3)) > 0).all()


def test_a_widened_backbone_is_rebuilt_from_its_configuration(vit):
    vit.widen_input(5)
    again = ViT.from_state(type(vit.config).from_json(vit.config.to_json()), vit.state_dict())
    slices = torch.randn(1, 5, 8, 8)
    torch.testing.assert_close(again(slices).cls_token, vit(slices).cls_token)
    again.widen_input(5)  # no change but that it trains
    torch.testing.assert_close(again(slices).cls_token, vit(slices).cls_token)


@pytest.mark.parametrize("num_planes", [1, 4])
def test_an_input_that_has_no_central_slice_is_refused(vit, num_planes):
    with pytest.raises(ConfigError, match="give an odd number from 3"):
        vit.widen_input(num_planes)


def test_a_widened_input_is_not_made_narrow_again(vit):
    vit.widen_input(5)
    with pytest.raises(ConfigError, match="of 5 planes cannot be made one of 3"):
        vit.widen_input(3)
    with pytest.raises(ConfigError, match="images have 3 planes, but the backbone reads 5"):
        vit(torch.zeros(1, 3, 8, 8))


def test_images_that_are_no_multiple_of_the_patch_are_refused(vit):
    with pytest.raises(ConfigError, match=r"12 x 18 pixels .* patch of 4.*Fix: resize or pad"):
        vit(torch.zeros(1, 3, 12, 18))


@pytest.mark.parametrize("taps", [(3,), (-1,), ()])
def test_taps_outside_the_backbone_are_refused(vit, taps):
    with pytest.raises(ConfigError, match="do not fit a backbone of 3 blocks"):
        vit(torch.zeros(1, 3, 8, 8), taps=taps)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_heads": 5}, "not a multiple of num_heads"),
        ({"num_heads": 4}, "multiple of 4"),
        ({"position_grid": [3, 3]}, "belongs to dinov2"),
        ({"depth": 0}, "greater than 0"),
    ],
)
def test_impossible_configurations_are_refused(vit, changes, words):
    with pytest.raises(ConfigError, match=words):
        type(vit.config).from_json(vit.config.to_json() | changes)


def test_branches_of_single_images_are_left_out_too(vit):
    """With one image a round, the share of rounds that skip is the rate, and the expectation stays."""
    torch.manual_seed(0)
    x, branch = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    rounds = torch.stack(
        [add_rows(x, branch[: len(take_rows(x, kept))], kept) for kept in (kept_rows(x, 0.2) for _ in range(4000))]
    )
    assert set(rounds.unique().tolist()) == {0.0, 1.25}
    assert (rounds == 0).float().mean() == pytest.approx(0.2, abs=0.03)
    assert rounds.mean() == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("score_bytes", [blocks.SCORE_BYTES, 1])
def test_attention_in_bfloat16_is_that_of_the_fused_kernel_many_heads_at_a_time_or_one(score_bytes, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(blocks, "SCORE_BYTES", score_bytes)
    packed = torch.randn(3, 2, 4, 50, 16)
    packed[1] += 5 * torch.randn(16)  # keys with an offset in common, as in DINO backbones
    exact = F.scaled_dot_product_attention(*packed.bfloat16().float())
    leaves = [packed.bfloat16().requires_grad_() for _ in range(2)]
    for attention, leaf in zip((F.scaled_dot_product_attention, attend), leaves, strict=True):
        out = attention(*leaf)
        assert (out - exact).norm() < 0.01 * exact.norm()
        assert torch.equal(attention(*leaf.detach()), out)
        out.square().sum().backward()
    fused, ours = (leaf.grad.float() for leaf in leaves)
    assert (ours - fused).norm() < 0.02 * fused.norm()


@pytest.mark.parametrize(
    "num_tokens, trains, is_plain", [(600, True, True), (700, True, False), (700, False, True), (1500, False, False)]
)
def test_attention_in_bfloat16_leaves_long_sequences_to_the_fused_kernel(num_tokens, trains, is_plain, monkeypatch):
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *given: calls.append(1) or fused(*given))
    attend(*torch.randn(3, 1, 1, num_tokens, 4).bfloat16().requires_grad_(trains))
    assert calls == [1] * (not is_plain)


ATTENDS_ALONE = """
import sys
import torch
from voxdino.models.backbones.blocks import attend
assert "torch._dynamo" not in sys.modules  # it takes seconds to import; only who compiles should wait for it
q, k, v = torch.randn(3, 2, 3, 40, 8).bfloat16()
compiled = torch.compile(attend, backend="eager", fullgraph=True)
assert torch.equal(compiled(q, k, v), attend(q, k, v))
"""


def test_attention_in_bfloat16_compiles_in_one_graph_and_imports_no_compiler():
    """In a process without the checks of types, which torch cannot compile."""
    done = subprocess.run([sys.executable, "-c", ATTENDS_ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
