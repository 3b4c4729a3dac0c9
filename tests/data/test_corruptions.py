"""Scanner faults: same generator, same image; stronger is further from the original; by hand where one can."""

import numpy as np
import pytest

from voxdino.core.errors import ConfigError
from voxdino.data.corruptions import CORRUPTIONS, STRENGTHS, corrupted

SHAPES = [(1, 37, 26), (3, 33, 40), (1, 9, 22, 17), (2, 1, 24, 19)]


def textured(shape):
    """Smooth structures with edges, values like those of a CT."""
    axes = np.meshgrid(*[np.linspace(0, 3, n) for n in shape[1:]], indexing="ij")
    waves = sum(np.sin((2 + place) * axis) for place, axis in enumerate(axes)) + 2 * (axes[-1] > 1.5)
    return np.stack([300 * waves + 50 * channel for channel in range(shape[0])]).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_grows_with_its_strength_and_leaves_its_input(name, shape):
    image = textured(shape)
    before = image.copy()
    errors = []
    for strength in STRENGTHS:
        changed = CORRUPTIONS[name](image, strength, np.random.default_rng(7))
        again = CORRUPTIONS[name](image, strength, np.random.default_rng(7))
        assert changed.shape == image.shape and changed.dtype == np.float32 and np.isfinite(changed).all()
        np.testing.assert_array_equal(changed, again)
        errors.append(float(np.sqrt(np.mean((changed - image) ** 2))))
    np.testing.assert_array_equal(image, before)
    assert errors[0] > 0 and errors == sorted(errors)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_units_do_not_matter(name):
    image = textured((1, 20, 30))
    changed = CORRUPTIONS[name](image, 3, np.random.default_rng(0))
    scaled = CORRUPTIONS[name](image * 0.25 + 64, 3, np.random.default_rng(0))
    np.testing.assert_allclose(scaled, changed * 0.25 + 64, atol=1.2)  # rounding of counts and grey levels


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"noise", "rician"}))
def test_nothing_is_made_of_a_constant_image(name):
    image = np.full((1, 12, 10, 8), -1000, dtype=np.float32)
    np.testing.assert_allclose(CORRUPTIONS[name](image, 5, np.random.default_rng(0)), image, atol=0.05)


def test_noise_of_magnitudes_brightens_air_and_noise_of_few_quanta_spares_it():
    image = np.zeros((1, 64, 64), dtype=np.float32)
    image[:, :, 32:] = 100
    assert CORRUPTIONS["rician"](image, 4, np.random.default_rng(0))[:, :, :32].mean() > 10
    dose = CORRUPTIONS["low_dose"](image, 4, np.random.default_rng(0))
    assert (dose[:, :, :32] == 0).all() and dose[:, :, 32:].std() == pytest.approx(100 / 50**0.5, rel=0.1)


def test_ghosts_keep_the_mean_and_a_bias_field_keeps_the_lowest_value():
    image = textured((1, 32, 32))
    image[0, :4] = image.min()
    ghosted = CORRUPTIONS["ghosting"](image, 5, np.random.default_rng(1))
    assert ghosted.mean() == pytest.approx(image.mean(), rel=1e-4)
    biased = CORRUPTIONS["bias_field"](image, 5, np.random.default_rng(1))
    np.testing.assert_allclose(biased[0, :4], image[0, :4], rtol=0.05)


def test_values_beyond_the_range_survive_a_jpeg():
    image = textured((1, 40, 40))
    image[0, 5, 5] = 30000
    assert CORRUPTIONS["jpeg"](image, 1, np.random.default_rng(0))[0, 5, 5] > 25000


def test_a_sixth_strength_is_refused():
    with pytest.raises(ConfigError, match="strengths from 1 to 5, not 6"):
        CORRUPTIONS["blur"](textured((1, 5, 5)), 6, np.random.default_rng(0))


@pytest.mark.parametrize("kind", ["uint8", "int16", "float32", "float64"])
def test_a_corrupted_image_is_one_that_its_file_could_hold_and_its_own_every_time(kind):
    image = (textured((1, 24, 31)) / 8 + 120).clip(0, 255).astype(kind)
    changed = corrupted(image, "noise", 5, of="case_1")
    assert changed.dtype == image.dtype and changed.shape == image.shape
    np.testing.assert_array_equal(changed, corrupted(image, "noise", 5, of="case_1"))
    assert (changed != corrupted(image, "noise", 5, of="case_2")).any()
    half = corrupted(image, "noise", 3, of="case_1").astype(float) - image
    inside = (changed > 0) & (changed < 255)
    assert np.corrcoef(half[inside], (changed.astype(float) - image)[inside])[0, 1] > 0.99  # the same pattern, stronger
    if kind == "uint8":
        assert changed.min() == 0 and abs(changed.astype(float) - image).max() < 160  # nothing wraps around
