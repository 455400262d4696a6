"""Peak memory of a training process, above a process that has only imported torch: ``python -m bench.memory SIDE``."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from pathlib import Path

SIDES = ("fastmaf", "naive", "masked once")


def peak_gb(
    side: str, *, features: int, blocks: int, hidden: tuple[int, ...], batch: int, steps: int = 4
) -> float | None:
    """Returns the peak resident memory of ``steps`` training steps in a process of their own, in GB above importing
    torch.

    None where the operating system does not tell.
    """
    command = [sys.executable, "-m", "bench.memory", side, *map(str, (features, blocks, batch, steps, *hidden))]
    found = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    return None if found.stdout.strip() == "unknown" else float(found.stdout) / 1e9


def _peak_bytes() -> int | None:
    # Linux hands getrusage's peak on from the process that started this one, so a large parent would hide all growth.
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=SIDES)
    for name in ("features", "blocks", "batch", "steps"):
        parser.add_argument(name, type=int)
    parser.add_argument("hidden", type=int, nargs="+")
    asked = parser.parse_args()
    import torch

    before = _peak_bytes()
    if before is None:
        print("unknown")
        return
    train(asked.side, torch.rand(asked.batch, asked.features), asked.blocks, asked.hidden, asked.steps)
    print((_peak_bytes() or 0) - before)


def train(side: str, x: object, blocks: int, hidden: list[int], steps: int) -> None:
    """Builds one side and takes a few training steps, as a user of that side alone would."""
    import torch

    import fastmaf
    from bench.sides import fast_side, masked_once_side, naive_side

    assert isinstance(x, torch.Tensor)
    flow = fastmaf.MAF(x.shape[1], blocks, hidden, seed=0, order="natural")
    if side == "fastmaf":
        built = fast_side(flow)
    else:
        naive = flow.to_naive()
        del flow
        built = naive_side(naive) if side == "naive" else masked_once_side(naive)
    for _ in range(steps):
        built.train_step(x)


if __name__ == "__main__":
    _main()
