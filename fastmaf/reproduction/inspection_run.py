"""The inspection recipe on the images of the published run: fit, evaluation, samples of the whitened flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmaf.images.decode import DataError
from fastmaf.images.samples import SampleResult, write_samples
from fastmaf.images.samples import outputs_of as sample_outputs
from fastmaf.inspection.model import load_inspection
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.report.content import Report, TestResults
from fastmaf.inspection.workflow.evaluate import evaluate_with_report
from fastmaf.inspection.workflow.evaluate import outputs_of as eval_outputs
from fastmaf.inspection.workflow.fit import fit
from fastmaf.inspection.workflow.fit import outputs_of as fit_outputs
from fastmaf.io.outputs import Output
from fastmaf.metrics.evaluate import evaluate_scores
from fastmaf.metrics.result_files import to_json
from fastmaf.metrics.results import Evaluation

SAMPLES = 5


@dataclass(frozen=True)
class InspectionRun:
    """The results of the inspection recipe.

    Attributes:
        seconds: duration of the fit.
        report: the content of its report.
        test: results on the test set.
        evaluation: the same scores, evaluated as those of the published recipe.
        samples: of the flow.
    """

    seconds: float
    report: Report
    test: TestResults
    evaluation: Evaluation
    samples: SampleResult

    @property
    def seconds_per_sample(self) -> float:
        """Mean time of drawing a sample."""
        return self.samples.seconds / len(self.samples.files)

    def summary(self) -> dict[str, Any]:
        """Returns the results as JSON types."""
        default = self.test.default
        return {
            "seconds": self.seconds,
            "seconds_per_sample": self.seconds_per_sample,
            "pixel_auroc": default.pixel_auroc,
            "au_pro": default.au_pro,
            "evaluation": to_json(self.evaluation),
        }


def inspect(
    data: str | Path,
    out: Path,
    recipe: Recipe,
    *,
    skip_bad: bool,
    device: str,
    progress: bool,
    say: Callable[[str], None],
) -> InspectionRun | None:
    """Fits an inspection model, evaluates it and samples from its flow; returns None for unsuitable images.

    Args:
        data: the images.
        out: folder for everything that is written.
        recipe: the settings.
        skip_bad, device, progress, say: see ``fastmaf.inspection.workflow``.
    """
    try:
        fitted = fit(data, out, recipe, skip_bad=skip_bad, progress=progress, say=_unheard)
        _, report = evaluate_with_report(
            out, data, out, device=device, skip_bad=skip_bad, seed=0, progress=progress, say=_unheard
        )
    except DataError as error:
        say(f"the inspection recipe was left out: {error}")
        return None
    model, test = load_inspection(out, device=device), report.test
    assert test is not None
    evaluation = evaluate_scores(
        test.scores,
        test.labels,
        held_out_nll=model.calibration.scores,
        false_alarm=model.calibration.false_alarm,
    )
    samples = write_samples(model.flow, model.size, out, SAMPLES, progress=progress)
    return InspectionRun(sum(fitted.fitted.seconds.values()), report, test, evaluation, samples)


def _unheard(text: str) -> None:
    """Takes notes on the images: the published recipe has shown them, and the report lists them."""


def outputs_of(out: Path) -> list[Output]:
    """Returns the files that ``inspect`` writes, each once: the report of the evaluation replaces that of the fit."""
    outputs = (*fit_outputs(out), *eval_outputs(out), *sample_outputs(out, SAMPLES))
    return list({output.path: output for output in outputs}.values())
