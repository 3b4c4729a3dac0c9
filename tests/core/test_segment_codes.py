"""Names of classes get the codes of the standard where it has them, and claim nothing where it has not."""

import pytest

from voxdino.core.segments import PRIVATE_SCHEME, segment_code, segment_colour


@pytest.mark.parametrize(
    ("name", "value", "kind", "side", "region"),
    [
        ("liver", "10200004", "anatomy", None, None),
        ("Left kidney", "64033007", "anatomy", "Left", None),
        ("kidney_right", "64033007", "anatomy", "Right", None),
        ("adrenal_gland_left", "23451007", "anatomy", "Left", None),
        ("lung_upper_lobe_left", "45653009", "anatomy", "Left", None),
        ("heart_ventricle_left", "87878005", "anatomy", None, None),  # the code itself says left
        ("vertebrae_L5", "49668003", "anatomy", None, None),
        ("rib_left_4", "113197003", "anatomy", "Left", None),
        ("urinary bladder", "89837001", "anatomy", None, None),
        ("tumour", "108369006", "abnormal", None, None),
        ("enhancing tumor", "108369006", "abnormal", None, None),
        ("liver_tumor", "108369006", "abnormal", None, "Liver"),
        ("left kidney cyst", "367643001", "abnormal", "Left", "Kidney"),
        ("skin", "39937001", "tissue", None, None),
    ],
)
def test_usual_names_have_their_snomed_codes(name, value, kind, side, region):
    code = segment_code(name)
    assert (code.type.value, code.type.scheme_designator, code.kind) == (value, "SCT", kind)
    assert (code.side and code.side.meaning) == side
    assert (code.region and code.region.meaning) == region


@pytest.mark.parametrize("name", ["Anterior", "non-tumor", "label 7", "PZ", "Ödem", "gluteus_maximus_left", "", "!"])
def test_a_name_that_no_list_knows_gets_a_code_of_our_own(name):
    code = segment_code(name)
    assert code.type.scheme_designator == PRIVATE_SCHEME
    assert code.category.meaning == "Spatial and Relational Concept"
    assert 0 < len(code.type.value) <= 16
    assert code.type.meaning


def test_different_names_have_different_private_codes():
    names = ["PZ", "CZ", "a very long name of something", "a very long name of something else", "Ödem", "Adem"]
    assert len({segment_code(name).type.value for name in names}) == len(names)


def test_segments_of_one_file_have_different_colours():
    colours = [segment_colour(index) for index in range(104)]
    assert len(set(colours)) == 104
    assert all(0 <= part <= 255 for colour in colours for part in colour)
