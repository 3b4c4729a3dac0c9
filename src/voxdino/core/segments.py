"""What a segment is called in DICOM: its code in SNOMED CT where its name is a usual one, and its colour."""

import colorsys
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from voxdino.core.safe_files import digest_bytes

PRIVATE_SCHEME = "99VOXDINO"
MOST_CHARACTERS = 64  # of a text in DICOM (LO)

_GOLDEN = 0.618033988749895  # of the colour circle from one segment to the next: neighbours never look alike
_SYNONYMS = {
    **dict.fromkeys(("tumour", "tumor", "tumours", "tumors", "cancer", "carcinoma", "neoplasms"), "neoplasm"),
    **dict.fromkeys(("vertebrae", "vertebral"), "vertebra"),
    "oedema": "edema", "oesophagus": "esophagus", "haemorrhage": "hemorrhage", "clavicula": "clavicle",
    "bowel": "intestine", "hepatic": "liver", "renal": "kidney", "pulmonary": "lung", "lungs": "lung",
    "kidneys": "kidney", "lesions": "lesion", "cysts": "cyst", "nodules": "nodule", "masses": "mass",
}  # fmt: skip
_SILENT = {"of", "the", "and", "structure", "heart", "urinary", "body"}  # words that leave the meaning as it is
_QUALIFIERS = {"whole", "core", "enhancing", "active", "primary", "gross"}  # a core of a neoplasm is neoplasm
_SIDES = {"left": codes.SCT.Left, "right": codes.SCT.Right, "l": codes.SCT.Left, "r": codes.SCT.Right}

Kind = Literal["anatomy", "abnormal", "tissue", "unknown"]
_CATEGORIES: dict[Kind, Code] = {
    "anatomy": codes.SCT.AnatomicalStructure,
    "abnormal": codes.SCT.MorphologicallyAbnormalStructure,
    "tissue": codes.SCT.Tissue,
    "unknown": codes.SCT.SpatialAndRelationalConcept,
}


@dataclass(frozen=True)
class SegmentCode:
    """What a segment shows. kind: which table has the code; side and region: None where the name says nothing of it."""

    kind: Kind
    type: Code
    side: Code | None = None
    region: Code | None = None

    @property
    def category(self) -> Code:
        return _CATEGORIES[self.kind]


def segment_code(name: str) -> SegmentCode:
    """The code of a class name: "kidney_left" is SNOMED CT 64033007 (Kidney) with the modifier Left.

    The words of the name, in any order, are looked up in the standard's own lists (DICOM PS3.16: CID 7192 anatomy,
    7194 abnormal structures, 7191 tissues, as pydicom holds them). "liver tumour" is a neoplasm in the region of the
    liver. A number that no list knows falls away ("rib_left_4" is a rib). A name that no list knows gets a code of
    our own scheme, 99VOXDINO, under the category "Spatial and Relational Concept": nothing is claimed about it.
    """
    words = _words(name)
    side = next((_SIDES[word] for word in sorted(words) if word in _SIDES), None)
    plain = words - _SIDES.keys()
    if found := _look_up(words):
        return SegmentCode(found[0], found[1])
    for attempt in (plain, {word for word in plain if not word.isdigit()}):
        if found := _look_up(attempt):
            return SegmentCode(found[0], found[1], side)
    for abnormal, code in sorted(_table("abnormal").items(), key=lambda item: -len(item[0])):
        rest = {word for word in plain - abnormal - _QUALIFIERS if not word.isdigit()}
        region = _table("anatomy").get(frozenset(rest))
        if abnormal <= plain and (region or not rest):
            return SegmentCode("abnormal", code, side, region)
    return SegmentCode("unknown", _private(name))


def segment_colour(index: int) -> tuple[int, int, int]:
    """Red, green and blue (0 to 255) of the segment at this place in the list."""
    hue, light = (index * _GOLDEN) % 1.0, (0.95, 0.75)[index // 16 % 2]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.75, light))
    return red, green, blue


def _private(name: str) -> Code:
    value = "_".join(re.findall(r"[a-z0-9]+", name.lower()))
    value = value if name.isascii() and 0 < len(value) <= 16 else digest_bytes(name.encode())[:16]
    return Code(value, PRIVATE_SCHEME, name[:MOST_CHARACTERS] or "unnamed")


def _look_up(words: set[str]) -> tuple[Kind, Code] | None:
    kinds: tuple[Kind, ...] = ("anatomy", "abnormal", "tissue")
    return next(((kind, _table(kind)[key]) for kind in kinds if (key := frozenset(words)) in _table(kind)), None)


@cache
def _table(kind: Kind) -> dict[frozenset[str], Code]:
    """Words of a concept's meaning -> its code; where two concepts share their words, the first of the list."""
    concepts = {"anatomy": codes.cid7192, "abnormal": codes.cid7194, "tissue": codes.cid7191}[kind].concepts
    table: dict[frozenset[str], Code] = {}
    for name, code in concepts.items():
        if name not in ("Background", "Normal"):
            table.setdefault(frozenset(_words(code.meaning)), Code(code.value, "SCT", code.meaning))
    return table


def _words(name: str) -> set[str]:
    words = {_SYNONYMS.get(word, word) for word in re.findall(r"[a-z]+\d*|\d+", name.lower())}
    return words - _SILENT or words
