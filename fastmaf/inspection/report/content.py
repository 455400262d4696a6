"""The content of a report as plain numbers, texts and arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.evaluate import TableRow


class Absent(NamedTuple):
    """Stands for a missing part. ``reason`` completes the sentence "not shown, as ..."."""

    reason: str


class Count(NamedTuple):
    """The number of images of a class in a split ("train", "calibration", "test")."""

    split: str
    label: str
    images: int


class Samples(NamedTuple):
    """A few images of one class, uint8 [k, h, w, 3]."""

    label: str
    images: np.ndarray


class Fold(NamedTuple):
    """The number of images that a fold held out, and their mean NLL in nats."""

    images: int
    nll: float


class Timing(NamedTuple):
    """Duration of a step: median and 95th percentile of ``n`` measurements, in milliseconds."""

    step: str
    p50: float
    p95: float
    n: int


class Exhibit(NamedTuple):
    """One test image beside its anomaly map.

    Attributes:
        file: its name, as displayed.
        label: its class.
        score, p_value: anomaly score and conformal p-value.
        image, overlay: uint8 [h, w, 3], without and with the anomaly map laid over it.
        mask: bool [h, w], the labelled defect, outlined on the overlay; None if not known.
    """

    file: str
    label: str
    score: float
    p_value: float
    image: np.ndarray
    overlay: np.ndarray
    mask: np.ndarray | None = None


class Gallery(NamedTuple):
    """Selected test images, the most relevant first; see ``worst_cases``."""

    false_alarms: tuple[Exhibit, ...]
    misses: tuple[Exhibit, ...]
    detections: tuple[Exhibit, ...]


@dataclass(frozen=True)
class Training:
    """How the model was trained.

    Attributes:
        settings: (name, value) pairs, in the order to be shown.
        log: rows with "step", "nll" and "held_out_nll" (mean NLLs of an image in nats); empty without blocks.
        folds: of the cross-validation.
    """

    settings: tuple[tuple[str, str], ...]
    log: tuple[Mapping[str, float], ...]
    folds: tuple[Fold, ...]


@dataclass(frozen=True, eq=False)
class TestResults:
    """The results on a labelled test set with normal and defective images.

    Attributes:
        scores: anomaly scores, float64 [n].
        labels: [n] classes; "good" is normal, every other class defective.
        table: the score table; one row is the default score, that of ``scores``.
        gallery: selected images.
    """

    __test__ = False  # not a test case of pytest

    scores: np.ndarray
    labels: tuple[str, ...]
    table: tuple[TableRow, ...]
    gallery: Gallery

    @property
    def default(self) -> TableRow:
        """The row of the default score."""
        return next(row for row in self.table if row.default)


@dataclass(frozen=True, eq=False)
class Report:
    """The content of report.html.

    Attributes:
        title: of the page.
        model: the name of the model file.
        date: as displayed.
        version: of fastmaf.
        counts: numbers of images, in the order to be shown.
        notes: on images that were not plain 8-bit RGB, one sentence each.
        skipped: (file, reason) of each file that could not be read.
        samples: a few images of each class.
        training: absent if the model file does not record it.
        calibration: of the model.
        test: absent before there are test images.
        timings: of single images.
        environment: (name, value) pairs: processor, threads, versions, ...
        assumptions: behind the numbers, one sentence each.
    """

    title: str
    model: str
    date: str
    version: str
    counts: tuple[Count, ...]
    notes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    samples: tuple[Samples, ...]
    training: Training | Absent
    calibration: Calibration
    test: TestResults | Absent
    timings: tuple[Timing, ...]
    environment: tuple[tuple[str, str], ...]
    assumptions: tuple[str, ...]
