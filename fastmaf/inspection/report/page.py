"""The report as one self-contained HTML file without scripts, fonts or external resources."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fastmaf.inspection.report import figures, findings, text
from fastmaf.inspection.report.content import Absent, Report
from fastmaf.inspection.report.pictures import data_uri
from fastmaf.io.atomic import written_atomically
from fastmaf.metrics.evaluate import evaluate_scores
from fastmaf.metrics.results import NORMAL

_SAMPLE_WIDTH = 128
_SECTIONS = (
    ("summary", "Summary"),
    ("data", "Data"),
    ("training", "Training"),
    ("scores", "Scores and baselines"),
    ("detection", "Detection"),
    ("threshold", "Threshold"),
    ("images", "Selected images"),
    ("speed", "Speed and environment"),
    ("assumptions", "Assumptions"),
)


def write_report(path: str | Path, report: Report) -> Path:
    """Writes a report as one self-contained HTML file and returns its path. The same report gives the same bytes.

    Raises:
        OSError: the file cannot be written; an existing file stays.
    """
    path = Path(path)
    page = _environment(report).get_template("report.html.j2").render(_variables(report))
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
    scores = report.calibration.scores
    if not isinstance(report.test, Absent):
        scores = np.concatenate([report.test.scores, scores])
    environment.tests["absent"] = lambda value: isinstance(value, Absent)
    environment.filters.update(
        number=text.number,
        interval=text.interval,
        percent=text.percent,
        images=text.images,
        score=partial(text.number, digits=text.score_digits(scores)),
        picture=data_uri,
        sample=partial(data_uri, widest=_SAMPLE_WIDTH),
    )
    return environment


def _variables(report: Report) -> dict[str, Any]:
    """Returns the variables of the template."""
    calibration, test, training = report.calibration, report.test, report.training
    variables: dict[str, Any] = {
        "report": report,
        "calibration": calibration,
        "test": test,
        "training": training,
        "sections": _SECTIONS,
        "summary": findings.summary(report),
        "key_figures": findings.key_figures(report),
        "good": NORMAL,
        "histogram": figures.score_histogram(calibration, None if isinstance(test, Absent) else test),
        "curve": Absent("the model has no trained blocks"),
    }
    if not isinstance(test, Absent):
        evaluation = evaluate_scores(test.scores, test.labels, bootstrap=0)
        verdicts = findings.verdicts(test, calibration.threshold)
        variables |= {
            "verdicts": verdicts,
            "classes": findings.class_rows(test, evaluation, calibration.threshold),
            "baselines": findings.winning_baselines(test.table),
            "better_scores": findings.better(test.table, "score"),
            "roc": figures.roc(evaluation, verdicts),
        }
    if not isinstance(training, Absent):
        total = sum(fold.images for fold in training.folds)
        mean = sum(fold.images * fold.nll for fold in training.folds) / max(1, total)
        variables |= {"fold_total": total, "fold_mean": mean}
        if training.log:
            variables["curve"] = figures.training_curve(training.log)
    return variables
