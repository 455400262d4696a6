"""The report's figures and pictures: SVG for a page, axes that outliers leave readable, small PNGs."""

from __future__ import annotations

import base64
import io
import re
import warnings
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fastmaf.inspection.report import Absent, Outcome, Threshold, TrainingPoint
from fastmaf.inspection.report import figures as drawn
from fastmaf.inspection.report.figures import Drawing, roc, score_histogram, training_curve
from fastmaf.inspection.report.findings import verdicts
from fastmaf.inspection.report.pictures import WIDEST, data_uri
from fastmaf.inspection.report.svg import COLOURS
from fastmaf.metrics.evaluate import evaluate_scores

CSS = (Path(drawn.__file__).parent / "report.css").read_text("utf-8")
RNG = np.random.default_rng(2)
LABELS = ("good",) * 20 + ("a $1 & $2 <b> \u5b57", "cut") * 15
SCORES = np.concatenate([RNG.normal(5, 1, 20), RNG.normal(9, 2, 30)])
OUTCOME = Outcome(SCORES, LABELS)
THRESHOLD = Threshold(7.0, "", 0.05, 0.08, RNG.normal(5, 1, 60))


def curve(nll: list[float | None], held_out: list[float | None] | None = None, unit: str = "epoch") -> Drawing:
    pairs = zip(nll, held_out or [None] * len(nll), strict=True)
    return training_curve(tuple(TrainingPoint(i + 1, a, b) for i, (a, b) in enumerate(pairs)), unit)


def every_figure() -> dict[str, Drawing]:
    return {
        "curve": curve([-10.0, -11.0, -11.5], [-9.0, -9.5, None]),
        "histogram": score_histogram(OUTCOME, THRESHOLD),
        "roc": roc(evaluate_scores(SCORES, LABELS, bootstrap=0), verdicts(OUTCOME, THRESHOLD)),
    }


@pytest.fixture(scope="module")
def figures() -> dict[str, Drawing]:
    return every_figure()


def texts(drawing: Drawing) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(drawing.svg).iter("text")]


def test_figures_are_svg_that_shares_a_page(figures: dict[str, Drawing]) -> None:
    seen: set[str] = set()
    for name, drawing in figures.items():
        root = ElementTree.fromstring(drawing.svg)
        assert root.tag == "svg" and "width" not in root.attrib and root.attrib["viewBox"]
        ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        assert ids and len(ids) == len(set(ids)) and not seen & set(ids)
        assert all(each.startswith(f"{name}-") for each in ids)
        seen |= set(ids)
        wanted = re.findall(r"url\(#([^)]+)\)", drawing.svg)
        wanted += [element.attrib["href"][1:] for element in root.iter() if "href" in element.attrib]
        assert wanted and set(wanted) <= set(ids)
        assert not [element for element in root.iter() if element.tag in ("style", "metadata")]
        assert "http" not in drawing.svg


def test_every_colour_is_one_of_the_pages(figures: dict[str, Drawing]) -> None:
    light, dark = CSS.partition("@media screen and (prefers-color-scheme: dark)")[::2]
    dark = dark[: dark.index("\n}")]
    for drawing in figures.values():
        assert not re.findall("#[0-9a-fA-F]{6}", drawing.svg)
        used = set(re.findall(r"var\((--[a-z]+)\)", drawing.svg))
        assert used and used <= set(COLOURS.values())
    for variable in COLOURS.values():
        assert f"{variable}: #" in light and f"{variable}: #" in dark
    for colour, variable in COLOURS.items():
        if variable in ("--blue", "--orange", "--green", "--purple", "--grey"):  # the house's own, on white
            assert f"{variable}: {colour.lower()};" in light
    for text in ElementTree.fromstring(figures["roc"].svg).iter("text"):
        assert "var(--ink)" in text.attrib["style"]


def test_figures_say_what_they_show(figures: dict[str, Drawing]) -> None:
    said = texts(figures["histogram"])
    assert {"calibration (60)", "good (20)", "defective (30)", "threshold 7.00"} <= set(said)
    assert "a $1 & $2 <b> \u5b57 (15)" in said and "cut (15)" in said
    counts = verdicts(OUTCOME, THRESHOLD)
    point = f"{counts.detected} of 30 defects, {counts.false_alarms} of 20 false alarms"
    assert any(point in text for text in texts(figures["roc"]))
    assert point in ElementTree.fromstring(figures["roc"].svg).attrib["aria-label"]
    assert {"training", "held-out normals", "\u221211", "epoch"} <= set(texts(figures["curve"]))
    without = roc(evaluate_scores(SCORES, LABELS, bootstrap=0), verdicts(OUTCOME, Absent("never calibrated")))
    assert not any("chosen" in text for text in texts(without))


