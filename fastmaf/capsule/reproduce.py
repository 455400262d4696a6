"""The published capsule run, repeated: train, sample, evaluate, and both runs side by side: ``fastmaf reproduce``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import fastmaf
from fastmaf.capsule.config import TrainConfig
from fastmaf.capsule.evaluate import evaluate
from fastmaf.capsule.evaluate import outputs_of as eval_outputs
from fastmaf.capsule.models import Model, load_model
from fastmaf.capsule.sample import outputs_of as sample_outputs
from fastmaf.capsule.sample import sample
from fastmaf.capsule.synthetic import MARKER, draw_dataset
from fastmaf.capsule.train import TrainResult, train_in
from fastmaf.capsule.train import outputs_of as train_outputs
from fastmaf.io.atomic import written_atomically
from fastmaf.io.outputs import Output, check_outputs, text_file
from fastmaf.io.run_folder import run_folder
from fastmaf.metrics.result_files import format_table
from fastmaf.metrics.results import Evaluation, ThresholdReport

# What the published notebook recorded on the real capsule images, on a GTX 1050 Ti.
REFERENCE_NLL = MappingProxyType(
    {
        1: 8002.67,
        2: -10732.63,
        3: -17777.71,
        5: -24368.98,
        10: -29276.77,
        20: -34421.31,
        30: -37217.04,
        50: -39320.27,
        75: -40993.22,
        90: -41713.94,
        100: -42192.40,
    }
)
_REFERENCE_SECONDS_PER_EPOCH, _REFERENCE_SECONDS_PER_SAMPLE = 27.8, 266.8
_REFERENCE_AUROC, _REFERENCE_ACCURACY = 0.7854, 0.86
_REFERENCE_ANOMALY, _REFERENCE_NORMAL = ".90/.93/.91", ".60/.52/.56"

COMPARISON_FILE = "comparison.txt"
SAMPLES = 5


@dataclass(frozen=True)
class Reproduction:
    """What a reproduction gave: training, evaluation, seconds a sample (None when sampling was refused), and the
    table.
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
    """Trains, samples and evaluates with the given settings, and compares with the published run.

    Args:
        out: folder for everything that is written.
        config: the settings; the defaults of ``TrainConfig`` with ``degrees="random"`` are the reference's, but for
            strict masks.
        data: the capsule images; None draws the synthetic set into ``out/demo-data``.
        resume, skip_bad, device, graphs, progress: see ``train``.
        say: receives lines of text for the user.

    Returns:
        What was found, or None when Ctrl-C ended the training.

    Raises:
        OutputError: ``out`` holds a file of the name of one that is written, which is none; nothing was written.
    """
    out = Path(out)
    with run_folder(out, "reproducing the published run", COMPARISON_FILE):
        comparison = Output(out / COMPARISON_FILE, text_file("a comparison", "reference run"))
        results = [*train_outputs(out, resume=resume), *sample_outputs(out, SAMPLES), *eval_outputs(out), comparison]
        check_outputs(results)
        if data is None:
            data = out / "demo-data"
            draw_dataset(data, progress=progress)
            say(f"drew the synthetic capsules into {data}; their figures are not those of the real images")
        reference = None if (Path(data) / MARKER).is_file() else REFERENCE_NLL
        training = train_in(
            out,
            data,
            config,
            resume=resume,
            skip_bad=skip_bad,
            device=device,
            graphs=graphs,
            reference=reference,
            progress=progress,
        )
        if training.interrupted:
            say(f"stopped after {len(training.log)} whole epochs; the model is in {training.model}; --resume goes on")
            return None
        model = load_model(training.model, device=device)
        seconds = _sample(model, out, progress, say)
        extra = {"train_config": json.loads(json.dumps(vars(config))), "seconds_per_sample": seconds}
        evaluation = evaluate(model, data, out, skip_bad=skip_bad, extra=extra, progress=progress)
        say(format_table(evaluation))
        table = compare(training, evaluation, seconds, real=reference is not None)
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
    """Returns the reference run beside this one, as a text table."""
    nll = {int(row["epoch"] or 0): row["nll"] for row in training.log}
    last = max(nll, default=0)
    epochs = sorted({e for e in (1, 10, 50, 100) if e <= last} | {last} - {0})
    rows = [
        (f"NLL, epoch {e} (nats)", f"{REFERENCE_NLL[e]:,.0f}" if e in REFERENCE_NLL else "–", f"{nll[e]:,.0f}")
        for e in epochs
    ]
    pace = statistics.median(row["seconds"] or 0.0 for row in training.log) if training.log else float("nan")
    rows.append(("seconds an epoch", f"{_REFERENCE_SECONDS_PER_EPOCH}", f"{pace:.2f}"))
    own = "refused" if seconds_per_sample is None else f"{seconds_per_sample:.3f}"
    rows.append((f"seconds a sample (mean of {SAMPLES})", f"{_REFERENCE_SECONDS_PER_SAMPLE}", own))
    interval = evaluation.auroc_interval
    spread = f" ({interval[0]:.3f}–{interval[1]:.3f})" if interval else ""
    rows.append(("AUROC (95 % interval)", f"{_REFERENCE_AUROC:.3f}", f"{evaluation.auroc:.3f}{spread}"))
    rows.append(("at the threshold chosen on test labels:", "", ""))
    rows += _at(evaluation.youden, f"{_REFERENCE_ACCURACY}", _REFERENCE_ANOMALY, _REFERENCE_NORMAL)
    rows.append(("at the threshold from held-out normals:", "", ""))
    rows += (
        _at(evaluation.held_out, "–", "–", "–")
        if evaluation.held_out
        else [("  none: no normals were held out", "–", "–")]
    )
    title = "this run" if real else "this run (synthetic)"
    table = [("", "reference run", title), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in table]
    lines.insert(1, "-" * (sum(widths) + 4))
    return "\n".join(lines)


def _at(report: ThresholdReport, accuracy: str, anomaly: str, normal: str) -> list[tuple[str, str, str]]:
    def prf(found: tuple[float, float, float]) -> str:
        return "/".join(f"{value:.2f}".removeprefix("0") for value in found)

    return [
        ("  accuracy", accuracy, f"{report.accuracy:.2f}"),
        ("  P/R/F1 of defects", anomaly, prf(report.anomaly)),
        ("  P/R/F1 of normals", normal, prf(report.normal)),
        ("  false alarms among normals", "0.48" if anomaly != "–" else "–", f"{report.false_alarm_rate:.2f}"),
    ]
