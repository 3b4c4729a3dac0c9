"""A frozen backbone's features, computed once and kept on disk, so that a head trains without the backbone.

Augmentation goes in through a few cached views of each slice: view 0 is plain, view v is the sample drawn with epoch v.
"""

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from voxdino.core.errors import CheckpointError, InputError, ResourceError
from voxdino.core.records import Record
from voxdino.data.augment import AugmentConfig
from voxdino.data.loader import ReadAhead, assemble
from voxdino.data.sampling import Draw, Slice
from voxdino.data.store import CaseStore
from voxdino.models.features import Features, slices_to_volume

FORMAT = 2  # raised when the meaning of the files changes: an older cache is then not found, never misread
ENCODE_BATCH = 16
MARK_EVERY = 16  # batches between two progress marks


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """Features of B slabs of D slices, their labels and, where a detail stream reads them, their voxels.

    features: of the B * D slices, side by side.
    label:    (B, D, H, W) class indices.
    image:    (B, C, D, H, W) normalised, without context slices; None where the cache holds none.
    """

    features: Features
    label: Int[Tensor, "B D H W"]
    image: Float[Tensor, "B C D H W"] | None
    case_ids: tuple[str, ...]

    def to(self, device: torch.device) -> "FeatureBatch":
        maps = tuple(tap.to(device, non_blocking=True) for tap in self.features.maps)
        features = Features(maps, self.features.cls_token.to(device), self.features.patch_size)
        image = None if self.image is None else self.image.to(device, non_blocking=True)
        return FeatureBatch(features, self.label.to(device, non_blocking=True), image, self.case_ids)


class Mark(Record):
    """view_000.json: how many records of how many are safely on disk."""

    done: int = Field(ge=0)
    of: int = Field(ge=1)


