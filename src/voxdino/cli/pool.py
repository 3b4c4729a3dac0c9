"""`voxdino pool`: any images, labelled or not, as slices to pretrain on."""

import re
from pathlib import Path
from typing import Annotated

import typer

from voxdino.cli.options import DEFAULT_WORKDIR, JsonOption, SetOption, WorkdirOption, WorkersOption
from voxdino.cli.output import counting, end, relative


def pool(
    sources: Annotated[
        list[str], typer.Argument(help="Data sets, folders or files; NAME=PATH names one.", show_default=False)
    ],
    workdir: WorkdirOption = DEFAULT_WORKDIR,
    weight: Annotated[
        list[str] | None, typer.Option("--weight", metavar="NAME=NUMBER", help="Draw the slices of a source so often.")
    ] = None,
    leave_out: Annotated[
        list[str] | None, typer.Option("--leave-out", metavar="PATTERN", help="Cases to keep out: those of a test.")
    ] = None,
    modality: Annotated[
        list[str] | None,
        typer.Option("--modality", metavar="[NAME=]KIND", help="auto, ct (values are Hounsfield units) or other."),
    ] = None,
    set_: SetOption = None,
    workers: WorkersOption = None,
    json: JsonOption = False,
) -> None:
    """Make a pool of slices of any mix of scans and pictures; labels are not read. Run it again to go on."""
    from voxdino.cli.values import parse_settings
    from voxdino.core.errors import PartialError, UsageError
    from voxdino.pretraining.pool import Pool
    from voxdino.pretraining.pool_build import build_pool
    from voxdino.pretraining.pool_slices import PoolConfig
    from voxdino.pretraining.pool_sources import PoolSource

    named = [_named(text) for text in sources]
    weights = parse_settings(weight, "--weight", "NAME=2")
    for_all = [kind for kind in modality or () if "=" not in kind]
    if len(for_all) > 1:
        raise UsageError(f"{' and '.join(for_all)}: one holds for all.", where="--modality", fix="write NAME=ct.")
    kinds = parse_settings([kind for kind in modality or () if "=" in kind], "--modality")
    for option, given_names in (("--weight", weights), ("--modality", kinds)):
        for strange in [name for name in given_names if name not in dict(named)]:
            known = ", ".join(name for name, _ in named)
            raise UsageError(f"no source is called {strange!r}.", where=option, fix=f"there are: {known}.")
    given = [
        PoolSource.from_json(
            {
                "name": name,
                "path": path,
                "modality": kinds.get(name, *for_all) if for_all else kinds.get(name, "auto"),
                "leave_out": leave_out or [],
                **({"weight": _number(weights[name])} if name in weights else {}),
            },
            where=path,
        )
        for name, path in named
    ]
    config = PoolConfig().with_settings(parse_settings(set_))
    partly: PartialError | None = None
    try:
        with counting("reading") as on_progress:
            build_pool(given, workdir, config, num_workers=workers, on_progress=on_progress)
    except PartialError as error:
        partly = error
    made = Pool(workdir / "pool")
    facts = [source.to_json() for source in made.facts.sources]
    if not json:
        for source in made.facts.sources:
            told = f"{source.name:<24} {source.num_cases:>7} cases {source.num_slices:>9} slices"
            left = {"twice": source.num_duplicates, "empty": source.num_empty, "set aside": len(source.set_aside)}
            others = ", ".join(f"{number} {what}" for what, number in left.items() if number)
            print(told + (f"  ({others})" if others else ""))
            for note in source.notes:
                print(f"  {note}")
        print(f"{len(made)} slices in {relative(workdir / 'pool')}")
        print(f"next: voxdino pretrain --workdir {relative(workdir)}")
    end({"workdir": str(workdir), "num_slices": len(made), "sources": facts}, partly, as_json=json)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        from voxdino.core.errors import UsageError

        raise UsageError(f"{text!r} is no number.", where="--weight", fix="write --weight NAME=2.") from None


def _named(text: str) -> tuple[str, str]:
    """(name, path) of "NAME=PATH", or of a path whose last part is the name."""
    name, equals, path = text.partition("=")
    if equals and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        return name, path
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(text).resolve().name).strip("-_")
    return (stem or "images")[:64], text
