"""`voxdino benchmark`: encoders times data sets, frozen probes, one report."""

from pathlib import Path
from typing import Annotated

import typer

from voxdino.cli.options import Device, DeviceOption, JsonOption, LossyOption, OnOption, ShardOption
from voxdino.cli.output import cohort_on, counting, end, print_table, relative, say


def benchmark(
    data: Annotated[
        list[Path], typer.Argument(metavar="GRID.json | DATA...", help="A grid file, or data sets for a quick look.")
    ],
    encoders: Annotated[
        str | None,
        typer.Option("--encoders", help="Of a quick look, with commas: weights, random:NAME, pixels:PATCH, timm:NAME."),
    ] = None,
    root: Annotated[
        Path | None, typer.Option("--root", help="Where the grid's paths begin; default: the grid's own folder.")
    ] = None,
    workdir: Annotated[Path, typer.Option("--workdir", "-w", help="Features, results and report.")] = Path(
        "voxdino-benchmark"
    ),
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="TIME", help="Start no cell that would end later, e.g. 30m.")
    ] = None,
    on: OnOption = None,
    shard: ShardOption = None,
    lossy_labels: LossyOption = None,
    device: DeviceOption = Device.auto,
    json: JsonOption = False,
) -> None:
    """Measure frozen encoders on tasks and write a report. Run it again to continue."""
    from voxdino.benchmark.page import leaderboard, report_page
    from voxdino.benchmark.quick import quick_grid, read_grid
    from voxdino.benchmark.run import run_grid
    from voxdino.benchmark.standing import Standing
    from voxdino.benchmark.words import findings
    from voxdino.cli.values import parse_time_budget, read_options
    from voxdino.core.shards import Shard
    from voxdino.models.precision import resolve_device
    from voxdino.report.texts import cell_text, heading
    from voxdino.report.write import write_report

    if encoders is None:
        grid, start = read_grid(data, root)
    else:
        grid, start = quick_grid(data, encoders, read_options(lossy_labels=lossy_labels)), Path()
    over_cases = None if on is None else cohort_on(on, resolve_device(device).type).over_cases
    with counting("measuring", tell=on is not None, what="cells") as on_progress:
        outcome = run_grid(
            grid,
            start,
            workdir,
            device=device,
            budget_s=parse_time_budget(budget, "--budget"),
            shard=None if shard is None else Shard.parse(shard),
            over_cases=over_cases,
            say=say,
            on_progress=on_progress,
        )
    result = {"num_measured": len(outcome.results), "num_missing": len(outcome.missing), "failed": outcome.failed}
    if shard is not None:
        say("the same command without --shard takes the cells of all shards, and writes the report")
        end(result, outcome.error(workdir), as_json=json)
        return
    standing = Standing(outcome)
    report = write_report(report_page(standing), workdir / "report")
    table, told = leaderboard(standing), findings(standing)
    if not json:
        rows = [[cell_text(cell, c) for cell, c in zip(row, table.columns, strict=True)] for row in table.rows]
        print_table(grid.title, [heading(column) for column in table.columns], rows)
        print("\n".join(("", *told)))
    say(f"{len(outcome.missing)} cells are left for the next call; the report is {relative(report)}")
    result = {"report": str(report), **result, "findings": told, "leaderboard": table.to_json()}
    end(result, outcome.error(workdir), as_json=json)
