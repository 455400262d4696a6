"""Long runs and neighbours: memory, threads that call at once, workers of a DataLoader, and settings of the process."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import fastmaf
from tests.core.helpers import build, generator

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

LONG = """
import re
from pathlib import Path
import torch, fastmaf

def resident():
    return int(re.search(r"VmRSS:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

def calls(n, call):
    for i in range(n):
        call(i)

flow = fastmaf.MAF(48, 2, (16, 16), order="alternate", seed=0)
optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-4)
step = fastmaf.TrainingStep(flow, optimizer, fastmaf.Guards(max_grad_norm=50.0))
x = torch.rand(8, 48, generator=torch.Generator().manual_seed(0))
for call in (lambda i: step(x), lambda i: flow.sample(2, seed=i)):
    calls(2000, call)  # what is allocated once, and the allocator's pools
    before = resident()
    calls(10_000, call)
    print(before, resident())
"""


@linux
@pytest.mark.slow
def test_memory_stays_flat_over_10000_steps_and_10000_samples() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LONG]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        before, after = map(int, line.split())
        assert after <= 1.01 * before, f"{before} kB became {after} kB"
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize("order", ["natural", "random"])
def test_eight_threads_at_once_get_what_one_gets(order: Any) -> None:
    """The first call of a flow, which prepares it, is among them."""
    flow = build(48, hidden_features=(40, 30), order=order, dtype=torch.float32)
    inputs = [torch.rand(n, 48, generator=generator(n)) for n in range(1, 9)]

    def both(i: int) -> list[Tensor]:
        with torch.no_grad():
            return [flow.log_prob(inputs[i]), flow.sample(i + 1, seed=i), flow.log_prob(inputs[i])]

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's own sums depend on it
    try:
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(both, list(range(8)) * 5))
        alone = [both(i) for i in range(8)]
    finally:
        torch.set_num_threads(before)
    for i, found in enumerate(together):
        assert all(torch.equal(a, b) for a, b in zip(found, alone[i % 8], strict=True))


class Scored(Dataset[Tensor]):
    """Rows with their log-density, which the worker computes."""

    def __init__(self, flow: fastmaf.Flow) -> None:
        self.flow = flow

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        with torch.no_grad():
            x = torch.rand(2, 12, generator=torch.Generator().manual_seed(i))
            return torch.stack([self.flow.log_prob(x), self.flow.sample(2, seed=i).sum(1)])


LOADER = """
import torch
torch.set_num_threads(1)  # after work on several, torch's own operations hang in a forked child
from torch.utils.data import DataLoader
import fastmaf
from tests.core.test_neighbours import Scored

if __name__ == "__main__":
    flow = fastmaf.MAF(12, 2, (16,), seed=0)
    expected = torch.stack([Scored(flow)[i] for i in range(6)])
    for context in ("fork", "spawn"):
        loader = DataLoader(Scored(flow), batch_size=3, num_workers=2, multiprocessing_context=context)
        found = torch.cat(list(loader))
        assert torch.equal(found, expected), context
    print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_workers_of_a_loader_forked_and_spawned(tmp_path: Path) -> None:
    (program := tmp_path / "program.py").write_text(textwrap.dedent(LOADER))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(program)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and done.stdout.split() == ["equal"], done.stderr[-3000:]


def settings_of_the_process() -> dict[str, Any]:
    import matplotlib

    state: Any = np.random.get_state()
    return {
        "torch's generator": torch.get_rng_state().tolist(),
        "NumPy's generator": (state[1].tolist(), state[2:]),
        "Python's generator": random.getstate(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "denormals": float(torch.tensor(1e-40) * 1.0) != 0.0,
        "warnings": list(warnings.filters),
        "matplotlib": (matplotlib.get_backend(), dict(matplotlib.rcParams)),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "NumPy's errors": np.geterr(),
        "switch interval": sys.getswitchinterval(),
        "recursion": sys.getrecursionlimit(),
    }


def test_no_call_of_a_flow_changes_a_setting_of_the_process(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    flow = build(12, dtype=torch.float32)  # the helper has a generator of its own
    step = fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters()))
    x = torch.rand(4, 12)
    calls = {
        "build": lambda: fastmaf.MAF(12, 2, (16,), seed=0),
        "log_prob": lambda: flow.log_prob(x),
        "sample": lambda: flow.sample(3, seed=0),
        "step": lambda: step(x),
        "save": lambda: flow.save(tmp_path / "a.safetensors"),
        "load": lambda: fastmaf.load(tmp_path / "a.safetensors"),
    }
    for name, call in calls.items():
        before = settings_of_the_process()
        call()
        after = settings_of_the_process()
        assert [key for key in before if before[key] != after[key]] == [], name


@pytest.mark.slow
def test_no_workflow_changes_a_setting_of_the_process(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    import io

    from fastmaf.capsule.config import TrainConfig
    from fastmaf.capsule.synthetic import draw_dataset
    from fastmaf.capsule.train import train
    from fastmaf.inspection.workflow.fit import fit
    from fastmaf.inspection.workflow.score import score
    from tests.inspection.tiny import TINY, silent

    data, run = tmp_path / "data", tmp_path / "run"
    config = TrainConfig(size=8, blocks=1, hidden_features=(8,), epochs=1, batch_size=8)
    good = [str(data / "test" / "good")]
    quiet: Any = {"progress": False, "say": silent}
    calls = {
        "draw": lambda: draw_dataset(data, train=24, good=2, defects={}, size=32, progress=False),
        "train": lambda: train(data, tmp_path / "trained", config, progress=False),
        "fit": lambda: fit(data, run, TINY, **quiet),
        "score": lambda: score(run, good, overlays=tmp_path / "overlays", stdout=io.StringIO(), **quiet),
    }
    import matplotlib.pyplot  # noqa: F401 - chooses a backend when it is first imported
    import sklearn.metrics  # noqa: F401 - adds a filter of warnings, and variables of the environment, likewise

    for name, call in calls.items():
        before = settings_of_the_process()
        call()
        after = settings_of_the_process()
        assert [key for key in before if before[key] != after[key]] == [], name
