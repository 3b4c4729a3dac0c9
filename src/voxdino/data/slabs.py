"""Slabs of cached slices for what works in 3-D: how they are cut, drawn, and changed after the backbone.

A frozen backbone has seen each slice once. Turning, shifting and scaling its feature maps together with image and label
is nearly what turning the slice before would have given, and costs next to nothing; so every draw differs although the
features were computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from voxdino.data.augment import AugmentConfig, change_intensity, draw_affine, stays_in_plane, warp
from voxdino.data.features import FeatureBatch
from voxdino.data.sampling import CaseExtent, Draw, Quotas, Range, Slice, place_view
from voxdino.data.store import IGNORED
from voxdino.models.features import Features, slices_to_volume

Place = tuple[int, int]  # view, index of the record


def whole_cases(extents: Sequence[CaseExtent], seed: int) -> list[Slice]:
    """All slices of all cases, in order; the cases are shuffled, so that any part from the start is a fair sample."""
    ids = sorted(extent.case_id for extent in extents)
    depths = {extent.case_id: extent.shape[0] for extent in extents}
    order = np.random.default_rng([seed, 6]).permutation(len(ids))
    return [(ids[place], depth) for place in order for depth in range(depths[ids[place]])]


class SlabViews:
    """The crops of whole cases: one place in plane for all slices of a case, another in every view."""

    def __init__(self, extents: Sequence[CaseExtent], crop: tuple[int, int], quotas: Quotas, seed: int) -> None:
        self._cases = {extent.case_id: extent for extent in extents}
        self._ids = sorted(self._cases)
        self._crop, self._quotas, self._seed = crop, quotas, seed
        self._place = lru_cache(maxsize=4096)(self._place_in_plane)

    def draw(self, case_id: str, depth: int, view: int) -> Draw:
        """View 0 is the middle of slices that fit the crop. Of larger ones, a quota of views is around foreground."""
        rows, columns = self._place(case_id, view)
        return Draw(case_id, view, 0, ((depth, depth + 1), rows, columns))

    def _place_in_plane(self, case_id: str, view: int) -> tuple[Range, Range]:
        rng = np.random.default_rng([self._seed, 7, view, self._ids.index(case_id)])
        case = self._cases[case_id]
        voxels = case.candidates(self._quotas, rng)
        return place_view(case.shape, voxels, self._crop, self._quotas.foreground, rng, plain=True)


@dataclass(frozen=True)
class CachedCase:
    """A case in the cache. start: index of its first record in `view`; foreground: its slices with any, ascending.

    lesions: where samples are drawn by lesion, the slices of each (`slices_of_lesions`).
    """

    view: int
    start: int
    num_slices: int
    foreground: tuple[int, ...]
    lesions: tuple[tuple[int, ...], ...] = ()


class SlabSampler:
    """Draws slabs of consecutive records; sample n depends on nothing but (seed, n).

    Cases take turns in a new random order each round. The foreground quota holds a slice with foreground; by lesion,
    one of a lesion drawn evenly over those of the case.
    """

    def __init__(self, cases: Sequence[CachedCase], slab: int, quotas: Quotas, seed: int) -> None:
        assert cases, "no case to draw from"
        self._cases, self._slab, self._quotas, self._seed = list(cases), slab, quotas, seed
        self._order = lru_cache(maxsize=8)(self._shuffled)

    def draw(self, number: int) -> tuple[list[Place], list[bool]]:
        """The records of a slab, and which of them lie in the volume: beyond its ends the last slice is repeated."""
        turn, place = divmod(number, len(self._cases))
        case = self._cases[self._order(turn)[place]]
        rng = np.random.default_rng([self._seed, 8, number])
        if rng.random() < self._quotas.foreground and case.foreground:
            wanted = case.lesions[int(rng.integers(len(case.lesions)))] if case.lesions else case.foreground
            around = int(rng.choice(wanted)) - int(rng.integers(self._slab))
        else:
            around = int(rng.integers(case.num_slices)) - self._slab // 2
        low, high = sorted((0, case.num_slices - self._slab))
        return slab_places(case, min(max(around, low), high), self._slab)

    def _shuffled(self, turn: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, 9, turn]).permutation(len(self._cases))


def slices_of_lesions(extent: CaseExtent, draw: Draw) -> tuple[tuple[int, ...], ...]:
    """The slices of each lesion of a case whose box meets rows and columns of the draw, ascending."""
    lesions = [lesion for label in sorted(extent.lesions) for lesion in extent.lesions[label]]
    return tuple(
        tuple(range(*lesion.box[0]))
        for lesion in lesions
        if all(
            start < last and stop > first
            for (start, stop), (first, last) in zip(draw.box[1:], lesion.box[1:], strict=True)
        )
    )


def slab_places(case: CachedCase, first: int, slab: int) -> tuple[list[Place], list[bool]]:
    """The records of slices `first` to `first + slab` of a case, as `SlabSampler.draw` gives them."""
    wanted = np.arange(first, first + slab)
    inside = (wanted >= 0) & (wanted < case.num_slices)
    indices = case.start + np.clip(wanted, 0, case.num_slices - 1)
    return [(case.view, int(index)) for index in indices], inside.tolist()


def augment_slabs(
    batch: FeatureBatch, *, seeds: Sequence[int], spacing: tuple[float, float, float], config: AugmentConfig
) -> FeatureBatch:
    """A changed copy: each slab's features, voxels and labels turned, shifted and scaled alike; intensities of the
    voxels changed as well (the features keep what the backbone saw).

    spacing: (slice, row, column) size of a voxel.
    """
    generators = [np.random.default_rng(seed) for seed in seeds]
    shape = batch.label.shape[1:]
    affine = torch.stack([draw_affine(rng, config, shape, torch.tensor(spacing)) for rng in generators])
    affine = affine.to(batch.label.device)
    label, image = batch.label, batch.image
    if image is not None:
        edge = image.amin((2, 3, 4))  # (B, C): nothing, darkness, air
        image, label = warp(image, label, affine, edge, IGNORED)
        image = torch.stack([change_intensity(one, rng, config) for one, rng in zip(image, generators, strict=True)])
    else:
        blank = label.new_zeros(label.shape, dtype=torch.float32).unsqueeze(1)
        label = warp(blank, label, affine, blank.new_zeros(len(label), 1), IGNORED)[1]
    maps = tuple(_turn(one, affine) for one in batch.features.maps)
    features = Features(maps, batch.features.cls_token, batch.features.patch_size)
    return replace(batch, features=features, label=label, image=image)


def _turn(slices: Float[Tensor, "S E h w"], affine: Float[Tensor, "B 3 4"]) -> Float[Tensor, "S E h w"]:
    """Maps of B slabs of S / B slices, every slab by its own affine; linear between tokens, the outermost repeated."""
    num_slices = len(slices) // len(affine)
    if stays_in_plane(affine):
        moves = affine[:, :2, [0, 1, 3]].repeat_interleave(num_slices, dim=0)
        maps = slices.float()
    else:
        moves = affine
        maps = slices_to_volume(slices.float(), num_slices).contiguous()  # (B, E, D, h, w)
    grid = F.affine_grid(moves, [len(moves), 1, *maps.shape[2:]], align_corners=False)
    turned = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    if turned.ndim == 5:
        turned = turned.transpose(1, 2).flatten(0, 1)
    return turned.to(slices.dtype, memory_format=torch.channels_last)
