"""``fastmaf score``: one row an image, heat maps on request; damaged files are named and passed over."""

from __future__ import annotations

import csv
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, TextIO

import numpy as np
from tqdm import tqdm

import fastmaf
from fastmaf.images.decode import Frame, sentences
from fastmaf.images.names import to_cell
from fastmaf.inspection.heatmaps import to_frame, write_map, write_overlay
from fastmaf.inspection.inputs import Unreadable, expand, read_each
from fastmaf.inspection.model import InspectionModel, load_inspection, model_file
from fastmaf.io.atomic import STDOUT, write_errors, written_atomically
from fastmaf.io.marks import MAP, OVERLAY
from fastmaf.io.outputs import Output, check_outputs, picture, table
from fastmaf.io.outputs import json_lines as json_lines_file

VERDICTS = ("good", "anomalous")


@dataclass(frozen=True)
class Row:
    """What is said of one image.

    Attributes:
        file: its path as it was found; in a CSV as ``fastmaf.images.names.to_cell`` writes it.
        score: the anomaly score.
        p_value: share of normal images expected to score at least as high.
        verdict: ``"good"`` or ``"anomalous"``.
        nll: negative log-likelihood in nats.
        decode_ms: from the opening of the file to its pixels.
        latency_ms: from those to the verdict.
    """

    file: str
    score: float
    p_value: float
    verdict: str
    nll: float
    decode_ms: float
    latency_ms: float


class _Sink(Protocol):
    def __call__(self, row: Row) -> None: ...


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
    say: Callable[[str], Any],
) -> int:
    """Scores the images that arguments name, in their order.

    Args:
        model: model file or a run's folder.
        arguments: files, folders, patterns, ``-``; see ``expand``.
        out: file for the rows, ``.csv`` or ``.jsonl``; None writes to ``stdout`` as each is found.
        json_lines: JSON lines on ``stdout`` instead of CSV.
        overlays, maps: folders for pictures and for numbers, in the frame of each image.
        map_suffix: ``".png"`` (16 bits) or ``".tiff"`` (32-bit floating point).
        device: where to compute.
        progress: show a progress bar.
        stdout: where rows go without ``out``.
        say: told of files left aside, of damaged ones, of images that were not plain 8-bit RGB, and of a summary.

    Returns:
        How many files could not be read.

    Raises:
        DataError: an argument matches nothing.
        OutputError: a file to be written is an image or the model, another output, or a file that is no such output.
        ValueError: ``out`` has another suffix.
    """
    if out is not None and out.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"rows are written to a .csv or .jsonl file; found {out}")
    found = expand(arguments)
    for note in found.notes:
        say(note)
    names = _unique_names(found.files)
    check_outputs(_outputs_of(names.values(), out, overlays, maps, map_suffix), [model_file(model), *found.files])
    loaded = load_inspection(model, device=device)
    damaged = alarms = 0
    kinds: Counter[str] = Counter()
    pictures = overlays is not None or maps is not None
    low, high = loaded.map_levels
    with _rows(out, stdout, json_lines) as write:
        reading = read_each(found.files, loaded.size, keep_full=pictures)
        for one in tqdm(
            reading, total=len(found.files), desc="scoring", unit="image", disable=not progress, leave=False
        ):
            if isinstance(one, Unreadable):
                damaged += 1
                say(f"skipped: {one.reason}")
                continue
            kinds.update(one.kinds)
            row, heat = assess(loaded, one)
            alarms += row.verdict == VERDICTS[1]
            write(row)
            if pictures:
                drawn = to_frame(heat, (one.height, one.width))
                if overlays is not None:
                    full = np.ascontiguousarray(one.full.permute(1, 2, 0).numpy())
                    write_overlay(overlays / f"{names[one.path]}.png", full, drawn, low, high)
                if maps is not None:
                    write_map(maps / f"{names[one.path]}{map_suffix}", drawn)
    for note in sentences(kinds):
        say(note)
    read = len(found.files) - damaged
    say(
        f"{read} images: {read - alarms} good, {alarms} anomalous"
        + (f"; {damaged} could not be read" if damaged else "")
    )
    return damaged


def _outputs_of(
    names: Iterable[str], out: Path | None, overlays: Path | None, maps: Path | None, map_suffix: str
) -> Iterator[Output]:
    """What ``score`` writes."""
    rows, columns = "the scores of images", tuple(Row.__dataclass_fields__)
    overlay, heat = picture(OVERLAY, "a heat map laid over an image"), picture(MAP, "an anomaly map")
    if out is not None:
        yield Output(out, json_lines_file(rows, columns) if out.suffix == ".jsonl" else table(rows, columns))
    for name in names:
        if overlays is not None:
            yield Output(overlays / f"{name}.png", overlay)
        if maps is not None:
            yield Output(maps / f"{name}{map_suffix}", heat)


def assess(model: InspectionModel, frame: Frame) -> tuple[Row, np.ndarray]:
    """Returns the row of one image and its map ``[s, s]``."""
    began = perf_counter()
    found = model.assess(frame.pixels[None])
    p_value = float(model.calibration.p_values(found.scores)[0])
    verdict = VERDICTS[int(model.calibration.is_anomalous(found.scores)[0])]
    latency = perf_counter() - began + frame.resize_seconds
    score, nll = float(found.scores[0]), float(found.nll[0])
    row = Row(str(frame.path), score, p_value, verdict, nll, 1e3 * frame.decode_seconds, 1e3 * latency)
    return row, found.maps[0]


@contextmanager
def _rows(out: Path | None, stdout: TextIO, json_lines: bool) -> Iterator[_Sink]:
    """A function that writes a row: to a file that replaces ``out`` at the end, or to ``stdout`` at once."""
    if out is None:
        with write_errors(STDOUT):
            to_stdout = _writer(stdout, json_lines, keep_bytes=False)

        def write(row: Row) -> None:
            with write_errors(STDOUT):
                to_stdout(row)

        yield write
        return
    import io

    with written_atomically(out) as file:
        text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="", write_through=True)
        yield _writer(text, out.suffix == ".jsonl")
        text.detach()


def _writer(stream: TextIO, json_lines: bool, keep_bytes: bool = True) -> _Sink:
    if json_lines:

        def write_json(row: Row) -> None:
            # Escaped to ASCII, which keeps file names that are not valid Unicode.
            print(json.dumps(asdict(row)), file=stream, flush=True)

        return write_json
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(Row.__dataclass_fields__)

    def write(row: Row) -> None:
        values, file = asdict(row), to_cell(row.file, keep_bytes=keep_bytes)
        values.update({name: f"{values[name]:.2f}" for name in ("decode_ms", "latency_ms")}, file=file)
        rows.writerow(values.values())
        stream.flush()

    return write


def _unique_names(files: Sequence[Path]) -> dict[Path, str]:
    """A name for the pictures of each file: its stem, with the folders above it where several share one."""
    result: dict[Path, str] = {}
    stems: dict[str, int] = {}
    for file in files:
        stems[file.stem.lower()] = stems.get(file.stem.lower(), 0) + 1
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
    """A name that leaves room for a number and a suffix in the 255 bytes that file systems allow."""
    encoded = os.fsencode(name)
    if len(encoded) <= longest:
        return name
    return f"{encoded[: longest - 9].decode('utf-8', 'ignore')}-{zlib.crc32(encoded):08x}"
