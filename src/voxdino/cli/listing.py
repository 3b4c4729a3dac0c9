"""`voxdino list`: the names that options take, straight from the tables."""

from enum import StrEnum
from typing import Annotated

import typer

from voxdino.cli.options import JsonOption
from voxdino.cli.output import print_json, print_table


class Table(StrEnum):
    recipes = "recipes"
    backbones = "backbones"
    decoders = "decoders"
    inputs = "inputs"
    readers = "readers"
    metrics = "metrics"


def list_names(
    table: Annotated[Table | None, typer.Argument(help="One table; all of them when left out.")] = None,
    json: JsonOption = False,
) -> None:
    """List recipes, backbones, decoders, input builders, readers and metrics."""
    tables = {name: _entries(name) for name in ([table] if table else list(Table))}
    if json:
        print_json({str(name): entries for name, entries in tables.items()})
        return
    for name, entries in tables.items():
        if name == Table.recipes:
            _print_recipes(entries)
        else:
            print_table(str(name), ("name", "what it is"), sorted(entries.items()))


def _entries(table: Table) -> dict[str, str]:
    """name -> one line about it: the first line of its docstring, or its sizes."""
    match table:
        case Table.recipes:
            from voxdino.finetuning.recipes import RECIPES

            return {name: _first_line(recipe) for name, recipe in RECIPES.items()}
        case Table.backbones:
            from voxdino.models.registry import BACKBONES

            return {name: config.summary() for name, config in BACKBONES.items()}
        case Table.decoders:
            from voxdino.models.registry import DECODERS

            return {name: _first_line(decoder) for name, decoder in DECODERS.items()}
        case Table.inputs:
            from voxdino.models.registry import INPUT_BUILDERS

            return {name: _first_line(builder) for name, builder in INPUT_BUILDERS.items()}
        case Table.readers:
            from voxdino.core.io import READERS

            return {suffix: "read and written" if form.write else "read" for suffix, form in READERS.items()}
        case Table.metrics:
            from voxdino.evaluation.metrics import METRICS

            return {name: _first_line(metric.compute) for name, metric in METRICS.items()}


def _print_recipes(entries: dict[str, str]) -> None:
    """What each is, what of it trains and the memory that takes, and when to take it."""
    from voxdino.core.errors import ResourceError
    from voxdino.finetuning.cost import cost_of
    from voxdino.finetuning.recipes import RECIPES

    rows = []
    for name, what in entries.items():
        told = (RECIPES[name].__doc__ or "").split("Take it", 1)[1].split("\n\n")[0]
        when = " ".join(told.split()).split(". ")[0].split(": ")[0].strip(" .,")
        try:
            cost = cost_of(RECIPES[name](), device="cuda")
            trains, memory = f"{cost.num_trained / 1e6:.2f}", f"{cost.memory_bytes / 2**30:.1f}"
        except ResourceError as error:
            trains, memory = "?", str(error.fix)
        rows.append((name, what, trains, memory, when))
    print_table("recipes", ("name", "what it is", "trains (M)", "memory (GiB)", "take it"), rows)
    print(
        "With a DINOv3 ViT-S/16: weights that train, at the published widths (on a CPU decoders are narrower), and\n"
        "memory of a training step with one 224 x 224 slice or slab.\n"
        "auto, the default of `voxdino run`, chooses from the data set's facts and says why."
    )


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().split("\n")[0]
