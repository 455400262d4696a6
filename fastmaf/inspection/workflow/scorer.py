"""Scoring many files: read ahead in processes, scored in batches."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import torch

from fastmaf.images.decode import as_frame
from fastmaf.images.read_ahead import Read, ReadAhead, Unreadable, in_order
from fastmaf.inspection.interface import AnomalyModel
from fastmaf.inspection.workflow.journal import Record
from fastmaf.inspection.workflow.pictures import Pictures
from fastmaf.inspection.workflow.rows import predict_rows, score_rows

Scored: TypeAlias = Record | Unreadable


class FileScorer:
    """Scores files in order, several batches at a time.

    On the CPU, each batch is scored by one thread, and as many at a time as torch has threads: threads that share a
    batch wait for each other in every operation, and most of the time so beside other processes. On a GPU one batch is
    scored at a time.

    Args:
        model: an inspection model, whose results do not depend on the batch.
        pictures: where overlays and maps go, named already.
        processes: that read images; 0 to read in this one.
        nll: whether the rows hold NLLs, which take two thirds of the time of a model with blocks.
    """

    def __init__(self, model: AnomalyModel, pictures: Pictures, processes: int, *, nll: bool) -> None:
        self._model, self._pictures, self._nll = model, pictures, nll
        self._threads = torch.get_num_threads() if model.device.type == "cpu" else 1
        self._reader = ReadAhead(model.size, keep_full=pictures.are_wanted, processes=processes)
        self._pool = ThreadPoolExecutor(self._threads)

    def __enter__(self) -> FileScorer:
        if self._threads > 1:
            torch.set_num_threads(1)  # threads that start later inherit it
        # Once before the threads: each would make its own float64 copy of the flow.
        self._model.predict(torch.zeros(1, 3, self._model.size, self._model.size, dtype=torch.uint8))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._reader.__exit__()
        if self._threads > 1:
            torch.set_num_threads(self._threads)

    def score(self, files: Sequence[Path]) -> Generator[list[Scored], None, None]:
        """Yields the results of each batch of files, in order, once its pictures are written."""
        yield from in_order(self._submit, self._reader.read(files), self._threads)

    def _submit(self, batch: list[Read]) -> Future[list[Scored]]:
        return self._pool.submit(self._score, batch)

    def _score(self, batch: list[Read]) -> list[Scored]:
        images = [read for read in batch if not isinstance(read, Unreadable)]
        if not images:
            return [read for read in batch if isinstance(read, Unreadable)]
        frames = [as_frame(read.image) for read in images]
        if self._nll or self._pictures.are_wanted:
            rows, maps = predict_rows(self._model, frames, nll=self._nll)
        else:
            rows, maps = score_rows(self._model, frames), None
        if self._pictures.are_wanted and maps is not None:
            for frame, row, anomaly_map in zip(frames, rows, maps, strict=True):
                self._pictures.write(frame, anomaly_map, row.score, self._model)
        records = iter(Record(row, read.image.kinds, read.stamp) for row, read in zip(rows, images, strict=True))
        return [read if isinstance(read, Unreadable) else next(records) for read in batch]
