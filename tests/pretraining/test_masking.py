"""Masks: exact counts, evenly spread, in blocks, the same for the same generator."""

import numpy as np
import pytest
import torch

from voxdino.pretraining.masking import draw_blocks, draw_masks

GRIDS = [(14, 14), (5, 9), (3, 4), (1, 7), (2, 2)]


def draw(num_images=24, grid=(14, 14), seed=0, **settings):
    return draw_masks(num_images, grid, rng=np.random.default_rng(seed), **settings)


@pytest.mark.parametrize("grid", GRIDS)
def test_ratios_are_spread_evenly_over_half_of_the_images(grid):
    masks = draw(grid=grid)
    num_patches = grid[0] * grid[1]
    assert masks.shape == (24, num_patches) and masks.dtype == torch.bool
    counts = sorted(masks.sum(dim=1).tolist())
    assert counts[:12] == [0] * 12 or num_patches < 5  # few patches: a tenth of them may round to none
    edges = np.linspace(0.1, 0.5, 13)
    for count, low, high in zip(counts[12:], edges[:-1], edges[1:], strict=True):
        assert np.floor(low * num_patches) <= count <= np.ceil(high * num_patches)


@pytest.mark.parametrize("share, expected", [(0.0, 0), (0.5, 3), (0.7, 4), (1.0, 5)])
def test_the_share_of_masked_images_is_rounded_up(share, expected):
    assert draw(num_images=5, share_masked=share).any(dim=1).sum() == expected


def test_a_ratio_that_is_one_number_is_met_exactly():
    assert draw(share_masked=1.0, ratios=(0.4, 0.4)).sum(dim=1).tolist() == [78] * 24  # 0.4 * 196 = 78.4
    assert draw(share_masked=1.0, ratios=(1.0, 1.0)).all()
    assert not draw(share_masked=1.0, ratios=(0.0, 0.0)).any()


def test_images_without_a_mask_are_shuffled_in():
    masked = np.array([draw(num_images=8, seed=seed).any(dim=1).numpy() for seed in range(60)])
    assert ((masked.mean(axis=0) > 0.25) & (masked.mean(axis=0) < 0.75)).all()
    counts = np.array([draw(num_images=8, share_masked=1.0, seed=seed).sum(dim=1).numpy() for seed in range(60)])
    assert np.ptp(counts.mean(axis=0)) < 30  # nor do the large masks lie at the end


def test_masks_come_in_blocks():
    """Masked patches touch masked ones much more often than patches masked one by one would."""
    masks = draw(num_images=40, share_masked=1.0, ratios=(0.3, 0.3)).view(40, 14, 14)
    touching = (masks[:, :, 1:] & masks[:, :, :-1]).float().mean() + (masks[:, 1:] & masks[:, :-1]).float().mean()
    assert touching > 2 * 0.2  # 2 * 0.3 ** 2 = 0.18 if they were independent


@pytest.mark.parametrize("grid", [(14, 14), (5, 9), (20, 6)])
def test_a_single_block_is_a_rectangle_of_allowed_size_and_aspect(grid):
    for count in (4, 5, 9, 25):
        for mask in draw_blocks(np.full(80, count), grid, np.random.default_rng(count)):
            rows, columns = mask.nonzero()
            if not len(rows):
                continue
            assert len(rows) <= count
            whole = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            if whole == len(rows):  # one block, or several that make one
                assert (len(rows) >= 4 and 0.3 <= (np.ptp(rows) + 1) / (np.ptp(columns) + 1) <= 3.3) or count > 7
    alone = draw_blocks(np.full(80, 4), grid, np.random.default_rng(0))
    found = alone[alone.any(axis=(1, 2))]
    assert len(found) > 40 and (found.sum(axis=(1, 2)) == 4).all()
    for mask in found:
        rows, columns = mask.nonzero()
        assert np.ptp(rows) == np.ptp(columns) == 1  # 2 x 2 is the one block of four that is not too long


def test_blocks_reach_every_patch():
    assert draw(num_images=400, grid=(5, 9)).any(dim=0).all()


def test_the_same_generator_gives_the_same_masks():
    assert torch.equal(draw(seed=3), draw(seed=3))
    assert not torch.equal(draw(seed=3), draw(seed=4))


def test_no_images_have_no_masks():
    assert draw(num_images=0).shape == (0, 196)
