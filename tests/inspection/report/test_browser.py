"""The report in a real browser: headless Chromium, at a desk's width and a phone's, by day and by night."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastmaf.inspection.report.page import write_report
from tests.inspection.browser import browser, needs_browser, opened
from tests.inspection.report.report_made import example_report, named_badly, untested

__all__ = ["browser"]
pytestmark = [pytest.mark.slow, needs_browser]

PAGES = ("full", "untested", "badly named")
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("Berichte mit Umlaut \u00fc")
    report = example_report(folder)
    reports = {"full": report, "untested": untested(report), "badly named": named_badly(report)}
    return {name: write_report(folder / f"{name}.html", each) for name, each in reports.items()}


def colours(browser: Any, selector: str, text: str = "color") -> list[tuple[float, float]]:
    """Relative luminances (WCAG 2) of text and ground of every element that is found."""
    script = """
    const out = [];
    for (const element of document.querySelectorAll(arguments[0])) {
      let at = element, ground = 'rgba(0, 0, 0, 0)';
      while (at && /, 0\\)$/.test(ground)) { ground = getComputedStyle(at).backgroundColor; at = at.parentElement; }
      out.push([getComputedStyle(element)[arguments[1]], ground]);
    }
    return out;"""
    return [(luminance(a), luminance(b)) for a, b in browser.execute_script(script, selector, text)]


def luminance(colour: str) -> float:
    parts = [float(each) for each in re.findall(r"[0-9.]+", colour)]
    assert len(parts) == 3 or parts[3] == 1, f"{colour} lets something shine through"
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in parts[:3])]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", PAGES)
def test_it_opens_without_a_complaint_and_asks_for_nothing(browser: Any, pages: dict[str, Path], name: str) -> None:
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")  # what was before does not count
    opened(browser, pages[name])
    assert browser.title and browser.execute_script("return document.readyState") == "complete"
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} == {pages[name].as_uri()}
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [entry for entry in fetched if not entry.startswith("data:")] == []


def test_the_policy_would_stop_a_request(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["full"])
    browser.get_log("browser")
    script = "const i = new Image(); i.src = arguments[0]; document.body.append(i)"
    browser.execute_script(script, (pages["full"].parent / "other.png").as_uri())
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_sticks_out(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    opened(browser, pages[name], width)
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    out = browser.execute_script(
        """return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
             && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert out == []
    wide = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    )
    assert wide == 0 or width == 390 or name == "badly named"  # a desk has room for every table


@pytest.mark.parametrize("width", WIDTHS)
def test_every_picture_and_figure_is_there(browser: Any, pages: dict[str, Path], width: int) -> None:
    opened(browser, pages["full"], width)
    images = browser.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.naturalWidth / i.naturalHeight - "
        "i.width / i.height, i.width])"
    )
    assert len(images) > 40
    for complete, natural, skew, shown in images:
        assert complete and 0 < natural <= 200 and abs(skew) < 0.03 and shown > 40
    figures = browser.execute_script(
        """return [...document.querySelectorAll('svg.figure')].map(svg => {
             const box = svg.getBoundingClientRect();
             const cut = [...svg.querySelectorAll('text')].filter(t => { const b = t.getBoundingClientRect();
               return b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1
                 || b.bottom > box.bottom + 1;
             }).map(t => t.textContent);
             const size = Math.min(...[...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect().height));
             return [box.width, box.height, cut, size] })"""
    )
    assert len(figures) == 3
    for figure_width, height, cut, size in figures:
        assert figure_width > 250 and height > 150 and cut == [] and size > 8


def test_the_table_of_contents_leads_somewhere(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["full"])
    links = browser.find_elements("css selector", "nav a")
    assert len(links) == 9
    for link in links:
        link.click()
        target = browser.execute_script("return document.querySelector(':target')")
        assert target is not None
        assert target.find_element("css selector", "h2").text == link.text
        assert browser.execute_script("return Math.abs(arguments[0].getBoundingClientRect().top) < innerHeight", target)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_by_day_and_by_night(browser: Any, pages: dict[str, Path], scheme: str) -> None:
    opened(browser, pages["full"], scheme=scheme)
    ((_, ground),) = colours(browser, "body")
    assert ground > 0.9 if scheme == "light" else ground < 0.03
    for selector in ("body", "h1", "p", "a", "figcaption", "caption", "td", "th", ".quiet", ".alarm", ".passed", "dt"):
        luminances = colours(browser, selector)
        assert luminances, selector
        for a, b in luminances:
            assert (max(a, b) + 0.05) / (min(a, b) + 0.05) >= 4.5, selector
    marks = colours(browser, "svg.figure text", "fill")
    assert marks and all((max(a, b) + 0.05) / (min(a, b) + 0.05) >= 4.5 for a, b in marks)
    lines = browser.execute_script(
        "return [...document.querySelectorAll('svg.figure path')].map(p => getComputedStyle(p).stroke)"
        ".filter(c => c != 'none')"
    )
    for colour in set(lines):
        a = luminance(colour)
        assert (max(a, ground) + 0.05) / (min(a, ground) + 0.05) >= 3, colour  # graphics: WCAG 1.4.11


def test_it_prints_on_white_and_within_the_sheet(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["full"], width=718, scheme="dark", media="print")  # A4 within margins of 1 cm
    ((ink, ground),) = colours(browser, "body")
    assert ground == pytest.approx(1.0) and ink < 0.02
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 718
    assert browser.execute_script("return getComputedStyle(document.querySelector('nav')).display") == "none"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert len(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]) > 10_000
