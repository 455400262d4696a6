"""Reads damaged files of models and images in a process with little memory: ``python -m tests.fuzz.run COUNT SEED``.

Each is refused by a typed error that names the file, or is loaded and computes, within a deadline and 2 GB. Prints what
is not as promised, and a summary.
"""

from __future__ import annotations

import re
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import fastmaf
from tests.fuzz import images
from tests.io import model_files

DEADLINE = 30  # seconds
MEMORY = 2_000_000_000  # bytes
_ROOM_OF_MODELS = 200 << 20  # beyond what the process has, of addresses
_ROOM_OF_IMAGES = 1700 << 20  # of 64 million pixels, 24 bytes each


class Deadline(BaseException):
    """A file has taken too long."""


def status(name: str) -> int:
    """Returns a size of this process in bytes, such as its peak memory (VmHWM)."""
    found = re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _limit(room: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + room, hard))


def _expired(*_: object) -> None:
    raise Deadline


def of_models(folder: Path, count: int, seed: int) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Yields what is done to each damaged model, and a function that reads it: whether it was loaded."""
    contents = model_files.write_all(folder)
    for kind, content in contents.items():
        model_files.use(kind, folder, content)
    for kind, mutation, content in model_files.mutants(contents, count, seed):

        def load(kind: str = kind, content: bytes = content) -> bool:
            file = folder / ("folds" if kind.startswith("fold") else "") / f"{kind}.safetensors"
            try:
                model_files.use(kind, folder, content)
            except fastmaf.CheckpointError as error:
                message = str(error)
                assert str(folder) in message and len(message) < 1200 and message.isprintable(), ascii(message)
                return False
            finally:
                file.write_bytes(contents[kind])
            return True

        yield f"{kind} {mutation}", load


def of_images(folder: Path, count: int, seed: int) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Yields the name of each damaged image, and a function that reads it: whether it was read."""
    for name, content in images.whole_images().items():
        (folder / name).write_bytes(content)
        assert images.read(folder / name)
    for name, content in images.mutants(count, seed):

        def load(name: str = name, content: bytes = content) -> bool:
            (folder / name).write_bytes(content)
            return images.read(folder / name)

        yield name, load


def main(count: int, seed: int) -> int:
    """Reads ``count`` files; returns how many were not handled as promised."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _expired)
    outcomes: Counter[str] = Counter()
    faults = 0
    for kind, room, cases in (
        ("model", _ROOM_OF_MODELS, of_models),
        ("image", _ROOM_OF_IMAGES, of_images),
    ):
        with tempfile.TemporaryDirectory() as name:
            for i, (what, load) in enumerate(
                cases(Path(name), count - count // 2 if kind == "model" else count // 2, seed)
            ):
                if i == 0:
                    _limit(room)
                signal.alarm(DEADLINE)
                try:
                    outcomes[f"{kind}s {'loaded' if load() else 'refused'}"] += 1
                except BaseException as error:
                    faults += 1
                    print("fault", kind, i, what, type(error).__name__, ascii(str(error)[:300]), flush=True)
                    if isinstance(error, KeyboardInterrupt):
                        raise
                finally:
                    signal.alarm(0)
    if (peak := status("VmHWM")) > MEMORY:
        faults += 1
        print("fault: the process had", peak, "bytes")
    print(*(f"{n} {outcome}" for outcome, n in sorted(outcomes.items())), f"{peak >> 20} MiB at the peak", sep=", ")
    return faults


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3])) > 0)
