"""``fastmaf inspect score``: one row per image, anomaly maps on request; unreadable files are reported and skipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

import fastmaf
from fastmaf.images.progress import Progress
from fastmaf.images.read_ahead import Unreadable, processors, stamp_of
from fastmaf.inspection.calibration import CalibrationError
from fastmaf.inspection.model import load_inspection, model_file
from fastmaf.inspection.workflow.inputs import Say, expand
from fastmaf.inspection.workflow.journal import Journal, Record, digest_of, digest_of_file, journal_output
from fastmaf.inspection.workflow.pictures import Pictures
from fastmaf.inspection.workflow.rows import COLUMNS, row_writer, written_rows
from fastmaf.inspection.workflow.rows import VERDICTS as VERDICTS
from fastmaf.inspection.workflow.scorer import FileScorer
from fastmaf.inspection.workflow.shards import contents_at_first, files_of_first
from fastmaf.inspection.workflow.summary import ScoreResult, Summary
from fastmaf.io.atomic import STDOUT
from fastmaf.io.locks import run_lock
from fastmaf.io.outputs import Output, check_outputs, table
from fastmaf.io.outputs import json_lines as json_lines_file
from fastmaf.io.wording import count, errors_of
from fastmaf.training.interrupts import interruptible
from fastmaf.training.processes import Processes, device_of, local_size, started_together, was_restarted


def score(model: str | Path, arguments: Sequence[str], **settings: Any) -> int:
    """Scores images as ``score_images`` does; returns the number of files that could not be read."""
    return score_images(model, arguments, **settings).unread


@fastmaf.torch_defaults()
def score_images(
    model: str | Path,
    arguments: Sequence[str],
    *,
    out: Path | None = None,
    resume: bool = False,
    json_lines: bool = False,
    overlays: Path | None = None,
    maps: Path | None = None,
    map_suffix: str = ".png",
    nll: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    progress: bool = True,
    stdout: TextIO,
    say: Say,
) -> ScoreResult:
    """Scores the images that arguments name, in their order; processes that ``torchrun`` started share them.

    Args:
        arguments: files, folders, patterns, ``-``; see ``expand``.
        out: file for the rows, ``.csv`` or ``.jsonl``, which appears at the end; until then the rows are in a journal
            beside it, which stays if the run is interrupted. None writes the rows to ``stdout`` as they come.
        resume: continue from that journal, if there is one.
        json_lines: JSON lines on ``stdout`` instead of CSV.
        overlays: folder for overlays of the anomaly maps, in the size of each image.
        maps: folder for the anomaly maps as numbers, in the size of each image.
        map_suffix: ``".png"`` (16 bits) or ``".tiff"`` (32-bit floating point).
        nll: fill in the NLLs of the rows, too, which take two thirds of the time of a model with blocks.
        workers: number of processes that read images; by default one for each processor, and none for few images.
        stdout: where rows go without ``out``.

    Raises:
        CalibrationError: a score is NaN; the message names the model and the image.
        DataError: an argument matches nothing.
        OutputError: an output is an image, the model, another output, or a file of another origin.
        ResumeError: the interrupted run had another model or other arguments.
        ValueError: ``out`` has another suffix, or is missing with ``resume`` or several processes.
    """
    check_out(out, resume)
    with started_together(torch.device("cpu")) as team, ExitStack() as stack:
        if out is None and team.size > 1:
            raise ValueError(f"{team.size} processes need a file for their rows (--out)")
        pictures, path = Pictures(overlays, maps, map_suffix), model_file(model)
        files = files_of_first(team, expand(arguments, say=say) if team.is_first else [])
        pictures.name(files)
        check_outputs([*pictures.outputs(files), *row_outputs(out, team)], [path, *files])
        journal, mine = None, files
        if out is not None:
            images = f"{count(len(files), 'image')}, {digest_of(map(str, files))}"
            described = run_of(path, pictures, images, nll)
            journal = stack.enter_context(open_journal(out, described, resume or was_restarted(), say, team))
            mine = [file for file in files[team.rank :: team.size] if is_due(file, journal)]
            for file in mine:
                journal.forget(str(file))  # a file that has changed, and can no longer be read, has no row
        loaded = load_inspection(path, device=str(device_of(device)))
        readers = max(1, processors() // local_size()) if workers is None else workers
        scorer = stack.enter_context(FileScorer(loaded, pictures, readers, nll=nll))
        summary = Summary()
        write = journal.add if journal is not None else _to_stream(stdout, json_lines, summary)
        with errors_of(path, CalibrationError):
            interrupted = not _all_scored(scorer, mine, write, progress, say)
        if journal is not None and out is not None:
            interrupted = team.any(interrupted)
            _finish(journal, out, files, summary, interrupted, team, say)
        unread = [] if interrupted else [name for name in map(str, files) if name not in summary.names]
        if team.is_first and not (interrupted and journal is not None):
            summary.tell(loaded.calibration, unread, say)
        return summary.result(len(unread) if team.is_first else 0, interrupted)


def check_out(out: Path | None, resume: bool) -> None:
    """Raises ValueError unless rows can be written to ``out``, and resumed if asked for."""
    if out is not None and out.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"expected a .csv or .jsonl file for the scores; found {out}")
    if resume and out is None:
        raise ValueError("only a run with a file for its rows (--out) can be resumed")


def row_outputs(out: Path | None, team: Processes) -> list[Output]:
    """Returns the files of rows that a process writes."""
    if out is None:
        return []
    name = "the scores of images"
    kind = json_lines_file(name, COLUMNS) if out.suffix == ".jsonl" else table(name, COLUMNS)
    return [*([Output(out, kind)] if team.is_first else []), journal_output(_journal_path(out, team))]


def run_of(model: Path, pictures: Pictures, images: str, nll: bool) -> dict[str, str | None]:
    """Returns what a run does, by which its journal is known again."""
    maps = None if pictures.maps is None else f"{pictures.maps}, {pictures.map_suffix}"
    return {
        "model": digest_of_file(model),
        "images": images,
        "overlays": None if pictures.overlays is None else str(pictures.overlays),
        "maps": maps,
        "version": fastmaf.__version__,
        "--nll": "given" if nll else None,
    }


@contextmanager
def open_journal(
    out: Path, run: Mapping[str, str | None], resume: bool, say: Say, team: Processes
) -> Iterator[Journal]:
    """Opens the journal of a process, and locks the output."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = _journal_path(out, team)
    with run_lock(path, "scoring"):
        if not resume and os.path.exists(path):
            say(f"the rows of an interrupted run in {path} are replaced; --resume would have continued it")
        journal = Journal(path, {**run, "processes": team.size}, resume=resume)
        try:
            if journal.stamps:
                say(f"continuing after {count(len(journal.stamps), 'image')} in {path}")
            yield journal
        finally:
            journal.close()


