"""Repeating the published run, then fitting an inspection model: the command is ``fastmaf capsule reproduce``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastmaf
from fastmaf.capsule import published
from fastmaf.capsule.config import TrainConfig
from fastmaf.capsule.evaluate import evaluate
from fastmaf.capsule.evaluate import outputs_of as eval_outputs
from fastmaf.capsule.models import Model, load_model
from fastmaf.capsule.sample import sample
from fastmaf.capsule.synthetic import MARKER, draw_dataset
from fastmaf.capsule.train import outputs_of as train_outputs
from fastmaf.capsule.train import train
from fastmaf.capsule.train_result import TrainResult
from fastmaf.images.samples import SampleResult
from fastmaf.images.samples import outputs_of as sample_outputs
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.report.content import REPORT, REPORT_FILE
from fastmaf.io.atomic import written_atomically
from fastmaf.io.outputs import Output, check_outputs, text_file
from fastmaf.io.run_folder import run_folder
from fastmaf.metrics.result_files import to_json
from fastmaf.metrics.results import Evaluation
from fastmaf.reproduction import inspection_run
from fastmaf.reproduction.inspection_run import SAMPLES, InspectionRun, inspect
from fastmaf.reproduction.page import write_comparison
from fastmaf.reproduction.table import compare
from fastmaf.training.checkpoints import refuse_unfinished

COMPARISON_FILE, INSPECTION_FOLDER = "comparison.txt", "inspection"


@dataclass(frozen=True)
class Reproduction:
    """The results of a reproduction.

    Attributes:
        training: the training of the published recipe.
        evaluation: its evaluation on the test images.
        seconds_per_sample: mean time of drawing a sample; None if its model cannot be sampled.
        inspection: the results of the inspection recipe; None if it does not suit the images.
        table: the published run beside both.
    """

    training: TrainResult
    evaluation: Evaluation
    seconds_per_sample: float | None
    inspection: InspectionRun | None
    table: str

    def summary(self) -> dict[str, Any]:
        """Returns the results of both recipes as JSON types; ``inspection`` is None if there is none."""
        return {
            "training": self.training.summary(),
            "evaluation": to_json(self.evaluation),
            "seconds_per_sample": self.seconds_per_sample,
            "inspection": None if self.inspection is None else self.inspection.summary(),
        }


@fastmaf.torch_defaults()
def reproduce(
    out: str | Path,
    config: TrainConfig,
    *,
    data: str | Path | None = None,
    recipe: Recipe | None = None,
    resume: bool = False,
    skip_bad: bool = False,
    device: str = "cpu",
    graphs: bool = True,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Reproduction | None:
    """Trains, samples and evaluates with the published recipe, then with the inspection recipe, and compares all.

    Files of the published recipe are written to ``out``, those of the inspection recipe to ``out/inspection``, the
    comparison to ``out/comparison.txt`` and ``out/report.html``.

    Args:
        out: folder for everything that is written.
        config: settings of the published recipe; the defaults of ``TrainConfig`` with ``degrees="random"`` are those
            of the published run, except for strict masks.
        data: the capsule images; None draws the synthetic set into ``out/demo-data``.
        recipe: settings of the inspection model; by default its defaults, with the size and the seed of ``config``.
        resume, skip_bad, device, graphs, progress: see ``fastmaf.capsule.train.train``.
        say: receives lines of text for the user.

    Returns:
        The results, or None if Ctrl-C ended a training.

    Raises:
        OutputError: a file in ``out`` that this command did not write would be replaced; nothing was written.
    """
    out = Path(out)
    with run_folder(out, "reproducing the published run", COMPARISON_FILE, REPORT_FILE):
        comparison = Output(out / COMPARISON_FILE, text_file("a comparison", "published run", "reference run"))
        results = [*train_outputs(out, resume=resume), *sample_outputs(out, SAMPLES), *eval_outputs(out)]
        results += [comparison, Output(out / REPORT_FILE, REPORT), *inspection_run.outputs_of(out / INSPECTION_FOLDER)]
        check_outputs(results)
        refuse_unfinished(out / INSPECTION_FOLDER)
        if data is None:
            data = out / "demo-data"
            draw_dataset(data, progress=progress)
            say(f"drew the synthetic capsules into {data}; their results are not those of the real images")
        real = not (Path(data) / MARKER).is_file()
        training = train(
            data,
            out,
            config,
            resume=resume,
            skip_bad=skip_bad,
            device=device,
            graphs=graphs,
            published=published.PUBLISHED_NLL if real else None,
            progress=progress,
            locked=True,
        )
        if training.interrupted:
            say(f"stopped after {len(training.log)} whole epochs; the model is in {training.model}; --resume continues")
            return None
        model = load_model(training.model, device=device)
        samples = _sample(model, out, progress, say)
        seconds = None if samples is None else samples.seconds / SAMPLES
        extra = {"train_config": config, "seconds_per_sample": seconds}
        evaluation = evaluate(model, data, out, skip_bad=skip_bad, extra=extra, progress=progress)
        say(f"published recipe: image AUROC {evaluation.auroc:.3f}, {training.describe()}")
        options = {"skip_bad": skip_bad, "device": device, "progress": progress, "say": say}
        try:
            inspection = _inspect(data, out / INSPECTION_FOLDER, config, recipe, options)
        except KeyboardInterrupt:
            say(f"stopped; the part of the published recipe in {out} is finished; --resume continues after it")
            return None
        table = compare(training, evaluation, seconds, inspection, real=real)
        with written_atomically(out / COMPARISON_FILE) as file:
            file.write(f"{table}\n".encode())
        write_comparison(
            out, data, table, training, evaluation, samples, inspection, size=config.size, skip_bad=skip_bad
        )
        return Reproduction(training, evaluation, seconds, inspection, str(table))


def _inspect(
    data: str | Path, out: Path, config: TrainConfig, recipe: Recipe | None, options: dict[str, Any]
) -> InspectionRun | None:
    try:
        recipe = recipe or Recipe(size=config.size, seed=config.seed)
    except ValueError as error:
        options["say"](f"the inspection recipe was left out: {error}")
        return None
    return inspect(data, out, recipe, **options)


def _sample(model: Model, out: Path, progress: bool, say: Callable[[str], None]) -> SampleResult | None:
    try:
        return sample(model, out, SAMPLES, progress=progress)
    except fastmaf.NotInvertibleError as error:
        say(f"no samples: {error}")
        return None