class FeatureCache:
    """One folder of cached views. Records lie one after the other in `view_000.bin`, in the order of `slices`.

    A record: maps (h, w, E of all taps) float16, cls (E,) float16, label (H, W) int16, image (C, H, W) float16 where
    num_channels > 0, CRC-32 of these bytes.

    folder:     named by the digest of everything that shaped its content; the caller computes it.
    embed_dims: channels of each tap.
    """

    def __init__(
        self,
        folder: Path,
        slices: Sequence[Slice],
        *,
        grid: tuple[int, int],
        embed_dims: tuple[int, ...],
        cls_dim: int,
        patch_size: int,
        crop: tuple[int, int],
        num_channels: int = 0,
    ) -> None:
        self.folder, self.slices, self.patch_size = folder, list(slices), patch_size
        self.embed_dims, self.num_channels = embed_dims, num_channels
        image = [("image", "<f2", (num_channels, *crop))] if num_channels else []
        self.record = np.dtype(
            [
                ("maps", "<f2", (*grid, sum(embed_dims))),
                ("cls", "<f2", (cls_dim,)),
                ("label", "<i2", crop),
                *image,
                ("crc", "<u4"),
            ]
        )
        self._open: dict[int, NDArray[np.uint8]] = {}

    @property
    def record_bytes(self) -> int:
        return self.record.itemsize

    def num_done(self, view: int) -> int:
        """Records of a view that are safely on disk; none where their mark is damaged: they are computed again."""
        try:
            marked = Mark.read(self._mark_path(view)).done
            return min(marked, len(self.slices), self._data_path(view).stat().st_size // self.record_bytes)
        except (InputError, FileNotFoundError):
            return 0

    def batch(self, places: Sequence[tuple[int, int]], dtype: torch.dtype, *, num_slices: int = 1) -> FeatureBatch:
        """Slabs of `num_slices` of the records at (view, index), as tensors of `dtype`; images in float32.

        Errors: CheckpointError for a damaged record.
        """
        rows = np.stack([self._rows(view)[index] for view, index in places])  # (B * D, record_bytes)
        for (view, index), row in zip(places, rows, strict=True):
            if zlib.crc32(row[:-4].data) != int(row[-4:].view("<u4")[0]):
                raise CheckpointError(
                    f"the cached features of case {self.slices[index][0]!r} are damaged (checksum differs)",
                    where=self._data_path(view),
                    fix="delete the folder; the features are then computed again.",
                )
        records = rows.reshape(-1).view(self.record)
        maps = torch.from_numpy(records["maps"]).permute(0, 3, 1, 2)  # (B * D, E of all taps, h, w)
        features = Features(
            tuple(
                tap.to(dtype, memory_format=torch.channels_last)
                for tap in torch.split(maps, list(self.embed_dims), dim=1)
            ),
            torch.from_numpy(records["cls"]).to(dtype),
            (self.patch_size, self.patch_size),
        )
        label = torch.from_numpy(records["label"].reshape(-1, num_slices, *records["label"].shape[1:])).to(torch.int64)
        image = None
        if self.num_channels:
            image = slices_to_volume(torch.from_numpy(records["image"]).float(), num_slices)
        return FeatureBatch(features, label, image, tuple(self.slices[index][0] for _, index in places[::num_slices]))

    def encode(
        self,
        view: int,
        *,
        store: CaseStore,
        draw: Callable[[str, int, int], Draw],
        seed: int,
        context: int,
        augmentation: AugmentConfig,
        encode: Callable[[Float[Tensor, "B C Dk H W"]], Features],
        device: torch.device,
        num_threads: int,
        go_on: Callable[[int], bool],
    ) -> int:
        """Compute a view from where it was left, until it is complete or go_on(records done) is False.

        draw: (case id, slice, view) -> the crop to cut.
        Batches start at multiples of ENCODE_BATCH, so that an interrupted view ends with the same bits.
        Returns the number of records done. Errors: ResourceError when the disk is full.
        """
        done, total = self.num_done(view), len(self.slices)
        if done == total:
            return done
        done -= done % ENCODE_BATCH  # a file cut short may end within a batch
        self._open.pop(view, None)

        def fetch(number: int) -> Any:
            chosen = self.slices[number * ENCODE_BATCH : (number + 1) * ENCODE_BATCH]
            draws = [draw(case_id, depth, view) for case_id, depth in chosen]
            return assemble(store, draws, context=context, seed=seed)

        path = self._data_path(view)
        try:
            with path.open("r+b" if path.exists() else "w+b") as file, torch.inference_mode():
                file.truncate(done * self.record_bytes)
                file.seek(done * self.record_bytes)
                with ReadAhead(fetch, first=done // ENCODE_BATCH, num_threads=num_threads) as batches:
                    while done < total and go_on(done):
                        batch = next(batches).to(device)
                        batch = batch.augmented(augmentation) if view else batch
                        centre = batch.image[:, :, context : batch.image.shape[2] - context]
                        file.write(self._pack(encode(batch.image), batch.label, centre))
                        done = min(done + ENCODE_BATCH, total)
                        if done == total or done // ENCODE_BATCH % MARK_EVERY == 0:
                            self._mark(view, done, file)
                self._mark(view, done, file)
        except OSError as error:
            raise ResourceError(
                f"cached features could not be written ({error.strerror})",
                where=path,
                fix="free space, or run with --set cache=off or a smaller cache_gib.",
            ) from error
        return done

    def _pack(self, features: Features, label: Int[Tensor, "B 1 H W"], image: Float[Tensor, "B C 1 H W"]) -> bytes:
        maps = torch.cat([_half(tap).permute(0, 2, 3, 1) for tap in features.maps], dim=-1)  # (B, h, w, E of all taps)
        records = np.zeros(len(maps), dtype=self.record)
        records["maps"] = maps.cpu().numpy()
        records["cls"] = _half(features.cls_token).cpu().numpy()
        records["label"] = label[:, 0].to(torch.int16).cpu().numpy()
        if self.num_channels:
            records["image"] = _half(image[:, :, 0]).cpu().numpy()
        rows = records.view(np.uint8).reshape(len(records), -1)
        records["crc"] = [zlib.crc32(row[:-4].data) for row in rows]
        return records.tobytes()

    def _mark(self, view: int, done: int, file: Any) -> None:
        file.flush()
        os.fsync(file.fileno())
        Mark(done=done, of=len(self.slices)).write(self._mark_path(view))

    def _rows(self, view: int) -> NDArray[np.uint8]:
        """(records done, record_bytes) of a view, memory-mapped."""
        if view not in self._open:
            flat = np.memmap(self._data_path(view), dtype=np.uint8, mode="r")
            num = self.num_done(view)
            self._open[view] = flat[: num * self.record_bytes].reshape(num, self.record_bytes)
        return self._open[view]

    def _data_path(self, view: int) -> Path:
        return self.folder / f"view_{view:03d}.bin"

    def _mark_path(self, view: int) -> Path:
        return self.folder / f"view_{view:03d}.json"


def _half(x: Tensor) -> Tensor:
    limit = torch.finfo(torch.float16).max
    return x.float().clamp(-limit, limit).half()
