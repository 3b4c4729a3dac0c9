"""`voxdino export`: a fine-tuned model as ONNX, with all that surrounds the network, for machines without torch."""

from pathlib import Path
from typing import Annotated

import typer

from voxdino.cli.options import JsonOption
from voxdino.cli.output import end, say


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder of a fine-tuned model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for model.onnx and export.json.")],
    json: JsonOption = False,
) -> None:
    """Write a model as ONNX, and check it; voxdino predict --run FOLDER runs it without torch."""
    from voxdino.inference.onnx_export import export_model

    say("exporting; this takes a minute or more")
    card = export_model(run, out)
    if not json:
        print(f"{out}  {card.name} as ONNX ({card.licence}); its probe gives torch's logits")
        print(f"next: voxdino predict IMAGE... --run {out} --out FOLDER   (pip install 'voxdino[onnx]', no torch)")
    end({"folder": str(out), "name": card.name, "run_digest": card.run_digest}, None, as_json=json)
