"""`voxdino weights`: which backbones are here, getting more, looking into a file."""

from json import dumps
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from voxdino.cli.options import JsonOption, SetOption
from voxdino.cli.output import print_json, print_table, relative, say

if TYPE_CHECKING:
    from voxdino.models.foreign import ImportedModel

app = typer.Typer(help="Backbone weights: list, pull (uses the network), import, inspect, export.")

FolderOption = Annotated[
    Path | None,
    typer.Option("--weights-folder", metavar="DIR", help="Default: VOXDINO_WEIGHTS, else ~/.voxdino/weights."),
]
LicenceOption = Annotated[str | None, typer.Option("--licence", help="The licence, where it is another one.")]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help=".safetensors or .pth file, or a folder with one.")]


@app.command("list")
def list_here(weights_folder: FolderOption = None, json: JsonOption = False) -> None:
    """List the weights that are here and the names that `pull` knows."""
    from voxdino.models.hub import HUB_COPIES
    from voxdino.models.weights import BUILT_IN_FILE, default_weights_folder, inspect_weights, list_weights

    folder = weights_folder or default_weights_folder()
    cards = (inspect_weights(BUILT_IN_FILE), *list_weights(folder))
    others = {name: copy.repository for name, copy in HUB_COPIES.items() if name not in {card.name for card in cards}}
    if json:
        print_json({"folder": str(folder), "here": [card.to_json() for card in cards], "can_be_pulled": others})
        return
    rows = [(c.name, f"{c.num_parameters / 1e6:.1f} M", c.licence, c.source) for c in cards]
    print_table(f"built in, and in {folder}", ("name", "parameters", "licence", "from"), rows)
    print_table("voxdino weights pull NAME", ("name", "from"), list(others.items()))


@app.command("pull")
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name of the list, or a hub repository OWNER/NAME.")],
    weights_folder: FolderOption = None,
    licence: LicenceOption = None,
    json: JsonOption = False,
) -> None:
    """Download weights from the Hugging Face hub and import them."""
    from voxdino.models.weights import default_weights_folder, pull_weights

    folder = weights_folder or default_weights_folder()
    say(f"fetching {name} ...")
    _show_imported(pull_weights(name, folder, licence=licence), folder, json)


@app.command("import")
def import_file(
    file: FileArgument,
    name: Annotated[str | None, typer.Option("--name", help="What to call them; default: after the file.")] = None,
    weights_folder: FolderOption = None,
    licence: LicenceOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Check a weights file and copy it into the weights folder; then its name is enough. Needs no network."""
    from voxdino.cli.values import parse_settings
    from voxdino.models.weights import default_weights_folder, import_weights

    folder = weights_folder or default_weights_folder()
    settings = parse_settings(set_)
    card = import_weights(file, folder, name, licence=licence, settings=settings)
    _show_imported(card, folder, json)


@app.command("inspect")
def inspect(file: FileArgument, set_: SetOption = None, json: JsonOption = False) -> None:
    """Say what a weights file is: layout, architecture, licence; refuse it where it is damaged or incomplete."""
    from voxdino.cli.values import parse_settings
    from voxdino.models.weights import inspect_weights

    card = inspect_weights(file, settings=parse_settings(set_))
    if json:
        print_json(card.to_json())
        return
    facts = {
        "name": card.name,
        "layout": card.layout,
        "architecture": card.config.summary(),
        "parameters": f"{card.num_parameters / 1e6:.2f} M",
        "licence": card.licence,
        "sha256": card.source_digest,
        "notes": "; ".join(card.notes) or "none",
    }
    if card.model is not None:
        facts |= _model_facts(card.model)
    for key, value in facts.items():
        print(f"{key:<13} {value}")


@app.command("export")
def export(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name that `list` shows, or a weights file.")],
    layout: Annotated[str, typer.Option("--layout", help="official, huggingface (transformers) or timm.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="A new folder for weights and model card.")],
    weights_folder: FolderOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Write a backbone as other libraries read it, with a model card that says what it is and its licence."""
    from voxdino.cli.values import parse_settings
    from voxdino.models.export_layouts import export_backbone

    settings = parse_settings(set_)
    summary = export_backbone(name, out, layout, weights_folder=weights_folder, settings=settings)
    if json:
        print_json(summary.to_json())
        return
    print(f"{summary.name}  {summary.num_parameters / 1e6:.1f} M parameters, in the {layout} layout")
    print(f"{relative(out)}: {', '.join(summary.files)}")
    for note in summary.notes:
        say(f"note: {note}")
    if summary.settings:
        told = " ".join(f"--set {quote(f'{key}={value}')}" for key, value in summary.settings.items())
        say(f"note: the file does not say all of it; whoever imports it adds {told}")
    say(f"licence {summary.licence}; models trained from these weights inherit it.")


def _model_facts(model: "ImportedModel") -> dict[str, str]:
    """What a whole model of other authors is, beside its backbone."""
    config = model.config
    texts = {k: v if isinstance(v, str) else dumps(v, separators=(",", ":")) for k, v in model.settings().items()}
    decoder = f"{config.decoder}, {config.num_outputs} outputs, taps {', '.join(map(str, config.taps or ()))}"
    if config.detail != "none":
        decoder += ", with a detail stream"
    if config.adaptation == "lora":
        decoder += f", low-rank adapters of rank {config.lora_rank}"
    return {
        "model": model.system,
        "decoder": f"{decoder}; {model.num_parameters / 1e6:.2f} M parameters beside the backbone",
        "trained with": "; ".join(f"{key} {value}" for key, value in model.facts.items()) or "the file does not say",
        "not mapped": "; ".join(model.unmapped) or "nothing",
        "left out": "; ".join(model.dropped) or "nothing",
        "fits with": " ".join(f"--set {quote(f'{key}={text}')}" for key, text in texts.items()),
    }


def _show_imported(card: object, folder: Path, as_json: bool) -> None:
    from voxdino.models.weights import licence_notice_once
    from voxdino.models.weights_card import WeightsCard

    assert isinstance(card, WeightsCard)
    notice = licence_notice_once(card, folder)
    if as_json:
        print_json(card.to_json())
    else:
        print(f"{card.name}  {card.num_parameters / 1e6:.1f} M parameters, in {folder}")
        if card.model is not None:
            print(f"{'architecture':<13} {card.config.summary()}")
            for key, value in _model_facts(card.model).items():
                print(f"{key:<13} {value}")
        print(f"use it: voxdino run DATASET --backbone {card.name}")
        if card.model is not None:
            print(f"to start from all of it: also --set initial_weights={card.name}")
    if notice:
        say(notice)
