"""The report's figures and pictures: SVG for a page, axes that outliers leave readable, small PNGs."""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.report.content import Gallery, TestResults
from fastmaf.inspection.report.figures import Drawing, roc, score_histogram, training_curve
from fastmaf.inspection.report.findings import verdicts
from fastmaf.inspection.report.pictures import WIDEST, data_uri
from fastmaf.metrics.evaluate import evaluate_scores

pytestmark = pytest.mark.slow  # documents that are built and parsed

RNG = np.random.default_rng(2)
LABELS = ("good",) * 20 + ("a $1 & $2 <b> \u5b57", "cut") * 15
SCORES = np.concatenate([RNG.normal(5, 1, 20), RNG.normal(9, 2, 30)])
RESULTS = TestResults(SCORES, LABELS, (), Gallery((), (), ()))
CALIBRATION = Calibration(RNG.normal(5, 1, 60), 0.05, None, "split")


def curve(nll: list[float], held_out: list[float] | None = None) -> Drawing:
    pairs = zip(nll, held_out or [math.nan] * len(nll), strict=True)
    return training_curve([{"step": i + 1, "nll": a, "held_out_nll": b} for i, (a, b) in enumerate(pairs)])


def histogram(scores: np.ndarray, labels: tuple[str, ...] = LABELS, calibration: Calibration = CALIBRATION) -> Drawing:
    return score_histogram(calibration, replace(RESULTS, scores=scores, labels=labels))


def every_figure() -> dict[str, Drawing]:
    return {
        "curve": curve([-10.0, -11.0, -11.5], [-9.0, -9.5, math.nan]),
        "histogram": histogram(SCORES),
        "roc": roc(
            evaluate_scores(SCORES, LABELS, bootstrap=0), {"chosen threshold": verdicts(RESULTS, CALIBRATION.threshold)}
        ),
    }


@pytest.fixture(scope="module")
def figures() -> dict[str, Drawing]:
    return every_figure()


def texts(drawing: Drawing) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(drawing.svg).iter("text")]


def test_figures_follow_the_colours_of_the_page(figures: dict[str, Drawing]) -> None:
    """A fixed colour would be unreadable on a dark page."""
    for drawing in figures.values():
        assert "var(--" in drawing.svg and not re.findall("#[0-9a-fA-F]{6}", drawing.svg)


def test_figures_say_what_they_show(figures: dict[str, Drawing]) -> None:
    shown = texts(figures["histogram"])
    assert {
        "calibration (n = 60)",
        "good (n = 20)",
        "defective (n = 30)",
        f"threshold {CALIBRATION.threshold:.2f}",
    } <= set(shown)
    assert "a $1 & $2 <b> \u5b57 (15)" in shown and "cut (15)" in shown
    counts = verdicts(RESULTS, CALIBRATION.threshold)
    point = f"{counts.detected} of 30 defects, false alarms: {counts.false_alarms} of 20"
    assert any(point in text for text in texts(figures["roc"]))
    assert point in ElementTree.fromstring(figures["roc"].svg).attrib["aria-label"]
    assert {"training", "held-out good images", "\u221211", "step"} <= set(texts(figures["curve"]))


def test_a_blown_up_score_leaves_the_histogram_readable() -> None:
    blown = SCORES.copy()
    blown[-2:] = 4.0e5, np.inf
    drawing = histogram(blown)
    (note,) = drawing.notes
    assert re.search(r"holds \d+ images? above [0-9.]+, up to infinite", note)
    ticks = [float(text) for text in texts(drawing) if re.fullmatch(r"[0-9.]+", text)]
    assert max(ticks) < 40  # shares in per cent and scores alike
    assert histogram(SCORES).notes == ()


