"""``fastmaf inspect score --watch``: images are scored as they come into a folder, until Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TextIO

import fastmaf
from fastmaf.images.read_ahead import Stamp, Unreadable, processors
from fastmaf.inspection.calibration import CalibrationError
from fastmaf.inspection.model import load_inspection, model_file
from fastmaf.inspection.workflow.arrivals import Arrivals
from fastmaf.inspection.workflow.inputs import Say
from fastmaf.inspection.workflow.journal import Record
from fastmaf.inspection.workflow.pictures import Pictures
from fastmaf.inspection.workflow.rows import appended_rows, row_writer, written_rows
from fastmaf.inspection.workflow.score import check_out, open_journal, row_outputs, run_of
from fastmaf.inspection.workflow.scorer import FileScorer
from fastmaf.inspection.workflow.summary import ScoreResult, Summary
from fastmaf.io.atomic import STDOUT
from fastmaf.io.outputs import check_outputs
from fastmaf.io.wording import errors_of
from fastmaf.training.interrupts import interruptible
from fastmaf.training.processes import Processes, world_size

_SECONDS = 0.5  # between two listings, at least; long listings are made less often


@fastmaf.torch_defaults()
def watch(
    model: str | Path,
    folder: Path,
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
    stdout: TextIO,
    say: Say,
) -> ScoreResult:
    """Scores the images in a folder, and those that come into it, until Ctrl-C; see ``Arrivals``.

    A file that changes is scored again. Arguments and errors as ``score_images``, except
    that each row is appended to ``out`` at once, and that the journal stays, for ``resume``.
    """
    check_out(out, resume)
    if world_size() > 1:
        raise ValueError(f"a folder is watched by one process; found {world_size()}")
    path, pictures = model_file(model), Pictures(overlays, maps, map_suffix)
    check_outputs(row_outputs(out, Processes()), [path])
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder to watch")
    with ExitStack() as stack:
        journal = None
        if out is not None:
            run = run_of(path, pictures, f"those in {folder}, as they come", nll)
            journal = stack.enter_context(open_journal(out, run, resume, say, Processes()))
        loaded = load_inspection(path, device=device)
        scorer = stack.enter_context(
            FileScorer(loaded, pictures, processors() if workers is None else workers, nll=nll)
        )
        summary = Summary()
        if journal is None or out is None:
            write = row_writer(stdout, STDOUT, json_lines)
        else:
            before = list(journal.records(list(journal.stamps)))
            pictures.name([Path(record.row.file) for record in before])
            pictures.keep_existing = resume
            summary.add(before)
            with written_rows(out) as write_again:
                for record in before:
                    write_again(record.row)
            write = stack.enter_context(appended_rows(out))

        def note(records: list[Record]) -> None:
            if journal is not None:
                journal.add(records)
            for record in records:
                write(record.row)
            summary.add(records)

        say(f"watching {folder} for images, until Ctrl-C")
        stamps = {} if journal is None else journal.stamps
        with errors_of(path, CalibrationError):
            unread = _until_stopped(folder, path, scorer, pictures, stamps, note, say)
        summary.tell(loaded.calibration, unread, say)
        if journal is not None and journal.stamps:
            say(f"--resume continues from {journal.path}")
        return summary.result(len(unread), interrupted=False)


def _until_stopped(
    folder: Path,
    model: Path,
    scorer: FileScorer,
    pictures: Pictures,
    stamps: dict[str, Stamp],
    note: Callable[[list[Record]], None],
    say: Say,
) -> list[str]:
    """Scores what comes into a folder until Ctrl-C; returns the files that were given up."""
    arrivals, unread, seconds = Arrivals(folder, stamps), dict[str, None](), 0.0
    with interruptible() as stop:
        while not stop.wait(max(_SECONDS, 5 * seconds)):
            start = time.monotonic()
            ready = arrivals.ready()
            seconds = time.monotonic() - start
            pictures.name(ready)
            check_outputs(pictures.outputs(ready), [model, *ready])
            with closing(scorer.score(ready)) as batches:
                for batch in batches:
                    records = [result for result in batch if isinstance(result, Record)]
                    note(records)
                    for record in records:
                        stamps[record.row.file] = record.stamp
                        unread.pop(record.row.file, None)
                    for result in batch:
                        if isinstance(result, Unreadable) and arrivals.refuse(result.path):
                            unread[str(result.path)] = None
                            say(f"skipped: {result.reason}")
                    if stop.is_set():
                        break
    return list(unread)
