"""Zero-shot matching: the masks of one training case, carried over to every test case by the likeness of tokens."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from voxdino.benchmark.encoders import Encoder
from voxdino.benchmark.grid import Cell
from voxdino.benchmark.images import View, last_features
from voxdino.benchmark.kept import kept
from voxdino.benchmark.segmentation import Model, SegmentationData
from voxdino.core.safe_files import digest_json
from voxdino.core.volume import LabelMap, Volume
from voxdino.models.precision import uses_bf16
from voxdino.preparation.dataset import read_case
from voxdino.probes.correspondence import class_shares, transfer_labels

FORMAT = 1  # raised when the meaning of kept maps changes
MOST_SLICES = 32  # of a volume


def one_case(data: SegmentationData, cell: Cell, encoder: Encoder) -> Model:
    """Every token of a test case takes the labels of the nearest tokens of one labelled case; nothing is fitted.

    That case is drawn from those training cases that hold the most structures. Of volumes up to 32 slices, evenly
    spread along the first axis, are encoded. Errors: UsageError for regions.
    """
    labels = data.classes("correspondence")
    split = data.split(cell.site)[0]
    held = {name: len(data.store.record(name).packed_locations) for name in sorted(split.train)}
    fullest = [name for name, number in held.items() if number == max(held.values())]
    source = fullest[int(np.random.default_rng([cell.seed, 13]).integers(len(fullest)))]
    cases = {case.id: case for case in data.dataset.cases}
    maps = _Maps(data, encoder, cell.resolution)
    volume, reference = read_case(cases[source], data.plan.read_options, labels)
    assert reference is not None
    known = labels.to_indices(reference.array)
    label = torch.from_numpy(np.where(known == labels.ignore_index, 0, known).astype(np.int64))
    of_source = maps(source, volume, keep=True)
    shares = class_shares(label, of_source.shape[1:], num_classes=len(labels.ids))

    def predict(name: str, volume: Volume, keep: bool) -> LabelMap:
        shape = volume.array.shape[1:]
        of_case = maps(name, volume, keep=keep)
        found = transfer_labels(of_source, of_case, shares, target_shape=shape)
        return LabelMap(labels.to_ids(found.numpy()), volume.grid)

    dices = [data.score(cases[name], predict, cell)["dice"] for name in split.val]
    defined = [dice for dice in dices if dice is not None]
    return Model(
        predict=predict,
        validation=float(np.mean(defined)) if defined else None,
        num_train=1,
        settings={"side": maps.side, "source": source},
    )


class _Maps:
    """Token maps of whole cases, kept on disk."""

    def __init__(self, data: SegmentationData, encoder: Encoder, resolution: int) -> None:
        self.side, self._encoder, self._device = encoder.side(resolution), encoder, data.device
        self._bf16 = uses_bf16(data.device, "auto")
        key = [FORMAT, encoder.card.file_digest, data.digest, self.side, self._bf16]
        self._folder: Path = data.folder / "maps" / digest_json(key)[:20]

    def __call__(self, name: str, volume: Volume, *, keep: bool) -> Float[Tensor, "E *grid"]:
        def make() -> dict[str, Tensor]:
            depth = min(MOST_SLICES, volume.array.shape[1])
            images = View(volume.grid.ndim, (0,), depth, 3).images(volume.array, self.side, where=volume.source)
            maps = last_features(self._encoder, images, self._device, self._bf16).maps[-1].cpu().movedim(1, 0)
            return {"map": maps if volume.grid.ndim == 3 else maps[:, 0]}

        found = kept(self._folder / f"{digest_json(name)[:20]}.safetensors", make) if keep else make()
        return found["map"].float()
