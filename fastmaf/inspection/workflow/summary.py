"""What ``fastmaf inspect score`` says about all images of a run at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fastmaf.images.decode import sentences
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.exchangeability import drift
from fastmaf.inspection.workflow.inputs import Say
from fastmaf.inspection.workflow.journal import Record
from fastmaf.inspection.workflow.rows import VERDICTS
from fastmaf.io.wording import count, some


@dataclass(frozen=True)
class ScoreResult:
    """How a run of ``fastmaf inspect score`` ended.

    Attributes:
        images: number of images that were scored.
        anomalous: number of these called anomalous.
        unread: number of files that could not be read.
        interrupted: whether it was stopped by Ctrl-C before the last image.
    """

    images: int
    anomalous: int
    unread: int
    interrupted: bool = False


class Summary:
    """Counts over the images of a run, whose ``names`` are those of its rows."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._kinds: Counter[str] = Counter()
        self._verdicts: Counter[str] = Counter()
        self._scores: list[float] = []

    def add(self, records: Iterable[Record]) -> None:
        """Counts images."""
        for record in records:
            self.names.add(record.row.file)
            self._kinds.update(record.kinds)
            self._verdicts[record.row.verdict] += 1
            self._scores.append(record.row.score)

    def result(self, unread: int, interrupted: bool) -> ScoreResult:
        """Returns the numbers."""
        return ScoreResult(len(self._scores), self._verdicts[VERDICTS[1]], unread, interrupted)

    def tell(self, calibration: Calibration, unread: Sequence[str], say: Say) -> None:
        """Tells how images were converted, the number of verdicts, and whether the scores are those of good images."""
        for note in sentences(self._kinds):
            say(note)
        listed = ", ".join(f"{self._verdicts[verdict]:,} {verdict}" for verdict in VERDICTS)
        text = f"{count(len(self._scores), 'image')} scored at the threshold {calibration.threshold:.6g}: {listed}"
        if unread:
            text += f"; {count(len(unread), 'file')} could not be read: {some(unread)}"
        say(text)
        warning = drift(calibration, np.array(self._scores))
        if warning is not None:
            say(warning)
