"""``fastmaf inspect score``: one row per image, anomaly maps on request; unreadable files are reported and skipped."""

from __future__ import annotations

import csv
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TextIO

import numpy as np

import fastmaf
from fastmaf.images.decode import Frame, sentences
from fastmaf.images.names import to_cell
from fastmaf.inspection.exchangeability import drift
from fastmaf.inspection.interface import AnomalyModel
from fastmaf.inspection.map_images import to_frame, write_map, write_overlay
from fastmaf.inspection.model import load_inspection, model_file
from fastmaf.inspection.workflow.inputs import Say, expand, read_each
from fastmaf.io.atomic import STDOUT, write_errors, written_atomically
from fastmaf.io.marks import MAP, OVERLAY
from fastmaf.io.outputs import Output, check_outputs, picture, table
from fastmaf.io.outputs import json_lines as json_lines_file
from fastmaf.io.wording import count, some

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
        latency_ms: from the pixels to the verdict.
    """

    file: str
    score: float
    p_value: float
    verdict: str
    nll: float
    decode_ms: float
    latency_ms: float


@fastmaf.torch_defaults()
def score(
    model: str | Path,
    arguments: Sequence[str],
    *,
    out: Path | None = None,
    json_lines: bool = False,
    overlays: Path | None = None,
    maps: Path | None = None,
    map_suffix: str = ".png",
    device: str = "cpu",
    progress: bool = True,
    stdout: TextIO,
    say: Say,
) -> int:
    """Scores the images that arguments name, in their order.

    Args:
        arguments: files, folders, patterns, ``-``; see ``expand``.
        out: file for the rows, ``.csv`` or ``.jsonl``; None writes each row to ``stdout`` at once.
        json_lines: JSON lines on ``stdout`` instead of CSV.
        overlays: folder for overlays of the anomaly maps, in the size of each image.
        maps: folder for the anomaly maps as numbers, in the size of each image.
        map_suffix: ``".png"`` (16 bits) or ``".tiff"`` (32-bit floating point).
        stdout: where rows go without ``out``.

    Returns:
        The number of files that could not be read.

    Raises:
        DataError: an argument matches nothing.
        OutputError: an output is an image, the model, another output, or a file of another origin.
        ValueError: ``out`` has another suffix.
    """
    if out is not None and out.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"expected a .csv or .jsonl file for the scores; found {out}")
    files = expand(arguments, say=say)
    names = _unique_names(files)
    check_outputs(_outputs(names.values(), out, overlays, maps, map_suffix), [model_file(model), *files])
    loaded = load_inspection(model, device=device)
    low, high = loaded.map_levels
    kinds: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    read: set[Path] = set()
    scores: list[float] = []
    pictures = overlays is not None or maps is not None
    with _row_writer(out, stdout, json_lines) as write:
        for frame in read_each(files, loaded.size, keep_full=pictures, progress=progress, say=say):
            row, anomaly_map = predict_row(loaded, frame)
            write(row)
            kinds.update(frame.kinds)
            verdicts[row.verdict] += 1
            read.add(frame.path)
            scores.append(row.score)
            if frame.full is not None:
                resized = to_frame(anomaly_map, (frame.height, frame.width))
                if overlays is not None:
                    full = np.ascontiguousarray(frame.full.permute(1, 2, 0).numpy())
                    write_overlay(overlays / f"{names[frame.path]}.png", full, resized, low, high)
                if maps is not None:
                    write_map(maps / f"{names[frame.path]}{map_suffix}", resized)
    for note in sentences(kinds):
        say(note)
    listed = ", ".join(f"{verdicts[verdict]:,} {verdict}" for verdict in VERDICTS)
    summary = f"{count(verdicts.total(), 'image')} scored at the threshold {loaded.calibration.threshold:.6g}: {listed}"
    unread = [str(file) for file in files if file not in read]
    if unread:
        summary += f"; {count(len(unread), 'file')} could not be read: {some(unread)}"
    say(summary)
    warning = drift(loaded.calibration, np.array(scores))
    if warning is not None:
        say(warning)
    return len(unread)


def _outputs(
    names: Iterable[str], out: Path | None, overlays: Path | None, maps: Path | None, map_suffix: str
) -> Iterator[Output]:
    rows, columns = "the scores of images", tuple(ImageRow.__dataclass_fields__)
    overlay, anomaly_map = picture(OVERLAY, "an overlay of an anomaly map"), picture(MAP, "an anomaly map")
    if out is not None:
        yield Output(out, json_lines_file(rows, columns) if out.suffix == ".jsonl" else table(rows, columns))
    for name in names:
        if overlays is not None:
            yield Output(overlays / f"{name}.png", overlay)
        if maps is not None:
            yield Output(maps / f"{name}{map_suffix}", anomaly_map)


def predict_row(model: AnomalyModel, frame: Frame) -> tuple[ImageRow, np.ndarray]:
    """Returns the row of one image and its anomaly map ``[s, s]``."""
    start = perf_counter()
    prediction = model.predict(frame.pixels[None], [(frame.height, frame.width)])
    p_value = float(model.calibration.p_values(prediction.scores)[0])
    verdict = VERDICTS[int(model.calibration.is_anomalous(prediction.scores)[0])]
    latency = perf_counter() - start + frame.resize_seconds
    score, nll = float(prediction.scores[0]), float(prediction.nll[0])
    row = ImageRow(str(frame.path), score, p_value, verdict, nll, 1e3 * frame.decode_seconds, 1e3 * latency)
    return row, prediction.anomaly_maps[0]


@contextmanager
def _row_writer(out: Path | None, stdout: TextIO, json_lines: bool) -> Iterator[Callable[[ImageRow], None]]:
    """Yields a function that writes a row: to a file that replaces ``out`` at the end, or to ``stdout`` at once."""
    if out is None:
        yield _writer(stdout, STDOUT, json_lines)
        return
    with written_atomically(out) as file:
        text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="", write_through=True)
        yield _writer(text, str(out), out.suffix == ".jsonl")
        text.detach()


def _writer(stream: TextIO, name: str, json_lines: bool) -> Callable[[ImageRow], None]:
    table = csv.DictWriter(stream, ImageRow.__dataclass_fields__, lineterminator="\n")
    if not json_lines:
        with write_errors(name):
            table.writeheader()

    def write(row: ImageRow) -> None:
        values = asdict(row)
        with write_errors(name):
            if json_lines:  # escaped to ASCII, which keeps file names that are not valid Unicode
                print(json.dumps(values), file=stream)
            else:
                values["file"] = to_cell(row.file, keep_bytes=name != STDOUT)
                values.update(decode_ms=f"{row.decode_ms:.2f}", latency_ms=f"{row.latency_ms:.2f}")
                table.writerow(values)
            stream.flush()

    return write


def _unique_names(files: Sequence[Path]) -> dict[Path, str]:
    """Returns a name for the pictures of each file: its stem, with the folders above it if several share one."""
    result: dict[Path, str] = {}
    stems = Counter(file.stem.lower() for file in files)
    taken: set[str] = set()
    for file in files:
        parts = [part for part in file.with_suffix("").parts if part not in (file.anchor, "..", ".")]
        name = _shortened(file.stem if stems[file.stem.lower()] == 1 else "_".join(parts[-3:]))
        unique, k = name, 2
        while unique.lower() in taken:
            unique, k = f"{name}_{k}", k + 1
        taken.add(unique.lower())
        result[file] = unique
    return result


def _shortened(name: str, longest: int = 200) -> str:
    """Returns a name short enough for a number and a suffix in the 255 bytes that file systems allow."""
    encoded = os.fsencode(name)
    if len(encoded) <= longest:
        return name
    return f"{encoded[: longest - 9].decode('utf-8', 'ignore')}-{zlib.crc32(encoded):08x}"