def is_due(file: Path, journal: Journal) -> bool:
    """Returns whether a file has no row, or has changed since."""
    return str(file) not in journal.stamps or journal.stamps[str(file)] != stamp_of(file)


def _journal_path(out: Path, team: Processes) -> Path:
    part = f"-{team.rank + 1}-of-{team.size}" if team.size > 1 else ""
    return out.with_name(f"{out.name}.partial{part}")


def _to_stream(stdout: TextIO, json_lines: bool, summary: Summary) -> Callable[[list[Record]], None]:
    write = row_writer(stdout, STDOUT, json_lines)

    def write_all(records: list[Record]) -> None:
        for record in records:
            write(record.row)
        summary.add(records)

    return write_all


def _all_scored(
    scorer: FileScorer, files: Sequence[Path], write: Callable[[list[Record]], None], progress: bool, say: Say
) -> bool:
    """Scores files until the last, or Ctrl-C; returns whether it was the last."""
    done = 0
    with (
        interruptible() as stop,
        Progress("scoring", "image", total=len(files), show=progress) as bar,
        closing(scorer.score(files)) as batches,
    ):
        for batch in batches:
            for result in batch:
                if isinstance(result, Unreadable):
                    say(f"skipped: {result.reason}")
            write([result for result in batch if isinstance(result, Record)])
            done += len(batch)
            bar.update(len(batch))
            if stop.is_set():
                break
    return done == len(files)


def _finish(
    journal: Journal, out: Path, files: Sequence[Path], summary: Summary, interrupted: bool, team: Processes, say: Say
) -> None:
    """Writes the rows of all processes to ``out``, in the order of the files, and removes the journals."""
    if interrupted:
        if journal.stamps:
            say(f"{count(len(journal.stamps), 'image')} scored; their rows are in {journal.path}: --resume continues")
        return
    for content in contents_at_first(team, journal.content() if team.size > 1 else b""):
        journal.append(content)
    if team.is_first:
        with written_rows(out) as write:
            for record in journal.records(map(str, files)):
                write(record.row)
                summary.add([record])
    team.any(False)  # the others wait until the rows are written
    journal.close(remove=True)
