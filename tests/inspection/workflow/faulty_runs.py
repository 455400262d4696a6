"""A new fit over an earlier run, with a fault at every operation on files; started by ``test_run_files.py``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastmaf.images.dataset import load_train
from fastmaf.inspection.fit import fit
from fastmaf.inspection.fold_models import FOLDS_FOLDER, load_fold_models
from fastmaf.inspection.model import load_inspection
from fastmaf.inspection.report import build
from fastmaf.inspection.report.content import REPORT_FILE
from fastmaf.inspection.workflow import fit as fitting
from fastmaf.inspection.workflow.fit import LOG_FILE
from fastmaf.io.atomic import written_atomically
from fastmaf.training.checkpoints import MODEL_FILE
from tests.faults import every_fault, hidden
from tests.inspection.tiny import A_REPORT, TINY, silent

NEW = replace(TINY, size=8, seed=7)
FILES = {MODEL_FILE, LOG_FILE, REPORT_FILE}
PREVIOUS = {"model.previous.safetensors", "training_log.previous.csv", "report.previous.html"}


def main(fault: str, data: Path, before: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    fitted = fit(load_train(data, size=NEW.size, progress=False).pixels, NEW, progress=False)
    old = (before / MODEL_FILE).read_bytes()

    def report(path: Path, *args: Any, **kwargs: Any) -> None:
        with written_atomically(path) as file:
            file.write(A_REPORT.encode())

    def train(out: Path) -> None:
        fitting.fit(data, out, NEW, keep_folds=True, progress=False, say=silent)

    def check(out: Path) -> None:
        model = load_inspection(out)
        new = model.about["recipe"]["seed"] == NEW.seed
        print("new" if new else "old", flush=True)
        assert (out / ("model.previous.safetensors" if new else MODEL_FILE)).read_bytes() == old
        assert {path.name for path in out.iterdir()} >= FILES
        assert len(load_fold_models(out, model)) in ((0, NEW.folds) if new else (0,))
        assert fault == "killed" or hidden(out) == []
        train(out)
        assert {path.name for path in out.iterdir()} == {*FILES, *PREVIOUS, FOLDS_FOLDER}
        assert len(load_fold_models(out, load_inspection(out))) == NEW.folds

    fitting.fit_model = lambda *args, **kwargs: fitted
    build.training_report = report
    train(folder / "warm-up")  # imports what takes a second, once for all children
    every_fault(fault, before, folder, train, check)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
