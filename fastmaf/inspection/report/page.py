"""The report as one HTML file that asks for nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fastmaf.inspection.report import figures, findings, text
from fastmaf.inspection.report.content import Absent, Exhibit, Report
from fastmaf.inspection.report.pictures import data_uri
from fastmaf.io.atomic import written_atomically
from fastmaf.metrics.results import NORMAL

_SAMPLE_WIDTH = 128
_SECTIONS = (
    ("summary", "Summary"),
    ("data", "Data"),
    ("training", "Training"),
    ("scores", "Scores and controls"),
    ("detection", "Detection"),
    ("threshold", "Threshold"),
    ("images", "Images worth a look"),
    ("speed", "Speed and environment"),
    ("assumptions", "What the numbers assume"),
)


def write_report(path: str | Path, report: Report) -> Path:
    """Write `report` as one self-contained HTML file and return its path. The same report gives the same bytes.

    Raises:
        ValueError: the default score has one image AUROC in the score table, another by `report.outcome`.
        OSError: the file cannot be written; what was there before stays.
    """
    path = Path(path)
    page = _environment(report).get_template("report.html.j2").render(_names(report))
    with written_atomically(path) as file:
        file.write(page.encode())
    return path


def _environment(report: Report) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=text.finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["absent"] = lambda value: isinstance(value, Absent)
    environment.filters.update(
        number=text.number,
        interval=text.interval,
        percent=text.percent,
        images=text.images,
        score=partial(text.number, digits=text.score_digits(_scores(report))),
        picture=data_uri,
        sample=partial(data_uri, widest=_SAMPLE_WIDTH),
    )
    return environment


def _names(report: Report) -> dict[str, Any]:
    """What the template knows: the report and what follows from it."""
    outcome = None if isinstance(report.outcome, Absent) else report.outcome
    threshold = None if isinstance(report.threshold, Absent) else report.threshold
    verdicts = None if outcome is None else findings.verdicts(outcome, report.threshold)
    evaluation = findings.evaluation(report.outcome)
    findings.check_default(report, evaluation)
    histogram: figures.Drawing | Absent = Absent("there is neither a test image nor a calibration set")
    if outcome is not None or threshold is not None:
        histogram = figures.score_histogram(outcome, threshold)
    roc: figures.Drawing | Absent
    if isinstance(evaluation, Absent):
        roc = evaluation
    else:
        assert verdicts is not None
        roc = figures.roc(evaluation, verdicts)
    training = None if isinstance(report.training, Absent) else report.training
    points = () if training is None else training.curve
    curve: figures.Drawing | Absent
    if isinstance(points, Absent):
        curve = points
    else:
        curve = figures.training_curve(points, training.unit) if training and points else Absent("the log is empty")

    folds = () if training is None or isinstance(training.folds, Absent) else training.folds

    def verdict(exhibit: Exhibit) -> bool | None:
        return None if threshold is None else exhibit.score > threshold.value

    return {
        "report": report,
        "sections": _SECTIONS,
        "summary": findings.summary(report),
        "key_figures": findings.key_figures(report),
        "verdicts": verdicts,
        "verdict": verdict,
        "labelled": outcome is not None and outcome.labels is not None,
        "classes": findings.class_lines(report.outcome, report.threshold),
        "controls": () if isinstance(report.scores, Absent) else findings.winning_controls(report.scores),
        "better_scores": () if isinstance(report.scores, Absent) else findings.better(report.scores, "score"),
        "histogram": histogram,
        "roc": roc,
        "curve": curve,
        "good": NORMAL,
        "fold_total": sum(fold.images for fold in folds),
        "fold_mean": sum(fold.images * fold.nll for fold in folds) / max(1, sum(fold.images for fold in folds)),
    }


def _scores(report: Report) -> np.ndarray:
    parts = [part.scores for part in (report.outcome, report.threshold) if not isinstance(part, Absent)]
    return np.concatenate(parts) if parts else np.empty(0)
