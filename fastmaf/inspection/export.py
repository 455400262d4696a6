"""Exporting a model: one ONNX file from pixels to verdict, refused unless ONNX Runtime says what fastmaf says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

import fastmaf
from fastmaf.images.decode import load_frame, resized
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.model import InspectionModel
from fastmaf.inspection.onnx_graph import inspection_graph
from fastmaf.inspection.onnx_values import ExportError, require
from fastmaf.io.atomic import written_atomically
from fastmaf.io.outputs import ONNX, Output, check_outputs

__all__ = ["ExportError", "ExportReport", "export_onnx"]

_OUTPUTS = ("score", "map", "nll", "p_value", "anomalous")


@dataclass(frozen=True)
class ExportReport:
    """What was written and how well it agrees.

    Attributes:
        path, bytes: the file.
        images: how many were checked.
        tolerance: what was asked for.
        score: largest difference of scores, in the unit that ``export_onnx`` names; at most ``tolerance``.
        map: largest difference of a map's values, likewise.
        nll: largest difference of NLLs in nats.
        undecided: images at the threshold: their verdicts differ, as their scores lie within the tolerance of it.
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
        """Plain text, a line a finding."""
        lines = [
            f"{self.path}: {self.bytes / 1e6:.1f} MB, from pixels to verdict",
            f"ONNX Runtime and fastmaf agree on {self.images} image{'s' * (self.images != 1)}; largest differences:",
            f"  score {self.score:.1e} of the calibration scores' interquartile range, or of a far one's distance",
            f"  map {self.map:.1e} of the maps' range; {self.tolerance:g} was allowed for both",
            f"  NLL {self.nll:.2g} nats",
            f"pixels to verdict, median: ONNX Runtime {self.runtime_ms:.1f} ms, fastmaf {self.fastmaf_ms:.1f} ms",
        ]
        if self.undecided:
            names = ", ".join(self.undecided)
            lines.append(f"at the threshold, so that rounding decides and the verdicts differ: {names}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class _Said:
    """What one side says of an image."""

    score: float
    map: np.ndarray
    nll: float
    p_value: float
    anomalous: bool
    seconds: float


@fastmaf.torch_defaults()
def export_onnx(
    model: InspectionModel,
    path: str | Path,
    check_images: Sequence[str | Path | np.ndarray],
    *,
    tolerance: float = 1e-3,
) -> ExportReport:
    """Writes a model to one ONNX file: resizing, flow, score, map, p-value and verdict; see ``inspection_graph``.

    Before the file is moved to its place, ONNX Runtime (CPU) and fastmaf judge each check image, each from its pixels
    at full resolution, and

    - scores differ by at most ``tolerance`` times the interquartile range of the calibration scores, or, for an image
      further than that from their median, times its distance from it;
    - values of maps by at most ``tolerance`` times the range of fastmaf's maps over all check images;
    - NLLs by at most ``tolerance`` times √(D/2) nats, the deviation of the NLL of D normal numbers, and 5e-5 of
      themselves: a float32 whitening loses digits on an image of unusual brightness;
    - p-values and verdicts follow from the graph's own score exactly, and verdicts are equal. They may differ only
      where both scores lie within ``tolerance`` times the interquartile range of the threshold: after a recalibration
      on the check images one of them *is* the threshold. Such images are named in the report.

    Args:
        model: calibrated.
        path: of the file; an earlier export there is replaced in the end, or stays.
        check_images: files, or arrays uint8 [h, w, 3]; at least one. Good images, of the size that will come.
        tolerance: a positive number.

    Raises:
        ExportError: both disagree, the model cannot be exported, or a package is missing. Nothing is written.
        OutputError: ``path`` is a check image, or another file that is no export.
        DataError: an image cannot be read.
    """
    if not len(check_images):
        raise ExportError("an export is checked on images; expected at least one, found none")
    if not 0 < tolerance < math.inf:
        raise ExportError(f"tolerance must be a positive number; found {tolerance}")
    check_outputs([Output(Path(path), ONNX)], [image for image in check_images if not isinstance(image, np.ndarray)])
    spread = _spread(model.calibration)
    onnx, proto = require("onnx"), inspection_graph(model)
    with written_atomically(path) as file:
        file.write(proto.SerializeToString())
        file.flush()
        try:
            onnx.checker.check_model(str(file.name), full_check=True)
        except onnx.checker.ValidationError as error:
            raise ExportError(f"the graph is no valid ONNX: {error}") from error
        session = _session(str(file.name))
        names, expected, found = [], [], []
        for i, image in enumerate(check_images):
            name = f"check image {i}" if isinstance(image, np.ndarray) else str(image)
            both = _judge(model, session, image, name)
            if i == 0:  # the first call of each allocates and plans: not to be timed
                both = _judge(model, session, image, name)
            names.append(name)
            expected.append(both[0])
            found.append(both[1])
        report = _compared(model, names, expected, found, spread, tolerance, Path(path), file.tell())
    return report


def _spread(calibration: Calibration) -> float:
    """Returns the interquartile range of the calibration scores."""
    finite = calibration.scores[np.isfinite(calibration.scores)]
    spread = float(np.subtract(*np.quantile(finite, (0.75, 0.25)))) if len(finite) else 0.0
    if not (spread > 0 and math.isfinite(calibration.threshold)):
        raise ExportError(
            "scores are compared in units of the calibration scores' interquartile range, and with a threshold; "
            f"expected a positive one and a finite one, found {spread:g} and {calibration.threshold:g}: run "
            "'fastmaf recalibrate' on more normal images, or 'fastmaf calibrate' with another rate"
        )
    return spread


def _session(file: str) -> Any:
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads would slow fastmaf's
    options.log_severity_level = 3
    try:
        return runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes share no base but this one
        raise ExportError(f"ONNX Runtime {runtime.__version__} cannot read the graph: {error}") from error


def _judge(model: InspectionModel, session: Any, image: str | Path | np.ndarray, name: str) -> tuple[_Said, _Said]:
    """Returns what fastmaf and ONNX Runtime say of an image."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ExportError(f"{name} must be uint8 [h, w, 3]; found {image.dtype} {list(image.shape)}")
        full, began = np.ascontiguousarray(image), perf_counter()
        pixels, before = resized(full, model.size), perf_counter() - began
    else:
        frame = load_frame(image, model.size, keep_full=True)
        assert frame.full is not None
        full = np.ascontiguousarray(frame.full.permute(1, 2, 0).numpy())
        pixels, before = frame.pixels, frame.resize_seconds
    began = perf_counter()
    own = model.assess(pixels[None])
    p_value = float(model.calibration.p_values(own.scores)[0])
    anomalous = bool(model.calibration.is_anomalous(own.scores)[0])
    seconds = perf_counter() - began + before
    expected = _Said(float(own.scores[0]), own.maps[0], float(own.nll[0]), p_value, anomalous, seconds)
    began = perf_counter()
    score, heat, nll, p_value, anomalous = session.run(_OUTPUTS, {"image": full})
    seconds = perf_counter() - began
    return expected, _Said(float(score), heat, float(nll), float(p_value), bool(anomalous), seconds)


def _compared(
    model: InspectionModel,
    names: Sequence[str],
    expected: Sequence[_Said],
    found: Sequence[_Said],
    spread: float,
    tolerance: float,
    path: Path,
    size: int,
) -> ExportReport:
    """Returns the report, or raises for the first image on which both disagree."""
    calibration = model.calibration
    usual = float(np.median(calibration.scores))
    maps = np.stack([said.map for said in expected])
    map_range = float(np.ptp(maps)) or 1.0  # 1: maps that are all the same number
    score_shares, map_shares, undecided = [], [], []
    for name, own, other in zip(names, expected, found, strict=True):
        unit = max(spread, abs(own.score - usual))
        _near(name, "score", own.score, other.score, tolerance * unit)
        score_shares.append(abs(own.score - other.score) / unit)
        place = np.unravel_index(np.argmax(np.abs(own.map - other.map)), own.map.shape)
        where = f"map[{place[0]}, {place[1]}]"
        _near(name, where, float(own.map[place]), float(other.map[place]), tolerance * map_range)
        map_shares.append(abs(float(own.map[place]) - float(other.map[place])) / map_range)
        deviation = math.sqrt(model.flow.features / 2)
        _near(name, "NLL", own.nll, other.nll, tolerance * deviation + 5e-5 * abs(own.nll))
        _near(name, "p-value", float(calibration.p_values(np.array([other.score]))[0]), other.p_value, 1e-12)
        if other.anomalous != (other.score > calibration.threshold):
            raise _differs(name, "verdict on its own score", not other.anomalous, other.anomalous, "not at all")
        if own.anomalous != other.anomalous:
            if max(abs(said.score - calibration.threshold) for said in (own, other)) > tolerance * spread:
                allowed = f"only within {tolerance * spread:.3g} of the threshold {calibration.threshold:.9g}"
                raise _differs(name, "verdict (anomalous)", own.anomalous, other.anomalous, allowed)
            undecided.append(name)
    return ExportReport(
        path=path,
        bytes=size,
        images=len(names),
        tolerance=tolerance,
        score=max(score_shares),
        map=max(map_shares),
        nll=max(abs(own.nll - other.nll) for own, other in zip(expected, found, strict=True)),
        undecided=tuple(undecided),
        runtime_ms=1e3 * median(other.seconds for other in found),
        fastmaf_ms=1e3 * median(own.seconds for own in expected),
    )


def _near(name: str, what: str, expected: float, found: float, allowed: float) -> None:
    if not abs(expected - found) <= allowed:  # so that NaN is refused
        raise _differs(name, what, f"{expected:.9g}", f"{found:.9g}", f"at most by {allowed:.3g}")


def _differs(name: str, what: str, expected: object, found: object, allowed: str) -> ExportError:
    return ExportError(
        f"{name}: {what}: expected {expected} as fastmaf says, found {found} from ONNX Runtime; they may differ "
        f"{allowed}. Nothing was written"
    )
