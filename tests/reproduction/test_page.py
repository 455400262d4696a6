"""The page of a reproduction: self-contained, with both recipes, names escaped, shown in headless Chromium."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastmaf.reproduction import Reproduction, reproduce
from tests.inspection.browser import browser, needs_browser, opened
from tests.inspection.report.report_read import Element, read
from tests.reproduction.tiny import RECIPE, TINY

__all__ = ["browser"]
NASTY = "<i>&\"'{{ 7*7 }}"

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::fastmaf.ConnectivityWarning")]


@pytest.fixture(scope="module")
def page(ten_epochs: tuple[Path, Reproduction, str]) -> Element:
    return read((ten_epochs[0] / "report.html").read_text("utf-8"))


def test_it_needs_no_other_file(page: Element) -> None:
    assert not page.all("script") and not page.all("iframe")
    assert [link.attributes["href"] for link in page.all("link")] == ["data:,"]
    assert all(image.attributes["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert "url(" not in "".join(style.text for style in page.all("style"))
    links = {link.attributes["href"] for link in page.all("a")}
    assert {link for link in links if not link.startswith("#")} == {"inspection/report.html"}
    ids = [element.attributes["id"] for element in page.walk() if "id" in element.attributes]
    assert len(ids) == len(set(ids)) and {link[1:] for link in links if link.startswith("#")} <= set(ids)


def test_its_link_leads_to_the_report(ten_epochs: tuple[Path, Reproduction, str]) -> None:
    assert read((ten_epochs[0] / "inspection" / "report.html").read_text("utf-8")).one("h1").text == "Inspection report"


def test_both_recipes_are_on_it(page: Element, ten_epochs: tuple[Path, Reproduction, str]) -> None:
    out, result, _ = ten_epochs
    ours = result.inspection
    assert ours is not None
    table = page.table("The published run, its repetition here")
    assert [cell.split(" (")[0] for cell in table[0][1:]] == ["published run", "this run", "fastmaf's recipe"]
    text = (out / "comparison.txt").read_text("utf-8")
    for row in table[1:]:
        assert re.search(r"^ *" + r" +".join(map(re.escape, row)) + "$", text, re.MULTILINE), row
    assert f"{result.evaluation.auroc:.3f}" in page.one("section", id="summary").text
    assert f"{ours.evaluation.auroc:.3f}" in page.one("section", id="summary").text
    figures = [svg.attributes["aria-label"] for svg in page.all("svg")]
    assert [label.split(" ")[0] for label in figures] == ["NLL", "ROC", "Anomaly", "ROC", "Training"]
    strips = page.one("section", id="samples").all("figure")
    assert [len(strip.all("img")) for strip in strips] == [5, 5, 5]
    assert len(page.one("section", id="images").all("figure")) >= 1
    assert [row[0] for row in page.table("By class")[1:]] == ["good", "crack", "poke", "squeeze"]


def test_a_class_name_is_no_markup(data: Path, tmp_path: Path) -> None:
    root = shutil.copytree(data, tmp_path / "data")
    for folder in ("test", "ground_truth"):
        (root / folder / "crack").rename(root / folder / NASTY)
    result = reproduce(tmp_path / "out", TINY, data=root, recipe=RECIPE, progress=False, say=lambda text: None)
    assert result is not None
    page = read((tmp_path / "out" / "report.html").read_text("utf-8"))
    assert NASTY in [row[0] for row in page.table("By class")[1:]]
    assert not page.all("i")


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_shown_whole_in_a_browser(
    browser: Any, ten_epochs: tuple[Path, Reproduction, str], width: int, scheme: str
) -> None:
    browser.get_log("browser")
    opened(browser, ten_epochs[0] / "report.html", width, scheme)
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    complete = browser.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert len(complete) > 15 and all(complete)
    red, *_ = re.findall(r"\d+", browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert (int(red) > 200) == (scheme == "light")
