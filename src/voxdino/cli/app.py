"""The table of commands. Importing it costs typer only: each command imports what it needs when it runs."""

from typing import Annotated

import typer

from voxdino import __version__
from voxdino.cli.benchmark import benchmark
from voxdino.cli.check import check
from voxdino.cli.data import app as data
from voxdino.cli.demo import demo
from voxdino.cli.doctor import doctor
from voxdino.cli.evaluate import evaluate
from voxdino.cli.export import export
from voxdino.cli.finetune import finetune
from voxdino.cli.listing import list_names
from voxdino.cli.pool import pool
from voxdino.cli.predict import predict
from voxdino.cli.prepare import prepare
from voxdino.cli.pretrain import pretrain
from voxdino.cli.report import report
from voxdino.cli.run import run
from voxdino.cli.tune import tune
from voxdino.cli.weights import app as weights

app = typer.Typer(
    name="voxdino",
    help="Adapt DINOv3 vision transformers to 2-D and 3-D medical images: check, plan, fine-tune, segment, measure.",
    epilog="Start with: voxdino demo, then voxdino run DATASET. Not a medical device.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def voxdino(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (with any command).")] = False,
) -> None:
    if version:
        print(f"voxdino {__version__}")
        raise typer.Exit


ROAD = "The road of a case"
PRETRAINING = "A backbone of your own"
HELP = "Around it"
app.command("run", rich_help_panel=ROAD)(run)
app.command("check", rich_help_panel=ROAD)(check)
app.command("prepare", rich_help_panel=ROAD)(prepare)
app.command("finetune", rich_help_panel=ROAD)(finetune)
app.command("predict", rich_help_panel=ROAD)(predict)
app.command("tune", rich_help_panel=ROAD)(tune)
app.command("evaluate", rich_help_panel=ROAD)(evaluate)
app.command("export", rich_help_panel=ROAD)(export)
app.command("report", rich_help_panel=ROAD)(report)
app.command("benchmark", rich_help_panel=PRETRAINING)(benchmark)
app.command("pool", rich_help_panel=PRETRAINING)(pool)
app.command("pretrain", rich_help_panel=PRETRAINING)(pretrain)
app.command("demo", rich_help_panel=HELP)(demo)
app.add_typer(data, name="data", rich_help_panel=HELP)
app.add_typer(weights, name="weights", rich_help_panel=HELP)
app.command("list", rich_help_panel=HELP)(list_names)
app.command("doctor", rich_help_panel=HELP)(doctor)
