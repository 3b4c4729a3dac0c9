"""The README.md beside exported weights: what they are, where they come from, under which licence, how to load them."""

import json
from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Any

import voxdino
from voxdino.models.backbones.timm_bridge import TimmConfig
from voxdino.models.backbones.vit import ViTConfig
from voxdino.models.weights_card import PretrainingFacts, WeightsCard

LIBRARIES = {"huggingface": "transformers", "timm": "timm"}
_HUB_LICENCES = {"Apache-2.0": "apache-2.0"}  # what the hub calls them; all else is "other" there


def model_card(
    name: str,
    card: WeightsCard,
    layout: str,
    weights: str,
    config: Mapping[str, Any] | None,
    *,
    settings: Mapping[str, str],
    notes: Sequence[str],
) -> str:
    """Markdown with the header that the hub reads.

    layout, weights, config: as exported; the file's name; its config.json.
    settings, notes: what a reader must be told, and what is not kept.
    """
    parts = [
        _header(card, layout),
        f"# {name}",
        f"A pretrained image backbone: {card.config.summary()}, {card.num_parameters / 1e6:.2f} M parameters, in the "
        f"{layout} layout. Written by voxdino {voxdino.__version__}.",
        "## Where it comes from",
        _origin(card),
        "## Licence",
        _licence(card),
        "## How to load it",
        _loading(name, card, layout, weights, config, settings),
    ]
    if notes:
        parts += ["## What differs from the weights it was made of", "\n".join(f"- {note}." for note in notes)]
    return "\n\n".join(parts) + "\n"


def _header(card: WeightsCard, layout: str) -> str:
    known = _HUB_LICENCES.get(card.licence)
    lines = ["---", f"license: {known or 'other'}"]
    if known is None:
        lines.append(f"license_name: {json.dumps(card.licence)}")
    if layout in LIBRARIES:
        lines.append(f"library_name: {LIBRARIES[layout]}")
    return "\n".join([*lines, "pipeline_tag: image-feature-extraction", "---"])


def _origin(card: WeightsCard) -> str:
    facts = [f"- file: {card.source} (SHA-256 {card.source_digest})"]
    facts += [f"- {note}" for note in card.notes]
    if card.pretraining is None:
        return "\n".join(facts)
    return f"{_pretraining(card.pretraining)}\n\n" + "\n".join(facts)


def _pretraining(facts: PretrainingFacts) -> str:
    """What was done, and a table of the images by source."""
    counts = sorted({kind for numbers in facts.sources.values() for kind in numbers})
    rows = [["source", *counts], ["---", *("---:" for _ in counts)]]
    rows += [
        [source.replace("|", "\\|"), *(str(numbers.get(kind, "")) for kind in counts)]
        for source, numbers in facts.sources.items()
    ]
    sums = [str(sum(numbers.get(kind, 0) for numbers in facts.sources.values())) for kind in counts]
    rows += [["all", *sums]] if len(facts.sources) > 1 else []
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    told = (
        f"Self-supervised pretraining of `{facts.start}` without labels: recipe `{facts.recipe}`, {facts.num_steps} "
        f"steps, on these images (pool {facts.pool_digest[:16]}):"
    )
    return (
        f"{told}\n\n{table}\n\nScores on test cases that were among them are not those of unseen cases; "
        "`voxdino finetune` and `voxdino evaluate --run` warn of it."
    )


def _licence(card: WeightsCard) -> str:
    told = f"{card.licence}."
    if card.pretraining is not None:
        told += f" It is inherited from the weights the pretraining started from (`{card.pretraining.start}`)."
    return f"{told} Models trained from these weights inherit it."


def _loading(
    name: str,
    card: WeightsCard,
    layout: str,
    weights: str,
    config: Mapping[str, Any] | None,
    settings: Mapping[str, str],
) -> str:
    """Code for the library of the layout, and the command of ours."""
    if layout == "huggingface":
        code = 'from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("FOLDER")'
    elif layout == "official":
        code = f'import torch\n\nstate = torch.load("{weights}", weights_only=True)  # a flat state dict'
    elif config is not None:
        code = 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)'
    else:
        code = f'from safetensors.torch import load_file\n\nstate = load_file("{weights}")'
        code += "  # timm has no model of this size; its Eva or VisionTransformer takes the names"
    given = f"timm:{card.config.model}@{weights}" if isinstance(card.config, TimmConfig) else weights
    told = "".join(f" --set {quote(f'{key}={value}')}" for key, value in settings.items())
    text = f"```python\n{code}\n```\n\n```sh\nvoxdino weights import {given} --name {name}{told}\n```"
    if settings:
        names = ", ".join(settings)
        text += f"\n\nThe file itself does not say {names}: whoever reads it must be told."
    if layout == "official" and isinstance(card.config, ViTConfig) and card.config.embed_dim == 1024:
        text += (
            "\n\nDINOv3's own builder of ViT-L reads eight hexadecimal digits from the file's name "
            "(dinov3_vitl16_pretrain_NAME-00000000.pth): rename it so before."
        )
    return text
