"""Results of fastmaf and of ONNX Runtime for the same images, alone and in batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import torch

from fastmaf.images.decode import Frame, load_frame, resized
from fastmaf.inspection.export.graph_builder import ExportError
from fastmaf.inspection.interface import AnomalyModel
from fastmaf.inspection.workflow.rows import VERDICTS, ImageRow, predict_row

Results: TypeAlias = tuple[tuple[ImageRow, np.ndarray], tuple[ImageRow, np.ndarray]]
"""Row and anomaly map of one image, from fastmaf and from ONNX Runtime."""

_BATCH = 8  # images of one size that are checked together
_OUTPUTS = ("score", "map", "nll", "p_value", "anomalous")


def _frame(image: str | Path | np.ndarray, name: str, size: int) -> Frame:
    """Reads a file, or treats an array as one that is already decoded."""
    if not isinstance(image, np.ndarray):
        return load_frame(image, size, keep_full=True)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ExportError(f"{name} must be uint8 [h, w, 3]; found {image.dtype} {list(image.shape)}")
    start = perf_counter()
    pixels = resized(image, size)
    seconds = perf_counter() - start
    (height, width, _), full = image.shape, torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    return Frame(Path(name), pixels, height, width, (), 0.0, seconds, full)


def both(model: AnomalyModel, session: Any, image: str | Path | np.ndarray, name: str) -> Results:
    """Returns the results of fastmaf and of ONNX Runtime for an image."""
    frame = _frame(image, name, model.size)
    full = _pixels(frame)[None]
    expected = predict_row(model, frame)
    start = perf_counter()
    outputs = session.run(_OUTPUTS, {"image": full})
    return expected, _result(name, [output[0] for output in outputs], 1e3 * (perf_counter() - start))


def _pixels(frame: Frame) -> np.ndarray:
    assert frame.full is not None
    return np.ascontiguousarray(frame.full.permute(1, 2, 0).numpy())


def _result(name: str, outputs: Sequence[Any], latency_ms: float) -> tuple[ImageRow, np.ndarray]:
    score, anomaly_map, nll, p_value, anomalous = outputs
    verdict = VERDICTS[int(anomalous)]
    return ImageRow(name, float(score), float(p_value), verdict, float(nll), 0.0, latency_ms), anomaly_map


def in_batches(
    model: AnomalyModel, session: Any, images: Sequence[str | Path | np.ndarray], names: Sequence[str]
) -> list[Results]:
    """Returns the results of fastmaf for each image, and of ONNX Runtime for batches of images of one size."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        frame = _frame(image, names[i], model.size)
        shapes.setdefault((frame.height, frame.width), []).append(i)
    results = []
    for index in (part[i : i + _BATCH] for part in shapes.values() for i in range(0, len(part), _BATCH)):
        frames = [_frame(images[i], f"{names[i]}, in a batch", model.size) for i in index]
        full = [_pixels(frame) for frame in frames]
        if len(full) == 1:
            full.append(full[0][:, ::-1].copy())
            frames.append(_frame(full[1], f"the mirror image of {names[index[0]]}, in a batch", model.size))
        outputs = session.run(_OUTPUTS, {"image": np.stack(full)})
        results += [
            (predict_row(model, frame), _result(str(frame.path), [output[i] for output in outputs], 0.0))
            for i, frame in enumerate(frames)
        ]
    return results


def near(name: str, what: str, expected: float, found: float, allowed: float) -> float:
    """Returns the difference; raises if it is not allowed, or NaN."""
    difference = abs(expected - found)
    if not difference <= allowed:
        raise differs(name, what, f"{expected:.9g}", f"{found:.9g}", f"at most by {allowed:.3g}")
    return difference


def differs(name: str, what: str, expected: object, found: object, allowed: str) -> ExportError:
    """Returns the error for a result that differs by more than is allowed."""
    return ExportError(
        f"{name}: {what}: expected {expected} as in fastmaf, found {found} from ONNX Runtime; they may differ "
        f"{allowed}. Nothing was written"
    )
