"""Checks of a test set's class folders, with proposals where they have other names than expected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastmaf.images.folders import TEST
from fastmaf.images.listing import nearest
from fastmaf.io.wording import count
from fastmaf.metrics.results import NORMAL, EvaluationError, missing_kind

_NORMAL_WORDS = (
    "bon", "clean", "correct", "defect_free", "fine", "gut", "intact", "io", "no_defect",
    "non_defective", "normal", "normals", "ok", "okay", "pass", "passed", "undamaged",
)  # fmt: skip


def require_both(labels: Sequence[str], root: str | Path) -> None:
    """Checks that a test set has normals and defects, before anything is scored.

    Args:
        labels: class of each image that was read.
        root: folder of the data set, for the message.

    Raises:
        EvaluationError: one of them is missing; the message lists what was found and proposes what was meant.
    """
    test = Path(root).expanduser() / TEST
    message = missing_kind(labels)
    if message is None:
        return
    message += f", in the folders of {test}"
    if NORMAL not in labels:
        meant = like_normal(labels, test)
        message += "".join(f"\ndid you mean {path} (expected the name {NORMAL})?" for path in meant)
        message += f"\nexpected: {test / NORMAL} with good images"
    else:
        message += f"\nexpected: {test}/<defect class> with defective images, a folder for each class"
    raise EvaluationError(message)


def like_normal(labels: Iterable[str], test: Path) -> list[Path]:
    """Returns class folders that are probably meant to be ``good``: similar names first, then synonyms."""
    others = sorted(set(labels) - {NORMAL})
    near = nearest(NORMAL, [test / label for label in others])
    return list(dict.fromkeys([*near, *(test / label for label in others if _means_normal(label))]))


def _means_normal(label: str) -> bool:
    return label.lower().replace("-", "_").replace(" ", "_") in (NORMAL, *_NORMAL_WORDS)


def doubtful(labels: Iterable[str]) -> list[str]:
    """Returns notes on class folders that count as defects though their names mean normal."""
    counted = Counter(labels)
    if not counted[NORMAL]:
        return []
    return [
        f"class folder test/{label} ({count(counted[label], 'image')}) counts as a defect class; if its images "
        f"are good, move them to test/{NORMAL}"
        for label in sorted(set(counted) - {NORMAL})
        if _means_normal(label)
    ]
