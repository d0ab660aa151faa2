"""The report's page in a real browser: opened from disk, used, and never asking the network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from report_runs import comparison, unfinished, values

from benchmarks.report import write_report

pytestmark = pytest.mark.browser

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
)
ROWS = {
    "flow_matching": {0: values(100.0, 50.0), 1: values(200.0, 60.0)},
    "mean_flow": {0: values(90.0, 55.0), 1: values(190.5, 50.0)},
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install '.[browser]'")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium on the PATH")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=list(ARGUMENTS))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    runs = comparison(tmp_path_factory.mktemp("browser") / "runs", ROWS)
    unfinished(runs, "dumo", RuntimeError("<script>alert(1)</script>"))
    write_report([runs], runs.parent / "report")
    return runs.parent / "report" / "report.html"


@pytest.fixture(scope="module")
def opened(browser, report) -> Iterator[Any]:
    """The page, and what it said on the console and asked for."""
    context = browser.new_context(offline=True, viewport={"width": 1200, "height": 900})
    context.set_default_timeout(120_000)  # ms, for a busy machine
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    own = ("data:", "blob:", report.as_uri())
    page.on("request", lambda r: None if r.url.startswith(own) else said.append(r.url))
    page.goto(report.as_uri())
    yield page, said
    context.close()


@pytest.fixture
def page(opened) -> Iterator[Any]:
    """The page with everything shown; after each test it has said and asked nothing."""
    page, said = opened
    yield page
    for box in page.locator("#arms input:not(:checked), [data-show-nfe]:not(:checked)").all():
        box.check()
    assert said == []


def drawn(page, place: str) -> None:
    page.locator(f"#{place}").scroll_into_view_if_needed()
    page.wait_for_selector(f"#{place} .main-svg")


def wait_until(page, script: str) -> None:
    """page.wait_for_function would evaluate text, which the page's policy forbids."""
    for _ in range(600):
        if page.evaluate(script):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"never true: {script}")


def visible_rows(page, place: str) -> set[str]:
    """The rows whose curves a figure shows."""
    script = "p => p.data.filter(t => t.visible === true).map(t => t.meta)"
    return set(page.locator(f"#{place}").evaluate(script))


def test_box_switches_a_row_off_in_every_figure_table_and_sample(page):
    drawn(page, "quality_nfe-0-0")
    assert visible_rows(page, "quality_nfe-0-0") == set(ROWS)
    rows = page.locator('tr[data-arm="1"]')
    assert rows.first.is_visible()
    page.locator('[data-toggle="1"]').uncheck()
    assert visible_rows(page, "quality_nfe-0-0") == {"flow_matching"}
    assert rows.evaluate_all("rows => rows.every(row => row.hidden)")
    drawn(page, "training-0-0")  # drawn after the choice, and keeps to it
    assert visible_rows(page, "training-0-0") == {"flow_matching"}
    page.locator('[data-toggle="1"]').check()
    assert visible_rows(page, "training-0-0") == visible_rows(page, "quality_nfe-0-0") == set(ROWS)
    assert rows.first.is_visible()


def test_legend_switches_a_row_off_everywhere(page):
    drawn(page, "quality_seconds-0-0")
    drawn(page, "quality_nfe-0-0")
    page.locator("#quality_nfe-0-0 .legendtoggle").nth(1).click()
    wait_until(page, "!document.querySelector('[data-toggle=\"1\"]').checked")
    for place in ("quality_nfe-0-0", "quality_seconds-0-0"):
        wait_until(page, f"document.getElementById('{place}').data.some(t => t.visible !== true)")
        assert visible_rows(page, place) == {"flow_matching"}


def test_hover_says_the_value_and_the_row(page):
    drawn(page, "quality_nfe-0-0")
    place = page.locator("#quality_nfe-0-0")
    place.evaluate("p => Plotly.Fx.hover(p, [{curveNumber: 3, pointNumber: 0}])")
    shown = place.locator(".hovertext")
    assert "140.25" in shown.text_content()
    assert "mean_flow" in shown.text_content()


def test_slider_shows_the_samples_of_an_earlier_step(page):
    image = page.locator("#strip-0-0")
    final = image.get_attribute("src")
    slider = page.locator("input.steps")
    assert slider.evaluate("s => [s.nextElementSibling.value, s.dataset.steps]") == ["20", "10 20"]
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert image.get_attribute("src") != final
    assert "step 10" in image.get_attribute("alt")
    assert page.locator('[data-step-of="strip-0-0"]').inner_text() == "10"
    page.keyboard.press("ArrowRight")
    assert image.get_attribute("src") == final


def test_nfe_box_hides_its_samples_and_does_not_undo_a_hidden_row(page):
    shown = page.locator('tr[data-nfe="0-1"]')
    page.locator('[data-show-nfe="0-1"]').uncheck()
    assert shown.evaluate_all("rows => rows.every(row => row.hidden)")
    page.locator('[data-toggle="0"]').uncheck()
    page.locator('[data-show-nfe="0-1"]').check()
    assert shown.evaluate_all("rows => rows.map(row => row.hidden)") == [True, False]


def test_page_follows_the_colour_scheme_and_fits_a_narrow_screen(page):
    drawn(page, "quality_nfe-0-0")
    ground = "p => p.layout.paper_bgcolor"
    assert page.locator("#quality_nfe-0-0").evaluate(ground) == "#ffffff"
    page.emulate_media(color_scheme="dark")
    wait_until(
        page, "document.getElementById('quality_nfe-0-0').layout.paper_bgcolor === '#16181c'"
    )
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 380, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    page.set_viewport_size({"width": 1200, "height": 900})


def test_page_is_readable_without_sight_of_it(page):
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("h1").count() == 1
    assert page.locator("table:not(:has(caption))").count() == 0
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    assert page.locator(".panel:not([aria-label])").count() == 0
    levels = page.locator("h1, h2, h3").evaluate_all("all => all.map(h => +h.tagName[1])")
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_what_a_record_says_is_text_and_never_markup(page):
    assert page.get_by_text("RuntimeError: <script>alert(1)</script>").count() == 1


def test_printing_draws_every_figure(page):
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    wait_until(
        page, "[...document.querySelectorAll('.panel')].every(p => p.querySelector('.main-svg'))"
    )
