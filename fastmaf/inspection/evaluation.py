"""Judging an inspection model on a labelled test set: ``fastmaf eval`` writes scores.csv, metrics.json and report.html.

Every score that can be taken from the model stands in one table with the controls of the same run: they are fitted to
the same good images, and compared with the default score on the same resamples of the test images.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastmaf.capsule.data import ImageSet, load_test, load_train, to_unit
from fastmaf.capsule.folders import has_normals
from fastmaf.capsule.results import NORMAL, written_atomically
from fastmaf.inspection.controls import controls
from fastmaf.inspection.masks import Masks, load_masks
from fastmaf.inspection.metrics import (
    PairedDifference,
    au_pro,
    auroc,
    auroc_interval,
    paired_bootstrap,
    pixel_auroc,
)
from fastmaf.inspection.model import Assessment, InspectionModel, load_inspection, model_file
from fastmaf.inspection.scores import ScoreSettings, image_scores, maps_of, terms_and_nll
from fastmaf.inspection.scoring import VERDICTS

SCORES_FILE, METRICS_FILE, REPORT_FILE = "scores.csv", "metrics.json", "report.html"

Say = Callable[[str], Any]


@dataclass(frozen=True, eq=False)
class Line:
    """One row of the table: a score of the model, or a control.

    Attributes:
        name: of the score.
        kind: ``"score"`` or ``"control"``.
        auroc, interval: of images, with its 95 % bootstrap interval.
        difference: to the default score, paired; None for that itself.
        pixel_auroc, au_pro: of its maps; None without maps or masks.
        default: this is the score that the model gives.
    """

    name: str
    kind: str
    auroc: float
    interval: tuple[float, float]
    difference: PairedDifference | None
    pixel_auroc: float | None
    au_pro: float | None
    default: bool


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
    """
    from fastmaf.inspection.reporting import test_report

    out = Path(out)
    loaded = load_inspection(model, device=device)
    images = load_test(data, size=loaded.size, skip_bad=skip_bad, progress=progress)
    masks = load_masks(data, images)
    for note in (*images.notes, *masks.notes):
        say(note)
    normals = _normals(data, loaded.size, skip_bad, progress, say)
    found = loaded.assess(images.pixels)
    lines = table(loaded, images, masks, normals, seed=seed, progress=progress)
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


def scores_of(model: InspectionModel) -> list[tuple[str, ScoreSettings]]:
    """The scores that a model can give, by name, its own first."""
    own = model.settings
    others = [
        ScoreSettings("nll"),
        ScoreSettings("typicality"),
        replace(own, kind="map top"),
        replace(own, kind="map maximum"),
    ]
    return [(name_of(settings), settings) for settings in (own, *(one for one in others if one.kind != own.kind))]


def name_of(settings: ScoreSettings) -> str:
    """A score's name for people."""
    names = {
        "nll": "NLL",
        "typicality": "typicality |NLL - mean|",
        "map maximum": "map maximum",
        "map top": f"map, mean of top {settings.top:.1%}",
    }
    return names[settings.kind]


def table(
    model: InspectionModel,
    images: ImageSet,
    masks: Masks,
    normals: ImageSet | None,
    *,
    seed: int = 0,
    progress: bool = True,
) -> list[Line]:
    """Returns the score table: the scores of a model, and the controls fitted to ``normals``."""
    terms, nll = terms_of(model, images)
    found: list[tuple[str, str, np.ndarray, np.ndarray | None]] = []
    for name, settings in scores_of(model):
        drawn = maps_of(terms, model.statistics, settings, model.size)
        scores = image_scores(drawn, nll, model.statistics, settings).cpu().numpy()
        found.append((name, "score", scores, drawn.cpu().numpy() if settings.kind.startswith("map") else None))
    if normals is not None:
        for control in tqdm(controls(), desc="controls", disable=not progress, leave=False):
            found.append((control.name, "control", *control.fit(normals.pixels).score(images.pixels)))
    defect = np.array([label != NORMAL for label in images.labels])
    usable = masks.usable(images)
    lines = []
    for i, (name, kind, scores, maps) in enumerate(found):
        pixel = pro = None
        if maps is not None and usable.any():
            judged = np.flatnonzero(usable).tolist()
            own, truth = [maps[k] for k in judged], [masks.masks[k] for k in judged]
            pixel, pro = pixel_auroc(own, truth), au_pro(own, truth)
        difference = None if i == 0 else paired_bootstrap(scores, found[0][2], defect, seed=seed)
        interval = auroc_interval(scores, defect, 2000, seed)
        lines.append(Line(name, kind, auroc(scores, defect), interval, difference, pixel, pro, i == 0))
    return lines


def terms_of(model: InspectionModel, images: ImageSet) -> tuple[Tensor, Tensor]:
    """Returns terms ``[n, D]`` and NLLs ``[n]`` of images."""
    parts = images.pixels.split(64)
    found = [terms_and_nll(model.flow, to_unit(part).to(model.device), model.settings) for part in parts]
    terms, nll = zip(*found, strict=True)
    return torch.cat(terms), torch.cat(nll)


def verdicts(model: InspectionModel, images: ImageSet, found: Assessment) -> dict[str, tuple[int, int]]:
    """Returns (images, images called anomalous) of each class."""
    called = model.calibration.is_anomalous(found.scores)
    labels = np.asarray(images.labels)
    return {
        label: (int((labels == label).sum()), int(called[labels == label].sum())) for label in dict.fromkeys(labels)
    }


def format_lines(lines: Sequence[Line], called: Mapping[str, tuple[int, int]]) -> str:
    """The table as plain text for a terminal, and how many images of each class were called anomalous."""
    wide = max(len(line.name) for line in lines)
    head = f"{'':<{wide}}  {'AUROC':>6}  {'95% interval':<14}  {'to default':>10}  {'95% interval':<16}"
    text = [f"{head}  {'pixel':>5}  AU-PRO"]
    for line in lines:
        low, high = line.interval
        row = f"{line.name:<{wide}}  {line.auroc:>6.3f}  {low:.3f} - {high:.3f}   "
        if line.difference is None:
            row += f"{'default':>10}  {'':<16}"
        else:
            d = line.difference
            row += f"{d.difference:>+10.3f}  {d.low:+.3f} to {d.high:+.3f}"
        numbers = ("" if value is None else f"{value:.3f}" for value in (line.pixel_auroc, line.au_pro))
        text.append(row + "  {:>5}  {:>6}".format(*numbers))
    default = next(line for line in lines if line.default)
    for what, value in (("AUROC", "auroc"), ("pixel AUROC", "pixel_auroc"), ("AU-PRO", "au_pro")):
        own = getattr(default, value)
        controls_of = [(line.name, getattr(line, value)) for line in lines if line.kind == "control"]
        winners = [name for name, found in controls_of if None not in (own, found) and found > own]
        if winners:
            text.append(f"higher {what} here: the control {', '.join(winners)}")
    text.append("")
    text += [f"{label}: {alarms} of {n} called anomalous" for label, (n, alarms) in called.items()]
    return "\n".join(text)


def _write_scores(path: Path, model: InspectionModel, images: ImageSet, found: Assessment) -> None:
    p_values, called = model.calibration.p_values(found.scores), model.calibration.is_anomalous(found.scores)
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", "label", "score", "p_value", "verdict", "nll"])
    rows = zip(images.paths, images.labels, found.scores, p_values, called, found.nll, strict=True)
    for file, label, score, p_value, alarm, nll in rows:
        table.writerow([file, label, repr(float(score)), repr(float(p_value)), VERDICTS[int(alarm)], repr(float(nll))])
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
