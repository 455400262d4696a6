"""The page of a reproduction: both recipes on the same images, in one self-contained HTML file."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmaf.capsule.evaluate import SCORES_FILE
from fastmaf.capsule.train_result import TrainResult
from fastmaf.images.dataset import load_train
from fastmaf.images.names import from_cell
from fastmaf.images.samples import SampleResult
from fastmaf.inspection.report import build, figures
from fastmaf.inspection.report.content import REPORT_FILE
from fastmaf.inspection.report.findings import Verdicts
from fastmaf.inspection.report.page import report_variables, write_page
from fastmaf.metrics.results import NORMAL, Evaluation
from fastmaf.reproduction.inspection_run import SAMPLES, InspectionRun
from fastmaf.reproduction.table import NAMES, Table

_TEMPLATE = Path(__file__).parent / "reproduction.html.j2"


def write_comparison(
    out: Path,
    data: str | Path,
    table: Table,
    training: TrainResult,
    evaluation: Evaluation,
    samples: SampleResult | None,
    inspection: InspectionRun | None,
    *,
    size: int,
    skip_bad: bool,
) -> Path:
    """Writes ``out/report.html`` and returns its path.

    Args:
        out: folder with the files of the published recipe.
        data: the images.
        table: the comparison.
        training, evaluation, samples: of the published recipe; no samples if it cannot be sampled.
        inspection: of the inspection recipe; None if it does not suit the images.
        size: side of the images in pixels.
        skip_bad: leave out files that cannot be read.
    """
    normals = load_train(data, size=size, skip_bad=skip_bad, progress=False)
    strips: list[tuple[str, Iterable[np.ndarray]]] = [("training images", build.samples(normals, NORMAL, SAMPLES))]
    if samples is not None:
        strips.append((f"samples of the published recipe after {len(training.log)} epochs", _read(samples)))
    if inspection is not None:
        strips.append(("samples of fastmaf's recipe (the whitened flow)", _read(inspection.samples)))
    scores, labels = _scores(out / SCORES_FILE)
    thresholds = {"threshold chosen on test labels": evaluation.youden}
    if evaluation.held_out is not None:
        thresholds["threshold from held-out good images"] = evaluation.held_out
    variables: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "names": NAMES,
        "table": table,
        "epochs": len(training.log),
        "evaluation": evaluation,
        "verdicts_of_published": Verdicts.of(evaluation.held_out or evaluation.youden),
        "published_is_held_out": evaluation.held_out is not None,
        "strips": strips,
        "nll_histogram": figures.nll_histogram(
            scores, labels, {name: report.threshold for name, report in thresholds.items()}, name="nll"
        ),
        "nll_roc": figures.roc(
            evaluation, {name: Verdicts.of(report) for name, report in thresholds.items()}, name="nll-roc"
        ),
        "nll_curve": figures.training_curve(training.log, by="epoch", held_out_nll="val_nll", name="nll-curve"),
        "environment": build.environment(),
        "inspection": inspection,
    }
    report = None if inspection is None else inspection.report
    if report is not None:
        variables |= report_variables(report)
    return write_page(out / REPORT_FILE, _TEMPLATE, report, variables)


def _read(samples: SampleResult) -> list[np.ndarray]:
    pictures = []
    for file in samples.files:
        with Image.open(file) as picture:
            pictures.append(np.asarray(picture))
    return pictures


def _scores(path: Path) -> tuple[np.ndarray, Sequence[str]]:
    """Returns the NLLs and classes of the test images that an evaluation wrote."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    return np.array([float(row["nll"]) for row in rows]), [from_cell(row["label"]) for row in rows]
