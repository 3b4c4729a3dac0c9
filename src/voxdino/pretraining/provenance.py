"""What a pretraining says of itself: run.json, what must not change on the way, the card of the backbone it makes."""

import itertools
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import voxdino
from voxdino.core.records import Record
from voxdino.models.backbones.vit import ViT
from voxdino.models.weights_card import PretrainingFacts, WeightsCard, pack_seen
from voxdino.pretraining.config import AnyStage, PretrainConfig
from voxdino.pretraining.pool import Pool
from voxdino.training.checkpoint import flatten
from voxdino.training.distributed import World

FREE_TO_CHANGE = frozenset({"checkpoint_every_s", "num_workers", "compile", "gradient_checkpointing", "watch_every"})


class PretrainSummary(Record):
    """How a pretraining ended, or was left.

    num_steps:    of all stages, done until now; num_skipped: of them, those whose loss or gradient was no number.
    data_wait:    share of this call's time in which the device waited for images.
    was_finished: it had ended before; nothing was done now.
    """

    run_folder: str
    num_steps: int
    num_skipped: int
    elapsed_s: float
    data_wait: float
    was_finished: bool = False


class PretrainRecord(Record):
    """run.json: what was done, with what. No absolute path, no host name: runs are shared.

    identity: what must not change between the parts of the run, flat. outcome: None while the run has not ended.
    """

    config: dict[str, Any]
    backbone: dict[str, str | None]
    pool: dict[str, Any]
    num_parameters: int
    device: str
    num_processes: int
    num_threads: int
    python: str
    identity: dict[str, Any]
    outcome: PretrainSummary | None = None


def identity_of(config: PretrainConfig, pool: Pool, card: WeightsCard, named: Mapping[str, str]) -> dict[str, Any]:
    """What must not change between the parts of one run, flat; weights count by their content, wherever they lie."""
    other = {*FREE_TO_CHANGE, "backbone", "stages"}
    settings = {key: value for key, value in config.to_json().items() if key not in other}
    stages = {
        f"{number} {stage.name}": _with_names(stage, named.__getitem__) for number, stage in enumerate(config.stages, 1)
    }
    return flatten(
        {
            **settings,
            "stages": stages,
            "backbone": card.file_digest,
            "pool": pool.digest(),
            "voxdino": voxdino.__version__,
            "torch": str(torch.__version__),
        }
    )


def _with_names(stage: AnyStage, name: Callable[[str], str]) -> dict[str, Any]:
    """A stage as JSON, the weights it names told by `name`: paths are of one machine."""
    told: dict[str, Any] = stage.to_json()
    if "teachers" in told:
        told["teachers"] = [name(teacher) for teacher in told["teachers"]]
    if told.get("gram_teacher") not in (None, "start", "earlier", "kept"):
        told["gram_teacher"] = name(told["gram_teacher"])
    return told


def record_of(
    config: PretrainConfig, card: WeightsCard, pool: Pool, backbone: ViT, world: World, identity: dict[str, Any]
) -> PretrainRecord:
    return PretrainRecord(
        config={
            **config.to_json(),
            "backbone": Path(config.backbone).name,
            "stages": [_with_names(stage, lambda name: Path(name).name) for stage in config.stages],
        },
        backbone={"name": card.name, "licence": card.licence, "digest": card.file_digest},
        pool={"digest": pool.digest(), "num_slices": len(pool), "sources": pool.sources()},
        num_parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        device=world.device.type,
        num_processes=world.size,
        num_threads=torch.get_num_threads(),
        python=platform.python_version(),
        identity=identity,
    )


def origin_of(
    config: PretrainConfig, pool: Pool, start: WeightsCard, teachers: Sequence[WeightsCard]
) -> PretrainingFacts:
    """All but the number of steps. What start and teachers have seen, the backbone that is made has seen too."""
    known = [card.pretraining for card in (start, *teachers) if card.pretraining is not None]
    sources: dict[str, Any] = {}
    for given in (*(facts.sources for facts in known), pool.sources()):
        for name, counts in given.items():
            names = itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))
            sources[next(free for free in names if sources.get(free, counts) == counts)] = counts
    return PretrainingFacts(
        recipe=config.recipe,
        start=start.name,
        teachers=tuple(card.name for card in teachers),
        num_steps=0,
        pool_digest=pool.digest(),
        sources=sources,
        seen=pack_seen(pool.digests(), (facts.seen for facts in known)),
    )


def card_of(
    name: str, made: ViT, start: WeightsCard, teachers: Sequence[WeightsCard], facts: PretrainingFacts
) -> WeightsCard:
    """Of the backbone that a pretraining has made. facts: `origin_of` with the steps done."""
    taught = f", taught by {', '.join(card.name for card in teachers)}" if teachers else ""
    return start.model_copy(
        update={
            "name": name,
            "layout": "voxdino",
            "licence": _licence_of([start, *teachers]),
            "source": f"pretrained by voxdino {voxdino.__version__} from {start.name}{taught}",
            "file_digest": "",
            "source_digest": start.file_digest,
            "config": made.config,
            "notes": (),
            "model": None,
            "pretraining": facts,
            "licence_shown": True,
        }
    )


def _licence_of(cards: Sequence[WeightsCard]) -> str:
    """All that is inherited; random weights have none."""
    given = dict.fromkeys(card.licence for card in cards if not card.licence.startswith("none"))
    return "; ".join(given) or cards[0].licence
