"""The page in a real browser: no network, no error, nothing runs that should not, and people of all kinds can read it.

Needs chromium and the packages playwright and axe-playwright-python (CONTRIBUTING.md); skipped where one is missing.
"""

import shutil

import pytest
from pages import HOSTILE, page_of_all

from voxdino.report.page import ReportPage, TableSection
from voxdino.report.write import write_report

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENS = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(page_of_all(), tmp_path_factory.mktemp("report")).as_uri()


def visit(browser, report, width=1280, scheme="light", **context):
    """The page, what it complained of, and what it asked the network for."""
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **context).new_page()
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report)
    return page, complaints, [url for url in requests if not url.startswith(("file:", "data:"))]


@pytest.mark.parametrize("width, scheme", SCREENS)
def test_it_opens_from_disk_in_silence_fits_the_screen_and_runs_nothing_foreign(browser, report, width, scheme):
    page, complaints, requests = visit(browser, report, width, scheme)
    assert (complaints, requests) == ([], [])
    assert page.title() == HOSTILE
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("img:not([alt])").count() == 0


@pytest.mark.parametrize("width, scheme", SCREENS)
def test_axe_finds_nothing_serious(browser, report, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page, _, _ = visit(browser, report, width, scheme, bypass_csp=True)
    found = axe.Axe().run(page).response
    assert len(found["passes"]) > 20  # it did look
    assert [
        (v["id"], v["nodes"][0]["html"]) for v in found["violations"] if v["impact"] in ("serious", "critical")
    ] == []


def test_a_script_that_got_in_would_not_run(browser, report):
    page, complaints, _ = visit(browser, report)
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=\"document.title = 1\">')")
    page.wait_for_timeout(200)
    assert page.title() == HOSTILE
    assert any("Content Security Policy" in complaint for complaint in complaints)


def test_tables_sort_by_number_and_back_with_the_undefined_last(browser, tmp_path):
    table = TableSection.from_json(page_of_all("x").sections[1].to_json())
    page, _, _ = visit(browser, write_report(ReportPage(title="t", subtitle="", sections=(table,)), tmp_path).as_uri())
    names = page.locator("tbody th")
    page.locator("thead button").last.click()
    assert names.all_inner_texts() == ["b", "x", "c"]
    page.locator("thead button").last.click()
    assert names.all_inner_texts() == ["x", "b", "c"]
    assert page.locator("thead th").last.get_attribute("aria-sort") == "ascending"
