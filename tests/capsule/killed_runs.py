"""Training that is killed at random moments, fills the disk or loses its permission; started by ``test_kills.py``.

After each, the last good model loads, and the run that goes on ends with the weights of an uninterrupted one.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastmaf.capsule import training_run
from fastmaf.capsule.models import load_model
from fastmaf.images.dataset import to_unit
from fastmaf.training.checkpoints import MODEL_FILE, STATE_FILE, load_state
from tests.capsule.runs import run, same, tensors_of, with_
from tests.faults import hidden
from tests.slow_writes import ENDED, REFUSED, ended, forked, kill_at_random, slow_down

NEW = with_(seed=7, epochs=4, hidden_features=(64, 64))
LEFT = {
    MODEL_FILE,
    STATE_FILE,
    "train_log.csv",
    "nll_curve.png",
    "model.previous.safetensors",
    "train_log.previous.csv",
}


def prepared(data: Path, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A finished run of another seed, over which the others run, and the weights that these end with."""
    torch.set_num_threads(1)
    training_run._SECONDS_BETWEEN_CHECKPOINTS = training_run._SECONDS_WITHIN_EPOCHS = -1.0
    training_run.nll_curve = lambda path, *_: path.write_bytes(b"")  # type: ignore[assignment]
    run(data, folder / "before")
    run(data, folder / "whole", NEW)
    return folder / "before", tensors_of(folder / "whole")


def resumed(data: Path, before: Path, out: Path, whole: dict[str, torch.Tensor]) -> str:
    """Checks what a fault has left, goes on from it, and returns which model it was."""
    loaded = load_model(out)
    old = (out / MODEL_FILE).read_bytes() == (before / MODEL_FILE).read_bytes()
    assert loaded.flow.features == 192
    if not old:
        assert load_state(out)[1]["config"]["seed"] == NEW.seed
        assert (out / "model.previous.safetensors").read_bytes() == (before / MODEL_FILE).read_bytes()
    run(data, out, NEW, resume=not old)
    assert same(tensors_of(out), whole) and hidden(out) == []
    assert {path.name for path in out.iterdir()} <= LEFT
    return "old" if old else "new"


def killed(data: Path, folder: Path, moments: int, seed: int) -> None:
    before, whole = prepared(data, folder)

    def work(out: Path) -> None:
        slow_down()
        shutil.copytree(before, out)
        run(data, out, NEW)

    def check(out: Path) -> None:
        if not (out / MODEL_FILE).exists() or not (out / STATE_FILE).exists():  # killed while it was copied
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(before, out)
        print(resumed(data, before, out, whole), flush=True)

    count = kill_at_random(moments, seed, folder, work, check)
    print("killed", count)


def at_step(number: int, do: Any) -> None:
    """Does something at a training step, in this process."""
    steps = iter(range(1, 1000))

    def unit(pixels: torch.Tensor, *rest: Any) -> torch.Tensor:
        if next(steps) == number:
            do()
        return to_unit(pixels, *rest)

    training_run.to_unit = unit


def full(data: Path, folder: Path) -> None:
    """A small disk, in a name space of its own, that something else fills at one of the steps."""
    before, whole = prepared(data, folder)
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], check=True)
    for step in (1, 4, 7, 8):
        for left in (0, 8192, 150_000, 400_000):
            out = disk / "run"
            shutil.copytree(before, out)

            def fill(left: int = left) -> None:
                with open(disk / "filler", "wb") as file:
                    file.write(bytes(max(0, shutil.disk_usage(disk).free - left)))

            def work(step: int = step, fill: Any = fill, out: Path = out) -> None:
                at_step(step, fill)
                run(data, out, NEW)

            code = ended(forked(work))
            assert code in (REFUSED, ENDED), code
            (disk / "filler").unlink()
            print("failed" if code == REFUSED else "done", resumed(data, before, out, whole), flush=True)
            shutil.rmtree(out)


def limited(data: Path, folder: Path) -> None:
    """Files that must not grow beyond a size, as with a quota; the last size holds the first checkpoint alone."""
    before, whole = prepared(data, folder)
    sizes = [(before / MODEL_FILE).stat().st_size, (folder / "whole" / STATE_FILE).stat().st_size]
    for i, size in enumerate((100, sizes[0] // 2, sizes[0] + 100, sizes[1] // 2, sizes[1] - 200)):
        out = folder / f"limited {i}"
        shutil.copytree(before, out)

        def work(size: int = size, out: Path = out) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            run(data, out, NEW)

        assert ended(forked(work)) == REFUSED
        print("failed", resumed(data, before, out, whole), flush=True)


def revoked(data: Path, folder: Path) -> None:
    """The folder may no longer be written to; a super-user becomes another user first, whom permissions hold for."""
    before, whole = prepared(data, folder)
    nobody = 65534
    for step in (1, 4, 7):  # two steps an epoch, and a batch of validation
        out = folder / f"revoked {step}"
        shutil.copytree(before, out)
        owner = os.geteuid()
        if owner == 0:
            for path in (out, *out.iterdir()):
                os.chown(path, nobody, nobody)

        def work(step: int = step, out: Path = out, owner: int = owner) -> None:
            if owner == 0:
                os.setegid(nobody)
                os.seteuid(nobody)
            at_step(step, lambda: out.chmod(0o555))
            run(data, out, NEW)

        assert ended(forked(work)) == REFUSED
        out.chmod(0o755)
        print("failed", resumed(data, before, out, whole), flush=True)


if __name__ == "__main__":
    kind, data, folder = sys.argv[1], *map(Path, sys.argv[2:4])
    if kind == "killed":
        killed(data, folder, *map(int, sys.argv[4:]))
    else:
        {"full": full, "limited": limited, "revoked": revoked}[kind](data, folder)