@pytest.mark.parametrize(
    "scores", [np.ones(3), np.array([np.inf, np.inf, 1.0]), np.zeros(3), np.array([-4.1e4, -4.0e4, 9e30])]
)
@pytest.mark.parametrize("threshold", [0.0, 1e9, np.inf])
def test_extreme_scores_are_drawn(scores: np.ndarray, threshold: float) -> None:
    calibration = Calibration(np.append(np.linspace(-1, 0, 20), threshold), 0.01, None, "split")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing = histogram(scores, ("good", "cut", "cut"), calibration)
        assert ElementTree.fromstring(drawing.svg).tag == "svg"
        assert (threshold == 0.0) or "The threshold lies beyond this axis." in drawing.notes


def test_a_histogram_before_there_are_test_images() -> None:
    shown = texts(score_histogram(CALIBRATION, None))
    assert "calibration (60)" in shown and not any("good" in text or "defective" in text for text in shown)


def test_the_curve_survives_what_training_brings() -> None:
    blown = curve([-100.0, -110.0, 5e8, -115.0, -117.0] * 5)
    assert blown.notes == ("Training: 5 of 25 points are above the axis, up to 5e+08 nats at step 3.",)
    assert not any("e+08" in text for text in texts(blown))
    assert curve([-1.0, math.nan, math.nan]).notes == ("Training: no value at 2 of 3 points.",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "held-out good images" in texts(curve([math.nan, math.nan], [-5.0, -6.0]))
        assert curve([math.nan]).notes == ("Training: no value at 1 of 1 points.",)
        assert curve([math.inf, -3.0]).notes[0].startswith("Training: 1 of 2 points are above the axis")


def test_a_held_out_curve_with_a_value_every_tenth_step_is_a_line() -> None:
    """Points between missing values have no line of their own, and long curves have no markers."""
    steps = np.arange(60.0)
    sparse = curve(list(-steps), list(np.where(steps % 10 == 0, 5 - steps, math.nan)))
    paths = [e.attrib for e in ElementTree.fromstring(sparse.svg).iter("path")]
    (line,) = [path["d"] for path in paths if "--orange" in path.get("style", "") and path["d"].count("L") == 5]
    assert line.count("M") == 1


def pixels(uri: str) -> np.ndarray:
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(body, validate=True))) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.asarray(image)


@pytest.mark.parametrize("height, width", [(1, 1), (64, 64), (63, 64), (200, 200), (201, 150), (1000, 333), (2, 3000)])
def test_a_picture_is_never_large_and_never_smoothed_when_enlarged(height: int, width: int) -> None:
    image = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    uri, wide, high = data_uri(image)
    decoded = pixels(uri)
    assert decoded.shape == (high, wide, 3) and max(wide, high) <= WIDEST
    factor = WIDEST // max(height, width)
    if factor:
        np.testing.assert_array_equal(decoded, image.repeat(factor, 0).repeat(factor, 1))
    else:
        assert max(wide, high) == WIDEST
        assert abs(wide / high - width / height) < 0.02 * width / height or min(wide, high) == 1


@pytest.mark.parametrize("size", [64, 500])
def test_the_outline_runs_around_the_defect_and_not_through_it(size: int) -> None:
    image = np.full((size, size, 3), 128, np.uint8)
    mask = np.zeros((size, size), bool)
    mask[size // 4 : size // 2, size // 4 : size // 2] = True
    uri, wide, _ = data_uri(image, mask)
    decoded, scale = pixels(uri), wide / size
    inner = slice(round(size / 4 * scale), round(size / 2 * scale))
    assert (decoded[inner, inner] == 128).all()
    changed = (decoded != 128).any(2)
    ring = np.zeros_like(changed)
    ring[inner.start - 2 : inner.stop + 2, inner.start - 2 : inner.stop + 2] = True
    ring[inner, inner] = False
    np.testing.assert_array_equal(changed, ring)
    assert set(np.unique(decoded[changed])) == {0, 229, 255}
    assert not (pixels(data_uri(image, np.zeros_like(mask))[0]) != 128).any()


def test_a_speck_of_a_large_mask_is_not_lost() -> None:
    mask = np.zeros((1000, 1000), bool)
    mask[501, 502] = True
    assert (pixels(data_uri(np.full((1000, 1000, 3), 128, np.uint8), mask)[0]) == 255).any()
