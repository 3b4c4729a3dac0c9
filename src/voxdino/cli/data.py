"""`voxdino data`: public data sets, listed and downloaded."""

from pathlib import Path
from typing import Annotated

import typer

from voxdino.cli.options import JsonOption
from voxdino.cli.output import counting, print_json, print_table, relative, say

app = typer.Typer(help="Public data sets: list, pull (uses the network).")

DEFAULT_FOLDER = Path("voxdino-data")


@app.command("list")
def list_sets(json: JsonOption = False) -> None:
    """List the data sets that `pull` knows, with their licences."""
    from voxdino.preparation.public_sets import PUBLIC_SETS

    if json:
        print_json({name: one.to_json() for name, one in PUBLIC_SETS.items()})
        return
    rows = [(name, one.task, one.licence, one.about) for name, one in PUBLIC_SETS.items()]
    print_table("voxdino data pull NAME", ("name", "task", "licence", "what it is"), rows)


@app.command("pull")
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name of the list.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where it goes.")] = DEFAULT_FOLDER,
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="You have read the set's licence and agree to it.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Download a data set, check it and unpack it. Run it again to continue; without consent it names the licence."""
    from voxdino.preparation.public_sets import pull_set

    with counting(f"fetching {name}") as on_progress:
        found = pull_set(name, out, accept_licence=accept_licence, on_progress=on_progress)
    if json:
        print_json(found.to_json())
        return
    print(f"{relative(Path(found.path))}  {found.num_files} files, {found.checksum}")
    say(f"licence {found.licence}; what you publish must honour it.")
