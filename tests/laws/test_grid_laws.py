"""Laws of grids: reordering and flipping axes, and going to a canonical order, never move a voxel in the world."""

from itertools import permutations, product

import numpy as np
import pytest

from voxdino.core.errors import GeometryError
from voxdino.core.geometry import Grid, canonical_transpose, require_right_angles

ORIENTATIONS = [(order, flips) for order in permutations(range(3)) for flips in product((False, True), repeat=3)]
OBLIQUES = [(0.0, 0.0, 0.0), (0.1, 0.0, 0.0), (0.0, -0.3, 0.2), (0.5, 0.4, -0.6), (0.02, 0.7, 0.0)]
SHAPE = (5, 7, 4)


def rotation(angles):
    """Rotations about the three axes, one after the other."""
    result = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [a for a in range(3) if a != axis]
        step = np.eye(3)
        step[i, i] = step[j, j] = np.cos(angle)
        step[i, j], step[j, i] = -np.sin(angle), np.sin(angle)
        result = result @ step
    return result


def oblique_grid(angles, spacing=(0.7, 1.3, 5.0), origin=(-12.5, 30.0, 7.25)):
    affine = np.eye(4)
    affine[:3, :3] = rotation(angles) * spacing
    affine[:3, 3] = origin
    return Grid(SHAPE, affine)


def numbered(shape):
    return np.arange(np.prod(shape)).reshape(shape)


def apply(array, order, flips):
    return array.transpose(order)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]


def world_of(grid, array):
    """Each voxel's number -> where it lies."""
    indices = np.stack(np.unravel_index(np.argsort(array.ravel()), array.shape), axis=1)
    return grid.index_to_world(indices)


@pytest.mark.parametrize("angles", OBLIQUES)
def test_transposing_moves_no_voxel_in_the_world(angles):
    grid = oblique_grid(angles)
    array = numbered(SHAPE)
    for order, flips in ORIENTATIONS:
        moved, moved_array = grid.transposed(order, flips), apply(array, order, flips)
        assert moved.shape == moved_array.shape
        np.testing.assert_allclose(world_of(moved, moved_array), world_of(grid, array), atol=1e-9)


@pytest.mark.parametrize("angles", OBLIQUES)
@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.7, 1.3, 5.0), (3.0, 0.4, 0.41)])
def test_canonical_transpose_undone_gives_grid_and_labels_back(angles, spacing):
    base = oblique_grid(angles, spacing)
    for order, flips in ORIENTATIONS:  # every way a file may store this grid
        grid = base.transposed(order, flips)
        array = numbered(grid.shape)
        there, there_flips = canonical_transpose(grid, (2, 1, 0))
        canonical = apply(array, there, there_flips)
        unflipped = canonical[tuple(slice(None, None, -1 if flip else 1) for flip in there_flips)]
        np.testing.assert_array_equal(unflipped.transpose([there.index(axis) for axis in range(3)]), array)
        inverse = [there.index(axis) for axis in range(3)]
        back = grid.transposed(there, there_flips).transposed(inverse, [there_flips[axis] for axis in inverse])
        assert back.shape == grid.shape
        np.testing.assert_allclose(back.affine, grid.affine, atol=1e-9)


@pytest.mark.parametrize("world_order", list(permutations(range(3))))
def test_canonical_axes_run_along_the_positive_world_axes(world_order):
    for angles in OBLIQUES:
        if max(map(abs, angles)) > 0.45:
            continue  # turned so far that "along" is a matter of taste
        for order, flips in ORIENTATIONS:
            grid = oblique_grid(angles).transposed(order, flips)
            canonical = grid.transposed(*canonical_transpose(grid, world_order))
            assert canonical.axes_to_world() == (world_order, (1, 1, 1))


def test_canonical_order_of_one_scan_is_the_same_however_it_was_stored():
    base = oblique_grid((0.1, -0.2, 0.05))
    expected = base.transposed(*canonical_transpose(base, (2, 1, 0)))
    for order, flips in ORIENTATIONS:
        grid = base.transposed(order, flips)
        assert grid.transposed(*canonical_transpose(grid, (2, 1, 0))).same_as(expected)


def test_orientation_names_the_way_each_axis_runs():
    assert Grid.from_spacing(SHAPE).orientation == "RAS"
    assert Grid(SHAPE, np.diag([-1.0, -1, 1, 1])).orientation == "LPS"
    assert Grid(SHAPE, np.array([[0.0, 0, 2, 0], [0, -1, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]])).orientation == "SPR"


@pytest.mark.parametrize("shape", [(10, 14, 8), (3, 7, 4), (5, 7, 4), (1, 1, 1)])
def test_resized_grid_covers_the_same_box(shape):
    grid = oblique_grid((0.2, 0.1, -0.3))
    resized = grid.resized(shape)
    low, high = [[-0.5] * 3], np.array([grid.shape]) - 0.5
    np.testing.assert_allclose(resized.index_to_world([[-0.5] * 3]), grid.index_to_world(low), atol=1e-9)
    np.testing.assert_allclose(resized.index_to_world(np.array([shape]) - 0.5), grid.index_to_world(high), atol=1e-9)
    assert resized.voxel_volume * np.prod(shape) == pytest.approx(grid.voxel_volume * np.prod(grid.shape))


def test_spacing_is_the_length_of_the_affine_columns():
    assert oblique_grid((0.5, 0.4, -0.6)).spacing == pytest.approx((0.7, 1.3, 5.0))


def test_picture_grids_turn_and_flip_too():
    grid = Grid.from_spacing((4, 6), unit="px")
    turned = grid.transposed((1, 0), (True, False))
    assert turned.shape == (6, 4)
    assert turned.unit == "px"
    np.testing.assert_allclose(turned.index_to_world([[0, 0]]), [[0, 5]])


def test_grids_within_rounding_are_the_same_and_beyond_it_are_not():
    grid = oblique_grid((0.1, 0.0, 0.0))
    near, far = grid.affine.copy(), grid.affine.copy()
    near[0, 3] += 1e-5
    far[0, 3] += 0.1
    assert grid.same_as(Grid(SHAPE, near))  # A30
    assert not grid.same_as(Grid(SHAPE, far))  # A29
    assert grid.same_as(Grid(SHAPE, far), tolerance=0.2)
    assert not grid.same_as(grid.transposed((0, 1, 2), (True, False, False)))
    assert grid.largest_offset(Grid(SHAPE, far)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("affine", "words"),
    [
        (np.diag([1.0, 0, 1, 1]), "singular"),
        (np.diag([1.0, np.nan, 1, 1]), "NaN"),
        (np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "singular"),
    ],
)
def test_affines_without_a_world_are_refused(affine, words):
    with pytest.raises(GeometryError, match=words):
        Grid(SHAPE, affine)


def test_shear_within_a_ten_thousandth_is_rounding_and_beyond_is_refused():
    sheared = np.eye(4)
    sheared[0, 1] = 1e-4
    require_right_angles(Grid(SHAPE, sheared))
    sheared[0, 1] = 0.01
    with pytest.raises(GeometryError, match=r"sheared.*right angles"):
        require_right_angles(Grid(SHAPE, sheared))
