"""Commands on a full disk or in a folder that may no longer be written to; started by ``test_refused.py``.

Each ends with exit code 1 and a message that names what cannot be written, leaves every file as it was, and reaches the
result of an undisturbed one when it runs again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastmaf.cli.app import main as fastmaf_command
from tests.faults import hidden
from tests.inspection.workflow.killed_runs import ONNX, ROWS, commands, result
from tests.slow_writes import ended

NOBODY = 65534
Fault = Callable[[Path], object]


def arguments(name: str, data: Path, out: Path) -> list[str]:
    """The command line of a command in the folder of a run."""
    good = str(data / "test" / "good")
    return [
        "inspect",
        name,
        *{
            "fit": ["--data", str(data), "--out", str(out), "--size", "16", "--kind", "object", "--keep-folds", "-q"],
            "calibrate": [str(out), "--false-alarm", "0.2"],
            "recalibrate": [str(out), good, "--false-alarm", "0.2", "-q"],
            "score": [str(out), good, "--out", str(out / ROWS), "--maps", str(out / "maps"), "-q"],
            "export": [str(out), "--onnx", str(out / ONNX), "--check", good],
        }[name],
    ]


def run(arguments: list[str], messages: Path, before: Callable[[], object] = lambda: None) -> int:
    """Runs the command in a child, after something was done there; returns its exit code."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            descriptor = os.open(messages, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            before()
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            sys.argv = ["fastmaf", *arguments]
            fastmaf_command()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 98
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return ended(child)


def at_first_flush(do: Callable[[], object]) -> None:
    """Does something in this process when the first file has been written, and before it is in its place."""
    flush, done = os.fsync, []

    def flushed(descriptor: int) -> None:
        if not done:
            done.append(do())
        flush(descriptor)

    os.fsync = flushed


def contents(out: Path) -> dict[str, bytes]:
    """All files but those of an interrupted scoring, and what is hidden: it could not be removed."""
    names = (path.relative_to(out) for path in sorted(out.rglob("*")) if path.is_file())
    shown = (name for name in names if not any(part.startswith(".") or "partial" in part for part in name.parts))
    return {str(name): (out / name).read_bytes() for name in shown}


def check(name: str, data: Path, out: Path, before: Callable[[], object], after: Callable[[], object]) -> None:
    """Runs a command that meets a fault, and then again without it."""
    expected, files = result(out), contents(out)
    messages = out.parent.parent / "messages"
    messages.unlink(missing_ok=True)
    code = run(arguments(name, data, out), messages, before)
    after()
    text = messages.read_text()
    assert code == 1, (code, text)
    assert "error: " in text and "Traceback" not in text and str(out) in text, text
    assert any(words in text.lower() for words in ("no space left", "disk space", "permission denied")), text
    assert contents(out) == files, (sorted(files), sorted(contents(out)))
    code = run(arguments(name, data, out), messages)
    assert code == 0, messages.read_text()
    assert hidden(out) == []
    again = result(out)
    for found in (expected, again):  # each run keeps the one before
        found["record"]["about"].pop("configuration", None)
    assert again == expected
    print("refused", flush=True)


def prepared(name: str, data: Path, before: Path, out: Path) -> None:
    """A copy of a run in which the command has ended well: its results are what must stay."""
    shutil.copytree(before, out)
    for _ in range(2):  # the second keeps the first one's files as previous ones
        code = run(arguments(name, data, out), out.parent.parent / "messages")
        assert code == 0, (out.parent.parent / "messages").read_text()


def full(name: str, data: Path, before: Path, folder: Path) -> None:
    """A small disk, in a name space of its own, that something else fills: before the command looks, and after."""
    (disk := folder / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)], check=True)
    out, filler, usage = disk / "run", disk / "filler", shutil.disk_usage
    prepared(name, data, before, out)

    def fill(left: int) -> None:
        filler.write_bytes(bytes(max(0, usage(disk).free - left)))

    def fill_unseen(left: int) -> None:
        fill(left)
        shutil.disk_usage = lambda path: usage(path)._replace(free=1 << 40)  # type: ignore[assignment]

    for fault in (lambda: fill(0), lambda: fill_unseen(0), lambda: fill_unseen(4096)):
        check(name, data, out, fault, filler.unlink)


def revoked(name: str, data: Path, before: Path, folder: Path) -> None:
    """The folder may not be written to from the start, or from the first file on; not by a super-user."""
    (folder / "runs").mkdir()
    out = folder / "runs" / "run"
    prepared(name, data, before, out)
    owner = os.geteuid()

    def as_user() -> None:
        if owner == 0:
            os.setegid(NOBODY)
            os.seteuid(NOBODY)

    def own(user: int) -> None:
        for path in (out, *out.rglob("*")) if owner == 0 else ():
            os.chown(path, user, user)

    def forbid() -> None:
        for path in (out, *(path for path in out.rglob("*") if path.is_dir())):
            path.chmod(0o555)

    def allow() -> None:
        for path in (out, *(path for path in out.rglob("*") if path.is_dir())):
            path.chmod(0o755)
        own(owner)

    for when in ("start", "first file"):
        own(NOBODY)

        def fault(when: str = when) -> None:
            as_user()
            if when == "start":
                forbid()
            else:
                at_first_flush(forbid)

        check(name, data, out, fault, allow)


def main(fault: str, name: str, data: Path, before: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    shutil.copytree(before, folder / "warm-up")
    made: Any = commands(data)  # a fit and a report that take no time
    made[name](folder / "warm-up")  # imports what another user may not read
    {"full": full, "revoked": revoked}[fault](name, data, before, folder)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(Path, sys.argv[3:]))
