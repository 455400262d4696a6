"""The published run, its repetition and the inspection recipe side by side, as rows of text."""

from __future__ import annotations

import statistics
import textwrap
from typing import NamedTuple, TypeAlias

from fastmaf.capsule import published
from fastmaf.capsule.train_result import TrainResult
from fastmaf.metrics.intervals import rate_interval
from fastmaf.metrics.results import Evaluation, Prf, ThresholdReport
from fastmaf.reproduction.inspection_run import SAMPLES, InspectionRun

Row: TypeAlias = tuple[str, str, str, str]
"""A name, then the values of the published run, of this run and of the inspection recipe; all empty in a heading."""

NONE = "\u2013"
NAMES = ("published run", "this run", "fastmaf's recipe")


class Table(NamedTuple):
    """Rows and what they are of.

    Attributes:
        sources: of the values of each column.
        rows: the values.
        notes: sentences below.
    """

    sources: tuple[str, str, str]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [("", *NAMES), ("", *self.sources), *self.rows]
        first, *widths = (max(len(row[i]) for row in lines) for i in range(4))
        text = []
        for name, *values in lines:
            cells = "".join(f"  {value:>{width}}" for value, width in zip(values, widths, strict=True))
            text.append(f"{name:<{first}}{cells}".rstrip())
        text.insert(2, "-" * (first + sum(widths) + 6))
        return "\n".join([*text, "", *(textwrap.fill(note, 96, break_on_hyphens=False) for note in self.notes)])


def compare(
    training: TrainResult,
    evaluation: Evaluation,
    seconds_per_sample: float | None,
    inspection: InspectionRun | None,
    *,
    real: bool,
) -> Table:
    """Returns the published run beside this one and the inspection recipe.

    Args:
        training, evaluation: of the published recipe.
        seconds_per_sample: of the published recipe; None if it cannot be sampled.
        inspection: None if there is no inspection model.
        real: whether the images are those of the published run, rather than the synthetic ones.
    """
    nll = {int(row["epoch"] or 0): row["nll"] for row in training.log}
    seconds = [row["seconds"] or 0.0 for row in training.log]
    last = max(nll, default=0)
    epochs = sorted({e for e in (1, 10, 50, 100) if e <= last} | {last} - {0})
    before = {e: f"{published.PUBLISHED_NLL[e]:,.0f}" for e in epochs if e in published.PUBLISHED_NLL}
    pace = f"{statistics.median(seconds):.2f}" if seconds else NONE
    sampling = "refused" if seconds_per_sample is None else f"{seconds_per_sample:.3f}"
    ours = None if inspection is None else inspection.evaluation
    pixels = None if inspection is None else inspection.test.default.pixel_auroc
    fit = (NONE, NONE) if inspection is None else (f"{inspection.seconds:.0f}", f"{inspection.seconds_per_sample:.3f}")
    rows: list[Row] = [
        ("image AUROC (95% interval)", f"{published.AUROC:.3f}", _auroc(evaluation), _auroc(ours)),
        ("pixel AUROC", NONE, NONE, NONE if pixels is None else f"{pixels:.3f}"),
        ("at the threshold chosen on test labels:", "", "", ""),
        *_at(evaluation.youden, None if ours is None else ours.youden, is_published=True),
        ("at the threshold from held-out good images:", "", "", ""),
        *_at(evaluation.held_out, None if ours is None else ours.held_out, is_published=False),
        (
            "seconds to train (epochs)",
            f"{100 * published.SECONDS_PER_EPOCH:,.0f} (100)",
            f"{sum(seconds):,.0f} ({last})",
            fit[0],
        ),
        ("seconds an epoch", f"{published.SECONDS_PER_EPOCH}", pace, NONE),
        (f"seconds a sample (mean of {SAMPLES})", f"{published.SECONDS_PER_SAMPLE}", sampling, fit[1]),
        *((f"NLL, epoch {e} (nats)", before.get(e, NONE), f"{nll[e]:,.0f}", NONE) for e in epochs),
    ]
    notes = [
        "The published run chose its threshold on the labels of the test images; a threshold from held-out good "
        "images uses none."
    ]
    if evaluation.held_out is None:
        notes.append("No good images were held out of the training of this run.")
    if not real:
        notes.append("Published values are of the real images, and cannot be compared with those of synthetic ones.")
    source = "" if real else "(synthetic)"
    return Table(("(GTX 1050 Ti)", source, source), tuple(rows), tuple(notes))


def _auroc(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return NONE
    interval = evaluation.auroc_interval
    return f"{evaluation.auroc:.3f}" + ("" if interval is None else f" ({interval[0]:.3f}\u2013{interval[1]:.3f})")


def _at(this: ThresholdReport | None, ours: ThresholdReport | None, *, is_published: bool) -> list[Row]:
    theirs = (_f1(published.ANOMALY), f"{published.FALSE_ALARM_RATE:.0%}")
    names = ("F1 of defects (precision, recall)", "false alarms among good images (95% interval)")
    columns = theirs if is_published else (NONE, NONE), _values(this), _values(ours)
    return [(f"  {name}", a, b, c) for name, a, b, c in zip(names, *columns, strict=True)]


def _values(report: ThresholdReport | None) -> tuple[str, str]:
    if report is None:
        return NONE, NONE
    (tn, fp), _ = report.confusion
    low, high = rate_interval(fp, tn + fp)
    return _f1(report.anomaly), f"{report.false_alarm_rate:.0%} ({low:.0%}\u2013{high:.0%})"


def _f1(values: Prf | tuple[float, float, float]) -> str:
    precision, recall, f1 = values
    return f"{f1:.2f} ({precision:.2f}, {recall:.2f})"
