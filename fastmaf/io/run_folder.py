"""The output folder of a run, checked and locked before any work is done."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastmaf.io.atomic import sweep
from fastmaf.io.locks import run_lock
from fastmaf.training.checkpoints import MODEL_FILE


class DoesNotFitError(ValueError):
    """A run needs more memory or disk space than is available."""


@contextmanager
def run_folder(out: Path, doing: str, *files: str) -> Iterator[None]:
    """Creates the folder of a run if it is missing, locks it, and removes partial files of killed runs.

    A folder that was created here and stays empty is removed again.

    Args:
        out: the folder.
        doing: activity for the message of a refused second process, such as "training".
        files: names of files that will be written there, in addition to the model.

    Raises:
        InUseError: another process or thread is writing a run there.
        OSError: ``out`` is not a folder, cannot be written to, or one of the files is a folder.
    """
    lineage = (out, *out.parents)
    missing = [folder for folder in lineage if not folder.exists()]
    nearest = lineage[len(missing)] if len(missing) < len(lineage) else Path()
    if not nearest.is_dir():
        raise NotADirectoryError(f"expected a folder to write the run to; found the file {nearest}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in (out / name for name in (MODEL_FILE, *files)):
            if file.is_dir():
                raise IsADirectoryError(f"expected a file or nothing at {file}; found a folder")
        with run_lock(out / MODEL_FILE, doing):
            sweep(out)
            yield
    finally:
        with suppress(OSError):  # not empty, or never created
            for folder in missing:
                folder.rmdir()


def check_disk(out: Path, needed: int) -> None:
    """Refuses a run whose files would not fit on the disk beside those that they replace.

    Args:
        out: an existing folder.
        needed: size of the files, in bytes.

    Raises:
        DoesNotFitError: less disk space is free.
    """
    free = shutil.disk_usage(out).free
    if free < needed:
        raise DoesNotFitError(
            f"the run needs about {format_bytes(needed)} of disk space in {out}, but only {format_bytes(free)} are "
            "free (existing files are replaced only after the new ones are written); free disk space, or choose "
            "another --out"
        )


def format_bytes(size: int) -> str:
    """Formats a number of bytes, such as ``"1.23 GB"``."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
