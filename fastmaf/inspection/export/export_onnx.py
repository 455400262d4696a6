"""Export of a model as one ONNX file from pixels to verdict, refused unless ONNX Runtime agrees with fastmaf."""

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
from fastmaf.inspection.export.graph import inspection_graph
from fastmaf.inspection.export.graph_builder import ExportError, require
from fastmaf.inspection.model import InspectionModel
from fastmaf.io.atomic import written_atomically
from fastmaf.io.outputs import ONNX, Output, check_outputs

__all__ = ["ExportError", "ExportReport", "export_onnx"]

_OUTPUTS = ("score", "map", "nll", "p_value", "anomalous")


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
            f"{self.path}: {self.bytes / 1e6:.1f} MB, from pixels to verdict",
            f"ONNX Runtime and fastmaf agree on {self.images} image{'s' * (self.images != 1)}; largest differences:",
            f"  score {self.score:.1e} of the calibration scores' interquartile range, or of an outlier's distance",
            f"  map {self.map:.1e} of the range of the maps; tolerance of both: {self.tolerance:g}",
            f"  NLL {self.nll:.2g} nats",
            f"pixels to verdict, median: ONNX Runtime {self.runtime_ms:.1f} ms, fastmaf {self.fastmaf_ms:.1f} ms",
        ]
        if self.undecided:
            names = ", ".join(self.undecided)
            lines.append(f"verdicts that differ because the score equals the threshold within rounding: {names}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class _Result:
    """The result of one implementation for one image."""

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

    Before the file is moved to its place, ONNX Runtime (CPU) and fastmaf process each check image from its pixels at
    full resolution, and the following is required:

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
        _both(model, session, check_images[0], names[0])  # not timed: the first call allocates and plans
        results = [_both(model, session, image, name) for image, name in zip(check_images, names, strict=True)]
        return _compared(model, names, results, tolerance, Path(path), file.tell())


def _check_spread(calibration: Calibration) -> None:
    spread = calibration.spread()
    if not (spread > 0 and math.isfinite(calibration.threshold)):
        raise ExportError(
            "scores are compared in units of the calibration scores' interquartile range, and with a threshold; "
            f"expected a positive one and a finite one, found {spread:g} and {calibration.threshold:g}: run "
            "'fastmaf recalibrate' on more normal images, or 'fastmaf calibrate' with another rate"
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


def _both(model: InspectionModel, session: Any, image: str | Path | np.ndarray, name: str) -> tuple[_Result, _Result]:
    """Returns the results of fastmaf and of ONNX Runtime for an image."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ExportError(f"{name} must be uint8 [h, w, 3]; found {image.dtype} {list(image.shape)}")
        full, start = np.ascontiguousarray(image), perf_counter()
        pixels, before = resized(full, model.size), perf_counter() - start
    else:
        frame = load_frame(image, model.size, keep_full=True)
        assert frame.full is not None
        full = np.ascontiguousarray(frame.full.permute(1, 2, 0).numpy())
        pixels, before = frame.pixels, frame.resize_seconds
    start = perf_counter()
    own = model.predict(pixels[None])
    p_value = float(model.calibration.p_values(own.scores)[0])
    anomalous = bool(model.calibration.is_anomalous(own.scores)[0])
    seconds = perf_counter() - start + before
    expected = _Result(float(own.scores[0]), own.anomaly_maps[0], float(own.nll[0]), p_value, anomalous, seconds)
    start = perf_counter()
    score, anomaly_map, nll, p_value, anomalous = session.run(_OUTPUTS, {"image": full})
    seconds = perf_counter() - start
    return expected, _Result(float(score), anomaly_map, float(nll), float(p_value), bool(anomalous), seconds)


def _compared(
    model: InspectionModel,
    names: Sequence[str],
    results: Sequence[tuple[_Result, _Result]],
    tolerance: float,
    path: Path,
    size: int,
) -> ExportReport:
    """Returns the report, or raises for the first image with different results."""
    calibration = model.calibration
    spread, middle = calibration.spread(), float(np.median(calibration.scores))
    map_range = float(np.ptp(np.stack([own.map for own, _ in results]))) or 1.0  # 1 if all maps are constant
    nll_deviation = math.sqrt(model.flow.features / 2)
    scores, maps, undecided = [], [], []
    for name, (own, other) in zip(names, results, strict=True):
        unit = max(spread, abs(own.score - middle))
        scores.append(_near(name, "score", own.score, other.score, tolerance * unit) / unit)
        place = np.unravel_index(np.argmax(np.abs(own.map - other.map)), own.map.shape)
        where, values = f"map[{place[0]}, {place[1]}]", (float(own.map[place]), float(other.map[place]))
        maps.append(_near(name, where, *values, tolerance * map_range) / map_range)
        _near(name, "NLL", own.nll, other.nll, tolerance * nll_deviation + 5e-5 * abs(own.nll))
        _near(name, "p-value", float(calibration.p_values(np.array([other.score]))[0]), other.p_value, 1e-12)
        if other.anomalous != (other.score > calibration.threshold):
            raise _differs(name, "verdict on its own score", not other.anomalous, other.anomalous, "not at all")
        if own.anomalous != other.anomalous:
            if max(abs(result.score - calibration.threshold) for result in (own, other)) > tolerance * spread:
                allowed = f"only within {tolerance * spread:.3g} of the threshold {calibration.threshold:.9g}"
                raise _differs(name, "verdict (anomalous)", own.anomalous, other.anomalous, allowed)
            undecided.append(name)
    return ExportReport(
        path=path,
        bytes=size,
        images=len(names),
        tolerance=tolerance,
        score=max(scores),
        map=max(maps),
        nll=max(abs(own.nll - other.nll) for own, other in results),
        undecided=tuple(undecided),
        runtime_ms=1e3 * median(other.seconds for _, other in results),
        fastmaf_ms=1e3 * median(own.seconds for own, _ in results),
    )


def _near(name: str, what: str, expected: float, found: float, allowed: float) -> float:
    """Returns the difference; raises if it is not allowed, or NaN."""
    difference = abs(expected - found)
    if not difference <= allowed:
        raise _differs(name, what, f"{expected:.9g}", f"{found:.9g}", f"at most by {allowed:.3g}")
    return difference


def _differs(name: str, what: str, expected: object, found: object, allowed: str) -> ExportError:
    return ExportError(
        f"{name}: {what}: expected {expected} as in fastmaf, found {found} from ONNX Runtime; they may differ "
        f"{allowed}. Nothing was written"
    )
