"""Where the loop's batches come from: images through the whole model, or a frozen backbone's cached features."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from voxdino.core.records import Record
from voxdino.core.safe_files import digest_json, format_bytes, lock_folder, require_free_space
from voxdino.data.features import FORMAT, FeatureBatch, FeatureCache
from voxdino.data.loader import Batch, ReadAhead, assemble
from voxdino.data.sampling import PoolSampler, Sampler, Slice, choose_slices
from voxdino.data.store import CaseStore
from voxdino.finetuning.config import FinetuneConfig
from voxdino.models.features import Features
from voxdino.models.precision import autocast, uses_bf16
from voxdino.models.segmenter import Segmenter
from voxdino.preparation.plan import Plan
from voxdino.training.checkpoint import read_state
from voxdino.training.stopping import StopRequest
from voxdino.training.tracking import Event, Listener

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

    def sampler(self, ids: Sequence[str]) -> Sampler:
        extents = [self.store.extent(case_id) for case_id in ids]
        return Sampler(extents, self.plan.crop, self.plan.slab, self.config.quotas, self.config.seed)

    def validation_slices(self) -> list[Slice]:
        """Evenly spread over all slices of all held-back cases."""
        every = [(case_id, depth) for case_id in sorted(self.val_ids) for depth in range(self.store.shape(case_id)[0])]
        places = np.linspace(0, len(every) - 1, min(self.config.validation_slices, len(every))).round().astype(int)
        return [every[place] for place in places]


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
        slices, sampler = setting.validation_slices(), setting.sampler(setting.val_ids)
        for start in range(0, len(slices), size):
            draws = [sampler.view(case_id, depth, 0) for case_id, depth in slices[start : start + size]]
            batch = assemble(setting.store, draws, context=setting.plan.context_slices, seed=setting.config.seed)
            yield batch.to(setting.device)


class Pool(Record):
    """features.json: the cache folder a run trains on, and its records per view."""

    folder: str
    records: tuple[int, ...]


class CachedExamples:
    """Random batches from a pool of cached features: one (view, slice) each."""

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
        config = setting.config
        extents = [setting.store.extent(case_id) for case_id in setting.train_ids]
        slices = choose_slices(extents, background_share=config.background_share, margin=EDGE_SLICES, seed=config.seed)
        self._validation, done = self._cache(setting.validation_slices(), setting.val_ids, [None])
        self._num_validation = sum(done)
        memory = run_folder / "features.json"
        fix = "delete it: the features are then counted anew."
        known = read_state(Pool, memory, fix=fix).records if memory.exists() else None
        self._training, done = self._cache(slices, setting.train_ids, known)
        if not stop:
            Pool(folder=self._training.folder.name, records=tuple(done)).write(memory)
        self._places = [(view, index) for view, count in enumerate(done) for index in range(count)]
        self.num_samples = len(self._places)
        foreground = {(extent.case_id, depth) for extent in extents for depth in extent.foreground_slices}
        held = [slices[index] in foreground for _, index in self._places]
        self._sampler = PoolSampler(held, config.quotas, config.seed)

    def batches(self, first: int, steps_per_epoch: int) -> AbstractContextManager[Iterator[FeatureBatch]]:
        """The batches from step `first` on."""
        size = self.setting.batch_size
        dtype = torch.bfloat16 if self.setting.amp else torch.float32

        def fetch(step: int) -> FeatureBatch:
            wanted = [self._sampler.draw(step * size + index) for index in range(size)]
            return self._training.batch([self._places[place] for place in wanted], dtype)

        return _Prepared(
            ReadAhead(fetch, first=first, num_threads=self.setting.config.num_workers),
            lambda batch: batch.to(self.setting.device),
        )

    def predict(self, batch: FeatureBatch) -> Tensor:
        """(B, K, H, W) logits."""
        return self.setting.segmenter.decode(batch.features, self.setting.plan.crop)

    def validation_batches(self) -> Iterator[FeatureBatch]:
        dtype = torch.bfloat16 if self.setting.amp else torch.float32
        size = self.setting.batch_size
        for start in range(0, self._num_validation, size):
            places = [(0, index) for index in range(start, min(start + size, self._num_validation))]
            yield self._validation.batch(places, dtype).to(self.setting.device)

    def _cache(
        self, slices: Sequence[Slice], ids: Sequence[str], wanted: Sequence[int | None] | None
    ) -> tuple[FeatureCache, list[int]]:
        """The cache of these slices and its records per view. wanted: records per view of an earlier part of this run;
        None within it: all of that view; None for it: as many views as disk and time allow.
        """
        setting, config, plan = self.setting, self.setting.config, self.setting.plan
        sampler, augmentation = setting.sampler(ids), config.augment.for_dimensions(plan.ndim)
        sample = self._first_features(sampler, slices[0])
        cache = FeatureCache(
            self._folder / self._key(slices, ids, sample)[:16],
            slices,
            grid=(sample.maps[0].shape[2], sample.maps[0].shape[3]),
            embed_dim=sample.maps[0].shape[1],
            num_taps=len(sample.maps),
            patch_size=plan.patch_size,
            crop=plan.crop,
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
                    sampler=sampler,
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
        limits = [min(num_slices, max(0, total - view * num_slices)) for view in range(config.cached_views)]
        limits = [limit for limit in limits if limit]
        size = format_bytes(sum(limits) * cache.record_bytes)
        self._listen(Event("note", f"caching features: {num_slices} slices, {len(limits)} views, {size} at most"))
        return limits

    def _encode(self, image: Tensor) -> Features:
        with autocast(self.setting.device, self.setting.amp):
            return self.setting.segmenter.encode(image)

    def _first_features(self, sampler: Sampler, one: Slice) -> Features:
        """Features of one slice: they tell how large a record is."""
        if self._sample is None:
            draw = sampler.view(*one, 0)
            batch = assemble(self.setting.store, [draw], context=self.setting.plan.context_slices, seed=0)
            with torch.inference_mode():
                self._sample = self._encode(batch.image.to(self.setting.device))
        return self._sample

    def _key(self, slices: Sequence[Slice], ids: Sequence[str], sample: Features) -> str:
        """Digest of all that shapes the cached numbers. ids: of the sampler; a view depends on a case's place there."""
        setting, config = self.setting, self.setting.config
        cases = sorted({case_id for case_id, _ in slices})
        return digest_json(
            {
                "format": FORMAT,
                "weights": self._weights_digest,
                "plan": setting.plan.digest(),
                "taps": setting.segmenter.taps,
                "maps": [tuple(one.shape[1:]) for one in sample.maps],
                "tap_norm": config.tap_norm,
                "bf16": setting.amp,
                "device": setting.device.type,
                "seed": config.seed,
                "ids": sorted(ids),
                "quotas": config.quotas.to_json(),
                "augment": config.augment.to_json(),
                "cases": {case_id: setting.store.record(case_id).digest() for case_id in cases},
                "slices": [list(one) for one in slices],
            }
        )


class _Prepared:
    """A ReadAhead whose items pass through `prepare` in the consumer's thread (device copies, augmentation)."""

    def __init__(self, source: ReadAhead[Any], prepare: Callable[[Any], Any]) -> None:
        self._source, self._prepare = source, prepare

    def __enter__(self) -> Iterator[Any]:
        return map(self._prepare, self._source)

    def __exit__(self, *_: object) -> None:
        self._source.close()
