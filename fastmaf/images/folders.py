"""Finding the folders of a data set, with errors that describe what was found and propose what was meant."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fastmaf.images.decode import DataError
from fastmaf.images.listing import (
    confined,
    contents,
    folders_in,
    images_below,
    images_in,
    is_image,
    is_unread_image,
    kind_for_people,
    leads_out,
    left_aside,
    nearest,
    walk,
)
from fastmaf.io.wording import count

TRAIN, TEST = "train/good", "test"

_EXPECTED = """expected:
  <folder>/train/good/*.png          good images to train on
  <folder>/test/good/*.png           good images to test on
  <folder>/test/<defect class>/*.png defective images to test on
  <folder>/ground_truth/<defect class>/*.png  masks (optional)"""

_EXPECTED_TO_TRAIN = """
or, for training, a folder of good images only:
  <folder>/*.png or <folder>/good/*.png"""


def find_test(root: Path) -> Path:
    """Returns the folder ``root/test``.

    Raises:
        DataError: it is missing; the message lists what was found and proposes a path.
    """
    if (root / TEST).is_dir():
        return _inside(root / TEST, root)
    raise _missing(root, TEST)


def find_normals(root: Path) -> tuple[Path, list[str]]:
    """Returns the folder of the good images to train on, and notes; errors as ``find_test``.

    This is ``root/train/good``. Without ``root/train`` it is ``root/good`` or ``root`` itself, provided that no other
    folder except ``test`` and ``ground_truth`` holds images and that it is not another part of a data set.
    """
    if (root / TRAIN).is_dir():
        return _inside(root / TRAIN, root), []
    folder = _alone(root)
    if folder is None:
        raise _missing(root, TRAIN)
    loose = len(images_in(root)[0])
    directly = f"{count(loose, 'image')} directly in {os.path.basename(os.path.abspath(root))}/"
    if folder == root:
        written = [file for below in _others(root, root) for file in images_in(below)[1] if is_image(file)]
        return root, [f"no folder {TRAIN}: using {directly} as good images", *left_aside(written)]
    left = [f"{directly} skipped: not in good/"] * (loose > 0)
    return folder, [f"no folder {TRAIN}: using the images in good/ as good images", *left]


def has_normals(root: Path) -> bool:
    """Returns whether ``find_normals`` finds a folder."""
    with confined(root):
        return (root / TRAIN).is_dir() or _alone(root) is not None


def _inside(folder: Path, root: Path) -> Path:
    """Returns a folder that does not lead out of the root.

    Raises:
        DataError: it does.
    """
    if leads_out(folder):
        raise DataError(
            f"{folder} leads out of {root}, to {os.path.realpath(folder)}: name that data set, or follow links with "
            "--follow-links"
        )
    return folder


def layout_error(what: str, wanted: str, root: Path) -> DataError:
    """Returns an error with the supported layouts for training or testing, and the folders that were found."""
    return DataError(f"{what}\n{_EXPECTED}{_EXPECTED_TO_TRAIN * (wanted == TRAIN)}\n{_tree(root)}")


def _alone(root: Path) -> Path | None:
    """Returns the folder of good images in a root without ``train`` and without other images, or None."""
    if (root / "train").is_dir():
        return None
    good = root / "good"
    folder = good if not leads_out(good) and images_below(good)[0] else root
    if folder == root and not images_in(root)[0]:
        return None
    above = _set_above(root, TRAIN)
    if above is not None and folder.resolve() != (above / TRAIN).resolve():
        return None  # such as the test images of a data set
    return None if any(images_in(below)[0] for below in _others(folder, root)) else folder


def _others(folder: Path, root: Path) -> Iterator[Path]:
    """Yields the folders below a root, except ``folder``, ``test`` and ``ground_truth``."""
    for child in folders_in(root):
        if child != folder and child.name not in ("test", "ground_truth"):
            yield from walk(child)


def _is_telling(file: Path) -> bool:
    """Returns whether a file that is ignored looks like an image."""
    return is_image(file) or is_unread_image(file)


def _missing(root: Path, wanted: str) -> DataError:
    if root.is_dir():
        aside = images_in(root)[1]
        what = f"no folder {wanted} in {root}" + f": {contents(aside)}" * any(map(_is_telling, aside))
    elif root.exists():
        what = f"{root}: expected a folder, found a file; unpack it first if it is an archive"
    else:
        what = f"no such folder: {root}"
    hints = "".join(f"\ndid you mean {path}{why}?" for path, why in _proposals(root, wanted))
    return layout_error(what + hints, wanted, root)


def _proposals(root: Path, wanted: str) -> list[tuple[Path, str]]:
    """Returns (path, reason) of the folders that were probably meant, of the most likely kind only."""
    above = _set_above(root, wanted)
    if above is not None:
        return [(above, f" (the folder above: it holds {wanted})")]
    children = folders_in(root)
    below = [f for f in [*children, *(g for f in children for g in folders_in(f))] if (f / wanted).is_dir()]
    if below:
        return [(path, f" (it holds {wanted})") for path in below[:3]]
    if not root.is_dir():
        return [(path, "") for path in nearest(root.name, folders_in(root.parent))]
    at = root
    for part in wanted.split("/"):
        if not (at / part).is_dir():
            near = [(path, f" (expected the name {part})") for path in nearest(part, folders_in(at))]
            loose = len(images_in(at)[0])
            to_move = [(at / part, f" (move the {count(loose, 'image')} in {at.name}/ there)")] * (loose > 0)
            return near or [*to_move, *(_classes(at) if wanted == TRAIN else [])]
        at = at / part
    return []


def _classes(folder: Path) -> list[tuple[Path, str]]:
    """Returns (path, reason) of folders that could be trained on: ``good`` if it exists, else up to three."""
    counted = [(child, len(images_below(child)[0])) for child in folders_in(folder) if child.name != "ground_truth"]
    holding = [(child, f" ({count(n, 'image')}, if all are normal)") for child, n in counted if n]
    return [(child, why) for child, why in holding if child.name == "good"] or holding[:3]


def _set_above(root: Path, wanted: str) -> Path | None:
    """Returns the root of the data set that this folder is part of, if that root holds ``wanted``."""
    whole = root.resolve()
    for above in list(whole.parents)[:3]:
        inside = whole.relative_to(above).parts[0] in ("train", "test", "ground_truth")
        if inside and (above / wanted).is_dir():
            return above
    return None


def _tree(root: Path, limit: int = 24) -> str:
    """Lists folders two levels deep, with the number of images in each and below the deepest."""
    if not root.is_dir():
        return f"found: nothing at {root}" if not root.exists() else f"found: the file {root}"
    folders = [root, *(f for child in folders_in(root) for f in (child, *folders_in(child)))]
    names = [f"{root}", *(f"{folder.relative_to(root).as_posix()}/" for folder in folders[1:])]
    lines = [f"  {name}  {_counted(folder, root)}" for name, folder in zip(names, folders, strict=True)]
    if len(lines) > limit:
        lines[limit:] = [f"  ... and {len(lines) - limit} more folders"]
    return "\n".join(["found:", *lines])


def _counted(folder: Path, root: Path) -> str:
    images, aside = images_in(folder)
    others = Counter(kind_for_people(file) for file in aside if _is_telling(file))
    text = count(len(images), "image")
    if folder.parent.parent == root and (n := len(images_below(folder)[0]) - len(images)):
        text += f", {n} in folders below"
    return text + "".join(f", {n} x {kind} (not read)" for kind, n in sorted(others.items()))
