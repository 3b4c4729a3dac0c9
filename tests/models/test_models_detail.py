"""Laws of the detail stream, its gate and the refinement."""

import pytest
import torch

from voxdino.models.detail import DetailMaps, DetailStream, GatedFusion, Refinement, resize

torch.set_num_threads(1)


def stream(**changes):
    torch.manual_seed(0)
    return DetailStream(**{"num_channels": 1, "width": 8, "base": 4, **changes})


@pytest.mark.parametrize("volumetric", [True, False])
@pytest.mark.parametrize("size", [(3, 9, 14), (1, 16, 12), (2, 5, 7)])
def test_maps_halve_in_plane_rounded_up_and_keep_every_slice(size, volumetric):
    depth, height, width = size
    maps = stream(num_channels=2, volumetric=volumetric)(torch.randn(2, 2, *size))
    assert maps.full.shape == (2, 4, *size)
    assert maps.half.shape == (2, 8, depth, -(-height // 2), -(-width // 2))
    assert maps.quarter.shape == (2, 8, depth, -(-height // 4), -(-width // 4))


def test_a_stream_of_16_channels_and_256_at_the_end_has_the_published_size():
    count = sum(p.numel() for p in DetailStream(num_channels=1).parameters())
    assert count == pytest.approx(0.52e6, rel=0.01)


def test_slices_of_a_flat_stream_are_alone_but_for_the_statistics_of_the_norm():
    images = torch.randn(1, 1, 3, 9, 14)
    for volumetric in (True, False):
        net = stream(volumetric=volumetric).stem[0]
        changed = images.clone()
        changed[:, :, 2] += 1
        same = torch.equal(net(images)[:, :, 1], net(changed)[:, :, 1])
        assert same == (not volumetric)


def test_a_crop_turned_over_along_its_depth_gives_turned_maps_when_the_kernels_are_turned_too():
    net, image = stream(), torch.randn(1, 1, 3, 8, 8)
    expected = net(image)
    with torch.no_grad():
        for value in net.parameters():
            if value.ndim == 5:
                value.copy_(value.flip(2))
    turned = net(image.flip(2))
    for name in ("full", "half", "quarter"):
        torch.testing.assert_close(getattr(turned, name).flip(2), getattr(expected, name), rtol=1e-4, atol=1e-4)


def test_cases_of_a_batch_are_alone():
    net, image = stream(), torch.randn(2, 1, 2, 8, 9)
    torch.testing.assert_close(net(image).quarter[1:], net(image[1:]).quarter, rtol=1e-4, atol=1e-5)


def test_the_gate_lets_all_half_or_nothing_through():
    fusion = GatedFusion(3)
    vit, cnn = torch.randn(2, 3, 1, 4, 5), torch.randn(2, 3, 1, 4, 5)
    with torch.no_grad():
        fusion.gate.weight.zero_()
        for bias, share in ((0.0, 0.5), (60.0, 1.0), (-60.0, 0.0)):
            fusion.gate.bias.fill_(bias)
            torch.testing.assert_close(fusion(vit, cnn), vit + share * cnn)


def test_the_gate_sees_features_first_and_detail_second():
    fusion = GatedFusion(1)
    with torch.no_grad():
        fusion.gate.weight.copy_(torch.tensor([2.0, 3.0]).reshape(1, 2, 1, 1, 1))
        fusion.gate.bias.zero_()
    vit, cnn = torch.full((1, 1, 1, 1, 1), 0.1), torch.full((1, 1, 1, 1, 1), -0.4)
    expected = 0.1 - 0.4 / (1 + torch.tensor(1.0).exp())  # sigmoid(2 * 0.1 - 3 * 0.4)
    torch.testing.assert_close(fusion(vit, cnn).squeeze(), expected)


@pytest.mark.parametrize("volumetric", [True, False])
@pytest.mark.parametrize("size", [(3, 9, 14), (1, 16, 12)])
def test_refinement_gives_a_logit_per_voxel_from_any_grid_and_everything_learns(size, volumetric):
    net, image = stream(volumetric=volumetric), torch.randn(2, 1, *size)
    refine = Refinement(hidden_width=6, num_outputs=3, base=4, widths=(8, 5), volumetric=volumetric)
    hidden = torch.randn(2, 6, size[0], 4, 3, requires_grad=True)
    logits = refine(hidden, net(image))
    assert logits.shape == (2, 3, *size)
    logits.square().mean().backward()
    assert hidden.grad.abs().sum() > 0
    learning = [*refine.parameters(), *net.at_full.parameters(), *net.at_half.parameters()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learning)


def test_refinement_has_the_published_size():
    count = sum(p.numel() for p in Refinement(hidden_width=256, num_outputs=2).parameters())
    assert count == pytest.approx(0.71e6, rel=0.02)


def test_resizing_keeps_outer_edges_and_does_nothing_on_the_same_grid():
    x = torch.randn(1, 2, 3, 4, 5)
    assert resize(x, torch.zeros(1, 7, 3, 4, 5)) is x
    ramp = torch.arange(4.0).reshape(1, 1, 1, 1, 4)
    finer = resize(ramp, torch.zeros(1, 1, 1, 1, 12)).flatten()
    torch.testing.assert_close(finer[1::3], torch.arange(4.0))  # centres that coincide keep their value


def test_autocast_leaves_the_maps_near_single_precision():
    net, image = stream(), torch.randn(1, 1, 2, 16, 12)
    exact = net(image)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(image)
    assert isinstance(rough, DetailMaps)
    assert (rough.quarter.float() - exact.quarter).norm() < 0.05 * exact.quarter.norm()