def test_a_blown_up_score_leaves_the_histogram_readable() -> None:
    blown = SCORES.copy()
    blown[-2:] = 4.0e5, np.inf
    drawing = score_histogram(Outcome(blown, LABELS), THRESHOLD)
    (note,) = drawing.notes
    assert re.search(r"holds \d+ images? above [0-9.]+, as far as infinite", note)
    ticks = [float(text) for text in texts(drawing) if re.fullmatch(r"[0-9.]+", text)]
    assert max(ticks) < 40  # shares in per cent and scores alike
    grey = [reach for style, *reach in outlines(drawing) if "fill: var(--shade)" in style]
    bars = [reach for style, *reach in outlines(drawing) if "stroke: var(--orange)" in style and "dash" in style]
    assert len(grey) == 2 and grey[0] == grey[1]  # the bin at the right, above and below
    assert max(right for _, right in bars) == pytest.approx(grey[0][1], abs=0.01)  # holds a bar
    assert score_histogram(OUTCOME, THRESHOLD).notes == ()
    assert not [style for style, *_ in outlines(score_histogram(OUTCOME, THRESHOLD)) if "--shade" in style]


def outlines(drawing: Drawing) -> list[tuple[str, float, float]]:
    """Style, left and right end of every path."""
    out = []
    for path in ElementTree.fromstring(drawing.svg).iter("path"):
        x = [float(pair[0]) for pair in re.findall(r"([-0-9.]+) ([-0-9.]+)", path.attrib["d"])]
        out.append((path.attrib.get("style", ""), min(x), max(x)))
    return out


@pytest.mark.parametrize(
    "scores", [np.ones(3), np.array([np.inf, np.inf, 1.0]), np.zeros(3), np.array([-4.1e4, -4.0e4, 9e30])]
)
@pytest.mark.parametrize("threshold", [0.0, -1e9, np.inf])
def test_scores_at_the_edge_of_sense_are_drawn(scores: np.ndarray, threshold: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing = score_histogram(Outcome(scores, ("good", "cut", "cut")), replace(THRESHOLD, value=threshold))
        assert ElementTree.fromstring(drawing.svg).tag == "svg"
        assert (threshold == 0.0) or "The threshold lies beyond this axis." in drawing.notes


def test_a_histogram_of_one_side_alone() -> None:
    assert "calibration (60)" in texts(score_histogram(None, THRESHOLD))
    said = texts(score_histogram(Outcome(SCORES, None), None))
    assert "test (class unknown) (50)" in said and not any("threshold" in text for text in said)
    assert "cut (1)" in texts(score_histogram(Outcome(np.array([3.0]), ("cut",)), None))


def test_the_curve_survives_what_training_brings() -> None:
    blown = curve([-100.0, -110.0, 5e8, -115.0, -117.0] * 5, unit="step")
    assert blown.notes == ("Training: above the axis 5 of 25 points, as far as 5e+08 nats at step 3.",)
    assert not any("e+08" in text for text in texts(blown))
    assert curve([-1.0, None, float("nan")]).notes == ("Training: no number at 2 of 3 points.",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "held-out normals" in texts(curve([None, None], [-5.0, -6.0]))
        assert curve([None]).notes == ("Training: no number at 1 of 1 points.",)
        assert curve([float("inf"), -3.0]).notes[0].startswith("Training: above the axis 1 of 2 points")


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
    found = pixels(uri)
    assert found.shape == (high, wide, 3) and max(wide, high) <= WIDEST
    factor = WIDEST // max(height, width)
    if factor:
        np.testing.assert_array_equal(found, image.repeat(factor, 0).repeat(factor, 1))
    else:
        assert max(wide, high) == WIDEST
        assert abs(wide / high - width / height) < 0.02 * width / height or min(wide, high) == 1


@pytest.mark.parametrize("size", [64, 500])
def test_the_outline_runs_around_the_defect_and_not_through_it(size: int) -> None:
    image = np.full((size, size, 3), 128, np.uint8)
    mask = np.zeros((size, size), bool)
    mask[size // 4 : size // 2, size // 4 : size // 2] = True
    uri, wide, _ = data_uri(image, mask)
    found, scale = pixels(uri), wide / size
    inner = slice(round(size / 4 * scale), round(size / 2 * scale))
    assert (found[inner, inner] == 128).all()
    changed = (found != 128).any(2)
    ring = np.zeros_like(changed)
    ring[inner.start - 2 : inner.stop + 2, inner.start - 2 : inner.stop + 2] = True
    ring[inner, inner] = False
    np.testing.assert_array_equal(changed, ring)
    assert set(np.unique(found[changed])) == {0, 255}
    assert not (pixels(data_uri(image, np.zeros_like(mask))[0]) != 128).any()


def test_a_speck_of_a_large_mask_is_not_lost() -> None:
    mask = np.zeros((1000, 1000), bool)
    mask[501, 502] = True
    assert (pixels(data_uri(np.full((1000, 1000, 3), 128, np.uint8), mask)[0]) == 255).any()
