"""The command line: `voxdino VERB`. Files parse, call one library function and print; heavy imports happen inside."""

from voxdino.cli.entry import main

__all__ = ["main"]
