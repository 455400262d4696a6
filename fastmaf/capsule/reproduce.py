"""``fastmaf capsule reproduce``: train, sample and evaluate as in the published run, and compare both."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fastmaf
from fastmaf.capsule import published
from fastmaf.capsule.config import TrainConfig
from fastmaf.capsule.evaluate import evaluate
from fastmaf.capsule.evaluate import outputs_of as eval_outputs
from fastmaf.capsule.models import Model, load_model
from fastmaf.capsule.sample import outputs_of as sample_outputs
from fastmaf.capsule.sample import sample
from fastmaf.capsule.synthetic import MARKER, draw_dataset
from fastmaf.capsule.train import outputs_of as train_outputs
from fastmaf.capsule.train import train
from fastmaf.capsule.train_result import TrainResult
from fastmaf.io.atomic import written_atomically
from fastmaf.io.outputs import Output, check_outputs, text_file
from fastmaf.io.run_folder import run_folder
from fastmaf.metrics.result_files import format_table
from fastmaf.metrics.results import Evaluation, ThresholdReport

COMPARISON_FILE = "comparison.txt"
SAMPLES = 5


@dataclass(frozen=True)
class Reproduction:
    """The results of a reproduction.

    Attributes:
        training: the training run.
        evaluation: the evaluation on the test images.
        seconds_per_sample: mean time of drawing a sample; None if the model cannot be sampled.
        table: the published run beside this one.
    """

    training: TrainResult
    evaluation: Evaluation
    seconds_per_sample: float | None
    table: str


@fastmaf.torch_defaults()
def reproduce(
    out: str | Path,
    config: TrainConfig,
    *,
    data: str | Path | None = None,
    resume: bool = False,
    skip_bad: bool = False,
    device: str = "cpu",
    graphs: bool = True,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Reproduction | None:
    """Trains, samples and evaluates with the given settings, and compares the results with the published run.

    Args:
        out: folder for everything that is written.
        config: the settings; the defaults of ``TrainConfig`` with ``degrees="random"`` are those of the published run,
            except for strict masks.
        data: the capsule images; None draws the synthetic set into ``out/demo-data``.
        resume, skip_bad, device, graphs, progress: see ``train``.
        say: receives lines of text for the user.

    Returns:
        The results, or None if Ctrl-C ended the training.

    Raises:
        OutputError: a file in ``out`` that this command did not write would be replaced; nothing was written.
    """
    out = Path(out)
    with run_folder(out, "reproducing the published run", COMPARISON_FILE):
        comparison = Output(out / COMPARISON_FILE, text_file("a comparison", "published run", "reference run"))
        results = [*train_outputs(out, resume=resume), *sample_outputs(out, SAMPLES), *eval_outputs(out), comparison]
        check_outputs(results)
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
        seconds = _sample(model, out, progress, say)
        extra = {"train_config": config, "seconds_per_sample": seconds}
        evaluation = evaluate(model, data, out, skip_bad=skip_bad, extra=extra, progress=progress)
        say(format_table(evaluation))
        table = compare(training, evaluation, seconds, real=real)
        with written_atomically(out / COMPARISON_FILE) as file:
            file.write((table + "\n").encode())
        return Reproduction(training, evaluation, seconds, table)


def _sample(model: Model, out: Path, progress: bool, say: Callable[[str], None]) -> float | None:
    try:
        return sample(model, out, SAMPLES, progress=progress).seconds / SAMPLES
    except fastmaf.NotInvertibleError as error:
        say(f"no samples: {error}")
        return None


def compare(training: TrainResult, evaluation: Evaluation, seconds_per_sample: float | None, *, real: bool) -> str:
    """Returns the published run beside this one, as a text table."""
    nll = {int(row["epoch"] or 0): row["nll"] for row in training.log}
    last = max(nll, default=0)
    epochs = sorted({e for e in (1, 10, 50, 100) if e <= last} | {last} - {0})
    before = {e: f"{published.PUBLISHED_NLL[e]:,.0f}" for e in epochs if e in published.PUBLISHED_NLL}
    pace = statistics.median(row["seconds"] or 0.0 for row in training.log) if training.log else float("nan")
    sampling = "refused" if seconds_per_sample is None else f"{seconds_per_sample:.3f}"
    interval = evaluation.auroc_interval
    spread = f" ({interval[0]:.3f}–{interval[1]:.3f})" if interval else ""
    rows = [
        *((f"NLL, epoch {e} (nats)", before.get(e, "–"), f"{nll[e]:,.0f}") for e in epochs),
        ("seconds an epoch", f"{published.SECONDS_PER_EPOCH}", f"{pace:.2f}"),
        (f"seconds a sample (mean of {SAMPLES})", f"{published.SECONDS_PER_SAMPLE}", sampling),
        ("AUROC (95 % interval)", f"{published.AUROC:.3f}", f"{evaluation.auroc:.3f}{spread}"),
        ("at the threshold chosen on test labels:", "", ""),
        *_at(evaluation.youden, is_published=True),
        ("at the threshold from held-out normals:", "", ""),
        *(_at(evaluation.held_out) if evaluation.held_out else [("  none: no normals were held out", "–", "–")]),
    ]
    table = [("", "published run", "this run" if real else "this run (synthetic)"), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in table]
    lines.insert(1, "-" * (sum(widths) + 4))
    return "\n".join(lines)


def _at(report: ThresholdReport, *, is_published: bool = False) -> list[tuple[str, str, str]]:
    def prf(values: tuple[float, float, float]) -> str:
        return "/".join(f"{value:.2f}".removeprefix("0") for value in values)

    rows = [
        ("  accuracy", f"{published.ACCURACY}", f"{report.accuracy:.2f}"),
        ("  P/R/F1 of defects", prf(published.ANOMALY), prf(report.anomaly)),
        ("  P/R/F1 of normals", prf(published.NORMAL), prf(report.normal)),
        ("  false alarms among normals", f"{published.FALSE_ALARM_RATE}", f"{report.false_alarm_rate:.2f}"),
    ]
    return rows if is_published else [(name, "–", value) for name, _, value in rows]
