"""Building the reports of a training run and of a labelled test set from their results."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import ImageSet
from fastmaf.images.decode import load_frame
from fastmaf.images.reduce import reduced
from fastmaf.inspection.aspect import aspect_of, fitted_into
from fastmaf.inspection.combined import CombinedModel
from fastmaf.inspection.decisions import decisions
from fastmaf.inspection.evaluate import TableRow
from fastmaf.inspection.interface import AnomalyModel, HeldOut
from fastmaf.inspection.map_images import contour_level, overlay, to_frame
from fastmaf.inspection.masks import LabelledSet
from fastmaf.inspection.model import Prediction
from fastmaf.inspection.report.content import Exhibit, Gallery, Report, TestResults, Training
from fastmaf.inspection.report.findings import worst_cases
from fastmaf.inspection.report.page import write_report
from fastmaf.inspection.workflow.rows import score_rows
from fastmaf.metrics.results import NORMAL

_SAMPLES, _CASES, _TIMED = 5, 6, 30
_WIDEST = 192  # pixels of a picture


def training_report(
    path: Path,
    model: AnomalyModel,
    images: ImageSet,
    held_out: HeldOut,
    *,
    name: str,
    outer: AnomalyModel | None = None,
) -> None:
    """Writes the report of a training run with this name, before there are test images.

    Args:
        path: of the file.
        model: the fitted model.
        images: that it was fitted to.
        held_out: their held-out scores and maps.
        name: of the run.
        outer: of images as they come, where ``model`` is one of framed or turned images: these are shown as they are.
    """
    scores, maps = held_out.scores[0], held_out.maps[0]
    if outer is not None:
        images = replace(images, shapes=(maps.shape[1:],) * len(images))
    pixels = None if outer is None else images.pixels
    highest = np.argsort(-scores, kind="stable")[:_CASES]
    values = scores, model.calibration.p_values(scores), maps
    unusual = tuple(_exhibit(model, images, i, *(each[i] for each in values), pixels=pixels) for i in highest)
    _write(path, model, name, images, images, images.notes, None, unusual, outer or model)


def test_report(
    path: Path, model: AnomalyModel, name: str, test: LabelledSet, prediction: Prediction, table: Sequence[TableRow]
) -> Report:
    """Writes the report of a labelled test set, and returns its content."""
    images = test.images
    cases = worst_cases(prediction.scores, images.labels, model.calibration.threshold, _CASES)
    p_values = model.calibration.p_values(prediction.scores)
    values = prediction.scores, p_values, prediction.anomaly_maps, test.masks.masks
    exhibits = (tuple(_exhibit(model, images, i, *(each[i] for each in values)) for i in group) for group in cases)
    results = TestResults(prediction.scores, images.labels, tuple(table), Gallery(*exhibits))
    return _write(path, model, name, images, test.normals, (*images.notes, *test.masks.notes), results)


def _write(
    path: Path,
    model: AnomalyModel,
    name: str,
    images: ImageSet,
    normals: ImageSet | None,
    notes: tuple[str, ...],
    test: TestResults | None,
    unusual: tuple[Exhibit, ...] = (),
    timed: AnomalyModel | None = None,
) -> Report:
    classes = Counter(() if test is None else test.labels)
    counts = [("calibration", NORMAL, model.calibration.n), *(("test", label, n) for label, n in classes.items())]
    shown = [(label, samples(images, label)) for label in classes]
    if normals is not None:
        counts.insert(0, ("train", NORMAL, len(normals)))
        shown.insert(0, (f"{NORMAL} (train)", samples(normals, NORMAL)))
    report = Report(
        model=name,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        counts=tuple(counts),
        notes=notes,
        skipped=tuple((file.name, reason) for file, reason in images.skipped),
        samples=tuple(shown),
        training=_training(model),
        calibration=model.calibration,
        test=test,
        unusual=unusual,
        map_levels=model.map_levels,
        timings=_timings(timed or model, images.paths),
        environment=environment(),
    )
    write_report(path, report)
    return report


def _training(model: AnomalyModel) -> Training | None:
    about: Mapping[str, Any] = model.about
    of_parts = model.parts[0].about if isinstance(model, CombinedModel) else about
    settings: dict[str, str] = {}
    parts = [("", about)]
    if isinstance(model, CombinedModel):
        parts = [(f"{s.name}, ", part.about) for s, part in zip(model.standards, model.parts, strict=True)]
    for prefix, of_part in parts:
        settings |= {f"{prefix}{name}": text for name, text in _settings(of_part).items()}
    if not settings and "features" not in about:
        return None
    settings |= decisions(model, explain=True)
    if configuration := about.get("configuration"):
        settings["configuration"] = ", ".join(f"{name} = {value}" for name, value in configuration.items())
    settings |= {f"seconds for {stage}": f"{value:.1f}" for stage, value in about.get("seconds", {}).items()}
    folds = zip(of_parts.get("images_of_folds", ()), of_parts.get("held_out_nll_of_folds", ()), strict=True)
    blocks = of_parts.get("recipe", {}).get("blocks", 0) != 0
    return Training(tuple(settings.items()), tuple(about.get("log", ())), tuple(folds), blocks)


def _settings(about: Mapping[str, Any]) -> dict[str, str]:
    """Returns the recipe and the held-out NLLs of a model or a part of one, if it records them."""
    if "recipe" not in about:
        return {}
    settings: dict[str, str] = {}
    for key, value in about["recipe"].items():
        pairs = {f"{key}: {k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
        settings |= {k.replace("_", " "): f"{v:g}" if isinstance(v, float) else str(v) for k, v in pairs.items()}
    settings["held-out NLL, nats"] = f"{about['held_out_nll']:,.0f}"
    settings["held-out NLL of the whitening alone, nats"] = f"{about['held_out_nll_of_whitening']:,.0f}"
    return settings


def samples(images: ImageSet, label: str, n: int = _SAMPLES) -> np.ndarray:
    """Returns up to n images of one class, uint8 ``[k, h, w, 3]``, evenly spread over it."""
    index = [i for i, other in enumerate(images.labels) if other == label]
    chosen = [index[round(k)] for k in np.linspace(0, len(index) - 1, min(n, len(index)))]
    shapes = images.shapes and [images.shapes[k] for k in chosen]
    return reduced(images.pixels[chosen], fitted_into(images.size, aspect_of(shapes))).permute(0, 2, 3, 1).numpy()


def _exhibit(
    model: AnomalyModel,
    images: ImageSet,
    i: int,
    score: float,
    p_value: float,
    anomaly_map: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    pixels: Tensor | None = None,
) -> Exhibit:
    """Returns an image with its map: from its file, or from ``pixels``, of the aspect ratio of the map."""
    if pixels is None:
        frame = load_frame(images.paths[i], _WIDEST)
        shape = fitted_into(_WIDEST, frame.height / frame.width)
        picture = reduced(frame.pixels[None], shape)[0].permute(1, 2, 0).contiguous().numpy()
    else:
        height, width = fitted_into(_WIDEST, anomaly_map.shape[0] / anomaly_map.shape[1])
        square = Image.fromarray(pixels[i].permute(1, 2, 0).contiguous().numpy())
        picture = np.asarray(square.resize((width, height), Image.Resampling.BILINEAR))
    low, high = model.map_levels
    values, anomalous = to_frame(anomaly_map, picture.shape[:2]), bool(score > model.calibration.threshold)
    if mask is not None:
        # A reduced pixel belongs to the defect if any of its pixels does.
        small = Image.fromarray(mask).convert("L").resize(picture.shape[1::-1], Image.Resampling.BOX)
        mask = np.asarray(small) > 0
    return Exhibit(
        f"{images.labels[i]}/{images.paths[i].name}",
        images.labels[i],
        float(score),
        float(p_value),
        picture,
        overlay(picture, values, low=low, high=high, contour=contour_level(values, high, anomalous)),
        mask,
    )


def _timings(model: AnomalyModel, paths: Sequence[Path]) -> tuple[tuple[str, float, float, int], ...]:
    """Times single images from file to verdict, after three images as warm-up."""
    files = [paths[i % len(paths)] for i in range(_TIMED + 3)]
    rows = [score_rows(model, [load_frame(file, model.size)])[0] for file in files][3:]
    decode, verdict = np.array([(row.decode_ms, row.latency_ms) for row in rows]).T
    steps = (("decode", decode), ("decoded to verdict", verdict), ("file to verdict", decode + verdict))
    return tuple((step, float(np.median(ms)), float(np.quantile(ms, 0.95)), len(ms)) for step, ms in steps)


def environment() -> tuple[tuple[str, str], ...]:
    """Returns versions, threads and the processor, as (name, value) pairs."""
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
