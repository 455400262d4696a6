"""Which class folders a test set must have to be judged, and what to say where they are called otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastmaf.images.folders import TEST
from fastmaf.images.listing import count, nearest
from fastmaf.metrics.results import NORMAL, EvaluationError

_NORMAL_WORDS = {
    "bon",
    "clean",
    "correct",
    "defect_free",
    "fine",
    "gut",
    "intact",
    "io",
    "no_defect",
    "non_defective",
    "normal",
    "normals",
    "ok",
    "okay",
    "pass",
    "passed",
    "undamaged",
}


def require_both(labels: Sequence[str], root: str | Path) -> None:
    """Refuses a test set without normals or without defects, before anything is scored.

    Args:
        labels: the class of each image that was read.
        root: the data set's folder, for the message.

    Raises:
        EvaluationError: with the folders that were found, their numbers of images, and the one that was meant.
    """
    found, test = Counter(labels), Path(root).expanduser() / TEST
    absent = [
        what for what, there in (("normal", found[NORMAL]), ("defect", len(found) - (NORMAL in found))) if not there
    ]
    if not absent:
        return
    listing = ", ".join(f"{name} {n}" for name, n in sorted(found.items())) or "none"
    message = (
        f'an AUROC needs normals (class "{NORMAL}") and defects (other classes), but there is no {absent[0]}; images '
        f"found: {listing}, in the folders of {test}"
    )
    if absent[0] == "normal":
        meant = like_normal(found, test)
        message += "".join(f"\ndid you mean {path} (expected the name {NORMAL})?" for path in meant)
        message += f"\nexpected: {test / NORMAL} with normal images"
    else:
        message += f"\nexpected: {test}/<defect class> with defective images, a folder for each class"
    raise EvaluationError(message)


def like_normal(labels: Iterable[str], test: Path) -> list[Path]:
    """The class folders that ``good`` may be called by mistake: by spelling, the nearest first, then by meaning."""
    others = sorted(set(labels) - {NORMAL})
    near = nearest(NORMAL, [test / label for label in others])
    return list(dict.fromkeys([*near, *(test / label for label in others if _says_normal(label))]))


def _says_normal(label: str) -> bool:
    return label.lower().replace("-", "_").replace(" ", "_") in {NORMAL, *_NORMAL_WORDS}


def doubtful(labels: Iterable[str]) -> list[str]:
    """A note on class folders that count as defects beside ``good``, though their names say normal."""
    counted = Counter(labels)
    if not counted[NORMAL]:
        return []
    return [
        f"class folder test/{label} ({count(counted[label], 'image')}) counts as a defect class: normal are "
        f"those in test/{NORMAL}"
        for label in sorted(set(counted) - {NORMAL})
        if _says_normal(label)
    ]
