"""Fits, calibrations, scores and exports that are killed at random moments or fill the disk; for ``test_kills.py``.

After each, what was there before loads, and the command that runs again ends with the result of an uninterrupted one.
"""

from __future__ import annotations

import csv
import io
import json
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastmaf.images.dataset import load_train
from fastmaf.inspection.export import export_onnx
from fastmaf.inspection.fit import fit as fit_model
from fastmaf.inspection.model import load_inspection
from fastmaf.inspection.report import build
from fastmaf.inspection.workflow import fit as fitting
from fastmaf.inspection.workflow.calibrate import calibrate, recalibrate
from fastmaf.inspection.workflow.export import export
from fastmaf.inspection.workflow.score import score
from fastmaf.io.atomic import written_atomically
from fastmaf.io.tensor_file import read_tensors
from fastmaf.training.checkpoints import MODEL_FILE
from tests.faults import hidden
from tests.inspection.tiny import A_REPORT, TINY, silent
from tests.slow_writes import REFUSED, ended, forked, kill_at_random, slow_down

ONNX, ROWS = "model.onnx", "scores.csv"


def _report(path: Path, *args: Any, **kwargs: Any) -> None:
    with written_atomically(path) as file:
        file.write(A_REPORT.encode())


def commands(data: Path) -> dict[str, Callable[[Path], object]]:
    """Returns what each command does in the folder of a run."""
    good = [str(data / "test" / "good")]
    fitted = fit_model(load_train(data, size=TINY.size, progress=False).pixels, TINY, progress=False)
    fitting.fit_model = lambda *args, **kwargs: fitted  # as fast as a kill at a random moment needs it
    build.training_report = _report
    quiet: Any = {"progress": False, "say": silent}
    return {
        "fit": lambda out: fitting.fit(data, out, TINY, keep_folds=True, **quiet),
        "calibrate": lambda out: calibrate(out, 0.2, say=silent),
        "recalibrate": lambda out: recalibrate(out, good, 0.2, **quiet),
        "score": lambda out: score(
            out, good, out=out / ROWS, overlays=out / "overlays", maps=out / "maps", stdout=io.StringIO(), **quiet
        ),
        "export": lambda out: export(out, out / ONNX, good, say=silent),
    }


def result(out: Path) -> dict[str, Any]:
    """Everything of a run's folder that does not depend on times."""
    tensors, metadata = read_tensors(out / MODEL_FILE)
    record = json.loads(metadata["inspection"])
    for name in ("seconds", "log", "created"):
        record["about"].pop(name, None)
    found: dict[str, Any] = {"tensors": {k: v.tolist() for k, v in tensors.items()}, "record": record}
    if (out / ROWS).exists():
        with open(out / ROWS, newline="") as file:
            found["rows"] = [(row["score"], row["p_value"], row["verdict"]) for row in csv.DictReader(file)]
    for folder in ("overlays", "maps"):
        found |= {str(p.relative_to(out)): p.read_bytes() for p in sorted((out / folder).glob("*"))}
    found["others"] = sorted(p.name for p in out.iterdir() if "previous" not in p.name)
    if (out / ONNX).exists():
        found["onnx"] = (out / ONNX).read_bytes()
    return found


def main(fault: str, name: str, data: Path, before: Path, folder: Path, *numbers: int) -> None:
    torch.set_num_threads(1)
    command = commands(data)[name]
    shutil.copytree(before, whole := folder / "whole")
    command(whole)
    expected = result(whole)

    def work(out: Path) -> None:
        shutil.copytree(before, out)
        slow_down()
        command(out)

    def check(out: Path) -> None:
        if sorted(p.name for p in before.iterdir()) != sorted({p.name for p in before.iterdir()} & set(listed(out))):
            shutil.rmtree(out, ignore_errors=True)  # killed while it was copied
            shutil.copytree(before, out)
        load_inspection(out)
        if (out / ONNX).exists():
            assert (out / ONNX).read_bytes() == expected["onnx"], "a graph that is there is whole"
        command(out)
        assert result(out) == expected and hidden(out) == []

    def listed(out: Path) -> list[str]:
        return [p.name for p in out.iterdir()] if out.exists() else []

    if fault == "killed":
        print("killed", kill_at_random(*numbers, folder, work, check))
        return
    for size in numbers:
        out = folder / f"limited {size}"
        shutil.copytree(before, out)

        def limited(size: int = size, out: Path = out) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            command(out)

        assert ended(forked(limited)) == REFUSED
        assert (out / MODEL_FILE).read_bytes() == (before / MODEL_FILE).read_bytes() and hidden(out) == []
        check(out)
        print("failed")


if __name__ == "__main__":
    fault, name, *paths = sys.argv[1:6]
    assert export_onnx  # imported before the first fork
    main(fault, name, *map(Path, paths), *map(int, sys.argv[6:]))
