"""mkdocs hook: one reference page per layer, with every module of it, and one with the help of every command."""

import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

SOURCE = Path(__file__).parents[1] / "src"
LAYERS = ("core", "models", "preparation", "data", "inference", "evaluation", "report", "training", "finetuning")
COMMANDS = ("run", "check", "prepare", "finetune", "predict", "evaluate", "report", "demo", "weights", "list", "doctor")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for layer in LAYERS:
        files.append(File.generated(config, f"reference/{layer}.md", content=layer_page(layer)))
    files.append(File.generated(config, "reference/cli.md", content=command_page()))
    return files


def layer_page(layer: str) -> str:
    folder = SOURCE / "voxdino" / layer
    modules = sorted(path for path in folder.rglob("*.py") if path.name != "__init__.py")
    names = [".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in modules]
    return "\n\n".join([f"# voxdino.{layer}", *(f"::: {name}" for name in names)])


def command_page() -> str:
    parts = ["# Command line", "What `voxdino COMMAND --help` prints."]
    for command in COMMANDS:
        code = f"from voxdino.cli import main; main(['{command}', '--help'])"
        environment = {"COLUMNS": "100", "PYTHONPATH": str(SOURCE), "TERM": "dumb", "NO_COLOR": "1"}
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
        )
        text = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
        parts.append(f"## voxdino {command}\n\n```text\n{text}\n```")
    return "\n\n".join(parts)
