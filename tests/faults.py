"""Faults in the middle of writing: the n-th operation on files fails, or ends the process.

Forks, so for processes of their own that never used a second thread.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastmaf.io import tensor_file

OPERATIONS = ("fsync", "replace", "link", "rmdir")
OUTCOMES = ("untouched", "done", "failed")


def at_operation(number: int, fault: str) -> list[int]:
    """Kills the process at the operation of that number, or lets the disk be full from it on; returns when that was."""
    counter, met = itertools.count(), list[int]()

    def counted(module: Any, name: str) -> None:
        original = getattr(module, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            now = next(counter)
            if now >= number and name != "rmdir":
                met.append(now)
            if now == number and fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if now >= number and name != "rmdir":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        setattr(module, name, operation)

    for name in OPERATIONS:
        counted(os, name)
    counted(tensor_file, "save_file")
    return met


def outcome(number: int, fault: str, work: Callable[[], object]) -> str:
    """Runs ``work`` in a child that meets a fault: "killed", "failed", "done", or "untouched" if it met none."""
    child = os.fork()
    if child == 0:
        code = len(OUTCOMES)
        try:
            met = at_operation(number, fault)
            work()
            code = OUTCOMES.index("done" if met else "untouched")
        except OSError as error:
            if error.errno == errno.ENOSPC:
                code = OUTCOMES.index("failed")
        finally:
            if code == len(OUTCOMES):
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return "killed"
    return OUTCOMES[os.WEXITSTATUS(status)]


def every_fault(
    fault: str,
    before: Path,
    folder: Path,
    work: Callable[[Path], object],
    check: Callable[[Path], object] = lambda out: None,
) -> None:
    """Does ``work`` on copies ``folder/0``, ``folder/1``, ... of ``before``, with the fault one operation later each.

    Prints what came of each, checks it, and ends with the number that no operation has.
    """
    for number in itertools.count():
        out = folder / str(number)
        shutil.copytree(before, out)
        ended = outcome(number, fault, lambda out=out: work(out))  # type: ignore[misc]
        if ended == "untouched":
            return
        print(number, ended, flush=True)
        check(out)


def hidden(folder: Path) -> list[str]:
    """The names of what is hidden in a folder: staging folders, locks."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
