"""Pages as self-contained HTML files without scripts, fonts or external resources."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import fastmaf
from fastmaf.inspection.map_images import scale_colours
from fastmaf.inspection.report import figures, findings, text
from fastmaf.inspection.report.content import Report
from fastmaf.inspection.report.pictures import data_uri
from fastmaf.io.atomic import written_atomically
from fastmaf.metrics.evaluate import evaluate_scores
from fastmaf.metrics.intervals import rate_interval

TEMPLATE = Path(__file__).parent / "report.html.j2"


def write_report(path: str | Path, report: Report) -> Path:
    """Writes a report as one self-contained HTML file and returns its path. The same report gives the same bytes.

    Raises:
        OSError: the file cannot be written; an existing file stays.
    """
    return write_page(path, TEMPLATE, report, report_variables(report))


def write_page(path: str | Path, template: Path, report: Report | None, variables: Mapping[str, Any]) -> Path:
    """Writes a page with the style and the macros of the reports; errors as of ``write_report``.

    Args:
        path: the HTML file.
        template: extends ``base.html.j2``.
        report: gives the digits of anomaly scores; None if the page has none.
        variables: of the template.
    """
    path = Path(path)
    page = _environment(template, report).get_template(template.name).render(variables, version=fastmaf.__version__)
    with written_atomically(path) as file:
        file.write(page.encode())
    return path


def _environment(template: Path, report: Report | None) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([template.parent, TEMPLATE.parent]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=text.finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    digits = 3
    if report is not None:
        calibration, test = report.calibration.scores, report.test
        digits = text.score_digits(calibration if test is None else np.concatenate([test.scores, calibration]))
    environment.filters.update(
        number=text.number,
        interval=text.interval,
        percent=text.percent,
        images=text.images,
        score=partial(text.number, digits=digits),
        picture=data_uri,
    )
    return environment


def report_variables(report: Report) -> dict[str, Any]:
    """Returns the variables of the template of a report."""
    calibration, test, training = report.calibration, report.test, report.training
    variables: dict[str, Any] = {
        "report": report,
        "calibration": calibration,
        "test": test,
        "training": training,
        "above": int(calibration.is_anomalous(calibration.scores).sum()),
        "scale_bar": scale_colours()[None].repeat(16, axis=0),
        "rate_interval": lambda count, n: " to ".join(text.percent(end) for end in rate_interval(count, n)),
        "histogram": figures.score_histogram(calibration, test),
    }
    if test is not None:
        evaluation = evaluate_scores(test.scores, test.labels, bootstrap=0)
        verdicts = findings.verdicts(test, calibration.threshold)
        variables |= {
            "verdicts": verdicts,
            "alarms": findings.alarms_by_class(test.labels, calibration.is_anomalous(test.scores)),
            "per_class": evaluation.per_class,
            "baselines": findings.winning_baselines(test.table),
            "better_scores": findings.better(test.table, "score"),
            "roc": figures.roc(evaluation, {"chosen threshold": verdicts}),
        }
    if training is not None:
        sizes, nll = np.transpose(training.folds)
        variables |= {
            "fold_mean": np.average(nll, weights=sizes),
            "curve": figures.training_curve(training.log) if training.log else None,
        }
    return variables
