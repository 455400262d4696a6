"""The row of one scored image, and files and streams of rows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import BinaryIO, TextIO

import numpy as np
import torch

from fastmaf.images.decode import Frame
from fastmaf.images.names import to_cell
from fastmaf.inspection.calibration import CalibrationError
from fastmaf.inspection.interface import AnomalyModel
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
        nll: negative log-likelihood in nats.
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


def predict_rows(model: AnomalyModel, frames: Sequence[Frame]) -> tuple[list[ImageRow], np.ndarray]:
    """Returns the rows of a batch of at least one image, and their anomaly maps ``[n, s, s]``.

    Raises:
        CalibrationError: a score is NaN; the message names the image.
    """
    start = perf_counter()
    shapes = [(frame.height, frame.width) for frame in frames]
    prediction = model.predict(torch.stack([frame.pixels for frame in frames]), shapes)
    if (wrong := np.isnan(prediction.scores)).any():
        raise CalibrationError(f"the score of {frames[int(wrong.argmax())].path} is NaN: it cannot be compared")
    p_values = model.calibration.p_values(prediction.scores)
    anomalous = model.calibration.is_anomalous(prediction.scores)
    seconds = (perf_counter() - start) / len(frames)
    rows = [
        ImageRow(
            file=str(frame.path),
            score=float(prediction.scores[i]),
            p_value=float(p_values[i]),
            verdict=VERDICTS[int(anomalous[i])],
            nll=float(prediction.nll[i]),
            decode_ms=1e3 * frame.decode_seconds,
            latency_ms=1e3 * (seconds + frame.resize_seconds),
        )
        for i, frame in enumerate(frames)
    ]
    return rows, prediction.anomaly_maps


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
                table.writerow(values)
            if flush:
                stream.flush()

    return write
