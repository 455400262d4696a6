"""The report as a document: what it says, what it says of parts that are absent, and what it never does."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from fastmaf.images.names import visible
from fastmaf.inspection.evaluate import TableRow
from fastmaf.inspection.report.content import Gallery, Report, TestResults, Training
from fastmaf.inspection.report.findings import better, winning_baselines, worst_cases
from fastmaf.inspection.report.page import write_report
from fastmaf.inspection.report.text import interval, number, percent, score_digits
from fastmaf.metrics.intervals import rate_interval
from tests.inspection.report.report_made import DEFECTS, example_report, row, untested
from tests.inspection.report.report_read import Element, read

pytestmark = pytest.mark.slow  # documents that are built and parsed

NASTY = "<script>alert(1)</script>&\"'`{{ 7*7 }}</title>$\\frac$ \u5b57\u00e9 \udcff\u202egnp.exe\n\x00."
SHOWN = "<script>alert(1)</script>&\"'`{{ 7*7 }}</title>$\\frac$ \u5b57\u00e9 \\xff\\u202egnp.exe\\x0a\\x00."


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return example_report(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Element:
    return written(report, tmp_path_factory.mktemp("page"))


def written(report: Report, folder: Path) -> Element:
    path = write_report(folder / "report.html", report)
    assert [entry.name for entry in path.parent.iterdir() if entry.name.endswith(".tmp")] == []
    return read(path.read_text("utf-8"))


def section(page: Element, name: str) -> Element:
    return page.one("section", id=name)


def test_the_page_is_a_document_with_headings_captions_and_alternative_texts(page: Element, report: Report) -> None:
    assert page.one("html").attributes["lang"] == "en"
    assert page.one("title").text == page.one("h1").text == "Inspection report"
    links = [link.attributes["href"] for link in page.one("nav").all("a")]
    assert links == [f"#{each.attributes['id']}" for each in page.all("section")]
    ids = [element.attributes["id"] for element in page.walk() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    assert all(table.all("caption") and table.all("th") for table in page.all("table"))
    assert all(each.attributes["alt"] for each in page.all("img"))
    assert all(svg.attributes["role"] == "img" and svg.attributes["aria-label"] for svg in page.all("svg"))
    levels = [int(element.tag[1]) for element in page.walk() if re.fullmatch("h[1-6]", element.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))


def test_the_page_asks_for_nothing_else(report: Report, page: Element, tmp_path: Path) -> None:
    policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    text = write_report(tmp_path / "report.html", report).read_text("utf-8")
    assert "://" not in text and "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    for element in page.walk():
        assert element.tag not in ("script", "iframe", "object", "embed", "base", "form")
        for name, value in element.attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value.startswith("#" if element.tag in ("a", "use") else "data:"), value[:80]
    assert len(text) < 1_500_000


def test_the_numbers_stand_where_they_belong(page: Element, report: Report) -> None:
    counts = section(page, "data").table("Images by split")
    assert counts[:3] == [
        ["Split", "Class", "Images"],
        ["train", "good", "219"],
        ["calibration", "good (held out, 5 folds)", "219"],
    ]
    assert ["test", "scratch", "5"] in counts
    assert section(page, "data").table("skipped (1)")[1][0] == "train/good/031.png"
    assert "1 image turned by its EXIF orientation" in section(page, "data").text
    assert ["learning rate", "2e-5"] in section(page, "settings").table("Settings")
    folds = section(page, "training").table("each fold")
    assert folds[1] == ["1", "44", "\u221257,214.2"]
    mean = (44 * (-57214.2 - 57388.0 - 56911.7 - 57102.4) - 43 * 57377.6) / 219
    assert folds[-1] == ["All images", "219", f"{mean:,.1f}".replace("-", "\u2212")]
    speed = section(page, "settings")
    assert speed.table("Time for one image")[-1] == ["decode to verdict", "27.02", "31.40", "200"]
    assert ["threads", "2"] in speed.table("Environment")
    assert len(section(page, "assumptions").all("li")) == 3
    numeric = [cell for cell in page.all("td") if re.fullmatch("[\u2212+]?[0-9.,]+%?", cell.text)]
    pairs = {"pairs"}  # settings are words
    assert all(
        cell.attributes.get("class") == "n" or pairs & {t.attributes.get("class") for t in ancestors(cell)}
        for cell in numeric
    )


def ancestors(element: Element) -> list[Element]:
    out = []
    while element.parent is not None:
        element = element.parent
        out.append(element)
    return out


def test_the_score_table_marks_the_default(page: Element) -> None:
    table = section(page, "scores").table("All scores")
    assert table[0] == [
        "Name", "Kind", "Image AUROC", "95% interval", "Minus default, 95%",
        "Pixel AUROC", "Minus default, 95%", "AU-PRO",
    ]  # fmt: skip
    default = ["default score", "0.939", "0.851 to 0.988", "\u2013", "0.952", "\u2013", "0.871"]
    assert table[1] == ["map maximum", *default] and not any("default" in row[1] for row in table[2:])
    (pca,) = [row for row in table if row[0] == "PCA residual"]
    assert pca[4:] == ["\u22120.133 to \u22120.031", "0.947", "\u22120.011 to +0.002", "0.853"]
    (plain,) = [row for row in table if row[0] == "plain NLL"]
    assert plain[4:] == ["\u22120.104 to \u22120.018", "\u2013", "\u2013", "\u2013"]


def test_verdicts_by_class_follow_from_scores_and_threshold(page: Element, report: Report) -> None:
    assert report.test is not None
    labels, alarm = np.array(report.test.labels), report.test.scores > report.calibration.threshold
    table = section(page, "detection").table("By class")
    assert [row[0] for row in table[1:]] == ["good", *sorted(DEFECTS)]
    for name, n, area, alarms, share, interval_of_share in table[1:]:
        alarms_of_class = alarm[labels == name]
        assert (n, alarms, share) == (
            str(len(alarms_of_class)),
            str(alarms_of_class.sum()),
            f"{alarms_of_class.mean():.1%}",
        )
        assert (area == "\u2013") == (name == "good")
        ends = rate_interval(int(alarms), int(n))
        assert interval_of_share == f"{ends[0]:.1%} to {ends[1]:.1%}"
    assert "1 of 6 (16.7%, 95% interval 0.4% to 64.1%)" in section(page, "threshold").text
    for line in report.calibration.describe(explain=True).splitlines():
        assert line in [each.text for each in section(page, "threshold").all("p")]


def test_exhibits_stand_beside_their_anomaly_maps(page: Element, report: Report) -> None:
    assert report.test is not None
    gallery, shown = report.test.gallery, section(page, "images")
    captions = [each.text for each in shown.all("figcaption")][1:]  # the first is that of the colours
    at = number(report.calibration.threshold, 2)
    assert captions[0] == f"good/000.png class good, score 12.40, threshold {at}, p = 0.0409, alarm"
    verdicts = [caption.rpartition(", ")[2] for caption in captions]
    assert verdicts == ["alarm"] + ["passed"] * len(gallery.misses) + ["alarm"] * 6
    assert [each.text for each in shown.all("h3")] == ["Worst false alarms", "Worst misses", "Clearest detections"]
    assert "1.25" in shown.all("span")[0].text and "6.50" in shown.all("span")[1].text
    pictures = shown.all("img")[1:]
    assert [each.attributes["alt"] for each in pictures[:4]] == [
        "image good/000.png",
        "anomaly map of good/000.png",
        f"image {gallery.misses[0].file}, labelled defect outlined",
        f"anomaly map of {gallery.misses[0].file}",
    ]
    assert all(each.attributes["width"] == each.attributes["height"] == "192" for each in pictures)


def test_the_summary_in_words(page: Element) -> None:
    text = section(page, "summary").text
    for part in (
        "28 images: 6 good images and 22 defective images",
        "1 of 6 good ones (16.7%)",
        "0.939 (95% interval 0.851 to 0.988)",
        "5.0% false alarms are expected on average, and with 95% confidence at most 7.6%",
        "No baseline beats the default score (map maximum)",
    ):
        assert part in text
    detected = sum(int(row[3]) for row in section(page, "detection").table("By class")[2:])
    assert f"found {detected} of 22 defective images ({detected / 22:.1%})" in text


def test_an_absent_part_is_named_with_its_reason(report: Report, tmp_path: Path) -> None:
    page = written(untested(report), tmp_path)
    for part in ("training", "scores", "threshold", "detection"):
        lines = [each.text for each in section(page, part).all("p", class_="absent")]
        reason = "the model file does not record its training" if part == "training" else "no test images were scored"
        assert lines and all(f": not shown, as {reason}" in line for line in lines), part


def test_before_there_are_test_images_the_most_unusual_good_images_are_shown(report: Report, tmp_path: Path) -> None:
    page = written(untested(report), tmp_path)
    shown = section(page, "images")
    assert [each.text for each in shown.all("h3")] == ["Good images with the highest scores: is there a defect in one?"]
    assert [each.attributes["alt"] for each in shown.all("img")[1::2]] == [f"image {e.file}" for e in report.unusual]
    above = int((report.calibration.scores > report.calibration.threshold).sum())
    assert f"{above} of 219 images" in section(page, "summary").text


def test_verdicts_and_images_come_first_and_settings_last(page: Element) -> None:
    names = [each.attributes["id"] for each in page.all("section")]
    assert names[:2] == ["summary", "images"] and names[-1] == "settings"


def test_a_report_without_blocks_and_without_misses(report: Report, tmp_path: Path) -> None:
    assert report.training is not None and report.test is not None
    test = replace(report.test, gallery=report.test.gallery._replace(misses=()))
    page = written(replace(report, training=replace(report.training, log=()), test=test), tmp_path)
    assert "Training curve: not shown, as the model has no trained blocks." in section(page, "training").text
    assert "No defective test image was missed." in section(page, "images").text


def test_texts_of_others_are_shown_and_never_obeyed(report: Report, tmp_path: Path) -> None:
    test = report.test
    assert test is not None
    shown = test.gallery.detections[0]._replace(file=NASTY, label=NASTY)
    nasty = replace(
        report,
        model=NASTY, date=NASTY,
        counts=((NASTY, NASTY, 1),), notes=(NASTY,), skipped=((NASTY, NASTY),),
        samples=((NASTY, np.zeros((1, 4, 4, 3), np.uint8)),),
        training=Training(((NASTY, NASTY),), (), ((1, 2.0),)),
        calibration=replace(report.calibration, source=NASTY),
        test=TestResults(
            test.scores,
            tuple(NASTY if label == "crack" else label for label in test.labels),
            (*test.table, row(NASTY, "baseline", 0.99)),
            Gallery((shown,), (), (shown,)),
        ),
        timings=((NASTY, 1.0, 2.0, 3),),
        environment=((NASTY, NASTY),),
    )  # fmt: skip
    page = written(nasty, tmp_path)
    assert {element.tag for element in page.walk()} <= {element.tag for element in written(report, tmp_path).walk()}
    assert SHOWN in page.one("header").text
    assert section(page, "data").table("skipped")[1] == [SHOWN, SHOWN]
    assert f"The baseline {SHOWN} has the higher image AUROC" in section(page, "summary").text
    assert SHOWN in [row[0] for row in section(page, "detection").table("By class")]
    assert section(page, "images").all("img")[1].attributes["alt"].startswith(f"image {SHOWN}")
    assert any(each.text.startswith(SHOWN[:17]) for each in section(page, "detection").all("text"))


@pytest.mark.slow
def test_the_same_report_gives_the_same_bytes_whatever_the_users_style(report: Report, tmp_path: Path) -> None:
    first = write_report(tmp_path / "a.html", report).read_bytes()
    with matplotlib.rc_context({"lines.color": "red", "text.color": "red", "svg.fonttype": "path", "font.size": 30}):
        second = write_report(tmp_path / "b.html", report).read_bytes()
    assert first == second


def rows(*others: TableRow) -> tuple[TableRow, ...]:
    return (row("map", "score", 0.9, pixel_auroc=0.95, default=True), *others)


def test_who_wins_is_read_off_the_rows() -> None:
    assert winning_baselines(rows()) == ("No baseline was evaluated, so the benefit of the model is not shown.",)
    assert winning_baselines(rows(row("PCA", "baseline", 0.9))) == (
        "The baseline PCA does not beat the default score (map).",
    )
    (sentence,) = winning_baselines(rows(row("PCA", "baseline", 0.912, difference=(-0.01, 0.03))))
    assert sentence == (
        "The baseline PCA has the higher image AUROC: 0.912 against 0.900 for the default score (map); the paired 95% "
        "interval of the difference, \u22120.010 to +0.030, includes 0: not significant on these images."
    )
    (sentence,) = winning_baselines(rows(row("PCA", "baseline", 0.95, difference=(0.01, 0.09))))
    assert sentence.endswith("excludes 0.")
    (sentence,) = winning_baselines(rows(row("PCA", "baseline", 0.9003)))
    assert "0.90030 against 0.90000" in sentence  # equal as printed
    (sentence,) = winning_baselines(rows(row("PCA", "baseline", 0.5, pixel_auroc=0.96)))
    assert "higher pixel AUROC" in sentence
    assert winning_baselines(rows(row("a", "baseline", float("nan")), row("b", "baseline", 0.1)))[0].startswith(
        "No baseline beats"
    )
    assert better(rows(row("top-k", "score", 0.91), row("PCA", "baseline", 0.99)), "score")[0].startswith(
        "The score top-k has the higher image AUROC"
    )


def test_worst_cases() -> None:
    scores = np.array([1.0, 5.0, 9.0, 2.0, 5.0, 7.0, 3.0, np.inf])
    labels = ["good", "good", "good", "cut", "cut", "cut", "cut", "cut"]
    cases = worst_cases(scores, labels, 5.0, 2)
    assert [part.tolist() for part in cases] == [[2], [3, 6], [7, 5]]  # 5.0 is not above 5.0
    assert [part.tolist() for part in worst_cases(scores, labels, 0.5, 9)] == [[2, 1, 0], [], [7, 5, 4, 6, 3]]
    assert [part.tolist() for part in worst_cases(np.ones(3), ["good", "cut", "cut"], 1.0, 5)] == [[], [1, 2], []]
    assert [len(part) for part in worst_cases(np.empty(0), [], 1.0, 5)] == [0, 0, 0]


def test_numbers_and_texts() -> None:
    assert [number(v, 2) for v in (None, -1234.567, 0.0, float("nan"), float("inf"), -float("inf"), 2.5e9)] == [
        "\u2013", "\u22121,234.57", "0.00", "not a number", "infinite", "\u2212infinite", "2.5e+09",
    ]  # fmt: skip
    assert number(0.01, 3, sign=True) == "+0.010"
    assert interval(None) == "\u2013" and interval((0.5, 0.75), 2) == "0.50 to 0.75"
    assert [percent(v) for v in (None, 0.0, 0.0434, float("nan"))] == ["\u2013", "0.0%", "4.3%", "not a number"]
    digits = [np.array([9.0, 10.0, 11.0]), np.array([-41000.0, -40000.0, -39000.0]), np.array([0.01, 0.02, 0.03, 1e9])]
    assert [score_digits(scores) for scores in digits] == [2, 0, 0]
    assert score_digits(np.empty(0)) == score_digits(np.array([np.inf, 3.0])) == 2
    assert visible("Stra\u00dfe \u5b57 \U0001f48a.png") == "Stra\u00dfe \u5b57 \U0001f48a.png"
    assert visible("a\tb\x1b[31m\x85\ufffe\ud800") == "a\\x09b\\x1b[31m\\x85\\ufffe\\ud800"
