"""A page is data: it goes through JSON unchanged and draws the same each time, whatever its names are."""

import re
from html.parser import HTMLParser

import pytest
from pages import HOSTILE, KINDS, interval, page_of_all, section_of

from voxdino.report.html import render
from voxdino.report.page import (
    AgreementSection,
    Column,
    CurveSection,
    FailureSection,
    ForestSection,
    GallerySection,
    ReliabilitySection,
    ReportPage,
    TableSection,
    TextSection,
)

VOID = {"meta", "link", "img", "wbr"}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "rel", "href", "class", "id", "type", "role", "tabindex"),
    *("aria-label", "aria-labelledby", "aria-hidden", "scope", "alt", "src", "loading", "data-sort", "data-kind"),
    *("viewbox", "width", "height", "x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "d", "text-anchor"),
}


class Reader(HTMLParser):
    """Every tag with its attributes, every text outside of style and script; refuses what is not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    def attributes(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def test_a_page_comes_back_from_json_with_its_pictures():
    page = page_of_all()
    assert ReportPage.from_json(page.to_json()) == page


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_names_are_shown_as_text_in_every_section(kind):
    page = ReportPage(title="t", subtitle="s", sections=(section_of(kind),))
    reader = Reader(render(page))
    assert [tag for tag, _ in reader.tags].count("script") == 1  # our own
    assert {name for _, attributes in reader.tags for name in attributes} <= ATTRIBUTES
    assert any(HOSTILE in text for text in (*reader.texts, "".join(reader.texts), *reader.attributes("aria-label")))
    assert all(source.startswith("data:image/png;base64,") for source in reader.attributes("src"))


def test_title_facts_and_warnings_of_a_stranger_are_text_too():
    reader = Reader(
        render(ReportPage(title=HOSTILE, subtitle="", facts=((HOSTILE, "1"),), warnings=("<b>",), sections=()))
    )
    assert reader.texts.count(HOSTILE) == 3  # title, heading, fact
    assert "<b>" in reader.texts


def test_unseen_characters_cannot_turn_or_hide_a_name():
    html = render(page_of_all("case\u202egnp\x00\u200b\ud800.nii\nline"))
    assert not re.search("[\u202a-\u202e\x00\u200b]", html)
    assert "case gnp" in html
    html.encode()


def test_a_page_refers_to_nothing_outside_itself_and_repeats_itself():
    html = render(page_of_all("plain"))
    assert html == render(page_of_all("plain"))
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html)
    reader = Reader(html)
    ids = reader.attributes("id")
    assert len(ids) == len(set(ids))
    assert {f"#{name}" for name in ids} >= {link for link in reader.attributes("href") if link.startswith("#")}


def test_the_policy_lets_only_our_style_and_script_run():
    policy = Reader(render(page_of_all())).tags
    content = next(a["content"] for tag, a in policy if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in content and "unsafe" not in content
    assert re.findall(r"(\w+)-src 'sha256-", content) == ["style", "script"]


@pytest.mark.parametrize(
    "section",
    [
        TextSection(title="t", paragraphs=()),
        TableSection(title="t", columns=(Column(title="a"),), rows=()),
        CurveSection(title="t", x_label="x", y_label="y", series=()),
        ForestSection(title="t", axis_label="x", rows=(("a", interval(None)),)),
        ReliabilitySection(title="t", bins=()),
        AgreementSection(title="t", unit="", points=()),
        AgreementSection(title="t", unit="", points=(("only", 1.0, 1.0),)),
        GallerySection(title="t", items=()),
        FailureSection(title="t", items=()),
    ],
    ids=lambda section: section.kind,
)
def test_sections_of_nothing_are_drawn(section):
    Reader(render(ReportPage(title="t", subtitle="", sections=(section,))))


def test_numbers_sort_by_their_value_and_the_best_are_set_off():
    rows = (("a", interval(0.5), 3), ("b", interval(0.7), 12), ("c", interval(None), None))
    columns = (Column(title="name"), Column(title="Dice", better="higher"), Column(title="n", better="lower"))
    page = ReportPage(title="t", subtitle="", sections=(TableSection(title="t", columns=columns, rows=rows),))
    cells = [a for tag, a in Reader(render(page)).tags if tag == "td"]
    assert [cell.get("data-sort") for cell in cells] == ["0.5", "3.0", "0.7", "12.0", None, None]
    assert ["best" in cell["class"] for cell in cells] == [False, True, True, False, False, False]
