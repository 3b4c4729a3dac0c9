"""What one linear layer reads from frozen patch tokens: Dice on held-back slices of prepared, labelled cases."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from voxdino.core.errors import DatasetError
from voxdino.core.records import Record
from voxdino.data.loader import Batch, assemble
from voxdino.data.sampling import CaseExtent, Quotas, Sampler, Slice
from voxdino.data.store import IGNORED, CaseStore
from voxdino.models.backbones.base import Backbone
from voxdino.models.decoders.linear import LinearDecoder
from voxdino.models.precision import autocast
from voxdino.models.registry import INPUT_BUILDERS, look_up
from voxdino.models.segmenter import ModelConfig, Segmenter
from voxdino.preparation.plan import Plan
from voxdino.preparation.splits import read_split
from voxdino.probes.fitting import (
    DECADES,
    choose,
    device_of,
    linear_logits,
    minimise,
    penalty,
    require_eval,
    spread,
    standardised,
)
from voxdino.probes.measures import effective_rank

FOREGROUND_SHARE = 0.8  # of the slices of a patch probe; the others are empty
FINENESS = 4  # the finest grid that labels are compared on while fitting, per token and axis
HELD_OUT = 5  # every fifth training case chooses the strength
FEW_STRENGTH = 1e-2  # of the penalty where no case can be spared to choose it
NUM_RANKED = 4096  # tokens that the effective rank is computed of


class PatchProbe(Record):
    """Dice of one linear layer on frozen patch tokens, pooled over the held-back slices of a fold.

    per_class: None where a class is neither there nor claimed; it does not enter the mean.
    strength:  of the penalty, chosen on held-out training cases.
    rank:      effective rank of the held-back tokens.
    """

    dice: float
    per_class: dict[str, float | None]
    strength: float
    rank: float
    num_train_slices: int
    num_test_slices: int


def patch_probe(
    workdir: Path,
    backbone: Backbone,
    *,
    fold: int = 0,
    num_train_slices: int = 200,
    num_test_slices: int = 100,
    magnify: float = 1.0,
    strengths: Sequence[float] = DECADES,
    max_iterations: int = 100,
    batch_size: int = 16,
    bf16: bool = False,
) -> PatchProbe:
    """What one linear layer reads from the patch tokens of the last tap, on cases prepared by `voxdino prepare`.

    Fixed slices of the fold's training and held-back cases, evenly spread, four of five with foreground; of larger
    slices a fixed crop near it. Logits of tokens are resized bilinearly to voxels, as the decoder "linear" does; the
    layer minimises cross-entropy with the share of each class (on a grid up to 4 times finer than the tokens, to bound
    memory), the Dice is of the largest logit at every voxel. Always the same slices: numbers of two backbones of one
    patch size compare.

    magnify: network pixels per pixel that the plan would give the backbone.
    bf16:    the backbone computes in bfloat16.
    Errors: those of the store and the splits; DatasetError where the slices hold no structure.
    """
    require_eval(backbone)
    plan, split = Plan.read(workdir / "plan.json"), read_split(workdir / "splits.json", fold)
    store = CaseStore(workdir / "prepared")
    encoder = patch_encoder(plan, backbone)
    num_classes = len(plan.labels.names)
    read = PatchReader(store, plan, encoder, num_classes, magnify, batch_size, bf16)
    train = read(split.train, num_train_slices)
    _require_structure(train, workdir, f"training cases of fold {fold}")
    layer = fit_patches(train, strengths=strengths, max_iterations=max_iterations)
    test = read(split.val, num_test_slices)
    _require_structure(test, workdir, f"held-back cases of fold {fold}")
    dices = _pooled_dices(layer.standardise(test.tokens), test.label, layer.weights, batch_size)
    per_class = dict(zip(plan.labels.names[1:], dices, strict=True))
    defined = [value for value in dices if value is not None]
    return PatchProbe(
        dice=sum(defined) / len(defined),
        per_class=per_class,
        strength=layer.strength,
        rank=effective_rank(test.tokens.flatten(0, 2)[spread(test.tokens[..., 0].numel(), NUM_RANKED)]),
        num_train_slices=len(train.label),
        num_test_slices=len(test.label),
    )


@dataclass(frozen=True, eq=False)
class PatchLayer:
    """A linear layer on patch tokens and how it was chosen.

    weights: (K, E + 1), the biases last, of tokens less `mean`, divided by `sd`.
    strength: of the penalty; held_out_dice: mean over the classes, of the training cases that chose it; None where
              there was no case to spare.
    """

    weights: Tensor
    mean: Tensor
    sd: Tensor
    strength: float
    held_out_dice: float | None

    def standardise(self, tokens: Tensor) -> Tensor:
        return (tokens - self.mean) / self.sd

    def of_raw_tokens(self) -> tuple[Tensor, Tensor]:
        """(K, E) weights and (K,) biases that read tokens as they are."""
        weights = self.weights[:, :-1] / self.sd
        return weights, self.weights[:, -1] - weights @ self.mean


def fit_patches(train: "PatchTokens", *, strengths: Sequence[float] = DECADES, max_iterations: int = 100) -> PatchLayer:
    """The layer of least cross-entropy with the share of each class; held-out cases choose the penalty's strength.

    Of a single picture none can be held out: the strength is then 0.01.
    """
    x, mean, sd = standardised(train.tokens)
    held = train.held_out()
    if not bool(held.any()):
        weights = _fit_map(x, train.shares, FEW_STRENGTH, None, max_iterations)
        return PatchLayer(weights, mean, sd, FEW_STRENGTH, None)
    found = choose(
        strengths,
        lambda strength, start: _fit_map(x[~held], train.shares[~held], strength, start, max_iterations),
        lambda weights: float(_map_loss(x[held], train.shares[held], weights)),
    )
    dices = [dice for dice in _pooled_dices(x[held], train.label[held], found.weights, 16) if dice is not None]
    weights = _fit_map(x, train.shares, found.strength, found.weights, max_iterations)
    return PatchLayer(weights, mean, sd, found.strength, sum(dices) / len(dices) if dices else None)


@dataclass(frozen=True, eq=False)
class PatchTokens:
    """Slices as a patch probe reads them.

    tokens: (S, h, w, E) float32. shares: (S, K, y, x) of the voxels of each class. label: (S, H, W). case: per slice.
    """

    tokens: Tensor
    shares: Tensor
    label: Tensor
    case: tuple[str, ...]

    def held_out(self) -> Tensor:
        """(S,) the slices of every fifth case; of every fifth slice where there is one case."""
        names = sorted(set(self.case))
        if len(names) == 1:
            return torch.arange(len(self.case)) % HELD_OUT == HELD_OUT - 1
        chosen = set(names[1::HELD_OUT])
        return torch.tensor([name in chosen for name in self.case])


class PatchReader:
    """Slices of given cases to tokens and labels."""

    def __init__(
        self,
        store: CaseStore,
        plan: Plan,
        encoder: Segmenter,
        num_classes: int,
        magnify: float,
        batch_size: int,
        bf16: bool,
    ) -> None:
        self._store, self._plan, self._encoder = store, plan, encoder
        self._num_classes, self._magnify, self._batch_size, self._bf16 = num_classes, magnify, batch_size, bf16

    @torch.no_grad()
    def __call__(self, cases: Sequence[str], number: int) -> PatchTokens:
        extents = [self._store.extent(case) for case in cases]
        sampler = Sampler(extents, self._plan.crop, 1, Quotas(foreground=1.0), seed=0)
        draws = [sampler.view(case, depth, 0) for case, depth in choose_probe_slices(extents, number)]
        tokens, shares, labels = [], [], []
        for first in range(0, len(draws), self._batch_size):
            part = draws[first : first + self._batch_size]
            batch = assemble(self._store, part, context=self._encoder.inputs.context_slices, seed=0)
            found = self._tokens(batch)
            label = batch.label[:, 0]
            tokens.append(found)
            shares.append(_shares(label, found.shape[1:3], self._num_classes))
            labels.append(label.to(torch.int16))
        return PatchTokens(
            torch.cat(tokens), torch.cat(shares), torch.cat(labels), tuple(draw.case_id for draw in draws)
        )

    def _tokens(self, batch: Batch) -> Tensor:
        """(S, h, w, E) of the last tap."""
        device = device_of(self._encoder.backbone)
        with autocast(device, self._bf16):
            features = self._encoder.encode(batch.image.to(device), magnify=self._magnify).maps[-1]
        return features.float().cpu().movedim(1, -1).contiguous()


def choose_probe_slices(extents: Sequence[CaseExtent], number: int) -> list[Slice]:
    """Up to `number` slices in the order of the cases: four of five with foreground, each kind evenly spread."""
    ordered = sorted(extents, key=lambda extent: extent.case_id)
    filled = [(extent.case_id, depth) for extent in ordered for depth in extent.foreground_slices]
    empty = [(extent.case_id, int(depth)) for extent in ordered for depth in extent.empty_slices()]
    num_empty = min(len(empty), number - round(number * FOREGROUND_SHARE))
    chosen = [filled[place] for place in spread(len(filled), number - num_empty)]
    return sorted(chosen + [empty[place] for place in spread(len(empty), num_empty)])


def patch_encoder(plan: Plan, backbone: Backbone, *, num_outputs: int | None = None) -> Segmenter:
    """The plan's way from crops to features around a backbone that stays as it is.

    Builders that learn a patch embedding of their own have none here: their neighbouring slices go in as colours.
    """
    name = plan.input_builder
    if look_up(INPUT_BUILDERS, name, kind="input builder").learns_embedding:
        name = "neighbours"
    inputs = INPUT_BUILDERS[name](len(plan.channels)).to(device_of(backbone))
    taps = backbone.default_taps()[-1:]
    config = ModelConfig(
        backbone="frozen",
        input_builder=name,
        context_slices=inputs.context_slices,
        num_channels=len(plan.channels),
        magnification=plan.magnification,
        decoder="linear",
        num_outputs=num_outputs or 1,
    )
    decoder = LinearDecoder(embed_dims=backbone.embed_dims(taps), num_outputs=num_outputs)
    return Segmenter(config, inputs, backbone, decoder, taps)


def _shares(label: Tensor, grid: Sequence[int], num_classes: int) -> Tensor:
    """(S, H, W) class indices to (S, K, y, x) shares of classes; ignored voxels belong to none."""
    kinds = F.one_hot(label.clamp(min=0), num_classes) * (label != IGNORED).unsqueeze(-1)  # (S, H, W, K)
    rows, columns = (min(voxels, FINENESS * n) for voxels, n in zip(label.shape[1:], grid, strict=True))
    return F.adaptive_avg_pool2d(kinds.movedim(-1, 1).float(), (rows, columns))


def _fit_map(tokens: Tensor, shares: Tensor, strength: float, start: Tensor | None, max_iterations: int) -> Tensor:
    """(K, E + 1) weights and biases of the linear layer."""
    first = tokens.new_zeros(shares.shape[1], tokens.shape[-1] + 1) if start is None else start
    return minimise(
        lambda weights: _map_loss(tokens, shares, weights) + penalty(weights, strength), first, max_iterations
    )


def _map_loss(tokens: Tensor, shares: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of resized logits with shares of classes, per labelled cell."""
    logits = _at(_map_logits(tokens, weights), shares.shape[2:])
    return -(shares * logits.log_softmax(1)).sum() / shares.sum().clamp(min=1)


