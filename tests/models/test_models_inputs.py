"""Every input builder makes one image per slice, and refuses what it cannot read."""

import pytest
import torch

from voxdino.core.errors import ConfigError
from voxdino.models.registry import INPUT_BUILDERS

CHANNELS = {
    "repeat": [1],
    "rgb": [3],
    "neighbours": [1],
    "slices_3": [1],
    "slices_5": [1],
    "windows": [1, 2, 3],
    "channels": [1, 2, 3, 4, 7],
}
CASES = [(name, n) for name, numbers in CHANNELS.items() for n in numbers]


def test_every_builder_is_tested():
    assert set(CHANNELS) == set(INPUT_BUILDERS)


@pytest.mark.parametrize("name, num_channels", CASES)
@pytest.mark.parametrize("depth", [1, 4])
def test_every_builder_gives_one_image_per_slice(name, num_channels, depth):
    build = INPUT_BUILDERS[name](num_channels)
    image = torch.randn(2, num_channels, depth + 2 * build.context_slices, 5, 7)
    before = image.clone()
    assert build(image).shape == (2 * depth, build.num_planes, 5, 7)
    assert torch.equal(image, before)


@pytest.mark.parametrize("name, num_channels", CASES)
def test_slices_of_a_case_lie_side_by_side(name, num_channels):
    build = INPUT_BUILDERS[name](num_channels)
    image = torch.randn(2, num_channels, 3 + 2 * build.context_slices, 5, 7)
    torch.testing.assert_close(build(image)[3:], build(image[1:]))


@pytest.mark.parametrize("name, num_channels", CASES)
def test_trainable_is_said_where_weights_learn(name, num_channels):
    build = INPUT_BUILDERS[name](num_channels)
    assert build.trainable == (build.learns_embedding or any(p.requires_grad for p in build.parameters()))
    assert build.trainable == (name.startswith("slices_") or (name == "channels" and num_channels > 3))


def test_only_a_learned_embedding_reads_other_than_three_planes():
    assert {name for name, kind in INPUT_BUILDERS.items() if kind.learns_embedding} == {"slices_3", "slices_5"}
    assert all(kind.num_planes == 3 or kind.learns_embedding for kind in INPUT_BUILDERS.values())


def test_the_plan_knows_how_many_slices_each_builder_reads():
    from voxdino.preparation.plan import _CONTEXT

    assert {name: _CONTEXT.get(name, 0) for name in INPUT_BUILDERS} == {
        name: kind.context_slices for name, kind in INPUT_BUILDERS.items()
    }


def test_neighbours_are_the_slices_before_and_after():
    image = torch.arange(5.0).reshape(1, 1, 5, 1, 1)
    assert INPUT_BUILDERS["neighbours"](1)(image).flatten(1).tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]


def test_planes_are_the_slices_around_each_from_the_first_to_the_last():
    image = torch.arange(6.0).reshape(1, 1, 6, 1, 1)
    assert INPUT_BUILDERS["slices_5"](1)(image).flatten(1).tolist() == [[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]]
    volume = torch.randn(2, 1, 5, 4, 3)
    assert torch.equal(INPUT_BUILDERS["slices_3"](1)(volume), INPUT_BUILDERS["neighbours"](1)(volume))


def test_slices_of_a_volume_turned_over_have_their_planes_turned_over():
    build, volume = INPUT_BUILDERS["slices_5"](1), torch.randn(1, 1, 9, 4, 3)
    assert torch.equal(build(volume.flip(2)), build(volume).flip(0, 1))


def test_two_channels_are_joined_by_their_mean():
    image = torch.tensor([2.0, 6.0]).reshape(1, 2, 1, 1, 1)
    for name in ("channels", "windows"):
        assert INPUT_BUILDERS[name](2)(image).flatten().tolist() == [2, 6, 4]


@pytest.mark.parametrize("name", ["rgb", "windows", "channels"])
def test_three_channels_stay_as_they_are(name):
    image = torch.randn(1, 3, 1, 2, 2)
    torch.testing.assert_close(INPUT_BUILDERS[name](3)(image), image[:, :, 0])


def test_more_channels_start_as_averages_of_groups_and_learn():
    build = INPUT_BUILDERS["channels"](4)
    image = torch.tensor([2.0, 6.0, 1.0, 9.0]).reshape(1, 4, 1, 1, 1)
    out = build(image)
    assert out.flatten().tolist() == [4, 1, 9]
    out.sum().backward()
    assert build.mixing.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "name, num_channels",
    [("repeat", 2), ("rgb", 1), ("neighbours", 3), ("slices_3", 2), ("slices_5", 3), ("windows", 4), ("channels", 0)],
)
def test_wrong_numbers_of_channels_are_refused_with_a_way_out(name, num_channels):
    with pytest.raises(ConfigError, match=rf"'{name}' takes .*, the plan has {num_channels} Fix: "):
        INPUT_BUILDERS[name](num_channels)
