"""`voxdino report`: runs and scores as one HTML page, with the tables beside it."""

from pathlib import Path
from typing import Annotated

import typer

from voxdino.cli.options import JsonOption
from voxdino.cli.output import end, relative


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folder of a run, or of scored predictions; several are compared."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder; default: report/ in the one RUN, or here.")
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option("--dataset", help="The images: the lowest, middle and highest case are drawn.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", help="With --dataset: dataset.json, labels.json or plan.json of them.")
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="Of the page; default: the name of the run.")] = None,
    json: JsonOption = False,
) -> None:
    """Write report.html, which needs no network, and its tables as CSV, JSON, Markdown and LaTeX."""
    from voxdino.cli.references import read_labels
    from voxdino.report.make import make_page
    from voxdino.report.write import write_report

    page = make_page(runs, dataset=dataset, labels=None if labels is None else read_labels(labels), title=title)
    home = runs[0] if runs[0].is_dir() else runs[0].parent
    path = write_report(page, out or (home if len(runs) == 1 else Path()) / "report")
    if not json:
        print(f"{relative(path)}  {len(page.sections)} sections, tables in {relative(path.parent / 'tables')}")
    end({"report": str(path), "page": str(path.with_name("page.json"))}, None, as_json=json)