def _map_logits(tokens: Tensor, weights: Tensor) -> Tensor:
    """(S, h, w, E) to (S, K, h, w)."""
    return linear_logits(tokens, weights).movedim(-1, 1).contiguous()


def _at(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Resized bilinearly, outer edges agreeing."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", antialias=False)


def _pooled_dices(tokens: Tensor, labels: Tensor, weights: Tensor, batch_size: int) -> list[float | None]:
    """Dice of each class but the background over all slices together; None where it is neither there nor claimed."""
    counts = torch.zeros(3, len(weights), dtype=torch.int64)
    for part, label in zip(tokens.split(batch_size), labels.split(batch_size), strict=True):
        found = _at(_map_logits(part, weights), label.shape[1:]).argmax(1)
        counts += _overlap(found, label.long(), len(weights))
    return [2 * both / (claimed + there) if claimed + there else None for both, claimed, there in counts.T.tolist()[1:]]


def _overlap(found: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """(3, K) voxels of each class that are both, claimed, and there; ignored ones do not count."""
    valid = label != IGNORED
    found, label = found[valid], label[valid]
    voxels = (found[found == label], found, label)
    return torch.stack([torch.bincount(one, minlength=num_classes) for one in voxels])


def _require_structure(slices: PatchTokens, workdir: Path, which: str) -> None:
    if not bool((slices.label > 0).any()):
        fix = "take another fold, or more slices: the probe measures how structures are found."
        raise DatasetError(f"{len(slices.label)} slices of the {which} hold no structure", where=workdir, fix=fix)
