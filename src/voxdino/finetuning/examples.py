"""Where the loop's batches come from: images through the whole model, or a frozen backbone's cached features."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from voxdino.core.locks import lock_folder
from voxdino.core.records import Record
from voxdino.core.safe_files import digest_json, format_bytes, require_free_space
from voxdino.data.augment import sample_seed
from voxdino.data.features import FORMAT, FeatureBatch, FeatureCache
from voxdino.data.loader import Batch, ReadAhead, assemble
from voxdino.data.sampling import CaseExtent, Draw, PoolSampler, Sampler, Slice, choose_slices, records_of_lesions
from voxdino.data.slabs import (
    CachedCase,
    Place,
    SlabSampler,
    SlabViews,
    augment_slabs,
    slab_places,
    slices_of_lesions,
    whole_cases,
)
from voxdino.data.store import IGNORED, CaseStore
from voxdino.finetuning.config import FinetuneConfig
from voxdino.inference.tiles import slab_starts
from voxdino.models.features import Features
from voxdino.models.precision import autocast, uses_bf16
from voxdino.models.segmenter import Segmenter
from voxdino.preparation.plan import Plan
from voxdino.training.checkpoint import read_state
from voxdino.training.stopping import StopRequest
from voxdino.training.tracking import Event, Listener

Views = Callable[[str, int, int], Draw]

EDGE_SLICES = 2  # next to foreground, always cached


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What both roads need."""

    store: CaseStore
    plan: Plan
    config: FinetuneConfig
    segmenter: Segmenter
    device: torch.device
    train_ids: Sequence[str]
    val_ids: Sequence[str]
    batch_size: int

    @property
    def amp(self) -> bool:
        return uses_bf16(self.device, self.config.amp)

    @property
    def in_slabs(self) -> bool:
        """Samples are slabs of several slices."""
        return self.plan.slab > 1

    def sampler(self, ids: Sequence[str]) -> Sampler:
        extents = [self.store.extent(case_id) for case_id in ids]
        return Sampler(extents, self.plan.crop, self.plan.slab, self.config.quotas, self.config.seed)

    def views(self, ids: Sequence[str]) -> Views:
        """(case id, slice, view) -> the crop that is cached."""
        if not self.in_slabs:
            return self.sampler(ids).view
        extents = [self.store.extent(case_id) for case_id in ids]
        return SlabViews(extents, self.plan.crop, self.config.quotas, self.config.seed).draw

    def tiles_of(self, case_id: str) -> int:
        """Crops side by side that cover a slice of the case."""
        pairs = zip(self.store.shape(case_id)[1:], self.plan.crop, strict=True)
        return math.prod(math.ceil(size / crop) for size, crop in pairs)

    def validation_slices(self) -> list[Slice]:
        """Evenly spread over all slices of all held-back cases; for slabs, all slices of evenly spread cases."""
        if self.in_slabs:
            depths = {case_id: self.store.shape(case_id)[0] for case_id in sorted(self.val_ids)}
            most = max(1, self.config.validation_slices * len(depths) // max(1, sum(depths.values())))
            ids = [list(depths)[place] for place in _evenly(len(depths), most)]
            return [(case_id, depth) for case_id in ids for depth in range(depths[case_id])]
        every = [(case_id, depth) for case_id in sorted(self.val_ids) for depth in range(self.store.shape(case_id)[0])]
        return [every[place] for place in _evenly(len(every), self.config.validation_slices)]


def _evenly(length: int, most: int) -> list[int]:
    """At most `most` of the places 0 .. length - 1, evenly spread."""
    return [int(place) for place in np.linspace(0, length - 1, min(most, length)).round()]


class ImageExamples:
    """Crops drawn and augmented anew for every step, through backbone and decoder."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.num_samples = math.ceil(
            sum(setting.store.shape(case_id)[0] for case_id in setting.train_ids) / setting.plan.slab
        )
        self._sampler = setting.sampler(setting.train_ids)
        self._augmentation = setting.config.augment.for_dimensions(setting.plan.ndim)

    def batches(self, first: int, steps_per_epoch: int) -> AbstractContextManager[Iterator[Batch]]:
        """The batches from step `first` on."""
        size, setting = self.setting.batch_size, self.setting

        def fetch(step: int) -> Batch:
            epoch, place = divmod(step, steps_per_epoch)
            draws = [self._sampler.draw(epoch + 1, place * size + index) for index in range(size)]
            return assemble(setting.store, draws, context=setting.plan.context_slices, seed=setting.config.seed)

        return _Prepared(
            ReadAhead(fetch, first=first, num_threads=setting.config.num_workers),
            lambda batch: batch.to(setting.device).augmented(self._augmentation),
        )

    def predict(self, batch: Batch) -> Tensor:
        """(B, K, D, H, W) logits."""
        return self.setting.segmenter(batch.image).logits  # type: ignore[no-any-return]

    def validation_batches(self) -> Iterator[Batch]:
        setting, size = self.setting, self.setting.batch_size
        views, slab = setting.views(setting.val_ids), setting.plan.slab
        draws = []
        if setting.in_slabs:
            for case_id in dict.fromkeys(case_id for case_id, _ in setting.validation_slices()):
                for first in slab_starts(setting.store.shape(case_id)[0], slab, overlap=0.0):
                    one = views(case_id, 0, 0)
                    draws.append(replace(one, box=((first, first + slab), *one.box[1:])))
        else:
            draws = [views(case_id, depth, 0) for case_id, depth in setting.validation_slices()]
        for start in range(0, len(draws), size):
            batch = assemble(
                setting.store,
                draws[start : start + size],
                context=setting.plan.context_slices,
                seed=setting.config.seed,
            )
            yield batch.to(setting.device)


class Pool(Record):
    """features.json: the cache folder a run trains on, and its records per view."""

    folder: str
    records: tuple[int, ...]


class CachedExamples:
    """Random batches from a pool of cached features: slices of any view, or slabs of consecutive slices."""

    def __init__(
        self,
        setting: Setting,
        *,
        weights_digest: str,
        features_folder: Path,
        run_folder: Path,
        stop: StopRequest,
        listen: Listener,
        seconds_left: Callable[[], float],
    ) -> None:
        self.setting = setting
        self._weights_digest, self._folder = weights_digest, features_folder
        self._stop, self._listen, self._seconds_left = stop, listen, seconds_left
        self._sample: Features | None = None
        self._augmentation = setting.config.augment.for_dimensions(setting.plan.ndim)
        self._before = self._augmentation  # of views, before the backbone
        if setting.in_slabs:  # slabs are moved when they are drawn
            still = {"spatial": 0.0, "flips": "none", "tilt_degrees": 0.0}
            self._before = self._augmentation.model_copy(update=still)
        config = setting.config
        extents = [setting.store.extent(case_id) for case_id in setting.train_ids]
        if setting.in_slabs:
            slices = whole_cases(extents, config.seed)
        else:
            slices = choose_slices(
                extents, background_share=config.background_share, margin=EDGE_SLICES, seed=config.seed
            )
        self._validation, done = self._cache(setting.validation_slices(), setting.val_ids, [None])
        self._num_validation = sum(done)
        memory = run_folder / "features.json"
        fix = "delete it: the features are then counted anew."
        known = read_state(Pool, memory, fix=fix).records if memory.exists() else None
        self._training, done = self._cache(slices, setting.train_ids, known)
        if stop:
            return  # the caller sees the same request, and ends
        Pool(folder=self._training.folder.name, records=tuple(done)).write(memory)
        foreground = {(extent.case_id, depth) for extent in extents for depth in extent.foreground_slices}
        by_lesion = setting.views(setting.train_ids) if config.quotas.by == "lesion" else None
        if setting.in_slabs:
            cases = [one for view, count in enumerate(done) for one in cached_cases(slices[:count], view, foreground)]
            if by_lesion:
                by_id = {extent.case_id: extent for extent in extents}
                cases = [_with_lesions(one, by_id[slices[one.start][0]], by_lesion) for one in cases]
            self.num_samples = math.ceil(sum(done) / setting.plan.slab)
            self._draw = SlabSampler(cases, setting.plan.slab, config.quotas, config.seed).draw
        else:
            places = [(view, index) for view, count in enumerate(done) for index in range(count)]
            self.num_samples = len(places)
            held = [slices[index] in foreground for _, index in places]
            draws = [by_lesion(*slices[index], view) for view, index in places] if by_lesion else []
            pool = PoolSampler(held, config.quotas, config.seed, records_of_lesions(extents, draws))
            self._draw = lambda number: ([places[pool.draw(number)]], [True])

    def batches(self, first: int, steps_per_epoch: int) -> AbstractContextManager[Iterator[FeatureBatch]]:
        """The batches from step `first` on."""
        setting, size = self.setting, self.setting.batch_size

        def fetch(step: int) -> tuple[int, FeatureBatch]:
            return step, self._slabs(self._training, [self._draw(step * size + index) for index in range(size)])

        def prepare(fetched: tuple[int, FeatureBatch]) -> FeatureBatch:
            step, batch = fetched
            batch = batch.to(setting.device)
            if not setting.in_slabs:  # augmented before the backbone saw it
                return batch
            numbers = range(step * size, (step + 1) * size)
            seeds = [sample_seed(setting.config.seed, 1, number, "", 0) for number in numbers]
            return augment_slabs(batch, seeds=seeds, spacing=setting.plan.voxel_size, config=self._augmentation)

        return _Prepared(ReadAhead(fetch, first=first, num_threads=setting.config.num_workers), prepare)

    def predict(self, batch: FeatureBatch) -> Tensor:
        """(B, K, D, H, W) logits."""
        depth, rows, columns = batch.label.shape[1:]
        return self.setting.segmenter.decode(batch.features, (depth, rows, columns), batch.image)

    def validation_batches(self) -> Iterator[FeatureBatch]:
        setting, size = self.setting, self.setting.batch_size
        if setting.in_slabs:
            slices = self._validation.slices[: self._num_validation]
            draws = [
                slab_places(case, first, setting.plan.slab)
                for case in cached_cases(slices, 0, set())
                for first in slab_starts(case.num_slices, setting.plan.slab, overlap=0.0)
            ]
        else:
            draws = [([(0, index)], [True]) for index in range(self._num_validation)]
        for start in range(0, len(draws), size):
            yield self._slabs(self._validation, draws[start : start + size]).to(setting.device)

    def _slabs(self, cache: FeatureCache, draws: Sequence[tuple[list[Place], list[bool]]]) -> FeatureBatch:
        """The drawn slabs as one batch; voxels beyond the volume count for nothing."""
        dtype = torch.bfloat16 if self.setting.amp else torch.float32
        places = [place for slab, _ in draws for place in slab]
        batch = cache.batch(places, dtype, num_slices=len(draws[0][0]))
        outside = ~torch.tensor([inside for _, inside in draws])  # (B, D)
        return replace(batch, label=batch.label.masked_fill(outside[:, :, None, None], IGNORED))

    def _cache(
        self, slices: Sequence[Slice], ids: Sequence[str], wanted: Sequence[int | None] | None
    ) -> tuple[FeatureCache, list[int]]:
        """The cache of these slices and its records per view. wanted: records per view of an earlier part of this run;
        None within it: all of that view; None for it: as many views as disk and time allow.
        """
        setting, config, plan = self.setting, self.setting.config, self.setting.plan
        views, augmentation = setting.views(ids), self._before
        sample = self._first_features(views, slices[0])
        cache = FeatureCache(
            self._folder / self._key(slices, ids, sample)[:16],
            slices,
            grid=(sample.maps[0].shape[2], sample.maps[0].shape[3]),
            embed_dims=tuple(one.shape[1] for one in sample.maps),
            cls_dim=sample.cls_token.shape[1],
            patch_size=plan.patch_size,
            crop=plan.crop,
            num_channels=len(plan.channels) if setting.segmenter.reads_image else 0,
        )
        limits = self._limits(cache, len(slices)) if wanted is None else [n or len(slices) for n in wanted]
        done: list[int] = []
        cache.folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(cache.folder):
            missing = sum(limit - min(limit, cache.num_done(view)) for view, limit in enumerate(limits))
            require_free_space(cache.folder, missing * cache.record_bytes)
            for view, limit in enumerate(limits):
                if self._stop:
                    break

                def go_on(count: int, view: int = view, limit: int = limit) -> bool:
                    self._listen(
                        Event("encode", f"features, view {view + 1} of {len(limits)}", sum(done) + count, sum(limits))
                    )
                    in_time = wanted is not None or self._seconds_left() > 0 or (view == 0 and count < 64)
                    return not self._stop and count < limit and in_time

                count = cache.encode(
                    view,
                    store=setting.store,
                    draw=views,
                    seed=config.seed,
                    context=plan.context_slices,
                    augmentation=augmentation,
                    encode=self._encode,
                    device=setting.device,
                    num_threads=config.num_workers,
                    go_on=go_on,
                )
                done.append(min(count, limit))
        return cache, [count for count in done if count]

    def _limits(self, cache: FeatureCache, num_slices: int) -> list[int]:
        """Records of each view that the disk budget allows."""
        config = self.setting.config
        total = max(int(config.cache_gib * 2**30) // cache.record_bytes, self.setting.batch_size)
        views = config.cached_views
        if self.setting.in_slabs:  # moved when they are drawn; a view is another place in slices larger than the crop
            tiles = [self.setting.tiles_of(case_id) for case_id in self.setting.train_ids]
            views = max(1, math.ceil(1.5 * (max(tiles) - 1)))
        limits = [min(num_slices, max(0, total - view * num_slices)) for view in range(views)]
        limits = [limit for limit in limits if limit]
        size = format_bytes(sum(limits) * cache.record_bytes)
        self._listen(Event("note", f"caching features: {num_slices} slices, {len(limits)} views, {size} at most"))
        return limits

    def _encode(self, image: Tensor) -> Features:
        with autocast(self.setting.device, self.setting.amp):
            return self.setting.segmenter.encode(image)

    def _first_features(self, views: Views, one: Slice) -> Features:
        """Features of one slice: they tell how large a record is."""
        if self._sample is None:
            batch = assemble(self.setting.store, [views(*one, 0)], context=self.setting.plan.context_slices, seed=0)
            with torch.inference_mode():
                self._sample = self._encode(batch.image.to(self.setting.device))
        return self._sample

    def _key(self, slices: Sequence[Slice], ids: Sequence[str], sample: Features) -> str:
        """Digest of all that shapes the cached numbers. ids: of the sampler; a view depends on a case's place there."""
        setting, config, plan = self.setting, self.setting.config, self.setting.plan
        cases = sorted({case_id for case_id, _ in slices})
        return digest_json(
            {
                "format": FORMAT,
                "weights": self._weights_digest,
                "cases prepared": plan.preparation_digest(),
                "seen": [plan.magnification, plan.crop, plan.input_builder, setting.in_slabs],
                "taps": setting.segmenter.taps,
                "maps": [tuple(one.shape[1:]) for one in sample.maps],
                "tap_norm": config.tap_norm,
                "blank": config.blank_features,
                "image": setting.segmenter.reads_image,
                "bf16": setting.amp,
                "device": setting.device.type,
                "seed": config.seed,
                "ids": sorted(ids),
                "quotas": config.quotas.to_json(),
                "augment": self._before.to_json(),
                "cases": {case_id: setting.store.record(case_id).digest() for case_id in cases},
                "slices": [list(one) for one in slices],
            }
        )


def cached_cases(slices: Sequence[Slice], view: int, foreground: set[Slice]) -> list[CachedCase]:
    """The cases whose slices are all there, of slices in the order of `whole_cases`; the last may be cut short."""
    cases = []
    start = 0
    for case_id, group in groupby(slices, key=lambda one: one[0]):
        held = list(group)
        inside = tuple(depth for _, depth in held if (case_id, depth) in foreground)
        cases.append(CachedCase(view, start, len(held), inside))
        start += len(held)
    return cases


def _with_lesions(case: CachedCase, extent: CaseExtent, views: Views) -> CachedCase:
    """With the slices of its lesions that are in the cache and in the view's crop."""
    every = slices_of_lesions(extent, views(extent.case_id, 0, case.view))
    held = (tuple(depth for depth in lesion if depth < case.num_slices) for lesion in every)
    return replace(case, lesions=tuple(lesion for lesion in held if lesion))


class _Prepared:
    """A ReadAhead whose items pass through `prepare` in the consumer's thread (device copies, augmentation)."""

    def __init__(self, source: ReadAhead[Any], prepare: Callable[[Any], Any]) -> None:
        self._source, self._prepare = source, prepare

    def __enter__(self) -> Iterator[Any]:
        return map(self._prepare, self._source)

    def __exit__(self, *_: object) -> None:
        self._source.close()
