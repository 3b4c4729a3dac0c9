"""The options that several commands share. cli/values.py says what their words mean."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

AUTO = "auto"  # the recipe that suits the data set
DEFAULT_WORKDIR = Path("voxdino-work")
ODD = "Odd files: what to allow"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class NanPolicy(StrEnum):
    refuse = "refuse"
    fill = "fill"


DatasetArgument = Annotated[
    Path,
    typer.Argument(metavar="DATASET", help="Folder in nnU-Net or MSD layout, or with images and a CSV table."),
]
WorkdirOption = Annotated[Path, typer.Option("--workdir", "-w", help="Everything this data set's work writes.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="auto takes a GPU where there is one.")]
WorkersOption = Annotated[int | None, typer.Option("--workers", min=1, help="Worker processes; default: the CPUs.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="Stop at the first bad case instead of setting it aside.")]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Same seed, same result.")]
FoldOption = Annotated[int, typer.Option("--fold", min=0, help="Fold that is held back for validation.")]
RecipeOption = Annotated[
    str, typer.Option("--recipe", help="Named settings; voxdino list recipes shows them. auto: what suits the data.")
]
BackboneOption = Annotated[
    str | None, typer.Option("--backbone", "-b", help="Weights: a file, or a name that voxdino weights list shows.")
]
EpochsOption = Annotated[int | None, typer.Option("--epochs", min=1, help="Passes over the training cases.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; plan.KEY for the plan. Repeatable."),
]
MapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--map", rich_help_panel=ODD, metavar="FROM=TO", help="Read label FROM as TO, e.g. 255=1. Repeatable."
    ),
]
LossyOption = Annotated[
    int | None,
    typer.Option(
        "--lossy-labels", rich_help_panel=ODD, min=0, max=255, help="Accept JPEG masks: brighter than this is 1."
    ),
]
NanOption = Annotated[
    NanPolicy,
    typer.Option("--nan-policy", rich_help_panel=ODD, help="fill reads NaN and infinity as the lowest value."),
]
GeometryOption = Annotated[
    float | None,
    typer.Option("--geometry-tol", rich_help_panel=ODD, min=0.0, help="How far (mm) image and label grids may differ."),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-array-order", rich_help_panel=ODD, help="Ignore that image and label affines differ.")
]
ExternalOption = Annotated[
    bool, typer.Option("--allow-external", rich_help_panel=ODD, help="Read files outside the data set's folder.")
]
SeriesOption = Annotated[
    str | None,
    typer.Option("--series", rich_help_panel=ODD, metavar="NUMBER", help="DICOM: the series to read, of several."),
]
SegmentOption = Annotated[
    list[str] | None,
    typer.Option(
        "--segment",
        rich_help_panel=ODD,
        metavar="NAME=ID",
        help="DICOM SEG, RTSTRUCT: read this segment as label ID, no others; the later wins. Repeatable.",
    ),
]
LesionsOption = Annotated[
    bool, typer.Option("--lesions", help="Lesion-wise scores too: recall, precision, F1, recall by size.")
]
TimeBudgetOption = Annotated[
    str | None, typer.Option("--time-budget", metavar="TIME", help="Be done within, e.g. 10m or 1h30m.")
]
OnOption = Annotated[
    str | None,
    typer.Option(
        "--on", metavar="WHERE", help="local:N processes here, ray, or ray://HOST:PORT: many cases at a time."
    ),
]
ShardOption = Annotated[
    str | None, typer.Option("--shard", metavar="I/N", help="Only part I (from 1) of N, for arrays of jobs.")
]
