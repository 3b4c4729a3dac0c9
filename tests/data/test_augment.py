"""Augmentation: the same for a sample in any batch, labels stay with the image, grey stays grey."""

import numpy as np
import pytest
import torch

from voxdino.core.errors import UsageError
from voxdino.data.augment import NNUNET_2D, AugmentConfig, augment, sample_seed

IGNORED = -1
OFF = AugmentConfig(spatial=0, gamma=0, brightness=0, contrast=0, noise=0, blur=0, low_resolution=0, flips="none")
ALL = AugmentConfig(spatial=1, gamma=1, brightness=1, contrast=1, noise=1, blur=1, low_resolution=1, flips="both")


def batch(number=3, channels=2, depth=3, context=1, size=(21, 34), seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(number, channels, depth + 2 * context, *size, generator=generator)
    return image, torch.randint(0, 3, (number, depth, *size), generator=generator)


def run(image, label, config, seeds=(1, 2, 3), spacing=(1.0, 1.0, 1.0), padding=-2.0):
    number, channels = image.shape[:2]
    return augment(
        image,
        label,
        seeds=list(seeds)[:number],
        padding=torch.full((number, channels), padding),
        spacing=torch.tensor([spacing] * number),
        config=config,
        ignore_index=IGNORED,
    )


def disc(size=(41, 41), center=(20, 12), radius=6):
    """A bright disc off the middle and its label."""
    rows, columns = np.indices(size)
    inside = torch.from_numpy((rows - center[0]) ** 2 + (columns - center[1]) ** 2 <= radius**2)
    return inside.float()[None, None, None], inside.long()[None, None]


def test_a_sample_does_not_depend_on_its_batch():
    image, label = batch()
    together = run(image, label, ALL)
    for i in range(3):
        alone = run(image[i : i + 1], label[i : i + 1], ALL, seeds=[(1, 2, 3)[i]])
        assert torch.equal(alone[0][0], together[0][i]) and torch.equal(alone[1][0], together[1][i])


def test_inputs_are_not_changed_in_place():
    image, label = batch()
    before = image.clone(), label.clone()
    run(image, label, ALL)
    assert torch.equal(image, before[0]) and torch.equal(label, before[1])


def test_everything_off_changes_nothing():
    image, label = batch()
    changed = run(image, label, OFF)
    assert torch.equal(changed[0], image) and torch.equal(changed[1], label)


@pytest.mark.parametrize(
    "name", ["gamma", "inverted_gamma", "brightness", "contrast", "noise", "blur", "low_resolution"]
)
def test_each_intensity_change_changes_the_image_alone(name):
    image, label = batch()
    changed, same = run(image, label, OFF.model_copy(update={name: 1.0}))
    assert not torch.allclose(changed, image)
    assert torch.isfinite(changed).all()
    assert torch.equal(same, label)


def test_grey_stays_grey():
    image, label = batch(channels=1)
    changed, _ = run(image.expand(-1, 3, -1, -1, -1), label, ALL)
    torch.testing.assert_close(changed[:, 0], changed[:, 1])
    torch.testing.assert_close(changed[:, 0], changed[:, 2])


def test_a_constant_image_stays_finite():
    image, label = batch()
    changed, _ = run(torch.zeros_like(image), label, ALL, padding=0.0)
    assert torch.isfinite(changed).all()


@pytest.mark.parametrize("seed", range(8))
def test_the_label_moves_with_the_image(seed):
    image, label = disc()
    moved, mask = run(image, label, OFF.model_copy(update={"spatial": 1.0, "flips": "both"}), [seed], padding=0.0)
    inside = mask[0, 0] == 1
    assert inside.sum() > 40
    assert moved[0, 0, 0][inside].mean() > 0.9
    assert moved[0, 0, 0][~inside].mean() < 0.03


def test_what_turns_in_from_outside_is_padding_and_ignored():
    image, label = torch.ones(1, 1, 1, 20, 20), torch.ones(1, 1, 20, 20, dtype=torch.int64)
    config = OFF.model_copy(update={"spatial": 1.0, "scale": (0.5, 0.5), "rotation_degrees": 0.0, "translation": 0.0})
    moved, mask = run(image, label, config, [1], padding=-2.0)
    assert (mask[0, 0, 5:15, 5:15] == 1).all() and (mask == 1).sum() == 100
    assert (mask[0, 0, 0] == IGNORED).all()
    torch.testing.assert_close(moved[0, 0, 0, 0], torch.full((20,), -2.0))
    torch.testing.assert_close(moved[0, 0, 0, 6:14, 6:14], torch.ones(8, 8))


def test_an_integer_label_is_never_blended():
    image, label = batch()
    label[label == 1] = 7
    _, moved = run(image, label, ALL)
    assert set(moved.unique().tolist()) <= {IGNORED, 0, 2, 7}


def test_a_rotation_keeps_lengths_in_millimetres_on_anisotropic_pixels():
    size, spacing = (60, 30), (1.0, 1.0, 2.0)  # a square of 60 mm
    rows, columns = np.indices(size)
    distance = ((rows - 29.5) * spacing[1]) ** 2 + ((columns - 14.5) * spacing[2]) ** 2
    label = torch.from_numpy(distance <= 15**2).long()[None, None]
    config = OFF.model_copy(update={"spatial": 1.0, "scale": (1.0, 1.0), "rotation_degrees": 90.0, "translation": 0.0})
    for seed in range(5):
        _, moved = run(label[:, None].float(), label, config, [seed], spacing=spacing)
        assert ((moved == 1) != (label == 1)).float().mean() < 0.02  # a round thing stays round


def ball(context, depth=20):
    """A ball off the middle, in slices of 1 x 1 mm that are 2 mm apart, and its label without the context slices."""
    z, y, x = np.indices((depth, 41, 41))
    inside = torch.from_numpy((2 * (z - 12)) ** 2 + (y - 17) ** 2 + (x - 22) ** 2 <= 10**2)
    return inside.float()[None, None], inside[context : depth - context].long()[None]


@pytest.mark.parametrize("context", [0, 2])
def test_tilted_slabs_keep_lengths_in_millimetres_and_take_their_label_along(context):
    image, label = ball(context)
    config = OFF.model_copy(update={"spatial": 1.0, "scale": (1.0, 1.0), "translation": 0.0, "tilt_degrees": 60.0})
    for seed in range(5):
        moved, mask = run(image, label, config, [seed], spacing=(2.0, 1.0, 1.0), padding=0.0)
        inside, known = mask[0] == 1, mask[0] != IGNORED
        shown = moved[0, 0, context : 20 - context] > 0.5
        assert (shown == inside)[known].float().mean() > 0.99
        places = inside.nonzero() * torch.tensor([2.0, 1.0, 1.0])
        extent = places.amax(0) - places.amin(0)
        assert abs(inside.sum() / label.sum() - 1) < 0.1 and (extent > 14).all() and (extent < 24).all()


def test_thick_slices_and_pictures_are_not_tilted():
    image, label = ball(0)
    config = OFF.model_copy(update={"spatial": 1.0, "scale": (1.0, 1.0), "translation": 0.0, "rotation_degrees": 0.0})
    tilted = config.model_copy(update={"tilt_degrees": 60.0})
    assert torch.equal(run(image, label, tilted, [1], spacing=(3.5, 1.0, 1.0))[1], label)
    assert torch.equal(run(image[:, :, :1], label[:, :1], tilted, [1])[1], label[:, :1])
    assert not torch.equal(run(image, label, tilted, [1], spacing=(2.5, 1.0, 1.0))[1], label)


@pytest.mark.parametrize("axis, dim", [("rows", -2), ("columns", -1)])
def test_flips_happen_along_the_allowed_axis_only_half_of_the_time(axis, dim):
    image, label = batch(number=1)
    num_flipped = 0
    for seed in range(40):
        moved, mask = run(image, label, OFF.model_copy(update={"flips": axis}), [seed])
        flipped = not torch.equal(mask, label)
        num_flipped += flipped
        expected = (image.flip(dim), label.flip(dim)) if flipped else (image, label)
        torch.testing.assert_close(moved, expected[0], atol=1e-4, rtol=0)
        assert torch.equal(mask, expected[1])
    assert 10 < num_flipped < 30


def test_turning_and_scaling_have_probabilities_of_their_own():
    image, label = disc()
    for name, turned in (("rotation", False), ("scaling", True)):
        config = OFF.model_copy(update={"spatial": 1.0, name: 0.0, "translation": 0.0})
        sizes = [(run(image, label, config, [seed], padding=0.0)[1] == 1).sum().item() for seed in range(20)]
        kept = [abs(size - label.sum().item()) <= 6 for size in sizes]
        assert all(kept) if turned else sum(kept) < 10  # turned only: the disc keeps its area
    half = OFF.model_copy(update={"spatial": 1.0, "rotation": 0.5, "scaling": 0.0, "translation": 0.0})
    unmoved = sum(torch.equal(run(image, label, half, [seed])[0], image) for seed in range(60))
    assert 18 < unmoved < 42


def test_inverted_gamma_is_gamma_of_the_negative():
    image, label = batch(number=1)
    inverted, _ = run(image, label, OFF.model_copy(update={"inverted_gamma": 1.0, "gamma_range": (1.4, 1.4)}))
    negative, _ = run(-image, label, OFF.model_copy(update={"gamma": 1.0, "gamma_range": (1.4, 1.4)}))
    torch.testing.assert_close(inverted, -negative)


def test_later_settings_leave_the_draws_of_the_default_as_they_were():
    """Cached features and stored loss curves rely on it."""
    image, label = batch()
    changed, moved = run(image, label, AugmentConfig(flips="both"))
    assert changed.double().abs().mean().item() == pytest.approx(0.7350518656767605, rel=1e-5)
    assert int(moved.sum()) == 6248


def test_the_nnunet_set_changes_a_batch_and_keeps_it_finite():
    image, label = batch(number=3)
    changed, moved = run(image, label, NNUNET_2D)
    assert torch.isfinite(changed).all() and not torch.equal(changed, image)
    assert set(moved.unique().tolist()) <= {IGNORED, 0, 1, 2}


def test_volumes_are_not_flipped_by_default_and_pictures_are():
    assert AugmentConfig().for_dimensions(3).flips == "none"
    assert AugmentConfig().for_dimensions(2).flips == "both"
    assert AugmentConfig(flips="columns").for_dimensions(3).flips == "columns"


def test_seeds_name_samples():
    first = (0, 1, 2, "a", 3)
    others = [(1, 1, 2, "a", 3), (0, 2, 2, "a", 3), (0, 1, 3, "a", 3), (0, 1, 2, "b", 3), (0, 1, 2, "a", 4)]
    assert len({sample_seed(*key) for key in [first, *others]}) == 6
    assert sample_seed(*first) == 9073654796954972202


RANGES = [name for name, field in AugmentConfig.model_fields.items() if isinstance(field.default, tuple)]


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("ends", ["[1, 0.5]", "[-1, 1]", "[0.5, 0.6, 0.7]"])
def test_a_range_that_is_none_is_refused_by_name(name, ends):
    with pytest.raises(UsageError, match=name):
        AugmentConfig().with_settings({name: ends})


@pytest.mark.parametrize("name", [name for name in RANGES if name != "noise_sd"])
def test_a_factor_of_zero_is_refused(name):
    with pytest.raises(UsageError, match="0 < low <= high"):
        AugmentConfig().with_settings({name: "[0, 1]"})
