"""Reading a folder of images into one uint8 tensor.

Layout: ``root/train/good``, ``root/test/<class>`` and optionally ``root/ground_truth/<class>`` (not read here), each
with all folders below it. For training, a folder of good images alone is accepted as well. Conversions of images that
are not plain 8-bit RGB are described in ``ImageSet.notes``. A file that cannot be read is an error, or is skipped on
request.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

import fastmaf
from fastmaf.images.decode import DataError, Frame, load_frame, sentences
from fastmaf.images.folders import TEST, TRAIN, find_normals, find_test, layout_error
from fastmaf.images.listing import confined, contents, files_in, folders_in, images_below, images_in, left_aside
from fastmaf.images.names import visible
from fastmaf.images.progress import track
from fastmaf.images.read_ahead import in_order, processors
from fastmaf.io.run_folder import DoesNotFitError, format_bytes
from fastmaf.io.wording import count, some
from fastmaf.training.available_memory import available_memory

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Decoded images of one split.

    Attributes:
        pixels: uint8 [n, 3, size, size], channels R, G, B, rows from the top.
        paths: the file of each image.
        labels: the class folder of each image: "good", "crack", ...
        notes: conversions of images that were not plain 8-bit RGB and files left aside, one sentence per kind.
        skipped: (file, reason) of each file that could not be read, with ``skip_bad``.
        names: path of each image within its class folder, with "/": "003.png", "monday/003.png"; by default the names
            of the files.
        shapes: (height, width) of each upright image at full resolution; () if the set was not read from files.
        double: the images at twice the size, uint8 [n, 3, 2 size, 2 size]; None unless requested.
    """

    pixels: Tensor
    paths: tuple[Path, ...]
    labels: tuple[str, ...]
    notes: tuple[str, ...] = ()
    skipped: tuple[tuple[Path, str], ...] = ()
    names: tuple[str, ...] = ()
    shapes: tuple[tuple[int, int], ...] = ()
    double: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.names:
            object.__setattr__(self, "names", tuple(path.name for path in self.paths))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def size(self) -> int:
        """Side of the square images in pixels."""
        return int(self.pixels.shape[-1])

    @property
    def features(self) -> int:
        """Number of values of one image: 3 * size * size."""
        return 3 * self.size * self.size

    @fastmaf.torch_defaults()
    def subset(self, index: Sequence[int]) -> ImageSet:
        """Returns the images at these positions, in this order, with the notes and skipped files of the whole set."""
        where = [int(i) for i in index]
        rows = torch.tensor(where, dtype=torch.long)
        of_each = {
            name: tuple(values[i] for i in where) if (values := getattr(self, name)) else ()
            for name in ("paths", "labels", "names", "shapes")
        }
        double = None if self.double is None else self.double[rows]
        return replace(self, pixels=self.pixels[rows], double=double, **of_each)


