"""The row of one scored image, and files and streams of rows."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import BinaryIO, TextIO

import numpy as np
import torch
from torch import Tensor

from fastmaf.images.decode import Frame
from fastmaf.images.names import to_cell
from fastmaf.inspection.calibration import CalibrationError
from fastmaf.inspection.interface import AnomalyModel, scores_of
from fastmaf.inspection.model import Shapes
from fastmaf.io.atomic import STDOUT, write_errors, written_atomically
from fastmaf.io.safe_json import finite

VERDICTS = ("good", "anomalous")


@dataclass(frozen=True)
class ImageRow:
    """The row of one image.

    Attributes:
        file: its path as it was found; in a CSV as ``fastmaf.images.names.to_cell`` writes it.
        score: the anomaly score.
        p_value: share of good images expected to score at least as high.
        verdict: ``"good"`` or ``"anomalous"``.
        nll: negative log-likelihood in nats; NaN, an empty cell of a CSV, where it was not asked for.
        decode_ms: from opening the file to its pixels.
        latency_ms: from the pixels to the verdict: resizing, and its share of the time of its batch.
    """

    file: str
    score: float
    p_value: float
    verdict: str
    nll: float
    decode_ms: float
    latency_ms: float


COLUMNS = tuple(ImageRow.__dataclass_fields__)


def predict_row(model: AnomalyModel, frame: Frame) -> tuple[ImageRow, np.ndarray]:
    """Returns the row of one image and its anomaly map ``[s, s]``."""
    rows, maps = predict_rows(model, [frame])
    return rows[0], maps[0]


def predict_rows(
    model: AnomalyModel, frames: Sequence[Frame], *, nll: bool = True
) -> tuple[list[ImageRow], np.ndarray]:
    """Returns the rows of a batch of at least one image, and their anomaly maps ``[n, s, s]``.

    Args:
        model: an inspection model.
        frames: the images.
        nll: whether the NLLs are wanted.

    Raises:
        CalibrationError: a score is NaN; the message names the image.
    """
    start = perf_counter()
    prediction = model.predict(*_stacked(frames), nll=nll)
    return _rows(model, frames, prediction.scores, prediction.nll if nll else None, start), prediction.anomaly_maps


def score_rows(model: AnomalyModel, frames: Sequence[Frame]) -> list[ImageRow]:
    """Returns the rows of ``predict_rows`` without the NLLs; the maps are not computed, if the model can do without."""
    start = perf_counter()
    return _rows(model, frames, scores_of(model, *_stacked(frames)), None, start)


def _stacked(frames: Sequence[Frame]) -> tuple[Tensor, Shapes]:
    return torch.stack([frame.pixels for frame in frames]), [(frame.height, frame.width) for frame in frames]


def _rows(
    model: AnomalyModel, frames: Sequence[Frame], scores: np.ndarray, nll: np.ndarray | None, start: float
) -> list[ImageRow]:
    if (wrong := np.isnan(scores)).any():
        raise CalibrationError(f"the score of {frames[int(wrong.argmax())].path} is NaN: it cannot be compared")
    p_values, anomalous = model.calibration.p_values(scores), model.calibration.is_anomalous(scores)
    seconds = (perf_counter() - start) / len(frames)
    return [
        ImageRow(
            file=str(frame.path),
            score=float(scores[i]),
            p_value=float(p_values[i]),
            verdict=VERDICTS[int(anomalous[i])],
            nll=math.nan if nll is None else float(nll[i]),
            decode_ms=1e3 * frame.decode_seconds,
            latency_ms=1e3 * (seconds + frame.resize_seconds),
        )
        for i, frame in enumerate(frames)
    ]


@contextmanager
def written_rows(path: Path) -> Iterator[Callable[[ImageRow], None]]:
    """Yields a function that writes a row to a file that replaces ``path``, .csv or .jsonl, at the end."""
    with written_atomically(path) as file, _text(file) as text:
        yield row_writer(text, str(path), path.suffix == ".jsonl", flush=False)


@contextmanager
def appended_rows(path: Path) -> Iterator[Callable[[ImageRow], None]]:
    """Yields a function that appends a row to the existing file ``path``, .csv or .jsonl, at once."""
    with open(path, "ab") as file, _text(file) as text:
        yield row_writer(text, str(path), path.suffix == ".jsonl", header=False)


@contextmanager
def _text(file: BinaryIO) -> Iterator[TextIO]:
    text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
    yield text
    text.flush()
    text.detach()


def row_writer(
    stream: TextIO, name: str, json_lines: bool, *, header: bool = True, flush: bool = True
) -> Callable[[ImageRow], None]:
    """Returns a function that writes a row to a stream.

    Args:
        stream: of text.
        name: of the stream, for errors.
        json_lines: write JSON lines instead of CSV.
        header: write the header of a CSV now.
        flush: flush the stream after every row.
    """
    table = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    if header and not json_lines:
        with write_errors(name):
            table.writeheader()

    def write(row: ImageRow) -> None:
        values = dict(vars(row))
        with write_errors(name):
            if json_lines:  # escaped to ASCII, which keeps file names that are not valid Unicode
                plain = {key: finite(value) if isinstance(value, float) else value for key, value in values.items()}
                print(json.dumps(plain, allow_nan=False), file=stream)
            else:
                values["file"] = to_cell(row.file, keep_bytes=name != STDOUT)
                values.update(decode_ms=f"{row.decode_ms:.2f}", latency_ms=f"{row.latency_ms:.2f}")
                if math.isnan(row.nll):
                    values["nll"] = None
                table.writerow(values)
            if flush:
                stream.flush()

    return write
