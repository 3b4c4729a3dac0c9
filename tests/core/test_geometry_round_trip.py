"""Label maps in NIfTI and NRRD lie where they lay, for every orientation, oblique and spacing; other readers agree."""

from itertools import permutations, product

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from voxdino.core.geometry import Grid
from voxdino.core.io import read_grid, read_label_map, write_label_map, write_volume
from voxdino.core.volume import LabelMap, Volume

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SHAPE = (3, 4, 5)
SPACINGS = [(0.7, 1.3, 2.5), (1.0, 1.0, 1.0), (0.4882812, 0.3, 7.25)]
ANGLES = [(0, 0, 0), (0.3, 0, 0), (0, -0.2, 0.1), (0.05, 0.4, -0.35), (-0.6, 0.5, 0.25)]
ORIENTATIONS = list(product(permutations(range(3)), product((1, -1), repeat=3)))
LABELS = np.random.default_rng(0).integers(0, 4, SHAPE).astype(np.uint8)


def affine_of(orientation, angles, spacing):
    order, signs = orientation
    affine = np.eye(4)
    affine[:3, :3] = 0
    affine[list(order), range(3)] = np.array(signs) * spacing
    for axis, angle in enumerate(angles):
        turn = np.eye(4)
        one, other = [i for i in range(3) if i != axis]
        turn[[one, other], [one, other]] = np.cos(angle)
        turn[one, other], turn[other, one] = -np.sin(angle), np.sin(angle)
        affine = turn @ affine
    affine[:3, 3] = (-91.5, 126.25, 1170.125)
    return affine


def read_with_nibabel(path):
    image = nibabel.load(path)
    return np.asanyarray(image.dataobj), image.affine


def read_with_simpleitk(path):
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, LPS @ affine


READERS = {".nii.gz": [read_with_nibabel, read_with_simpleitk], ".nrrd": [read_with_simpleitk]}


@pytest.mark.parametrize("orientation", range(48))
@pytest.mark.parametrize("suffix", READERS)
def test_a_label_map_comes_back_where_it_was(tmp_path, orientation, suffix):
    image, path = tmp_path / f"image{suffix}", tmp_path / f"labels{suffix}"
    for angles, spacing in product(ANGLES, SPACINGS):
        affine = affine_of(ORIENTATIONS[orientation], angles, spacing)
        write_volume(image, Volume(LABELS[None], Grid(SHAPE, affine)))
        grid, _ = read_grid(image)
        write_label_map(path, LabelMap(LABELS, grid), like=image)
        found = read_label_map(path)
        np.testing.assert_array_equal(found.array, LABELS)
        np.testing.assert_allclose(found.grid.affine, grid.affine, rtol=0, atol=1e-6)


@pytest.mark.parametrize("orientation", range(48))
@pytest.mark.parametrize("suffix", READERS)
def test_other_readers_find_the_same_voxels_at_the_same_place(tmp_path, orientation, suffix):
    affine = affine_of(ORIENTATIONS[orientation], ANGLES[orientation % 5], SPACINGS[orientation % 3])
    path = tmp_path / f"labels{suffix}"
    write_label_map(path, LabelMap(LABELS, Grid(SHAPE, affine)))
    voxels = np.argwhere(LABELS == 2)
    centroid = affine[:3, :3] @ voxels.mean(axis=0) + affine[:3, 3]
    for read in READERS[suffix]:
        array, found = read(path)
        np.testing.assert_array_equal(array, LABELS)
        np.testing.assert_allclose(
            found[:3, :3] @ np.argwhere(array == 2).mean(axis=0) + found[:3, 3], centroid, atol=1e-3
        )
