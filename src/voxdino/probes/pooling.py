"""Probes of bags: the slices of a volume, the patches of a picture, the pictures of a patient; one label per bag."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from voxdino.core.errors import DatasetError
from voxdino.core.labels import LabelKind
from voxdino.models.heads.classifier import ClassificationHead
from voxdino.models.heads.objectives import OBJECTIVES
from voxdino.models.heads.pooling import POOLINGS
from voxdino.models.registry import look_up
from voxdino.probes.calibration import fit_temperature
from voxdino.probes.fitting import STRENGTHS, standardised
from voxdino.probes.linear import LinearProbe, fit_linear_probe

Bags = Float[Tensor, "_ _ E"] | Sequence[Float[Tensor, "_ E"]]

FIXED = ("mean", "max")  # poolings without weights: the linear probe of what they give is all there is to fit
BATCH = 64
LEARNING_RATES = {"pool": 1e-2, "classifier": 1e-3}  # which starts where its loss is smallest


@dataclass(frozen=True, eq=False)
class BagProbe:
    """A classifier of bags: the mean of what its heads say of features less `mean`, divided by `sd`.

    linear:      the linear probe of pooled features, where the heads started.
    temperature: the logits are divided by it; 1.0 where no calibration was asked for.
    """

    linear: LinearProbe
    pooling: str
    mean: Float[Tensor, " E"]
    sd: Float[Tensor, " E"]
    heads: tuple[ClassificationHead, ...]
    temperature: float = 1.0

    def logits(self, bags: Bags) -> Float[Tensor, "M O"]:
        """As the objective of the labels' kind reads them, before the temperature."""
        padded, present = stacked(bags)
        with torch.no_grad():
            return torch.stack([head((padded - self.mean) / self.sd, present) for head in self.heads]).mean(0).double()

    def probabilities(self, bags: Bags) -> Float[Tensor, "M K"]:
        """Of each class; rows sum to 1 but for several labels."""
        return OBJECTIVES[self.linear.kind].probabilities(self.logits(bags) / self.temperature)


def fit_bag_probe(
    bags: Bags,
    labels: Int[Tensor, " N"] | Int[Tensor, "N K"],
    validation_bags: Bags,
    validation_labels: Int[Tensor, " V"] | Int[Tensor, "V K"],
    *,
    pooling: str = "mean",
    kind: LabelKind = "single",
    num_classes: int | None = None,
    strengths: Sequence[float] = STRENGTHS,
    num_epochs: int = 20,
    num_members: int = 3,
    calibrate: bool = False,
    seed: int = 0,
) -> BagProbe:
    """Fit a probe of bags (N bags of any number of E features), on the CPU, the same for the same seed.

    pooling "mean" and "max": pooled, then `fit_linear_probe`, whose penalty is one of `strengths`.
    "attention" and "abmil":  they start as the linear probe of the mean; then attention and classifier train together
    under the same penalty (Adam, cosine). Of each of `num_members` trainings, which differ in their seed, the epoch of
    the smallest validation loss is kept, the start among them; their logits are averaged.
    Errors: DatasetError for fewer than two classes; UsageError for an unknown pooling.
    """
    look_up(POOLINGS, pooling, kind="pooling")
    (train, there), (held, held_there) = stacked(bags), stacked(validation_bags)
    _, mean, sd = standardised(train[there])
    train, held = ((part - mean) / sd for part in (train, held))
    fixed = POOLINGS[pooling if pooling in FIXED else "mean"](train.shape[2])
    linear = fit_linear_probe(
        fixed(train, there),
        labels,
        fixed(held, held_there),
        validation_labels,
        strengths=strengths,
        kind=kind,
        num_classes=num_classes,
    )
    members = [_start(linear, pooling, seed + place) for place in range(num_members if pooling not in FIXED else 1)]
    if pooling not in FIXED:
        parts = (_Part(train, there, labels.cpu()), _Part(held, held_there, validation_labels.cpu()))
        for place, head in enumerate(members):
            _train(head, *parts, linear.strength, num_epochs, seed + place)
    probe = BagProbe(linear, pooling, mean, sd, tuple(members))
    if not calibrate:
        return probe
    return replace(probe, temperature=fit_temperature(probe.logits(validation_bags), validation_labels, kind))


def stacked(bags: Bags) -> tuple[Float[Tensor, "N S E"], Bool[Tensor, "N S"]]:
    """Bags of any length side by side in float32, filled up with zeros, and which instances there are.

    Errors: DatasetError for an empty bag.
    """
    if isinstance(bags, Tensor):
        return bags.detach().cpu().float(), torch.ones(bags.shape[:2], dtype=torch.bool)
    lengths = torch.tensor([len(bag) for bag in bags])
    if not len(bags) or int(lengths.min()) < 1:
        raise DatasetError("a bag without instances cannot be classified", fix="leave such cases out.")
    padded = nn.utils.rnn.pad_sequence([bag.detach().cpu().float() for bag in bags], batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


@dataclass(frozen=True, eq=False)
class _Part:
    bags: Float[Tensor, "N S E"]
    present: Bool[Tensor, "N S"]
    labels: Tensor


def _start(linear: LinearProbe, pooling: str, seed: int) -> ClassificationHead:
    """A head that says what the linear probe says of pooled features; attention is even."""
    sizes = {"embed_dim": len(linear.mean), "num_classes": linear.num_classes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ClassificationHead(**sizes, kind=linear.kind, pooling=pooling)
    weight = linear.weight[:, :-1] / linear.sd
    with torch.no_grad():
        head.to_logits.weight.copy_(weight[: len(head.to_logits.weight)])
        head.offsets.copy_(linear.weight[:, -1] - weight @ linear.mean)
    return head.eval()


def _train(head: ClassificationHead, train: _Part, held: _Part, strength: float, num_epochs: int, seed: int) -> None:
    """Leave the head as it was at its best epoch, the start among them."""
    generator = torch.Generator().manual_seed(seed)
    groups = [
        {"params": head.pool.parameters(), "lr": LEARNING_RATES["pool"]},
        {"params": [head.to_logits.weight, head.offsets], "lr": LEARNING_RATES["classifier"]},
    ]
    optimiser = torch.optim.Adam(groups)
    num_steps = num_epochs * -(-len(train.bags) // BATCH)
    curve = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_steps)
    best, kept = _loss(head, held), _weights_of(head)
    for _ in range(num_epochs):
        for places in torch.randperm(len(train.bags), generator=generator).split(BATCH):
            logits = head(train.bags[places], train.present[places])
            penalised = strength / 2 * head.to_logits.weight.square().sum()
            loss = head.objective.loss(logits, train.labels[places]) + penalised
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            curve.step()
        if (value := _loss(head, held)) < best:
            best, kept = value, _weights_of(head)
    head.load_state_dict(kept)


@torch.no_grad()
def _loss(head: ClassificationHead, part: _Part) -> float:
    return float(head.objective.loss(head(part.bags, part.present), part.labels))


def _weights_of(head: ClassificationHead) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in head.state_dict().items()}
