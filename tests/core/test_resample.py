"""Resizing keeps outer edges, constants, means and identities, and agrees with SciPy and PyTorch."""

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from voxdino.core.geometry import Grid
from voxdino.core.resample import linear_matrix, resize_linear, resize_nearest


def random(*shape):
    return np.random.default_rng(0).random(shape, dtype=np.float32)


@pytest.mark.parametrize(("old", "new"), [((5, 7), (11, 7)), ((5, 7), (6, 20)), ((4, 5, 6), (9, 5, 13))])
def test_growing_agrees_with_scipy_at_the_grids_own_coordinates(old, new):
    array = random(*old)
    grid = Grid.from_spacing(old, unit="px" if len(old) == 2 else "mm")
    where = np.stack(np.meshgrid(*map(np.arange, new), indexing="ij"), axis=-1).reshape(-1, len(new))
    coordinates = grid.resized(new).index_to_world(where)  # unit spacing: world is old index
    expected = map_coordinates(array, coordinates.T, order=1, mode="nearest").reshape(new)
    np.testing.assert_allclose(resize_linear(array, new, range(len(new))), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new"), [((20, 31), (7, 13)), ((20, 31), (40, 13)), ((16, 16), (8, 4)), ((5, 5), (1, 1))]
)
def test_shrinking_agrees_with_antialiased_pytorch(old, new):
    array = random(2, *old)
    expected = torch.nn.functional.interpolate(torch.from_numpy(array)[None], size=new, mode="bilinear", antialias=True)
    np.testing.assert_allclose(resize_linear(array, new, (1, 2)), expected[0].numpy(), atol=2e-6)


@pytest.mark.parametrize("new", [1, 2, 3, 6, 7, 12, 40])
def test_constants_stay_and_weights_sum_to_one(new):
    assert resize_linear(np.full((3, 6), 7, np.int16), (new,), (1,)) == pytest.approx(7, abs=1e-5)
    matrix = linear_matrix(6, new)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    assert matrix.min() >= 0


def test_equal_sizes_are_the_identity_in_a_new_array():
    array = random(3, 4, 5)
    for resized in (resize_linear(array, (4, 5), (1, 2)), resize_nearest(array, (4, 5), (1, 2))):
        np.testing.assert_array_equal(resized, array)
        assert not np.shares_memory(resized, array)


def test_whole_factors_average_the_voxels_that_fall_into_one_symmetrically():
    array = random(1, 12)
    np.testing.assert_allclose(
        resize_linear(array[:, ::-1], (4,), (1,)), resize_linear(array, (4,), (1,))[:, ::-1], atol=1e-6
    )


def test_a_ramp_keeps_its_slope_away_from_the_borders():
    ramp = np.arange(20, dtype=np.float32)
    for new in (10, 50):
        step = 20 / new
        resized = resize_linear(ramp, (new,), (0,))[new // 5 : -new // 5]
        np.testing.assert_allclose(np.diff(resized), step, atol=1e-4)


@pytest.mark.parametrize("factor", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, bool])
def test_nearest_shrinking_undoes_growing_by_whole_factors(factor, dtype):
    labels = (np.random.default_rng(1).random((2, 5, 7)) * 3).astype(dtype)
    grown = resize_nearest(labels, (5 * factor, 7 * factor), (1, 2))
    assert grown.dtype == labels.dtype
    np.testing.assert_array_equal(grown, labels.repeat(factor, 1).repeat(factor, 2))
    np.testing.assert_array_equal(resize_nearest(grown, (5, 7), (1, 2)), labels)


@pytest.mark.parametrize(("old", "new"), [(5, 8), (8, 5), (7, 3), (1, 4), (4, 1)])
def test_nearest_takes_the_nearest_centre(old, new):
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    taken = resize_nearest(np.arange(old), (new,), (0,))
    assert np.abs(taken - centres).max() <= 0.5 + 1e-9


def test_axes_are_independent_and_may_be_negative():
    array = random(3, 4, 5)
    both = resize_linear(array, (6, 2), (0, -1))
    np.testing.assert_allclose(both, resize_linear(resize_linear(array, (2,), (2,)), (6,), (0,)), atol=1e-6)
    assert both.shape == (6, 4, 2)
    assert both.dtype == np.float32


def test_the_input_is_not_changed():
    array = random(4, 5)
    before = array.copy()
    resize_linear(array, (9, 2), (0, 1))
    np.testing.assert_array_equal(array, before)
