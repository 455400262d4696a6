"""Export of a model as one ONNX file from pixels to verdict, refused unless ONNX Runtime agrees with fastmaf."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import fastmaf
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.combined import CombinedModel
from fastmaf.inspection.export.agreement import Results, both, differs, in_batches, near
from fastmaf.inspection.export.graph import inspection_graph
from fastmaf.inspection.export.graph_builder import ExportError, require
from fastmaf.inspection.features.model import FeatureModel
from fastmaf.inspection.framed import seen_by
from fastmaf.inspection.interface import AnomalyModel
from fastmaf.inspection.model import InspectionModel
from fastmaf.inspection.tiled import TiledModel
from fastmaf.inspection.workflow.rows import VERDICTS
from fastmaf.io.atomic import written_atomically
from fastmaf.io.outputs import Output, check_outputs, text_file
from fastmaf.io.wording import count

__all__ = ["ExportError", "ExportReport", "export_onnx"]

ONNX = text_file("an ONNX export", "\x12\x07fastmaf")  # ModelProto.producer_name


@dataclass(frozen=True)
class ExportReport:
    """The exported file and how closely it agrees with fastmaf.

    Attributes:
        path, bytes: the file.
        images: number of images checked.
        tolerance: as requested.
        score: largest difference of scores, in the unit that ``export_onnx`` names; at most ``tolerance``.
        map: largest difference of a map's values, likewise.
        nll: largest difference of NLLs in nats.
        undecided: images whose verdicts differ because their scores equal the threshold within the tolerance.
        runtime_ms, fastmaf_ms: median latency from decoded pixels to verdict.
    """

    path: Path
    bytes: int
    images: int
    tolerance: float
    score: float
    map: float
    nll: float
    undecided: tuple[str, ...]
    runtime_ms: float
    fastmaf_ms: float

    def describe(self) -> str:
        """Returns the report as plain text."""
        lines = [
            f"{self.path}: {self.bytes / 1e6:.1f} MB, one graph from pixels to verdict, for batches of any size",
            f"ONNX Runtime and fastmaf agree on {count(self.images, 'image')}; largest differences:",
            f"  score: {self.score:.1e} of the spread of the calibration scores (of its own distance for an outlier)",
            f"  anomaly map: {self.map:.1e} of the range of the maps; at most {self.tolerance:g} is accepted for both",
            f"  NLL: {self.nll:.2g} nats",
            f"median time of an image: ONNX Runtime {self.runtime_ms:.1f} ms, fastmaf {self.fastmaf_ms:.1f} ms",
        ]
        if self.undecided:
            names = ", ".join(self.undecided)
            lines.append(f"verdicts that differ, as the score equals the threshold within rounding: {names}")
        return "\n".join(lines)


@fastmaf.torch_defaults()
def export_onnx(
    model: AnomalyModel,
    path: str | Path,
    check_images: Sequence[str | Path | np.ndarray],
    *,
    tolerance: float = 1e-3,
) -> ExportReport:
    """Writes a model to one ONNX file: resizing, flow, score, map, p-value and verdict; see ``inspection_graph``.

    Before the file is moved to its place, ONNX Runtime (CPU) and fastmaf process each check image from its pixels at
    full resolution, ONNX Runtime first alone and then in batches of those of one size (a single one with its mirror
    image), and the following is required:

    - scores differ by at most ``tolerance`` times the interquartile range of the calibration scores, or, for an image
      further than that from their median, times its distance from it;
    - values of maps differ by at most ``tolerance`` times the range of fastmaf's maps over all check images;
    - NLLs differ by at most ``tolerance`` times √(D/2) nats, the standard deviation of the NLL of D normal numbers,
      plus 5e-5 of themselves: a float32 whitening loses digits on an image of unusual brightness;
    - p-values and verdicts follow exactly from the graph's own score, and verdicts are equal. They may differ only if
      both scores lie within ``tolerance`` times the interquartile range of the threshold: after a recalibration on the
      check images one of them *is* the threshold. Such images are listed in the report.

    Args:
        model: calibrated.
        path: of the file; an earlier export there is replaced at the end, or stays.
        check_images: files, or arrays uint8 [h, w, 3]; at least one. Preferably good images of the production size.
        tolerance: a positive number.

    Raises:
        ExportError: the results disagree, the model cannot be exported, or a package is missing. Nothing is written.
        OutputError: ``path`` is a check image, or another file that is not an export.
        DataError: an image cannot be read.
    """
    if not len(check_images):
        raise ExportError("an export is checked on images; expected at least one, found none")
    if not 0 < tolerance < math.inf:
        raise ExportError(f"tolerance must be a positive number; found {tolerance}")
    check_outputs([Output(Path(path), ONNX)], [image for image in check_images if not isinstance(image, np.ndarray)])
    _check_spread(model.calibration)
    onnx, proto = require("onnx"), inspection_graph(model)
    with written_atomically(path) as file:
        file.write(proto.SerializeToString())
        file.flush()
        try:
            onnx.checker.check_model(str(file.name), full_check=True)
        except onnx.checker.ValidationError as error:
            raise ExportError(f"the graph is not valid ONNX: {error}") from error
        session = _session(str(file.name))
        names = [f"check image {i}" if isinstance(im, np.ndarray) else str(im) for i, im in enumerate(check_images)]
        both(model, session, check_images[0], names[0])  # not timed: the first call allocates and plans
        results = [both(model, session, image, name) for image, name in zip(check_images, names, strict=True)]
        report = _compared(model, results, tolerance, Path(path), file.tell())
        _compared(model, in_batches(model, session, check_images, names), tolerance, Path(path), 0)
        return report


def _check_spread(calibration: Calibration) -> None:
    spread = calibration.spread()
    if not (spread > 0 and math.isfinite(calibration.threshold)):
        raise ExportError(
            "an export is checked in units of the calibration scores' interquartile range; expected a positive range "
            f"and a finite threshold, found {spread:g} and {calibration.threshold:g}: run "
            "'fastmaf inspect recalibrate' on more good images, or 'fastmaf inspect calibrate' with another rate"
        )


def _session(file: str) -> Any:
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning threads would slow fastmaf down
    options.log_severity_level = 3
    try:
        return runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base class but this one
        raise ExportError(f"ONNX Runtime {runtime.__version__} cannot read the graph: {error}") from error


def _compared(model: AnomalyModel, results: Sequence[Results], tolerance: float, path: Path, size: int) -> ExportReport:
    """Returns the report, or raises for the first image with different results."""
    calibration = model.calibration
    spread, middle = calibration.spread(), float(np.median(calibration.scores))
    map_range = float(np.ptp([anomaly_map for (_, anomaly_map), _ in results])) or 1.0  # 1 if all maps are constant
    nll_deviation = math.sqrt(_features(model) / 2)
    scores, maps, nlls, undecided = [], [], [], []
    for (expected, expected_map), (found, found_map) in results:
        name, unit = found.file, max(spread, abs(expected.score - middle))
        scores.append(near(name, "score", expected.score, found.score, tolerance * unit) / unit)
        pixel = np.unravel_index(np.argmax(np.abs(expected_map - found_map)), expected_map.shape)
        where, values = f"map[{pixel[0]}, {pixel[1]}]", (float(expected_map[pixel]), float(found_map[pixel]))
        maps.append(near(name, where, *values, tolerance * map_range) / map_range)
        nlls.append(near(name, "NLL", expected.nll, found.nll, tolerance * nll_deviation + 5e-5 * abs(expected.nll)))
        own_score = np.array([found.score])
        near(name, "p-value", float(calibration.p_values(own_score)[0]), found.p_value, 1e-12)
        verdict = VERDICTS[int(calibration.is_anomalous(own_score)[0])]
        if found.verdict != verdict:
            raise differs(name, "verdict on its own score", verdict, found.verdict, "not at all")
        if expected.verdict != found.verdict:
            if max(abs(row.score - calibration.threshold) for row in (expected, found)) > tolerance * spread:
                allowed = f"only within {tolerance * spread:.3g} of the threshold {calibration.threshold:.9g}"
                raise differs(name, "verdict", expected.verdict, found.verdict, allowed)
            undecided.append(name)
    return ExportReport(
        path=path,
        bytes=size,
        images=len(results),
        tolerance=tolerance,
        score=max(scores),
        map=max(maps),
        nll=max(nlls),
        undecided=tuple(undecided),
        runtime_ms=median(found.latency_ms for _, (found, _) in results),
        fastmaf_ms=median(expected.latency_ms for (expected, _), _ in results),
    )


def _features(model: AnomalyModel) -> int:
    """Returns the number of values that the NLL is of; other models than these have no graph."""
    model = seen_by(model)
    if isinstance(model, TiledModel):
        return sum(_features(part) for part in model.parts)
    first = model.parts[0] if isinstance(model, CombinedModel) else model
    if isinstance(first, FeatureModel):
        return len(first.statistics.mean) * first.gaussian.mean.shape[1]
    assert isinstance(first, InspectionModel)
    return first.flow.features
