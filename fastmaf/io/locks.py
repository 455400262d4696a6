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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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

    def release(self) -> None:
        """Unlocks and closes the file."""
        if self.enforced:
            _unlock(self.file)  # closing does not suffice if a forked child has the descriptor
        self.file.close()


def try_lock(path: Path) -> FileLock | None:
    """Opens or creates ``path`` and locks it; returns None if the lock is held elsewhere."""
    while True:
        file = open(path, "rb+", buffering=0, opener=_open_or_create)  # noqa: SIM115
        try:
            enforced = _lock(file)
            # The previous holder may have removed the file since it was opened: such a lock would exclude nobody.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    return FileLock(file, enforced)
            file.close()
        except BlockingIOError:
            file.close()
            return None
        except BaseException:
            file.close()
            raise


def _open_or_create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


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
            raise InUseError(_refusal(target, path, _read(path)))
        _held.add(key)
    try:
        lock = _taken(target, path, doing)
        try:
            yield
        finally:
            _remove(path, lock)
    finally:
        with _held_guard:
            _held.discard(key)


def _taken(target: Path, path: Path, doing: str) -> FileLock:
    """Acquires the lock of ``target`` and writes the new holder into it."""
    try:
        lock = try_lock(path)
        if lock is None:
            raise InUseError(_refusal(target, path, _read(path)))
        try:
            holder = _parsed(lock.file)
            if holder and not _gone(holder, lock.enforced):
                raise InUseError(_refusal(target, path, holder))
        except BaseException:
            lock.release()
            raise
        try:
            _write(lock.file, doing)
        except BaseException:
            _remove(path, lock)
            raise
        return lock
    except InUseError:
        raise
    except OSError as error:  # users know the folder, not its lock file
        raise OSError(error.errno, error.strerror, str(target.parent)) from error


def _remove(path: Path, lock: FileLock) -> None:
    if os.name == "nt":  # an open file cannot be removed there
        lock.release()
    with suppress(OSError):
        path.unlink()
    if os.name != "nt":
        lock.release()


def _write(file: BinaryIO, doing: str) -> None:
    since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    file.seek(0)
    file.truncate()
    file.write(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since, "doing": doing}).encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return _parsed(file)
    except OSError:
        return {}


def _parsed(file: BinaryIO) -> dict[str, Any]:
    try:
        holder = json.loads(file.read(4096))
        return {"pid": int(holder["pid"]), **{key: str(holder[key]) for key in ("host", "since", "doing")}}
    except (ValueError, KeyError, TypeError, OSError):
        return {}  # not written yet, or only in part


def _gone(holder: dict[str, Any], enforced: bool) -> bool:
    """Returns whether the process that wrote a lock file has certainly ended."""
    if holder["host"] != platform.node():
        return False  # locks may not reach other hosts
    return enforced or not _alive(holder["pid"])


def _alive(pid: int) -> bool:
    if os.name == "nt":  # os.kill would end the process there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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
