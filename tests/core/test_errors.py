"""Errors say where, what and the fix in one line, carry the exit code of their kind, and travel between processes."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from voxdino.core import errors
from voxdino.core.errors import GeometryError, ImageError, InputError, StoppedError, VoxdinoError, without_folders
from voxdino.core.geometry import Grid, format_shape, format_spacing
from voxdino.core.volume import LabelMap, Volume

KINDS = sorted(
    (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VoxdinoError)),
    key=lambda kind: kind.__name__,
)
EXIT_CODES = {"UsageError": 2, "ResourceError": 4, "SafetyError": 5, "PartialError": 6, "DivergedError": 7,
              "StoppedError": 130, "VoxdinoError": 1}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_exit_code_and_survives_pickling(kind):
    error = kind("a fact.", where=Path("a/b.nii"), fix="do this.")
    assert str(error) == "a/b.nii: a fact. Fix: do this."
    assert error.exit_code == EXIT_CODES.get(kind.__name__, 3)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (str(copy), copy.exit_code) == (str(error), error.exit_code)


def test_a_stop_keeps_its_signal_between_processes():
    assert pickle.loads(pickle.dumps(StoppedError("stopped.", signal_number=15))).exit_code == 143


def test_parts_that_are_not_known_are_left_out():
    assert str(InputError("a fact.")) == "a fact."
    assert str(InputError("a fact.", fix="do this.")) == "a fact. Fix: do this."


def test_user_mistakes_are_value_errors():
    assert issubclass(GeometryError, ValueError)


def test_sizes_and_spacings_are_printed_for_people():
    assert format_shape((512, 512, 90)) == "512 x 512 x 90"
    assert format_spacing((0.8, 0.79999, 5.0)) == "0.8 x 0.8 x 5 mm"


def test_arrays_must_fit_their_grid():
    grid = Grid.from_spacing((3, 4, 5))
    assert Volume(np.zeros((2, 3, 4, 5)), grid).num_channels == 2
    with pytest.raises(GeometryError, match=r"a\.nii: an array of 4 x 3 x 5 voxels does not fit a grid of 3 x 4 x 5"):
        Volume(np.zeros((1, 4, 3, 5)), grid, source=Path("a.nii"))
    with pytest.raises(GeometryError, match="label map of 3 x 4 voxels"):
        LabelMap(np.zeros((3, 4), np.uint8), grid)


@pytest.mark.parametrize(("shape", "words"), [((3,), "not 1"), ((3, 4, 5, 6), "not 4"), ((3, 0, 5), "holds nothing")])
def test_grids_without_voxels_or_with_other_axes_are_refused(shape, words):
    with pytest.raises(GeometryError, match=words):
        Grid(shape, np.eye(len(shape) + 1))


def test_a_message_for_a_record_names_no_folder(tmp_path):
    error = ImageError(
        f"differs from {tmp_path}/refs/a.png", where=tmp_path / "in" / "a.png", fix=f"see {tmp_path}/in."
    )
    told = without_folders(error, {tmp_path / "in": "", tmp_path / "refs": "reference "})
    assert told == "a.png: differs from reference a.png Fix: see in."
    assert without_folders(ImageError("plain/a.png"), {Path("in"): ""}) == "plain/a.png"
