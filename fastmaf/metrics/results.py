"""What an evaluation found, and how it is written down: JSON, CSV, a table for the terminal.

`fastmaf.metrics.evaluate` computes it and passes these names on; this half needs numpy alone.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastmaf.images.names import to_cell, visible
from fastmaf.io.atomic import written_atomically

NORMAL = "good"
SCORE_COLUMNS = ("file", "label", "nll", "bits_per_dim", "anomalous_youden", "anomalous_held_out")


def bits_per_dim(nll: float, features: int) -> float:
    """`nll` (nats) as bits per dimension of data in [0, 1]; add 8 for the nominal figure of 8-bit data."""
    return nll / (features * math.log(2))


class EvaluationError(ValueError):
    """Scores or labels that cannot be evaluated; the message says what was found."""


class Prf(NamedTuple):
    """Precision, recall and F1 of one of the two classes; 0 where a denominator is 0."""

    precision: float
    recall: float
    f1: float


class Roc(NamedTuple):
    """The ROC by falling threshold, one point per distinct score (float64 [k + 1] each).

    Point i calls an image anomalous iff nll >= thresholds[i]; point 0 is "nothing is anomalous", its threshold inf.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    thresholds: np.ndarray


@dataclass(frozen=True)
class ClassStats:
    """The NLLs of one class in nats; `std` has divisor n, `auroc` is against "good" (None for "good" itself)."""

    n: int
    mean: float
    std: float
    median: float
    auroc: float | None


