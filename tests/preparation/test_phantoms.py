"""Laws of the phantoms: reproducible, varied grids, every structure in every case, plausible Hounsfield units."""

import numpy as np
import pytest

from voxdino.preparation.phantoms import LABELS, LESION, LIVER, ORIENTATIONS, draw_phantom, draw_phantoms


@pytest.fixture(scope="module")
def phantoms():
    return [draw_phantom(np.random.default_rng([5, i]), orientation) for i, orientation in enumerate(ORIENTATIONS[:3])]


def test_every_phantom_holds_every_structure(phantoms):
    for _, label in phantoms:
        assert set(np.unique(label.array)) == set(LABELS.values())


def test_grids_are_oblique_anisotropic_and_run_in_different_directions(phantoms):
    assert len({image.grid.orientation for image, _ in phantoms}) == 3
    for image, label in phantoms:
        cosines = np.abs(image.grid.affine[:3, :3] / image.grid.spacing)
        assert cosines.max(axis=0).min() < 1 - 1e-4
        assert max(image.grid.spacing) / min(image.grid.spacing) > 1.1
        assert image.grid.same_as(label.grid)


def test_tissues_have_their_hounsfield_units(phantoms):
    for image, label in phantoms:
        liver, lesion = (image.array[0][label.array == which] for which in (LIVER, LESION))
        assert 90 < np.median(liver) < 130
        assert np.median(lesion) < np.median(liver) - 25
        assert image.array.min() < -950
        assert image.array.max() > 250
        air = image.array[0][(image.array[0] < -900) & (label.array == 0)]
        assert 5 < air.std() < 40  # noise


def test_lesions_lie_in_the_liver(phantoms):
    for _, label in phantoms:
        lesion = np.argwhere(label.array == LESION)
        low, high = np.argwhere(label.array == LIVER).min(axis=0), np.argwhere(label.array == LIVER).max(axis=0)
        assert ((lesion >= low) & (lesion <= high)).all()


def test_the_same_seed_writes_the_same_files(tmp_path):
    for name in ("a", "b"):
        draw_phantoms(tmp_path / name, num_cases=1, seed=3)
    for path in ("dataset.json", "imagesTr/phantom_000_0000.nii.gz", "labelsTr/phantom_000.nii.gz"):
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
