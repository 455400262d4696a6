"""What a run puts into its report.html: numbers and pictures, gathered for ``fastmaf.inspection.report``."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

import fastmaf
from fastmaf.images.dataset import ImageSet
from fastmaf.images.decode import load_frame
from fastmaf.inspection.heatmaps import overlay, to_frame
from fastmaf.inspection.masks import Masks
from fastmaf.inspection.model import Assessment, InspectionModel
from fastmaf.inspection.report import (
    Absent,
    Count,
    Data,
    Exhibit,
    Fold,
    Gallery,
    Outcome,
    Report,
    Samples,
    ScoreRow,
    Threshold,
    Timing,
    Training,
    TrainingPoint,
    worst_cases,
    write_report,
)
from fastmaf.inspection.scoring import assess
from fastmaf.metrics.results import NORMAL

if TYPE_CHECKING:
    from fastmaf.inspection.table import Line

_SAMPLES, _CASES, _TIMED = 5, 6, 30

ASSUMPTIONS = (
    "The promised false-alarm rate holds for new images that come from where the calibration images came from: the "
    "same object, camera, light and placement. After a change, recalibrate on new good images.",
    "No score, constant or threshold was chosen with the labels of the test images; they are only judged here.",
    "Intervals are bootstrap intervals over the test images at hand; with few good images they are wide.",
)


def training_report(path: Path, model: InspectionModel, images: ImageSet, *, name: str) -> None:
    """Writes the report of a training run of that name, before there are test images."""
    absent = Absent("no test images were scored yet: run fastmaf eval --data with labelled ones")
    data = Data(
        (Count("train", NORMAL, len(images)), Count("calibration", NORMAL, model.calibration.n)),
        images.notes,
        tuple((file.name, reason) for file, reason in images.skipped),
        (Samples(NORMAL, _strip(images, NORMAL)),),
    )
    gallery = Gallery(absent, absent, absent)
    report = _report(path, model, name, data, absent, absent, gallery, _timings(model, images.paths))
    write_report(path, report)


def test_report(
    path: Path,
    model: InspectionModel,
    name: str,
    images: ImageSet,
    masks: Masks,
    normals: ImageSet | None,
    found: Assessment,
    lines: Sequence[Line],
) -> None:
    """Writes the report of a labelled test set."""
    counts = [Count("calibration", NORMAL, model.calibration.n)]
    counts += [Count("test", label, n) for label, n in Counter(images.labels).items()]
    samples = []
    if normals is not None:
        counts.insert(0, Count("train", NORMAL, len(normals)))
        samples.append(Samples(f"{NORMAL} (train)", _strip(normals, NORMAL)))
    samples += [Samples(label, _strip(images, label)) for label in dict.fromkeys(images.labels)]
    skipped = tuple((file.name, reason) for file, reason in images.skipped)
    data = Data(tuple(counts), (*images.notes, *masks.notes), skipped, tuple(samples))
    rows = tuple(
        ScoreRow(
            line.name,
            line.kind,
            line.auroc,
            line.interval,
            None if line.difference is None else (line.difference.low, line.difference.high),
            line.pixel_auroc,
            None if line.pixel_difference is None else (line.pixel_difference.low, line.pixel_difference.high),
            line.au_pro,
            line.default,
        )
        for line in lines
    )
    cases = worst_cases(found.scores, images.labels, model.calibration.threshold, _CASES)
    p_values = model.calibration.p_values(found.scores)
    gallery = Gallery(
        *(
            tuple(_exhibit(model, images, masks, found, p_values, int(i)) for i in chosen)
            for chosen in (cases.false_alarms, cases.misses, cases.detections)
        )
    )
    outcome = Outcome(found.scores, images.labels)
    timings = _timings(model, images.paths)
    write_report(path, _report(path, model, name, data, rows, outcome, gallery, timings))


def _report(
    path: Path,
    model: InspectionModel,
    name: str,
    data: Data,
    rows: tuple[ScoreRow, ...] | Absent,
    outcome: Outcome | Absent,
    gallery: Gallery,
    timings: tuple[Timing, ...],
) -> Report:
    calibration = model.calibration
    return Report(
        title="Inspection report",
        model=name,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=fastmaf.__version__,
        data=data,
        training=_training(model),
        scores=rows,
        threshold=Threshold(
            calibration.threshold,
            calibration.describe(),
            calibration.expected_rate,
            calibration.bound(),
            calibration.scores,
        ),
        outcome=outcome,
        gallery=gallery,
        timings=timings,
        environment=environment(),
        assumptions=ASSUMPTIONS,
    )


def _training(model: InspectionModel) -> Training | Absent:
    about: Mapping[str, Any] = model.about
    if "recipe" not in about:
        return Absent("the model file does not say how it was trained")
    settings: list[tuple[str, str]] = []
    for key, value in about["recipe"].items():
        pairs = [(f"{key}: {k}", v) for k, v in value.items()] if isinstance(value, Mapping) else [(key, value)]
        settings += [(k.replace("_", " "), f"{v:g}" if isinstance(v, float) else str(v)) for k, v in pairs]
    settings += [
        ("held-out NLL, nats", f"{about['held_out_nll']:,.0f}"),
        ("held-out NLL of the whitening alone, nats", f"{about['held_out_nll_of_whitening']:,.0f}"),
    ]
    tried = about.get("held_out_nll_of_copies", {})
    settings += [(f"held-out NLL of a fold, copies: {copies}, nats", f"{nll:,.0f}") for copies, nll in tried.items()]
    if (nll_with := about.get("held_out_nll_with_blocks")) is not None:
        kept = "kept" if about["recipe"]["blocks"] else "left out"
        settings.append((f"held-out NLL with blocks ({kept}), nats", f"{nll_with:,.0f}"))
    drawn = {**about.get("drawn_auroc", {}), **about.get("drawn_maps", {})}
    settings += [(f"on drawn defects, {name}", f"{value:.3f}") for name, value in drawn.items()]
    settings += [(f"seconds for {what}", f"{value:.1f}") for what, value in about.get("seconds", {}).items()]
    curve = tuple(TrainingPoint(row["step"], row["nll"], row["held_out_nll"]) for row in about.get("log", ()))
    folds = tuple(Fold(n, nll) for n, nll in zip(about["images_of_folds"], about["held_out_nll_of_folds"], strict=True))
    return Training(tuple(settings), curve or Absent("the whitening is fitted in closed form"), folds, "step")


def _strip(images: ImageSet, label: str) -> np.ndarray:
    """A few images of one class, uint8 ``[k, h, w, 3]``, evenly spread over it."""
    index = [i for i, found in enumerate(images.labels) if found == label]
    chosen = [index[round(k)] for k in np.linspace(0, len(index) - 1, min(_SAMPLES, len(index)))]
    return images.pixels[chosen].permute(0, 2, 3, 1).numpy()


def _exhibit(
    model: InspectionModel, images: ImageSet, masks: Masks, found: Assessment, p_values: np.ndarray, i: int
) -> Exhibit:
    frame = load_frame(images.paths[i], 192)
    picture = frame.pixels.permute(1, 2, 0).numpy()
    low, high = model.map_levels
    mask = masks.masks[i]
    if mask is not None:
        # Whatever a small picture's pixel covers of a thin defect is shown.
        shrunk = Image.fromarray(mask).convert("L").resize(picture.shape[1::-1], Image.Resampling.BOX)
        mask = np.asarray(shrunk) > 0
    return Exhibit(
        f"{images.labels[i]}/{images.paths[i].name}",
        images.labels[i],
        float(found.scores[i]),
        float(p_values[i]),
        picture,
        overlay(picture, to_frame(found.maps[i], picture.shape[:2]), low=low, high=high),
        mask,
    )


def _timings(model: InspectionModel, paths: Sequence[Path]) -> tuple[Timing, ...]:
    """Times the way of single images from file to verdict, the first few as warm-up."""
    times: dict[str, list[float]] = {"decode": [], "decoded to verdict": [], "file to verdict": []}
    files = [paths[i % len(paths)] for i in range(_TIMED + 3)]
    for k, file in enumerate(files):
        row, _ = assess(model, load_frame(file, model.size))
        if k >= 3:
            parts = (row.decode_ms, row.latency_ms, row.decode_ms + row.latency_ms)
            for values, ms in zip(times.values(), parts, strict=True):
                values.append(ms)
    return tuple(
        Timing(step, float(np.quantile(ms, 0.5)), float(np.quantile(ms, 0.95)), len(ms)) for step, ms in times.items()
    )


def environment() -> tuple[tuple[str, str], ...]:
    """Where the timings were taken: (name, value) pairs."""
    return (
        ("fastmaf", fastmaf.__version__),
        ("torch", torch.__version__),
        ("threads", str(torch.get_num_threads())),
        ("Python", platform.python_version()),
        ("system", platform.platform()),
        ("processor", _processor()),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
