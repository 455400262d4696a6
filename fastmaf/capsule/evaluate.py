"""Evaluating a trained model on a labelled test set: ``fastmaf capsule eval``.

Writes scores.csv, metrics.json, nll_hist_good_defect.png and roc_curve.png.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import fastmaf
from fastmaf.capsule.models import Model, nll_of
from fastmaf.images.dataset import ImageSet, load_test, load_train
from fastmaf.images.folders import has_normals
from fastmaf.images.progress import note
from fastmaf.io.marks import HISTOGRAM, ROC
from fastmaf.io.outputs import Output, check_outputs, picture
from fastmaf.io.wording import errors_of
from fastmaf.metrics.classes import doubtful, require_both
from fastmaf.metrics.evaluate import evaluate_scores
from fastmaf.metrics.plots import nll_hist, roc_curve
from fastmaf.metrics.result_files import eval_metrics, eval_scores, write_metrics, write_scores
from fastmaf.metrics.results import Evaluation, EvaluationError

SCORES_FILE, METRICS_FILE = "scores.csv", "metrics.json"
HISTOGRAM_FILE, ROC_FILE = "nll_hist_good_defect.png", "roc_curve.png"


@fastmaf.torch_defaults()
def evaluate(
    model: Model,
    data: str | Path,
    out: str | Path,
    *,
    false_alarm: float = 0.05,
    skip_bad: bool = False,
    seed: int = 0,
    extra: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Scores the images of ``data/test`` and writes the results to ``out``.

    Args:
        model: a trained model.
        data: folder with ``test/<class>``; the images held out of training are looked up by ``load_train``.
        out: folder to write to.
        false_alarm: false-alarm rate of the threshold from held-out normals.
        skip_bad: skip files that cannot be read.
        seed: seed of the bootstrap.
        extra: further entries for metrics.json.
        progress: show progress bars.

    Raises:
        DataError: a folder or an image cannot be used.
        EvaluationError: the test set has no normal or no defective images, or a score is NaN.
        OutputError: a file in ``out`` that this command did not write would be replaced.
    """
    out = Path(out)
    check_outputs(outputs_of(out), [model.path])
    out.mkdir(parents=True, exist_ok=True)
    images = load_test(data, size=model.size, skip_bad=skip_bad, progress=progress)
    for text in (*images.notes, *doubtful(images.labels)):
        note(text)
    require_both(images.labels, data)
    nll = nll_of(model.flow, images, progress=progress)
    held_out = _held_out(model, data, skip_bad=skip_bad, progress=progress)
    with errors_of(model.path, EvaluationError):
        evaluation = evaluate_scores(
            nll,
            images.labels,
            held_out_nll=None if held_out is None else nll_of(model.flow, held_out, progress=progress),
            false_alarm=false_alarm,
            seed=seed,
            features=model.flow.features,
        )
    write_scores(out / SCORES_FILE, images.paths, images.labels, nll, evaluation, model.flow.features)
    write_metrics(out / METRICS_FILE, evaluation, {"model": model.path.name, **(extra or {})})
    thresholds = {report.name: report.threshold for report in (evaluation.youden, evaluation.held_out) if report}
    nll_hist(out / HISTOGRAM_FILE, np.asarray(nll), images.labels, thresholds)
    roc_curve(out / ROC_FILE, evaluation)
    return evaluation


def outputs_of(out: Path) -> list[Output]:
    """Returns the files that ``evaluate`` writes."""
    return [
        Output(out / SCORES_FILE, eval_scores()),
        Output(out / METRICS_FILE, eval_metrics()),
        Output(out / HISTOGRAM_FILE, picture(HISTOGRAM, "a histogram of NLLs")),
        Output(out / ROC_FILE, picture(ROC, "a ROC curve")),
    ]


def _held_out(model: Model, data: str | Path, *, skip_bad: bool, progress: bool) -> ImageSet | None:
    """Returns the normals that were held out of training, or None without any; notes missing ones."""
    if not model.held_out:
        return None
    if not has_normals(Path(data).expanduser()):
        note(f"no folder train/good in {data}: no threshold from held-out good images")
        return None
    normals = load_train(data, size=model.size, skip_bad=skip_bad, progress=progress)
    wanted = set(model.held_out)
    index = [i for i, name in enumerate(normals.names) if name in wanted]
    if len(index) < len(wanted):
        note(
            f"{len(wanted) - len(index)} of {len(wanted)} held-out good images not found in {data}: "
            + ("the threshold is taken from the others" if index else "no threshold from held-out good images")
        )
    return normals.subset(index) if index else None
