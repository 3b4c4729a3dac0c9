"""Laws of scores that shards leave: they stand for all files of an image, as they were before they were read."""

import numpy as np
import pytest

from voxdino.core.geometry import Grid
from voxdino.core.io import write_label_map
from voxdino.core.labels import LabelSet
from voxdino.core.volume import LabelMap
from voxdino.evaluation import evaluate as evaluating
from voxdino.evaluation.evaluate import evaluate
from voxdino.preparation.made_record import source_digest

LABELS = LabelSet(names=("background", "liver"), ids=(0, 1))
MASK = np.zeros((6, 5, 4), np.uint8)
MASK[1:4, 1:4, 1:3] = 1


def write_mask(path, array=MASK):
    write_label_map(path, LabelMap(array, Grid.from_spacing(array.shape, (1.0, 2.0, 3.0))))


@pytest.fixture
def pairs(tmp_path):
    found = []
    for case in ("a", "b"):
        files = [tmp_path / side / f"{case}.nii.gz" for side in ("predictions", "references")]
        for file in files:
            write_mask(file)
        found.append((case, *files))
    return found


@pytest.fixture
def scored(monkeypatch):
    """The cases that were scored, in turn."""
    done, score = [], evaluating._score_files
    monkeypatch.setattr(evaluating, "_score_files", lambda *given: done.append(given[0]) or score(*given))
    return done


def test_scores_are_not_taken_where_voxels_beside_their_header_changed(pairs, tmp_path, scored):
    packed = pairs[0][2].with_suffix("").with_suffix(".nrrd")
    write_mask(packed)
    header, voxels = packed.with_suffix(".nhdr"), packed.with_suffix(".raw")
    lines = packed.read_bytes().partition(b"\n\n")[0].replace(b"encoding: gzip", b"encoding: raw")
    header.write_bytes(lines + b"\ndata file: a.raw\n")
    voxels.write_bytes(MASK.tobytes(order="F"))
    pairs[0] = (*pairs[0][:2], header)
    part = tmp_path / "scores.1of1.json"
    assert evaluate(pairs, LABELS, keep=part).mean() == 1.0
    assert evaluate(pairs, LABELS, kept=[part]).mean() == 1.0 and scored == ["a", "b"]
    before = source_digest(header)
    voxels.write_bytes(np.roll(MASK, 1, axis=0).tobytes(order="F"))
    assert source_digest(header) != before  # nor are cases kept that were prepared from them
    assert evaluate(pairs, LABELS, kept=[part]) == evaluate(pairs, LABELS) and scored[2:] == ["a", "a", "b"]


def test_a_file_that_changes_while_it_is_scored_is_scored_again(pairs, tmp_path):
    part = tmp_path / "scores.1of1.json"

    def change(done, _):
        write_mask(pairs[0][1], np.roll(MASK, 1, axis=0))

    evaluate(pairs, LABELS, keep=part, num_workers=1, on_progress=change)
    assert evaluate(pairs, LABELS, kept=[part]) == evaluate(pairs, LABELS)


def test_a_file_that_is_gone_costs_a_shard_only_this_case(pairs, tmp_path, scored):
    part = tmp_path / "scores.1of1.json"
    pairs[0][1].unlink()
    assert [one.case for one in evaluate(pairs, LABELS, keep=part).failed] == ["a"]
    write_mask(pairs[0][1])
    assert not evaluate(pairs, LABELS, kept=[part]).failed and scored == ["a", "b", "a"]
