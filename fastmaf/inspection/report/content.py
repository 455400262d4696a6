"""What a report says, as plain numbers, texts and arrays: no model, no drawing.

A part that a run does not have is an `Absent`, which says why; the page prints that reason where the part would stand.
An empty tuple, on the other hand, is a finding: nothing was skipped, no good image raised an alarm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmaf.metrics.results import checked_scores


@dataclass(frozen=True)
class Absent:
    """In the place of a part that the run does not have. `reason` completes the sentence "not shown, as ..."."""

    reason: str


@dataclass(frozen=True)
class Count:
    """How many images of a class there are in a split ("train", "calibration", "test")."""

    split: str
    label: str
    images: int


@dataclass(frozen=True, eq=False)
class Samples:
    """A few images of one class, uint8 [k, h, w, 3]."""

    label: str
    images: np.ndarray

    def __post_init__(self) -> None:
        _check_image(self.images, f"the samples of class {self.label!r}", 4)


@dataclass(frozen=True, eq=False)
class Data:
    """The images that the run saw.

    Attributes:
        counts: in the order to be shown.
        notes: what the loader did to images that were not plain 8-bit RGB, a sentence each.
        skipped: (file, reason) of each file that could not be read.
        samples: a few images of each class.
    """

    counts: tuple[Count, ...]
    notes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    samples: tuple[Samples, ...] | Absent = Absent("no sample images were kept")


@dataclass(frozen=True)
class TrainingPoint:
    """One row of the training log: the epoch or step, and mean NLLs of an image in nats (None where not measured)."""

    at: int
    nll: float | None
    val_nll: float | None = None


@dataclass(frozen=True)
class Fold:
    """One fold of the cross-validation: the images it held out and their mean NLL in nats."""

    images: int
    nll: float


@dataclass(frozen=True)
class Training:
    """How the model came about.

    Attributes:
        settings: (name, value) pairs, in the order to be shown.
        curve: the training log; `unit` says what its `at` counts.
        folds: held-out NLL of each fold.
    """

    settings: tuple[tuple[str, str], ...]
    curve: tuple[TrainingPoint, ...] | Absent
    folds: tuple[Fold, ...] | Absent
    unit: str = "epoch"


@dataclass(frozen=True)
class ScoreRow:
    """One line of the score table.

    Attributes:
        kind: "score" (from the model) or "control" (what needs no model: PCA residual, file size, ...).
        auroc: image AUROC, with `interval` the ends of its 95% interval.
        difference_interval: ends of the paired 95% interval of the image AUROC minus that of the default score.
        pixel_auroc: AUROC of the pixels of the heat map; None where there is no map or no mask.
        pixel_interval: ends of the paired 95% interval of the pixel AUROC minus that of the default's heat maps.
        au_pro: area under the per-region overlap up to a false-positive rate of 0.3, of its largest value.
        default: this is the score that the model file uses; one row is.
    """

    name: str
    kind: str
    auroc: float
    interval: tuple[float, float] | None = None
    difference_interval: tuple[float, float] | None = None
    pixel_auroc: float | None = None
    pixel_interval: tuple[float, float] | None = None
    au_pro: float | None = None
    default: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("score", "control"):
            raise ValueError(f"{self.name}: a row of the score table is a score or a control, found {self.kind!r}")


@dataclass(frozen=True, eq=False)
class Threshold:
    """The threshold and its promise: an image is called anomalous iff its score is above `value`.

    Attributes:
        description: the calibration in words, lines as they shall stand.
        expected_rate: the share of good images expected to raise an alarm, over calibration sets.
        bound: the share that, with 95% confidence, this calibration set's false alarms stay below.
        scores: float64 [m], the anomaly scores of the normals it was calibrated on.
    """

    value: float
    description: str
    expected_rate: float
    bound: float
    scores: np.ndarray

    def __post_init__(self) -> None:
        scores = checked_scores(self.scores, "calibration")
        if not len(scores):
            raise ValueError("a threshold needs the calibration scores that it was set on, found none")
        object.__setattr__(self, "scores", scores)


@dataclass(frozen=True, eq=False)
class Outcome:
    """The images that the model was tried on: their anomaly scores, float64 [n], and their classes.

    `labels` is None for images of unknown class; else "good" is normal and every other class a defect.
    """

    scores: np.ndarray
    labels: tuple[str, ...] | None

    def __post_init__(self) -> None:
        scores = checked_scores(self.scores, "test", self.labels)
        if not len(scores):
            raise ValueError("no test image has a score; without any, say Absent(reason) instead")
        object.__setattr__(self, "scores", scores)


@dataclass(frozen=True, eq=False)
class Exhibit:
    """One test image beside its heat map.

    Attributes:
        file: its name, as it shall be shown.
        label: its class, None if unknown.
        p_value: conformal p-value, None if there is no calibration.
        image, overlay: uint8 [h, w, 3], the second with the heat map laid over the first.
        mask: bool [h, w], where the labelled defect is; its outline is drawn on the overlay.
    """

    file: str
    label: str | None
    score: float
    p_value: float | None
    image: np.ndarray
    overlay: np.ndarray
    mask: np.ndarray | None = None

    def __post_init__(self) -> None:
        _check_image(self.image, f"the image of {self.file!r}", 3)
        _check_image(self.overlay, f"the overlay of {self.file!r}", 3)
        if self.mask is not None and self.mask.shape != self.overlay.shape[:2]:
            expected, found = list(self.overlay.shape[:2]), list(self.mask.shape)
            raise ValueError(f"the mask of {self.file!r}: expected the overlay's size {expected}, found {found}")


@dataclass(frozen=True, eq=False)
class Gallery:
    """Images worth a look, the most telling first. `worst_cases` says which they are."""

    false_alarms: tuple[Exhibit, ...] | Absent
    misses: tuple[Exhibit, ...] | Absent
    detections: tuple[Exhibit, ...] | Absent


@dataclass(frozen=True)
class Timing:
    """How long a step takes: median and 95th percentile of `n` measured times, in milliseconds."""

    step: str
    p50: float
    p95: float
    n: int


_UNSAID = Absent("this run did not record it")


@dataclass(frozen=True, eq=False)
class Report:
    """All that report.html shows.

    Attributes:
        model: the name of the model file.
        date: as it shall be printed.
        version: of fastmaf.
        scores: the score table; one of its rows is the default score, which `threshold` and `outcome` hold.
        environment: (name, value) pairs: processor, threads, versions, ...
        assumptions: what the numbers rest on, a sentence each.
    """

    title: str
    model: str
    date: str
    version: str
    data: Data | Absent = _UNSAID
    training: Training | Absent = _UNSAID
    scores: tuple[ScoreRow, ...] | Absent = _UNSAID
    threshold: Threshold | Absent = _UNSAID
    outcome: Outcome | Absent = _UNSAID
    gallery: Gallery | Absent = _UNSAID
    timings: tuple[Timing, ...] | Absent = _UNSAID
    environment: tuple[tuple[str, str], ...] | Absent = _UNSAID
    assumptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.scores, Absent):
            names = [row.name for row in self.scores if row.default]
            if len(names) != 1:
                found = ", ".join(names) or "none"
                raise ValueError(f"the score table: expected one row marked as the default score, found {found}")


def _check_image(image: np.ndarray, what: str, dimensions: int) -> None:
    if image.ndim != dimensions or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
        shape = "[k, h, w, 3]" if dimensions == 4 else "[h, w, 3]"
        raise ValueError(f"{what}: expected uint8 {shape}, not empty; found {image.dtype} {list(image.shape)}")