def image_shape(features: int) -> tuple[int, int]:
    """Returns the channels, 1 or 3, and the side of square images of this many values; 3 s² is never a square.

    Raises:
        ValueError: there are no such images.
    """
    for channels in (1, 3):
        size = math.isqrt(max(features, 0) // channels)
        if channels * size**2 == features > 0:
            return channels, size
    raise ValueError(f"expected size² or 3 size² values of a square image; found {features}")


def check_takes_images(
    flow: fastmaf.Flow, path: Path, *, grey: bool = False, shape: tuple[int, int] | None = None
) -> int:
    """Checks that a flow models RGB images in float32.

    Args:
        flow: the flow.
        path: the file it was loaded from, for the message.
        grey: accept a flow of images of one channel, too.
        shape: (height, width) of the images; None: they are square.

    Returns:
        The longer side of the images in pixels.

    Raises:
        fastmaf.CheckpointError: the flow models something else, or is not float32.
    """
    size = math.isqrt(flow.features // 3)
    if shape is not None:
        size = max(shape)
        if flow.features not in (3 * math.prod(shape), math.prod(shape) if grey else 0):
            raise fastmaf.CheckpointError(
                f"{path}: expected a model of images of {shape[0]} x {shape[1]} pixels; found {flow.features} features"
            )
    elif grey and math.isqrt(flow.features) ** 2 == flow.features:
        size = math.isqrt(flow.features)
    elif 3 * size**2 != flow.features:
        raise fastmaf.CheckpointError(
            f"{path}: expected a model of square RGB images (3 x size x size values); found {flow.features} features"
        )
    dtypes = {tensor.dtype for tensor in chain(flow.parameters(), flow.buffers()) if tensor.is_floating_point()}
    if dtypes and torch.float32 not in dtypes:
        raise fastmaf.CheckpointError(f"{path}: expected a float32 model of images; found {dtypes.pop()}")
    return size


def to_grey(pixels: Tensor) -> Tensor:
    """Converts uint8 [n, 3, h, w] to uint8 [n, 1, h, w] as Pillow does; equal channels keep their value."""
    red, green, blue = (plane.int() for plane in pixels.unbind(1))
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)[:, None]


def is_grey(pixels: Tensor) -> bool:
    """Returns whether the channels of all images, uint8 [n, 3, h, w], are equal."""
    return all(bool((part[:, 1:] == part[:, :1]).all()) for part in pixels.split(64))


def to_unit(pixels: Tensor, channels: int = 3) -> Tensor:
    """Converts uint8 [n, 3, s, s] to float32 [n, 3*s*s] in [0, 1], in C, H, W order (pixel / 255, as ToTensor).

    With ``channels=1`` the images are converted to grey first, for float32 [n, s*s].
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels: expected uint8 [n, 3, s, s], found {pixels.dtype} {list(pixels.shape)}")
    pixels = to_grey(pixels) if channels == 1 else pixels
    return pixels.to(torch.float32).div_(255.0).flatten(1)


def to_images(x: Tensor, size: int) -> Tensor:
    """Converts float [n, 3*size*size] in C, H, W order to uint8 [n, size, size, 3], clamped to [0, 1] and rounded.

    The exact inverse of ``to_unit`` up to the order of the axes. NaN becomes 0.
    """
    if x.ndim != 2 or x.shape[1] != 3 * size * size:
        raise ValueError(f"x: expected [n, {3 * size * size}] for images of {size} pixels, found {list(x.shape)}")
    scaled = x.detach().nan_to_num(nan=0.0).clamp(0.0, 1.0).mul(255.0).round()
    return scaled.to(torch.uint8).reshape(-1, 3, size, size).permute(0, 2, 3, 1).contiguous()


@fastmaf.torch_defaults()
def load_train(
    root: str | Path, *, size: int = 64, skip_bad: bool = False, double: bool = False, progress: bool = True
) -> ImageSet:
    """Loads the good images to train on, all below ``root/train/good``.

    Args:
        root: folder of the data set. Without ``train``, its images (directly in it, or in ``good``) must all be normal:
            no other folder in it except ``test`` and ``ground_truth`` may hold images. Pictures that fastmaf wrote as
            results are ignored everywhere, and so are links that lead out of the folder; ``following_links`` of
            ``fastmaf.images.listing`` reads them.
        size: side of the square that every image is resized to, in pixels.
        skip_bad: record, log and skip files that cannot be read instead of stopping.
        double: read the images at twice the size as well; see ``ImageSet.double``.
        progress: show a progress bar.

    Raises:
        DataError: the folder is missing or holds no image, or a file cannot be read.
        DoesNotFitError: the images need more memory than is available.
    """
    root = Path(root).expanduser()
    with confined(root):
        folder, notes = find_normals(root)
        files, ignored, closed = (*images_in(root), []) if folder == root else images_below(folder)
        if not files:
            raise layout_error(f"no image in {folder}: {contents(files_in(folder))}", TRAIN, root)
        notes += left_aside(ignored, closed)
    labelled = [("good", folder, file) for file in files]
    return _load(labelled, "train", notes, size, skip_bad, progress, double)


@fastmaf.torch_defaults()
def load_test(root: str | Path, *, size: int = 64, skip_bad: bool = False, progress: bool = True) -> ImageSet:
    """Loads the test images, all below ``root/test/<class>``: "good" first, then the defect classes by name.

    "good" or defect classes may be missing. Arguments and errors as ``load_train``.
    """
    root = Path(root).expanduser()
    with confined(root):
        labelled, notes = _find_test_images(root)
    return _load(labelled, "test", notes, size, skip_bad, progress)


def _find_test_images(root: Path) -> tuple[list[tuple[str, Path, Path]], list[str]]:
    """Returns (class, class folder, file) of the test images, and notes."""
    test = find_test(root)
    loose, ignored = images_in(test)
    directly = f"{count(len(loose), 'image')} directly in test/"
    notes = [f"{directly} skipped: not in a class folder such as test/good"] if loose else []
    folders = sorted(folders_in(test), key=lambda folder: (folder.name != "good", folder.name))
    below = {folder: images_below(folder) for folder in folders}
    labelled = [(folder.name, folder, file) for folder, (files, _, _) in below.items() for file in files]
    notes += [f"no image in class folder test/{folder.name}" for folder, (files, _, _) in below.items() if not files]
    ignored += [file for _, others, _ in below.values() for file in others]
    closed = [folder for _, _, unopened in below.values() for folder in unopened]
    if not labelled:
        where = f"; {directly}, not in a class folder" if loose else ""
        raise layout_error(f"no class folder with images in {test}{where}", TEST, root)
    return labelled, [*notes, *left_aside(ignored, closed)]


def _load(
    files: list[tuple[str, Path, Path]],
    what: str,
    notes: list[str],
    size: int,
    skip_bad: bool,
    progress: bool,
    double: bool = False,
) -> ImageSet:
    """Loads files, given as (class, class folder, file), some at a time: Pillow decodes without Python's lock."""
    _check_memory(len(files), size, double)
    loaded: list[tuple[str, str, Frame]] = []
    skipped: list[tuple[Path, str]] = []
    threads = processors()
    with ThreadPoolExecutor(threads) as pool:

        def read(file: Path) -> Future[Frame | DataError]:
            return pool.submit(_read, file, size, double)

        with closing(in_order(read, (file for _, _, file in files), 2 * threads)) as results:
            for label, folder, file in track(files, f"reading {what} images", "image", show=progress):
                result = next(results)
                if isinstance(result, Frame):
                    loaded.append((label, file.relative_to(folder).as_posix(), result))
                    continue
                if not skip_bad:
                    raise DataError(f"{result}; --skip-bad skips such files") from result
                skipped.append((file, str(result)))
                _log.warning("skipped: %s", visible(str(result)))
    if not loaded:
        raise DataError(f"none of the {len(files)} {what} images could be read; the first:\n{skipped[0][1]}")
    labels, names, frames = zip(*loaded, strict=True)
    notes = [*sentences(Counter(kind for frame in frames for kind in frame.kinds)), *notes]
    if skipped:
        listed = some([file.name for file, _ in skipped])
        notes.append(f"{count(len(skipped), 'file')} skipped: could not be read ({listed})")
    return ImageSet(
        pixels=torch.stack([frame.pixels for frame in frames]),
        paths=tuple(frame.path for frame in frames),
        labels=labels,
        notes=tuple(notes),
        skipped=tuple(skipped),
        names=names,
        shapes=tuple((frame.height, frame.width) for frame in frames),
        double=torch.stack([frame.double for frame in frames]) if double else None,
    )


def _read(file: Path, size: int, double: bool) -> Frame | DataError:
    try:
        return load_frame(file, size, double=double)
    except DataError as error:
        return error


def _check_memory(images: int, size: int, double: bool) -> None:
    """Refuses images that would not fit into memory as 8-bit values: in parts while reading, and then as one tensor."""
    needed, available = 2 * images * 3 * size**2 * (5 if double else 1), available_memory(torch.device("cpu"))
    if available is not None and needed > available:
        raise DoesNotFitError(
            f"reading {count(images, 'image')} at {size} x {size} pixels needs about {format_bytes(needed)} of memory; "
            f"{format_bytes(available)} are available: choose a smaller size"
        )
