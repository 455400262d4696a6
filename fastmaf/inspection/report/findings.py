"""What follows from a report's numbers: verdicts by class, the worst cases, who wins, and the summary in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastmaf.inspection.report.content import Absent, Outcome, Report, ScoreRow, Threshold
from fastmaf.inspection.report.text import images, interval, number, percent
from fastmaf.metrics.evaluate import evaluate_scores
from fastmaf.metrics.results import NORMAL, Evaluation


class Cases(NamedTuple):
    """Positions of test images, the most telling first: int64 [at most k] each."""

    false_alarms: np.ndarray
    misses: np.ndarray
    detections: np.ndarray


def worst_cases(scores: np.ndarray, labels: Sequence[str] | None, threshold: float, k: int) -> Cases:
    """The k good images furthest above the threshold, the k defects with the lowest scores not above it, and the k
    defects with the highest above it. Without labels the first two are empty and the third are the highest scores.

    Args:
        scores: float64 [n] anomaly scores.
        labels: n class names, "good" is normal.
        threshold: an image is called anomalous iff its score is above it.
    """
    scores = np.asarray(scores, dtype=np.float64)
    falling, rising = np.argsort(-scores, kind="stable"), np.argsort(scores, kind="stable")
    if labels is None:
        return Cases(falling[:0], falling[:0], falling[:k])
    good, alarm = np.asarray([label == NORMAL for label in labels], dtype=bool), scores > threshold
    return Cases(
        falling[(good & alarm)[falling]][:k],
        rising[(~good & ~alarm)[rising]][:k],
        falling[(~good & alarm)[falling]][:k],
    )


@dataclass(frozen=True)
class ClassLine:
    """One class of the test images: AUROC against "good", and the alarms raised; None where there is no such number."""

    label: str
    images: int
    auroc: float | None
    alarms: int | None

    @property
    def share(self) -> float | None:
        """Alarms per image."""
        return None if self.alarms is None else self.alarms / self.images


def evaluation(outcome: Outcome | Absent) -> Evaluation | Absent:
    """AUROCs and ROC, or why there are none."""
    if isinstance(outcome, Absent):
        return outcome
    if outcome.labels is None:
        return Absent("the classes of the test images are not known")
    good = outcome.labels.count(NORMAL)
    if good in (0, len(outcome.labels)):
        kind = "defective" if good else "good"
        return Absent(f"there is no {kind} image among the {len(outcome.labels)} test images")
    return evaluate_scores(outcome.scores, outcome.labels, bootstrap=0)


def check_default(report: Report, found: Evaluation | Absent) -> None:
    """A ValueError if the score table and the scores of the test images are not of the same default score."""
    default = _default(report)
    if default is not None and not isinstance(found, Absent) and abs(default.auroc - found.auroc) > 1e-6:
        raise ValueError(
            f"the default score, {default.name}, has an image AUROC of {default.auroc:.6f} in the score table, but the "
            f"scores of the test images have {found.auroc:.6f}; expected the scores of the default"
        )


def class_lines(outcome: Outcome | Absent, threshold: Threshold | Absent) -> tuple[ClassLine, ...] | Absent:
    """Images, AUROC and alarms of every class, "good" first, or why there are no such lines."""
    if isinstance(outcome, Absent):
        return outcome
    if outcome.labels is None:
        return Absent("the classes of the test images are not known")
    found, labels = evaluation(outcome), np.asarray(outcome.labels)
    lines = []
    for label in sorted(set(outcome.labels), key=lambda name: (name != NORMAL, name)):
        own = outcome.scores[labels == label]
        area = None if isinstance(found, Absent) else found.per_class[label].auroc
        alarms = None if isinstance(threshold, Absent) else int((own > threshold.value).sum())
        lines.append(ClassLine(label, len(own), area, alarms))
    return tuple(lines)


class Verdicts(NamedTuple):
    """Alarms and images: of the good ones, of the defective ones, and of all. None where the threshold is absent."""

    false_alarms: int | None
    good: int
    detected: int | None
    defective: int
    alarms: int | None
    images: int


def verdicts(outcome: Outcome, threshold: Threshold | Absent) -> Verdicts:
    """Count them; images of unknown class are neither good nor defective."""
    labels = np.asarray(outcome.labels if outcome.labels is not None else [""] * len(outcome.scores))
    good, defective = labels == NORMAL, (labels != NORMAL) & (labels != "")
    n = (int(good.sum()), int(defective.sum()), len(labels))
    if isinstance(threshold, Absent):
        return Verdicts(None, n[0], None, n[1], None, n[2])
    alarm = outcome.scores > threshold.value
    return Verdicts(int((good & alarm).sum()), n[0], int((defective & alarm).sum()), n[1], int(alarm.sum()), n[2])


def summary(report: Report) -> str:
    """The report in one paragraph: what was tried, the verdicts, how well it ranks, and what is promised."""
    said = []
    if isinstance(report.outcome, Absent):
        said.append(f"{report.model}: no test images are reported, as {report.outcome.reason}.")
    else:
        v = verdicts(report.outcome, report.threshold)
        known = report.outcome.labels is not None
        what = f"{images(v.good, 'good')} and {images(v.defective, 'defective')}" if known else "of unknown class"
        said.append(f"{report.model} was tried on {images(v.images)}{': ' if known else ' '}{what}.")
        if isinstance(report.threshold, Absent):
            said.append(f"No verdicts: the threshold is absent, as {report.threshold.reason}.")
        elif known:
            found = [_of("found {} of {} defective images", v.detected, v.defective)] if v.defective else []
            found += [_of("raised a false alarm on {} of {} good ones", v.false_alarms, v.good)] if v.good else []
            said.append(f"At its threshold it {' and '.join(found)}.")
        else:
            said.append(f"At its threshold it {_of('raised the alarm on {} of {}', v.alarms, v.images)}.")
        score = evaluation(report.outcome)
        if not isinstance(score, Absent):
            said.append(f"Image AUROC {_area(report, score)}.")
    if not isinstance(report.threshold, Absent):
        t = report.threshold
        said.append(
            f"The threshold was set on {images(len(t.scores), 'good')}; on new good images like these, "
            f"{percent(t.expected_rate)} false alarms are expected on average, and with 95% confidence at most "
            f"{percent(t.bound)} for this calibration."
        )
    if not isinstance(report.scores, Absent):
        said += winning_controls(report.scores)
    return " ".join(said)


@dataclass(frozen=True)
class KeyFigure:
    """A number for the head of the page, with a line of context."""

    name: str
    value: str
    context: str


def key_figures(report: Report) -> list[KeyFigure]:
    """The few numbers that a reader looks for first; those that the run lacks are left out."""
    out = []
    if not isinstance(report.outcome, Absent):
        score, v = evaluation(report.outcome), verdicts(report.outcome, report.threshold)
        default = _default(report)
        if not isinstance(score, Absent):
            ends = default.interval if default else None
            value = default.auroc if default else score.auroc
            out.append(KeyFigure("Image AUROC", number(value), f"95% interval {interval(ends)}" if ends else ""))
        if default and default.pixel_auroc is not None:
            pro = "" if default.au_pro is None else f"AU-PRO {number(default.au_pro)}"
            out.append(KeyFigure("Pixel AUROC", number(default.pixel_auroc), pro))
        if v.detected is not None and v.defective:
            share = percent(v.detected / v.defective)
            out.append(KeyFigure("Defects found", share, f"{v.detected:,} of {v.defective:,} at the threshold"))
        if v.false_alarms is not None and v.good:
            share = percent(v.false_alarms / v.good)
            out.append(KeyFigure("False alarms", share, f"{v.false_alarms:,} of {v.good:,} good test images"))
        if v.alarms is not None and report.outcome.labels is None:
            out.append(KeyFigure("Alarms", percent(v.alarms / v.images), f"{v.alarms:,} of {v.images:,} images"))
    if not isinstance(report.threshold, Absent):
        t = report.threshold
        bound = f"with 95% confidence at most {percent(t.bound)}"
        out.append(KeyFigure("Expected false alarms", percent(t.expected_rate), bound))
    return out


def winning_controls(rows: Sequence[ScoreRow]) -> tuple[str, ...]:
    """Sentences on the controls that beat the default score, or one that says that none does."""
    (default,), controls = [row for row in rows if row.default], [row for row in rows if row.kind == "control"]
    said = better(rows, "control")
    if said:
        return said
    if not controls:
        return ("No control was measured beside the scores, so nothing shows what the model adds.",)
    none = "No control beats" if len(controls) > 1 else f"The control {controls[0].name} does not beat"
    return (f"{none} the default score ({default.name}).",)


def better(rows: Sequence[ScoreRow], kind: str) -> tuple[str, ...]:
    """A sentence on every measure by which a row of this kind ("score" or "control") beats the default score."""
    (default,) = [row for row in rows if row.default]
    said = []
    for row in rows:
        for measure, theirs, ours, apart in (
            ("image AUROC", row.auroc, default.auroc, row.difference_interval),
            ("pixel AUROC", row.pixel_auroc, default.pixel_auroc, row.pixel_interval),
            ("AU-PRO", row.au_pro, default.au_pro, None),
        ):
            if row.kind != kind or theirs is None or ours is None or not theirs > ours:
                continue
            digits = 3 if number(theirs) != number(ours) else 5
            text = f"The {kind} {row.name} has the higher {measure}: {number(theirs, digits)} against "
            text += f"{number(ours, digits)} for the default score ({default.name})"
            if apart is not None:
                low, high = apart
                clear = "includes 0: these images do not separate the two" if low <= 0 <= high else "excludes 0"
                text += f"; the paired 95% interval of the difference, {interval((low, high), 3, True)}, {clear}"
            said.append(text + ".")
    return tuple(said)


def _of(text: str, count: int | None, total: int) -> str:
    assert count is not None
    return text.format(f"{count:,}", f"{total:,}") + f" ({percent(count / total)})"


def _default(report: Report) -> ScoreRow | None:
    return None if isinstance(report.scores, Absent) else next(row for row in report.scores if row.default)


def _area(report: Report, score: Evaluation) -> str:
    default = _default(report)
    if default is None:
        return number(score.auroc)
    ends = "" if default.interval is None else f" (95% interval {interval(default.interval)})"
    return number(default.auroc) + ends
