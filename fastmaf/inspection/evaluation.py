"""Judging an inspection model on a labelled test set: ``fastmaf eval``: scores.csv, metrics.json, report.html."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import fastmaf
from fastmaf.images.dataset import ImageSet, load_test, load_train
from fastmaf.images.folders import has_normals
from fastmaf.images.names import to_cell
from fastmaf.inspection.masks import load_masks
from fastmaf.inspection.members import load_members
from fastmaf.inspection.model import Assessment, InspectionModel, load_inspection, model_file
from fastmaf.inspection.scoring import VERDICTS
from fastmaf.inspection.table import Line, format_lines, table
from fastmaf.io.atomic import written_atomically
from fastmaf.io.outputs import Output, check_outputs, report
from fastmaf.metrics.classes import doubtful, require_both
from fastmaf.metrics.result_files import INSPECTION_SCORES, eval_metrics, eval_scores

SCORES_FILE, METRICS_FILE, REPORT_FILE = "scores.csv", "metrics.json", "report.html"

Say = Callable[[str], Any]


@fastmaf.torch_defaults()
def evaluate(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    device: str = "cpu",
    skip_bad: bool = False,
    seed: int = 0,
    progress: bool = True,
    say: Say = print,
) -> list[Line]:
    """Scores the images of ``data/test`` and writes what was found to ``out``.

    Args:
        model: model file or a run's folder.
        data: folder with ``test/<class>``; ``train/good`` for the controls; ``ground_truth/<class>`` for pixel figures.
        out: folder to write to.
        device: where the model computes.
        skip_bad: leave out files that cannot be read.
        seed: of the bootstrap.
        progress: show progress bars.
        say: told of the table and of what is missing.

    Raises:
        DataError: the folder or a file in it is not what is needed.
        EvaluationError: the test set has no normal or no defective images.
        OutputError: ``out`` holds a file of the name of one that is written, which is none.
    """
    from fastmaf.inspection.reporting import test_report

    out, kinds = Path(out), {SCORES_FILE: eval_scores(), METRICS_FILE: eval_metrics(), REPORT_FILE: report()}
    check_outputs([Output(out / name, kind) for name, kind in kinds.items()], [model_file(model)])
    loaded = load_inspection(model, device=device)
    images = load_test(data, size=loaded.size, skip_bad=skip_bad, progress=progress)
    for note in (*images.notes, *doubtful(images.labels)):
        say(note)
    require_both(images.labels, data)
    masks = load_masks(data, images, skip_bad=skip_bad)
    for note in masks.notes:
        say(note)
    normals = _normals(data, loaded.size, skip_bad, progress, say)
    found = loaded.assess(images.pixels)
    members = load_members(model_file(model).parent, loaded)
    lines = table(loaded, images, found, masks, normals, members, seed=seed, progress=progress)
    called = verdicts(loaded, images, found)
    out.mkdir(parents=True, exist_ok=True)
    _write_scores(out / SCORES_FILE, loaded, images, found)
    _write_metrics(out / METRICS_FILE, model_file(model).name, loaded, lines, called)
    test_report(out / REPORT_FILE, loaded, model_file(model).name, images, masks, normals, found, lines)
    say(format_lines(lines, called))
    say(f"scores, metrics and {REPORT_FILE} are in {out}")
    return lines


def _normals(data: str | Path, size: int, skip_bad: bool, progress: bool, say: Say) -> ImageSet | None:
    if not has_normals(Path(data).expanduser()):
        say(f"no good images to train on in {data}: no controls can be fitted")
        return None
    return load_train(data, size=size, skip_bad=skip_bad, progress=progress)


def verdicts(model: InspectionModel, images: ImageSet, found: Assessment) -> dict[str, tuple[int, int]]:
    """Returns (images, images called anomalous) of each class."""
    called = model.calibration.is_anomalous(found.scores)
    labels = np.asarray(images.labels)
    return {
        label: (int((labels == label).sum()), int(called[labels == label].sum())) for label in dict.fromkeys(labels)
    }


def _write_scores(path: Path, model: InspectionModel, images: ImageSet, found: Assessment) -> None:
    p_values, called = model.calibration.p_values(found.scores), model.calibration.is_anomalous(found.scores)
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(INSPECTION_SCORES)
    rows = zip(images.paths, images.labels, found.scores, p_values, called, found.nll, strict=True)
    for file, label, score, p_value, alarm, nll in rows:
        names = to_cell(str(file)), to_cell(label)
        table.writerow([*names, repr(float(score)), repr(float(p_value)), VERDICTS[int(alarm)], repr(float(nll))])
    with written_atomically(path) as stream:
        stream.write(text.getvalue().encode("utf-8", "surrogateescape"))


def _write_metrics(
    path: Path, name: str, model: InspectionModel, lines: Sequence[Line], called: Mapping[str, tuple[int, int]]
) -> None:
    content = {
        "model": name,
        "threshold": model.calibration.threshold,
        "false_alarm": model.calibration.false_alarm,
        "expected_rate": model.calibration.expected_rate,
        "scores": [asdict(line) for line in lines],
        "classes": {label: {"images": n, "anomalous": alarms} for label, (n, alarms) in called.items()},
    }
    with written_atomically(path) as stream:
        stream.write((json.dumps(content, indent=2) + "\n").encode())
