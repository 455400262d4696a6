"""A new run over a finished one, with a fault at every operation on files; started by ``test_faults.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from fastmaf.capsule import training_run
from tests.capsule.runs import run, with_
from tests.faults import every_fault

NEW = with_(seed=7, epochs=1)


def main(fault: str, data: Path, finished: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    training_run._SECONDS_BETWEEN_CHECKPOINTS = -1.0
    training_run.nll_curve = lambda path, *_: path.write_bytes(b"a curve")  # type: ignore[assignment]
    run(data, folder / "warm-up", NEW)  # imports what takes a second, once for all children
    every_fault(fault, finished, folder, lambda out: run(data, out, NEW))


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
