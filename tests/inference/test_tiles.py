"""Laws of tiling: tiles cover, overlap as asked, and blend without a trace."""

import itertools

import numpy as np
import pytest
import torch

from voxdino.inference.tiles import blend, gaussian_weight, tile_boxes

CASES = [((40, 33), (16, 16)), ((9, 20, 17), (4, 8, 8)), ((16, 16), (16, 16)), ((17, 5), (16, 5))]


@pytest.mark.parametrize("shape, tile", CASES)
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_blending_untouched_tiles_gives_the_volume_back(shape, tile, overlap):
    volume = torch.rand(3, *shape)
    weight = torch.rand(tile) + 1e-3
    tiles = ((box, volume[(slice(None), *box)]) for box in tile_boxes(shape, tile, overlap))
    torch.testing.assert_close(blend(tiles, weight, torch.zeros_like(volume)), volume)


@pytest.mark.parametrize("shape, tile", CASES)
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_boxes_have_the_tile_size_cover_all_and_overlap_as_asked(shape, tile, overlap):
    boxes = tile_boxes(shape, tile, overlap)
    covered = np.zeros(shape, int)
    for box in boxes:
        assert [s.stop - s.start for s in box] == list(tile)
        covered[box] += 1
    assert covered.min() >= 1
    for axis, length in enumerate(tile):
        starts = sorted({box[axis].start for box in boxes})
        assert starts[0] == 0
        assert starts[-1] + length == shape[axis]
        assert all(b - a <= max(1, int(length * (1 - overlap))) for a, b in itertools.pairwise(starts))


def test_half_precision_tiles_are_added_in_float32():
    tiles = [((slice(0, 4),), torch.full((1, 4), 1000.3, dtype=torch.bfloat16))] * 300
    result = blend(tiles, torch.ones(4), torch.zeros(1, 4))
    torch.testing.assert_close(result, torch.full((1, 4), float(torch.tensor(1000.3, dtype=torch.bfloat16))))


def test_gaussian_weight_is_symmetric_largest_in_the_middle_and_nowhere_zero():
    weight = torch.from_numpy(gaussian_weight((9, 6)))
    torch.testing.assert_close(weight, weight.flip(0).flip(1))
    assert weight.argmax() in (4 * 6 + 2, 4 * 6 + 3)
    assert weight.max() == 1
    assert weight.min() >= 1e-3
    assert gaussian_weight((8,))[0] < 0.01


def test_constant_logits_stay_constant_under_gaussian_blending():
    boxes = tile_boxes((21, 30), (8, 8), 0.5)
    result = blend(
        ((b, torch.full((2, 8, 8), -3.5)) for b in boxes),
        torch.from_numpy(gaussian_weight((8, 8))),
        torch.zeros(2, 21, 30),
    )
    torch.testing.assert_close(result, torch.full((2, 21, 30), -3.5))
