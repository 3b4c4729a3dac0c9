"""A page with a section of every kind, all its names from a stranger."""

from typing import get_args

from voxdino.report.page import (
    AgreementSection,
    Column,
    CurveSection,
    FailureSection,
    ForestSection,
    GallerySection,
    Interval,
    Point,
    RankSection,
    ReliabilitySection,
    ReportPage,
    Section,
    Series,
    TableSection,
    TextSection,
)

HOSTILE = "<script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>"
PNG = bytes.fromhex(  # one grey pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c636800000082"
    "0081775382110000000049454e44ae426082"
)
KINDS = get_args(get_args(Section)[0])


def interval(mean: float | None, half: float = 0.05) -> Interval:
    ends = {"low": None, "high": None} if mean is None else {"low": mean - half, "high": mean + half}
    return Interval(mean=mean, **ends, num_undefined=1)


def section_of(kind: type, name: str = HOSTILE) -> Section:
    """A section of the kind with `name` wherever a text stands."""
    made: dict[type, Section] = {
        TextSection: TextSection(title=name, paragraphs=(name,)),
        TableSection: TableSection(
            title=name,
            columns=(Column(title=name), Column(title=name, unit=name, better="higher"), Column(title="n")),
            rows=((name, interval(0.5), 12), ("b", interval(0.7), 1234567), ("c", interval(None), None)),
            note=name,
        ),
        CurveSection: CurveSection(
            title=name,
            x_label=name,
            y_label=name,
            x_is_log=True,
            series=(
                Series(name=name, points=(Point(x=10, y=0.5), Point(x=100, y=0.7, low=0.6, high=0.8))),
                Series(name="b", points=tuple(Point(x=10 + i, y=0.1, low=0.0, high=0.2) for i in range(40))),
            ),
            note=name,
        ),
        ForestSection: ForestSection(
            title=name, axis_label=name, rows=((name, interval(0.5)), ("b", interval(None))), note=name
        ),
        RankSection: RankSection(
            title=name, names=(name, "b", "c"), mean_ranks=(1.5, 1.9, 2.6), critical_difference=0.8, note=name
        ),
        ReliabilitySection: ReliabilitySection(title=name, bins=((0.2, 0.3, 4), (0.9, 0.8, 9)), note=name),
        AgreementSection: AgreementSection(
            title=name, unit=name, points=((name, 10.0, 11.0), ("b", 5.0, 4.5), ("c", 7.0, 7.2)), note=name
        ),
        GallerySection: GallerySection(title=name, items=((name, PNG, ((name, name),)),), note=name),
        FailureSection: FailureSection(title=name, items=((name, name),)),
    }
    return made[kind]


def page_of_all(name: str = HOSTILE) -> ReportPage:
    """Every kind of section, each text being `name`."""
    sections = tuple(section_of(kind, name) for kind in KINDS)
    return ReportPage(title=name, subtitle=name, facts=((name, name),), warnings=(name,), sections=sections)
