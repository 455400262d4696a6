"""The table of training runs: what it counts as diverged, and that every library has its row."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastmaf.bench import stability
from fastmaf.bench.stability import DATA, DataSet


def test_a_row_for_each_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "stability.csv"
    stability.main(["--data", "moons", "--seeds", "2", "--steps", "20", "--out", str(out)])
    with open(out, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["model"] for row in rows] == ["diagonal Gaussian", *stability.MODELS]
    assert [row["diverged"] for row in rows[1:3]] == ["0", "0"]
    assert all(float(row["mean_nll"]) <= float(row["worst_nll"]) for row in rows[1:])
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


class Scaled(nn.Module):
    """A normal density with one scale, for which Adam's rate can be too large."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def log_prob(self, x: Tensor) -> Tensor:
        return (-0.5 * (x * torch.exp(-self.log_scale)).square() - self.log_scale).sum(dim=1)


@pytest.mark.parametrize("lr, diverged", [(1e-2, False), (100.0, True)])
def test_runs_that_diverge_are_counted(lr: float, diverged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = Scaled()
    monkeypatch.setattr(stability, "build", lambda *_: (flow, flow.log_prob))
    torch.manual_seed(0)
    x = 0.1 * torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    data = DataSet(lambda: x, hidden=1, batch=50, lr=lr, steps=60)
    run = stability.train("fastmaf", data, x, seed=0, steps=60)
    assert run.diverged is diverged


@pytest.mark.parametrize("key, features", [("moons", 2), ("power", 6), ("miniboone", 63), ("digits", 784)])
def test_data_sets_are_finite_and_repeatable(key: str, features: int) -> None:
    x = DATA[key].draw()
    assert x.shape[1] == features and bool(x.isfinite().all())
    assert torch.equal(x, DATA[key].draw())
