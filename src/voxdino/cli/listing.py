"""`voxdino list`: the names that options take, straight from the tables."""

import re
from enum import StrEnum
from typing import Annotated, Any

import typer

from voxdino.cli.options import JsonOption
from voxdino.cli.output import print_json, print_table


class Table(StrEnum):
    recipes = "recipes"
    classification = "classification"
    backbones = "backbones"
    decoders = "decoders"
    inputs = "inputs"
    readers = "readers"
    metrics = "metrics"


def list_names(
    table: Annotated[Table | None, typer.Argument(help="One table; all of them when left out.")] = None,
    json: JsonOption = False,
) -> None:
    """List recipes (of classification apart), backbones, decoders, input builders, readers and metrics."""
    tables = {name: _entries(name) for name in ([table] if table else list(Table))}
    if json:
        if Table.recipes in tables:
            tables[Table.recipes] = {row.pop("name"): row for row in _recipes()}
        print_json({str(name): entries for name, entries in tables.items()})
        return
    for name, entries in tables.items():
        if name == Table.recipes:
            _print_recipes()
        else:
            print_table(str(name), ("name", "what it is"), sorted(entries.items()))


def _entries(table: Table) -> dict[str, Any]:
    """name -> one line about it: the first line of its docstring, or its sizes."""
    match table:
        case Table.recipes:
            from voxdino.finetuning.recipes import RECIPES

            return {name: _first_line(recipe) for name, recipe in RECIPES.items()}
        case Table.classification:
            from voxdino.finetuning.classify_recipes import CLASSIFY_RECIPES

            return {name: _first_line(recipe) for name, recipe in CLASSIFY_RECIPES.items()}
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
            from voxdino.evaluation.classification import CLASSIFICATION_METRICS
            from voxdino.evaluation.metrics import METRICS

            of_masks = {name: _first_line(metric.compute) for name, metric in METRICS.items()}
            return of_masks | {name: _first_line(metric.compute) for name, metric in CLASSIFICATION_METRICS.items()}


def _recipes() -> list[dict[str, Any]]:
    """What each is, what of it trains and the memory that takes, stage by stage, and when to take it."""
    from voxdino.core.errors import ResourceError
    from voxdino.finetuning.cost import cost_of
    from voxdino.finetuning.recipes import RECIPES

    rows = []
    for name, recipe in RECIPES.items():
        told = (recipe.__doc__ or "").split("Take it", 1)[1].split("\n\n")[0]
        when = re.split("[.:;] ", " ".join(told.split()))[0].strip(" .,")
        row: dict[str, Any] = {"name": name, "what": _first_line(recipe), "take_it": when}
        config = recipe()
        try:
            costs = [cost_of(stage, device="cuda") for stage in (config.first, config) if stage is not None]
            row |= {"num_trained": [cost.num_trained for cost in costs]}
            row |= {"memory_bytes": max(cost.memory_bytes for cost in costs), "missing": None}
        except ResourceError as error:
            row |= {"num_trained": None, "memory_bytes": None, "missing": error.fix}
        rows.append(row)
    return rows


def _print_recipes() -> None:
    rows = []
    for row in _recipes():
        trains, memory = "?", row["missing"]
        if row["num_trained"] is not None:
            trains = ", then ".join(f"{number / 1e6:.2f}" for number in row["num_trained"])
            memory = f"{row['memory_bytes'] / 2**30:.1f}"
        rows.append((row["name"], row["what"], trains, memory, row["take_it"]))
    print_table("recipes", ("name", "what it is", "trains (M)", "memory (GiB)", "take it"), rows)
    print(
        "With a DINOv3 ViT-S/16: weights that train, at the widths for a GPU (on a CPU decoders are narrower), and\n"
        "memory of a training step with one 224 x 224 slice or slab.\n"
        "auto, the default of `voxdino run`, chooses from the data set's facts and says why."
    )


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().split("\n")[0]
