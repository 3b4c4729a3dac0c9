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


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().split("\n")[0]
