"""File locks that the operating system releases when their process dies, and the lock of a run's folder.

Uses ``flock`` on POSIX and ``msvcrt.locking`` on Windows. Both belong to the open file, so that threads of one process
exclude each other as well. The text in a lock file is for error messages, and decides only on file systems without
locks.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_held: set[str] = set()  # lock files of this process, as some network file systems do not exclude its threads
_held_guard = threading.Lock()


class InUseError(OSError):
    """Another process or thread is writing to the same run or model."""


@dataclass
class FileLock:
    """An open and locked file; ``enforced`` is False on file systems that have no locks."""

    file: BinaryIO
    enforced: bool

    def release(self, remove: Callable[[], object] = lambda: None) -> None:
        """Unlocks and closes the file, and calls ``remove`` for it, whose errors are ignored.

        The file is removed first, except on Windows, where an open file cannot be removed.
        """
        steps = [self._close, remove] if os.name == "nt" else [remove, self._close]
        for step in steps:
            with suppress(OSError):
                step()

    def _close(self) -> None:
        with self.file:
            if self.enforced:
                _unlock(self.file)  # closing does not suffice if a forked child has the descriptor


def try_lock(path: Path) -> FileLock | None:
    """Opens or creates ``path`` and locks it; returns None if the lock is held elsewhere."""
    while True:
        with ExitStack() as on_return:
            file = on_return.enter_context(open(path, "ab+", buffering=0))
            try:
                enforced = _lock(file)
                # The previous holder may have removed the file since it was opened: such a lock would exclude nobody.
                valid = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except BlockingIOError:
                return None
            except FileNotFoundError:
                continue
            if valid:
                on_return.pop_all()
                return FileLock(file, enforced)


@contextmanager
def run_lock(target: Path, doing: str) -> Iterator[None]:
    """Holds the lock of a model file while a command rewrites it and the files that belong to it.

    The lock is the hidden file ``.<name>.lock`` next to ``target``, removed at the end. The lock of a killed process is
    taken over.

    Args:
        target: the model file; its folder must exist.
        doing: activity of the holder, such as "training", for the message of a refused process.

    Raises:
        InUseError: another process or thread holds the lock, or a process of another host left it.
        OSError: the folder cannot be written to.
    """
    path = target.with_name(f".{target.name}.lock")
    key = os.path.realpath(path)
    with _held_guard:
        if key in _held:
            raise InUseError(_refusal(target, path, _holder(path)))
        _held.add(key)
    try:
        lock = _acquire(target, path, doing)
        try:
            yield
        finally:
            lock.release(path.unlink)
    finally:
        _held.discard(key)


def _acquire(target: Path, path: Path, doing: str) -> FileLock:
    """Acquires the lock of ``target`` and writes the new holder into it."""
    try:
        lock = try_lock(path)
        if lock is None:
            raise InUseError(_refusal(target, path, _holder(path)))
        try:
            holder = _holder(path)
            if holder and not _has_ended(holder, lock.enforced):
                raise InUseError(_refusal(target, path, holder))
        except BaseException:
            lock.release()
            raise
        try:
            _write(lock.file, doing)
        except BaseException:
            lock.release(path.unlink)
            raise
        return lock
    except InUseError:
        raise
    except OSError as error:  # users know the folder, not its lock file
        raise OSError(error.errno, error.strerror, str(target.parent)) from error


def _write(file: BinaryIO, doing: str) -> None:
    since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since, "doing": doing}).encode())


def _holder(path: Path) -> dict[str, Any]:
    """Returns the holder that a lock file names; empty if it was not written yet, or only in part."""
    try:
        with open(path, "rb") as file:
            holder = json.loads(file.read(4096))
        return {"pid": int(holder["pid"]), **{key: str(holder[key]) for key in ("host", "since", "doing")}}
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        return {}


def _has_ended(holder: dict[str, Any], enforced: bool) -> bool:
    """Returns whether the process that wrote a lock file has certainly ended."""
    if holder["host"] != platform.node():
        return False  # locks may not reach other hosts
    if enforced:
        return True
    try:
        os.kill(holder["pid"], 0)  # not on Windows, whose locks are always enforced
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _refusal(target: Path, path: Path, holder: dict[str, Any]) -> str:
    if not holder:
        return f"{target} is in use by another process (lock file {path}): wait until it has ended, or write elsewhere"
    who = "this process" if holder["pid"] == os.getpid() else "process"
    text = f"{target} is in use: {who} {holder['pid']} on {holder['host']}, {holder['doing']} since {holder['since']}"
    if holder["host"] != platform.node():
        return f"{text}; if that process has ended, delete {path}, else wait for it or write elsewhere"
    return f"{text}; wait until it has ended, stop it, or write elsewhere"


if os.name == "nt":  # pragma: no cover
    import msvcrt

    _FAR = 1 << 30  # beyond the text, as others cannot read a locked byte

    def _lock(file: BinaryIO) -> bool:
        file.seek(_FAR)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError as error:
            raise BlockingIOError(*error.args) from error
        file.seek(0)
        return True

    def _unlock(file: BinaryIO) -> None:
        file.seek(_FAR)
        with suppress(OSError):
            msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined]

else:
    import fcntl

    def _lock(file: BinaryIO) -> bool:
        """Locks an open file; returns False if the file system has no locks.

        Raises:
            BlockingIOError: the lock is held elsewhere.
        """
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
        return True

    def _unlock(file: BinaryIO) -> None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