@dataclass(frozen=True)
class ThresholdReport:
    """One operating point: a threshold, where it came from, and what it does to the test images.

    Attributes:
        name: "Youden" or "held-out".
        threshold: in nats.
        inclusive: anomalous iff nll >= threshold (Youden, as in sklearn's roc_curve) rather than nll > threshold
            (held-out, as the conformal guarantee wants it).
        how: how the threshold was chosen, in words.
        confusion: ((TN, FP), (FN, TP)): rows are the truth, normal first.
        alarms: images called anomalous, by class.
        false_alarm_rate: FP / normals of the test set.
        baseline_accuracy: the accuracy of calling every image anomalous.
        promised_rate: held-out only: the false-alarm rate that the threshold promises on average over held-out sets.
        rate_95: held-out only: the false-alarm rate that 95% of held-out sets of this size stay below.
    """

    name: str
    threshold: float
    inclusive: bool
    how: str
    confusion: tuple[tuple[int, int], tuple[int, int]]
    accuracy: float
    normal: Prf
    anomaly: Prf
    alarms: Mapping[str, int]
    false_alarm_rate: float
    baseline_accuracy: float
    promised_rate: float | None = None
    rate_95: float | None = None

    def is_anomalous(self, nll: np.ndarray) -> np.ndarray:
        """Bool array of nll's shape: which scores (nats) this threshold calls anomalous."""
        nll = np.asarray(nll, dtype=np.float64)
        return nll >= self.threshold if self.inclusive else nll > self.threshold


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate_scores` found.

    Attributes:
        counts: images by class, "good" first.
        auroc: P(NLL of a defect > NLL of a normal) + half the ties.
        auroc_interval: 95% stratified percentile bootstrap; None when bootstrap = 0.
        per_class: statistics of each class, "good" first.
        youden: at the threshold chosen on the test labels.
        held_out: at the threshold from held-out normals; None when there were none, `held_out_reason` says why.
        features: dimensions of an image, for bits/dim; None when not given.
    """

    counts: Mapping[str, int]
    auroc: float
    auroc_interval: tuple[float, float] | None
    bootstrap: int
    per_class: Mapping[str, ClassStats]
    roc: Roc
    youden: ThresholdReport
    held_out: ThresholdReport | None
    held_out_reason: str | None
    features: int | None

    @property
    def n_normal(self) -> int:
        """Images of class "good"."""
        return self.counts[NORMAL]

    @property
    def n_anomalous(self) -> int:
        """Images of every other class."""
        return sum(self.counts.values()) - self.n_normal

    def bits_per_dim(self, nll: float) -> float | None:
        """`nll` (nats) as bits per dimension, nll / (features * ln 2); None without `features`."""
        return None if self.features is None else bits_per_dim(float(nll), self.features)

    def to_json(self) -> dict[str, Any]:
        """Everything, in plain JSON types: NaN becomes null, infinities the strings "inf" and "-inf"."""
        out = _plain(self)
        out["n_normal"], out["n_anomalous"] = self.n_normal, self.n_anomalous
        for stats in out["per_class"].values():
            stats["mean_bits_per_dim"] = None if stats["mean"] is None else _plain(self.bits_per_dim(stats["mean"]))
        return out


def write_scores(
    path: str | Path,
    paths: Sequence[str | Path],
    labels: Sequence[str],
    nll: np.ndarray,
    evaluation: Evaluation,
    features: int,
) -> None:
    """Write one CSV line per image, in the order given: file, label, nll (nats), bits_per_dim, both verdicts (1 or 0).

    anomalous_held_out is empty without a held-out threshold. float() gives the written numbers back exactly, and
    `fastmaf.images.names.from_cell` files and labels.
    """
    scores = checked_scores(nll, "test", labels)
    if len(paths) != len(scores):
        raise EvaluationError(f"each score needs its file; found {len(scores)} scores and {len(paths)} files")
    caught = evaluation.youden.is_anomalous(scores)
    caught_held_out = None if evaluation.held_out is None else evaluation.held_out.is_anomalous(scores)
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(SCORE_COLUMNS)
    for i, score in enumerate(scores.tolist()):
        bits = bits_per_dim(score, features)
        held_out = "" if caught_held_out is None else int(caught_held_out[i])
        file, label = to_cell(os.fspath(paths[i])), to_cell(labels[i])
        table.writerow([file, label, repr(score), repr(bits), int(caught[i]), held_out])
    with written_atomically(path) as stream:
        stream.write(text.getvalue().encode("utf-8", "surrogateescape"))  # file names need not be valid Unicode


def write_metrics(path: str | Path, evaluation: Evaluation, extra: Mapping[str, Any] | None = None) -> None:
    """Write `evaluation.to_json()` and, beside its keys, those of `extra` (settings, seconds, ...) as indented JSON."""
    content = evaluation.to_json()
    clash = sorted(set(content) & set(extra or {}))
    if clash:
        raise EvaluationError(f"extra may not replace keys of the evaluation, found {', '.join(clash)}")
    content.update(_plain(dict(extra or {})))
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with written_atomically(path) as file:
        file.write(text.encode())


def format_table(evaluation: Evaluation) -> str:
    """The evaluation as plain text for a terminal, at most about 100 columns wide."""
    e, bits = evaluation, evaluation.features is not None
    interval = ""
    if e.auroc_interval is not None:
        low, high = e.auroc_interval
        interval = f"   95% interval {low:.3f} to {high:.3f} ({e.bootstrap} bootstrap resamples)"
    reports = [e.youden] + ([e.held_out] if e.held_out is not None else [])
    wide = max(len("class"), *(len(visible(name)) for name in e.counts))
    head = f"{'class':<{wide}} {'n':>5} {'mean NLL':>12} {'std':>12} {'median':>12}"
    head += (f" {'bits/dim':>9}" if bits else "") + f" {'AUROC':>6}" + "".join(f" {r.name:>10}" for r in reports)
    lines = [
        f"{e.n_normal + e.n_anomalous} test images: {e.n_normal} normal, {e.n_anomalous} defective",
        f"AUROC {e.auroc:.4f}{interval}",
        "",
        head,
    ]
    for name, s in e.per_class.items():
        line = f"{visible(name):<{wide}} {s.n:>5} {nats(s.mean):>12} {nats(s.std):>12} {nats(s.median):>12}"
        line += f" {e.bits_per_dim(s.mean):>9.3f}" if bits else ""
        line += f" {'' if s.auroc is None else format(s.auroc, '.3f'):>6}"
        lines.append(line + "".join(f" {r.alarms[name]:>10}" for r in reports))
    columns = " and ".join(r.name for r in reports)
    lines.append(f'NLL in nats (bits/dim of its mean); AUROC against "good"; {columns}: images called anomalous there')
    for r in reports:
        (tn, fp), (fn, tp) = r.confusion
        sign = ">=" if r.inclusive else ">"
        lines += [
            "",
            f"Threshold {r.name}: anomalous if NLL {sign} {nats(r.threshold, 2)} nats",
            textwrap.fill(r.how, 100, initial_indent="  ", subsequent_indent="  "),
            f"  {'':<12} {'called normal':>13} {'called anomalous':>16} {'precision':>10} {'recall':>7} {'F1':>7}",
            f"  {'normal':<12} {tn:>13} {fp:>16} " + "{:>10.3f} {:>7.3f} {:>7.3f}".format(*r.normal),
            f"  {'anomalous':<12} {fn:>13} {tp:>16} " + "{:>10.3f} {:>7.3f} {:>7.3f}".format(*r.anomaly),
            f"  accuracy {r.accuracy:.3f} (calling every image anomalous: {r.baseline_accuracy:.3f}); "
            f"false alarms: {fp} of {e.n_normal} normals ({r.false_alarm_rate:.1%})",
        ]
        if r.promised_rate is not None and r.rate_95 is not None:
            lines.append(
                f"  promised for new normals: false alarms <= {r.promised_rate:.1%} on average over held-out sets; "
                f"with 95% confidence, <= {r.rate_95:.1%}"
            )
    if e.held_out_reason is not None:
        lines += ["", f"No held-out threshold: {e.held_out_reason}"]
    return "\n".join(lines)


def nats(value: float, digits: int = 0) -> str:
    """A number of nats for people: thousands separated, decimals only where they matter, powers of ten when huge."""
    if not math.isfinite(value):
        return str(float(value))
    if abs(value) >= 1e7:
        return f"{value:.3g}"
    return f"{value:,.{digits if abs(value) >= 1000 else max(digits, 2)}f}"


def checked_scores(nll: np.ndarray, which: str, labels: Sequence[str] | None = None) -> np.ndarray:
    """`nll` as float64 [n] without NaN or -inf, or an EvaluationError."""
    scores = np.asarray(nll, dtype=np.float64)
    if scores.ndim != 1:
        raise EvaluationError(f"the {which} scores must be one NLL per image, shape [n]; found {list(scores.shape)}")
    if labels is not None and len(labels) != len(scores):
        raise EvaluationError(f"each score needs its label; found {len(scores)} scores and {len(labels)} labels")
    for bad, name in ((np.isnan(scores), "NaN"), (np.isneginf(scores), "-inf")):
        if bad.any():
            where = f"the first at index {int(np.argmax(bad))}"
            if labels is not None:
                tally = Counter(str(label) for label, hit in zip(labels, bad, strict=True) if hit)
                where = ", ".join(f"{k} {v}" for k, v in sorted(tally.items())) + "; " + where
            raise EvaluationError(f"{int(bad.sum())} of {len(scores)} {which} scores are {name} ({where}): no ranking")
    return scores


def _plain(value: Any) -> Any:
    """`value` in the types json knows, without NaN or infinities."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else (None if math.isnan(value) else str(value))
    return str(value)
