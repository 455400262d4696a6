"""The content of a report as plain numbers, texts and arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.evaluate import TableRow
from fastmaf.io.outputs import text_file

REPORT_FILE = "report.html"
REPORT = text_file("a report", '<meta name="generator" content="fastmaf ', "<title>Inspection report</title>")
"""The kind of report.html; reports of earlier versions are recognised by their title."""


class Exhibit(NamedTuple):
    """One test image beside its anomaly map.

    Attributes:
        file: its name, as displayed.
        label: its class.
        score, p_value: anomaly score and conformal p-value.
        image, overlay: uint8 [h, w, 3], without and with the anomaly map and its contour laid over it.
        mask: bool [h, w], the labelled defect, outlined on the image; None if not known.
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
        folds: (number of images that it held out, their mean NLL in nats) of each fold of the cross-validation.
        keeps_blocks: whether the model has the blocks whose training ``log`` holds.
    """

    settings: tuple[tuple[str, str], ...]
    log: tuple[Mapping[str, float], ...]
    folds: tuple[tuple[int, float], ...]
    keeps_blocks: bool = True


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
        model: the name of the model file.
        date: as displayed.
        counts: (split, class, number of images), in the order to be shown.
        notes: on images that were not plain 8-bit RGB, one sentence each.
        skipped: (file, reason) of each file that could not be read.
        samples: (class, uint8 [k, h, w, 3]): a few images of each class.
        training: None if the model file does not record it.
        calibration: of the model.
        test: None before there are test images.
        unusual: before there are test images: the good images with the highest held-out scores, highest first.
        map_levels: the values of the anomaly map at the ends of the overlays' colours.
        timings: (step, median and 95th percentile in milliseconds, number of measurements), of single images.
        environment: (name, value) pairs: processor, threads, versions, ...
    """

    model: str
    date: str
    counts: tuple[tuple[str, str, int], ...]
    notes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    samples: tuple[tuple[str, np.ndarray], ...]
    training: Training | None
    calibration: Calibration
    test: TestResults | None
    unusual: tuple[Exhibit, ...]
    map_levels: tuple[float, float]
    timings: tuple[tuple[str, float, float, int], ...]
    environment: tuple[tuple[str, str], ...]
