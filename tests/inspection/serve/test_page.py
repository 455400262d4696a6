"""The page of ``fastmaf inspect serve`` in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.inspection.browser import chromium, needs_browser
from tests.inspection.serve.server import Server, running

pytestmark = [pytest.mark.slow, needs_browser]
# Drops a file, as a user does: its bytes and its name.
_DROP = """
const transfer = new DataTransfer();
transfer.items.add(new File([Uint8Array.from(arguments[0])], arguments[1]));
document.getElementById('drop').dispatchEvent(
  new DragEvent('drop', { dataTransfer: transfer, bubbles: true, cancelable: true }));
"""


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with running(run, tmp_path_factory.mktemp("log") / "log") as found:
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def image(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(100, 140, (30, 40, 3)).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "ein Bild ä.png")
    return tmp_path / "ein Bild ä.png"


def shown(browser: Any) -> tuple[str, str, str, Any]:
    """Waits for an answer; returns the verdict, its class, the figures, and the picture."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(
        lambda driver: driver.find_element("id", "verdict").text not in ("", "…")  # type: ignore[no-any-return]
    )
    verdict = browser.find_element("id", "verdict")
    picture = browser.find_element("id", "overlay")
    return verdict.text, verdict.get_attribute("class"), browser.find_element("id", "figures").text, picture


def messages(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_an_image_that_is_chosen_or_dropped_is_scored(browser: Any, server: Server, image: Path) -> None:
    for way in ("chosen", "dropped"):
        browser.get(server.url)
        if way == "chosen":
            browser.find_element("id", "file").send_keys(str(image))
        else:
            browser.execute_script(_DROP, list(image.read_bytes()), image.name)
        verdict, kind, figures, picture = shown(browser)
        assert verdict == kind and verdict in ("good", "anomalous")
        assert figures.startswith("ein Bild ä.png, 40 × 30; score ") and "threshold" in figures and "p-value" in figures
        assert picture.is_displayed()
        size = browser.execute_script("return [arguments[0].naturalWidth, arguments[0].naturalHeight]", picture)
        assert size == [40, 30] and messages(browser) == []


def test_what_is_no_image_is_said_to_be_none(browser: Any, server: Server, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("<b>hello</b>")
    browser.get(server.url)
    browser.find_element("id", "file").send_keys(str(tmp_path / "text.png"))
    verdict, kind, figures, picture = shown(browser)
    assert (verdict, kind) == ("not scored", "error") and "not a readable image" in figures
    assert not picture.is_displayed()


def test_the_page_asks_for_nothing_else(browser: Any, server: Server) -> None:
    browser.get(server.url)
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [entry for entry in fetched if not entry.startswith("data:")] == []
    browser.get_log("browser")
    browser.execute_script("const i = new Image(); i.src = 'http://127.0.0.1:9/a.png'; document.body.append(i)")
    assert any("Content Security Policy" in message for message in messages(browser))


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_a_desk_and_a_phone(browser: Any, server: Server, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(server.url)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
