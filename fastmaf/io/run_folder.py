"""The folder that a run is written to: checked and locked before any work is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastmaf.io.atomic import sweep
from fastmaf.io.locks import run_lock
from fastmaf.training.checkpoints import MODEL_FILE


@contextmanager
def run_folder(out: Path, doing: str, *files: str) -> Iterator[None]:
    """Creates the folder of a run if it is missing, locks it, and frees it of what killed runs left half-written.

    A folder that was created here and in which nothing was written is removed again.

    Args:
        out: the folder.
        doing: for the message of a second process that is refused, such as "training".
        files: names of files that will be written there, beside the model.

    Raises:
        InUseError: another process or thread is writing a run there.
        OSError: ``out`` is no folder, cannot be written to, or one of the files is a folder.
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
                raise IsADirectoryError(f"{file} is to be written; found a folder of that name")
        with run_lock(out / MODEL_FILE, doing):
            sweep(out)
            yield
    finally:
        _remove_empty(missing)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # something was written, or it was never made
            return
