"""Which files of a data folder are images, and what to say about a folder that is not as expected.

A set is laid out as ``root/train/good``, ``root/test/<class>``, ``root/ground_truth/<class>``. For training, a folder
that holds nothing but normal images will do: directly, or in a folder ``good``.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from fastmaf.capsule.decoding import DataError
from fastmaf.io.regular import is_regular, kind_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
"""Files with these suffixes, in any case, are taken for images; all others and hidden ones are left aside."""

TRAIN, TEST = "train/good", "test"

_EXPECTED = """expected:
  <folder>/train/good/*.png          normal images to train on
  <folder>/test/good/*.png           normal images to test on
  <folder>/test/<defect class>/*.png defective images to test on
  <folder>/ground_truth/<defect class>/*.png  masks (optional)"""

_EXPECTED_TO_TRAIN = """
or, to train, a folder with no other images than normal ones:
  <folder>/*.png or <folder>/good/*.png"""


def count(n: int, noun: str) -> str:
    """Number and noun, in the plural but for one: "3 images"."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def find_test(root: Path) -> Path:
    """The folder ``root/test``.

    Raises:
        DataError: It is missing; says what is there instead and proposes the likely path.
    """
    if (root / TEST).is_dir():
        return root / TEST
    raise _missing(root, TEST)


def find_normals(root: Path) -> tuple[Path, list[str]]:
    """(the folder with the normal images to train on, notes); errors as ``find_test``.

    That is ``root/train/good``; where there is no ``root/train``, ``root/good`` or ``root`` itself, if no other folder
    but ``test`` and ``ground_truth`` holds images, and if they are no other part of a set than its ``train/good``.
    """
    if (root / TRAIN).is_dir():
        return root / TRAIN, []
    folder = _alone(root)
    if folder is None:
        raise _missing(root, TRAIN)
    loose = len(images_in(root)[0])
    directly = f"{count(loose, 'image')} directly in {os.path.basename(os.path.abspath(root))}/"
    if folder == root:
        return root, [f"no folder {TRAIN}: {directly} taken for normal ones"]
    left = [f"{directly} left aside: not in good/"] * (loose > 0)
    return folder, [f"no folder {TRAIN}: the images in good/ taken for the normal ones", *left]


def has_normals(root: Path) -> bool:
    """Whether ``find_normals`` finds a folder."""
    return (root / TRAIN).is_dir() or _alone(root) is not None


def no_image_in(folder: Path, root: Path) -> DataError:
    """The error about a folder for training that holds no image."""
    return DataError(f"no image in {folder}: {contents(files_in(folder))}\n{expected(TRAIN)}\n{tree(root)}")


def expected(wanted: str) -> str:
    """The layouts that are read, for an error message."""
    return _EXPECTED + _EXPECTED_TO_TRAIN * (wanted == TRAIN)


def _alone(root: Path) -> Path | None:
    """The folder of normal images in a root that has no ``train`` and no images of another kind, or None."""
    if (root / "train").is_dir():
        return None
    folder = root / "good" if images_in(root / "good")[0] else root
    if not images_in(folder)[0]:
        return None
    above = _set_above(root, TRAIN)
    if above is not None and folder.resolve() != (above / TRAIN).resolve():
        return None  # such as the set's test images: never to be trained on by mistake
    others = [child for child in folders_in(root) if child != folder and child.name not in ("test", "ground_truth")]
    return None if any(images_in(below)[0] for child in others for below in walk(child)) else folder


def _missing(root: Path, wanted: str) -> DataError:
    if root.is_dir():
        what = f"no folder {wanted} in {root}"
    elif root.exists():
        what = f"{root} is a file, expected a folder: unpack an archive first"
    else:
        what = f"no such folder: {root}"
    hints = "".join(f"\ndid you mean {path}{why}?" for path, why in _proposals(root, wanted))
    return DataError(f"{what}{hints}\n{expected(wanted)}\n{tree(root)}")


def _proposals(root: Path, wanted: str) -> list[tuple[Path, str]]:
    """(path, why) of the folders that were probably meant, the surest kind only."""
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
            to_move = [(at / part, f" as the place of the {count(loose, 'image')} in {at.name}/")] * (loose > 0)
            return near or [*to_move, *(_classes(at) if wanted == TRAIN else [])]
        at = at / part
    return []


def _classes(folder: Path) -> list[tuple[Path, str]]:
    """(path, why) of the folders in this one that could be trained on: ``good`` if there, else up to three."""
    counted = [(child, len(images_in(child)[0])) for child in folders_in(folder) if child.name != "ground_truth"]
    holding = [(child, f" ({count(n, 'image')}, if all are normal)") for child, n in counted if n]
    return [(child, why) for child, why in holding if child.name == "good"] or holding[:3]


def _set_above(root: Path, wanted: str) -> Path | None:
    """The root of the set in one of whose parts this folder lies, if it is one that holds ``wanted``."""
    whole = root.resolve()
    for above in list(whole.parents)[:3]:
        inside = whole.relative_to(above).parts[0] in ("train", "test", "ground_truth")
        if inside and (above / wanted).is_dir():
            return above
    return None


def nearest(name: str, among: Iterable[Path]) -> list[Path]:
    """Up to three of these paths whose last part is spelt much like ``name``, the nearest first."""
    by_name = {path.name.lower(): path for path in among}
    return [by_name[close] for close in difflib.get_close_matches(name.lower(), list(by_name), n=3, cutoff=0.7)]


def entries(folder: Path) -> list[Path]:
    """All that is in a folder, by name."""
    try:
        return sorted(folder.iterdir())
    except OSError:  # missing or not readable: shown as holding nothing
        return []


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, by name, but for hidden ones."""
    return [entry for entry in entries(folder) if not entry.name.startswith(".") and os.path.isdir(entry)]


def files_in(folder: Path) -> list[Path]:
    """Whatever is no folder in a folder, by name."""
    return [entry for entry in entries(folder) if not os.path.isdir(entry)]


def is_image(path: Path) -> bool:
    """Whether the name is that of an image; hidden ones are none, such as the ._x.png that macOS leaves."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def images_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """(image files by name, files left aside): among those is whatever has an image's name and is no regular file."""
    images: list[Path] = []
    aside: list[Path] = []
    for file in files_in(folder):
        (images if is_image(file) and is_regular(file) else aside).append(file)
    return images, aside


def walk(folder: Path) -> Iterator[Path]:
    """The folder and all below it, but for hidden ones, each once: links among them lead into no loop."""
    seen: set[str] = set()
    waiting = [folder]
    while waiting:
        at = waiting.pop()
        real = os.path.realpath(at)
        if real not in seen:
            seen.add(real)
            yield at
            waiting += reversed(folders_in(at))


def contents(files: Iterable[Path]) -> str:
    """What kinds of file these are, for an error message."""
    suffixes = Counter(f.name if f.name.startswith(".") else f.suffix.lower() or f.name for f in files)
    if not suffixes:
        return "it is empty"
    listed = ", ".join(f"{n} x {suffix}" for suffix, n in suffixes.most_common(5))
    return f"found {listed}; read are {' '.join(SUFFIXES)}"


def left_aside(files: Collection[Path]) -> list[str]:
    """The notes on files that were taken for no images, if there were any."""
    odd = [file for file in files if is_image(file)]
    notes = []
    if odd:
        first = f"{odd[0].name} is {kind_of(odd[0])}"
        notes.append(f"{count(len(odd), 'path')} left aside: named as images, but no regular files ({first})")
    if others := len(files) - len(odd):
        notes.append(f"{count(others, 'file')} left aside (hidden, or without an image's suffix)")
    return notes


def tree(root: Path, limit: int = 24) -> str:
    """What is there, two levels deep, with the number of images directly in each folder."""
    if not root.is_dir():
        return f"found: nothing at {root}" if not root.exists() else f"found: the file {root}"
    folders = [root, *(f for child in folders_in(root) for f in (child, *folders_in(child)))]
    names = [f"{root}", *(f"{folder.relative_to(root).as_posix()}/" for folder in folders[1:])]
    lines = [f"  {n}  {count(len(images_in(f)[0]), 'image')}" for n, f in zip(names, folders, strict=True)]
    if len(lines) > limit:
        lines[limit:] = [f"  ... and {len(lines) - limit} more folders"]
    return "\n".join(["found:", *lines])
