"""``fastmaf inspect eval``: evaluate a model on a labelled test set; writes scores, metrics and a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fastmaf
from fastmaf.images.dataset import load_test, load_train
from fastmaf.images.folders import has_normals
from fastmaf.images.names import to_cell
from fastmaf.inspection.calibration import CalibrationError
from fastmaf.inspection.evaluate import score_table
from fastmaf.inspection.fold_models import load_fold_models
from fastmaf.inspection.masks import LabelledSet, load_masks
from fastmaf.inspection.model import load_inspection, model_file
from fastmaf.inspection.report.content import REPORT, REPORT_FILE, Report
from fastmaf.inspection.report.findings import alarms_by_class
from fastmaf.inspection.workflow.evaluation_result import EvaluationResult
from fastmaf.inspection.workflow.inputs import Say
from fastmaf.inspection.workflow.rows import VERDICTS
from fastmaf.io.atomic import written_atomically
from fastmaf.io.csv_file import write_csv
from fastmaf.io.outputs import Output, check_outputs
from fastmaf.io.wording import errors_of
from fastmaf.metrics.classes import doubtful, require_both
from fastmaf.metrics.result_files import INSPECTION_SCORES, eval_metrics, eval_scores
from fastmaf.metrics.results import EvaluationError

SCORES_FILE, METRICS_FILE = "scores.csv", "metrics.json"


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
) -> EvaluationResult:
    """Scores the images of ``data/test`` and writes the results to ``out``.

    Args:
        data: folder with ``test/<class>``; optionally ``train/good`` for the baselines and ``ground_truth/<class>``
            for pixel metrics.
        out: folder to write to.
        seed: of the bootstrap.

    Raises:
        CalibrationError: a score is NaN; the message names the model.
        DataError: the folder or a file in it is unsuitable.
        EvaluationError: the test set has no normal or no defective images.
        OutputError: ``out`` holds a file of another origin under the name of an output.
    """
    options: dict[str, Any] = {"device": device, "skip_bad": skip_bad, "seed": seed, "progress": progress, "say": say}
    return evaluate_with_report(model, data, out, **options)[0]


@fastmaf.torch_defaults()
def evaluate_with_report(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    device: str,
    skip_bad: bool,
    seed: int,
    progress: bool,
    say: Say,
) -> tuple[EvaluationResult, Report]:
    """Does what ``evaluate`` does, and returns the content of the report, too."""
    from fastmaf.inspection.report.build import test_report

    out = Path(out)
    check_outputs(outputs_of(out), [model_file(model)])
    loaded = load_inspection(model, device=device)
    images = load_test(data, size=loaded.size, skip_bad=skip_bad, progress=progress)
    for note in (*images.notes, *doubtful(images.labels)):
        say(note)
    require_both(images.labels, data)
    masks = load_masks(data, images, skip_bad=skip_bad)
    for note in masks.notes:
        say(note)
    normals = None
    if has_normals(Path(data).expanduser()):
        normals = load_train(data, size=loaded.size, skip_bad=skip_bad, progress=progress)
    else:
        say(f"no good images in {data} to fit baselines to: the table has none")
    test, prediction = LabelledSet(images, masks, normals), loaded.predict(images.pixels, images.shapes or None)
    fold_models = load_fold_models(model_file(model).parent, loaded)
    with errors_of(model_file(model), CalibrationError, EvaluationError):
        anomalous = loaded.calibration.is_anomalous(prediction.scores)
        rows = score_table(loaded, test, prediction, fold_models, seed=seed, progress=progress)
    alarms = alarms_by_class(images.labels, anomalous)
    result = EvaluationResult(model_file(model).name, loaded.calibration, tuple(rows), alarms)
    values = prediction.scores, loaded.calibration.p_values(prediction.scores), anomalous, prediction.nll
    scores = (
        (to_cell(str(file)), to_cell(label), score, p_value, VERDICTS[alarm], nll)
        for file, label, score, p_value, alarm, nll in zip(
            images.paths, images.labels, *(array.tolist() for array in values), strict=True
        )
    )
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / SCORES_FILE, INSPECTION_SCORES, scores)
    with written_atomically(out / METRICS_FILE) as stream:
        stream.write((json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n").encode())
    report = test_report(out / REPORT_FILE, loaded, model_file(model).name, test, prediction, rows)
    return result, report


def outputs_of(out: Path) -> list[Output]:
    """Returns the files that ``evaluate`` writes."""
    kinds = {SCORES_FILE: eval_scores(), METRICS_FILE: eval_metrics(), REPORT_FILE: REPORT}
    return [Output(out / name, kind) for name, kind in kinds.items()]
