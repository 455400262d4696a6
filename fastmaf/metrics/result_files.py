"""Results of an evaluation as files and text: scores.csv, metrics.json, a table for the terminal."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastmaf.images.names import to_cell, visible
from fastmaf.io.atomic import written_atomically
from fastmaf.io.csv_file import write_csv
from fastmaf.io.outputs import Kind, json_file, table
from fastmaf.metrics.intervals import rate_interval
from fastmaf.metrics.results import Evaluation, EvaluationError, bits_per_dim, checked_scores, nats

SCORE_COLUMNS = ("file", "label", "nll", "bits_per_dim", "anomalous_youden", "anomalous_held_out")
INSPECTION_SCORES = ("file", "label", "score", "p_value", "verdict", "nll")


def eval_scores() -> Kind:
    """scores.csv of both commands ``eval``, for flows and inspection models: both write to the same place."""
    return table("the scores of an evaluation", SCORE_COLUMNS, INSPECTION_SCORES)


def eval_metrics() -> Kind:
    """metrics.json of both commands ``eval``, for flows and inspection models."""
    return json_file("the metrics of an evaluation", ("youden", "per_class"), ("threshold", "scores", "classes"))


def to_json(evaluation: Evaluation, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the content of metrics.json: NaN becomes null, infinities the strings "inf" and "-inf".

    Args:
        evaluation: the results.
        extra: further entries, such as the name of the model, settings and seconds.

    Raises:
        EvaluationError: ``extra`` has a key of the evaluation.
    """
    out = _plain(evaluation)
    out["n_normal"], out["n_anomalous"] = evaluation.n_normal, evaluation.n_anomalous
    for stats in out["per_class"].values():
        mean = stats["mean"]
        stats["mean_bits_per_dim"] = None if mean is None else _plain(evaluation.bits_per_dim(mean))
    clash = sorted(set(out) & set(extra or {}))
    if clash:
        raise EvaluationError(f"extra: expected other keys than those of the evaluation; found {', '.join(clash)}")
    return {**out, **_plain(dict(extra or {}))}


def write_scores(
    path: str | Path,
    paths: Sequence[str | Path],
    labels: Sequence[str],
    nll: np.ndarray,
    evaluation: Evaluation,
    features: int,
) -> None:
    """Writes one CSV line per image: file, label, NLL in nats, bits per dimension, and both verdicts (1 or 0).

    ``anomalous_held_out`` is empty without a held-out threshold. Numbers are written exactly;
    ``fastmaf.images.names.from_cell`` restores files and labels.
    """
    scores = checked_scores(nll, "test", labels)
    if len(paths) != len(scores):
        raise EvaluationError(f"each score needs its file; found {len(scores)} scores and {len(paths)} files")
    caught = evaluation.youden.is_anomalous(scores)
    caught_held_out = None if evaluation.held_out is None else evaluation.held_out.is_anomalous(scores)
    rows = []
    for i, score in enumerate(scores.tolist()):
        bits = bits_per_dim(score, features)
        held_out = "" if caught_held_out is None else int(caught_held_out[i])
        file, label = to_cell(os.fspath(paths[i])), to_cell(labels[i])
        rows.append([file, label, repr(score), repr(bits), int(caught[i]), held_out])
    write_csv(path, SCORE_COLUMNS, rows)


def write_metrics(path: str | Path, evaluation: Evaluation, extra: Mapping[str, Any] | None = None) -> None:
    """Writes ``to_json(evaluation, extra)``, indented."""
    text = json.dumps(to_json(evaluation, extra), indent=2, allow_nan=False) + "\n"
    with written_atomically(path) as file:
        file.write(text.encode())


def format_table(evaluation: Evaluation) -> str:
    """Returns an evaluation as plain text for a terminal, about 100 columns wide."""
    e, bits = evaluation, evaluation.features is not None
    interval = ""
    if e.auroc_interval is not None:
        low, high = e.auroc_interval
        interval = f", 95% interval {low:.3f} to {high:.3f}"
    reports = [report for report in (e.youden, e.held_out) if report is not None]
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
    unit = "nats (mean also in bits/dim)" if bits else "nats"
    lines.append(f"NLL in {unit}; AUROC against class good; {columns}: images called anomalous")
    for r in reports:
        (tn, fp), (fn, tp) = r.confusion
        low, high = rate_interval(fp, e.n_normal)
        above = "of at least" if r.inclusive else "above"
        lines += [
            "",
            f"threshold {r.name}: images with an NLL {above} {nats(r.threshold, 2)} nats are called anomalous",
            textwrap.fill(r.how, 100, initial_indent="  ", subsequent_indent="  "),
            f"  {'':<12} {'called normal':>13} {'called anomalous':>16} {'precision':>10} {'recall':>7} {'F1':>7}",
            f"  {'normal':<12} {tn:>13} {fp:>16} " + "{:>10.3f} {:>7.3f} {:>7.3f}".format(*r.normal),
            f"  {'anomalous':<12} {fn:>13} {tp:>16} " + "{:>10.3f} {:>7.3f} {:>7.3f}".format(*r.anomaly),
            f"  accuracy {r.accuracy:.3f} (if all were called anomalous: {r.baseline_accuracy:.3f})",
            f"  false alarms: {fp} of {e.n_normal} good images ({r.false_alarm_rate:.1%}, "
            f"95% interval {low:.1%} to {high:.1%})",
        ]
        if r.promised_rate is not None and r.rate_95 is not None:
            lines.append(
                f"  on new good images: at most {r.promised_rate:.1%} false alarms on average over held-out sets, "
                f"{r.rate_95:.1%} with 95% confidence"
            )
    if e.held_out_reason is not None:
        lines += ["", f"no held-out threshold: {e.held_out_reason}"]
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    """Converts a value to JSON types, without NaN and infinities."""
    if is_dataclass(value):
        value = vars(value)
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    elif isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
