"""The layouts in which data sets are published: a table of name -> (does it look so?, read its description).

`recognise(folder, table)` and `read(folder, table, options, labels)`; `table` is the CSV file where one was named.
"""

from collections.abc import Callable
from pathlib import Path

from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.preparation.case import Dataset
from voxdino.preparation.layouts import folder, msd, nnunet, pairs

Recognise = Callable[[Path, Path | None], bool]
ReadDescription = Callable[[Path, Path | None, ReadOptions, LabelSet | None], Dataset]

LAYOUTS: dict[str, tuple[Recognise, ReadDescription]] = {
    "msd": (msd.recognise, msd.read),
    "nnunet": (nnunet.recognise, nnunet.read),
    "folder": (folder.recognise, folder.read),
    "pairs": (pairs.recognise, pairs.read),
}
