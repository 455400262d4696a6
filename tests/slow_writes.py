"""Writing as on a slow disk, and children that are killed at a random moment or meet a fault; see ``tests/faults``.

Forks, so for processes of their own that never used a second thread.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastmaf.io import atomic, tensor_file

_PIECE, _PAUSE = 4096, 0.0005  # bytes, and seconds after each of them
ENDED, REFUSED, FAILED = 0, 3, 4


class SlowFile:
    """A binary file whose content arrives piece by piece."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> SlowFile:
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE):
            self._file.write(view[start : start + _PIECE])
            self._file.flush()
            time.sleep(_PAUSE)
        return len(view)


def slow_open(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
    file = open(path, mode, *args, **kwargs)  # noqa: SIM115 - as open itself
    return SlowFile(file) if mode == "wb" else file


def slow_down() -> None:
    """Slows all writing by fastmaf down, with pauses between its operations on files as well."""
    for module in (tensor_file, atomic):
        module.open = slow_open  # type: ignore[attr-defined]
    for name in ("fsync", "replace", "link", "mkdir"):
        setattr(os, name, _slowly(getattr(os, name)))


def _slowly(operation: Callable[..., Any]) -> Callable[..., Any]:
    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(_PAUSE)
        result = operation(*args, **kwargs)
        time.sleep(_PAUSE)
        return result

    return slowly


def forked(work: Callable[[], object]) -> int:
    """Runs ``work`` in a child; returns its process number. It ends with 0, or 3 after an OSError, 4 after others."""
    child = os.fork()
    if child == 0:
        code = FAILED
        try:
            work()
            code = ENDED
        except OSError as error:
            print(type(error).__name__, error, file=sys.stderr)
            code = REFUSED
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def ended(child: int) -> int:
    """Waits for a child; returns its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(seconds: float, work: Callable[[], object]) -> bool:
    """Runs ``work`` in a child that is killed after some time; returns whether it had not ended before."""
    child = forked(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    code = ended(child)
    assert code in (-signal.SIGKILL, ENDED), code
    return code != ENDED


def seconds_of(work: Callable[[], object]) -> float:
    """The time that ``work`` takes in a child."""
    began = time.monotonic()
    assert ended(forked(work)) == ENDED
    return time.monotonic() - began


def kill_at_random(
    moments: int, seed: int, folder: Path, work: Callable[[Path], object], check: Callable[[Path], object]
) -> int:
    """Kills ``work`` at random moments, each time in a folder of its own, and checks what is left.

    Returns how often it was killed before its end.
    """
    whole = min(seconds_of(lambda i=i: work(folder / f"timed {i}")) for i in range(2))  # type: ignore[misc]
    rng, killed = random.Random(seed), 0
    for i in range(moments):
        out = folder / f"killed {i}"
        killed += kill_after(rng.uniform(0.0, whole), lambda out=out: work(out))  # type: ignore[misc]
        check(out)
    return killed
