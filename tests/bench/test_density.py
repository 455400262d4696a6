"""The comparison of densities: equal batches for every library, its CSV file and its pictures."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastmaf.bench import density
from fastmaf.bench.density import COLUMNS, DATA, MODELS, DataSet, Model


def test_rows_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, folder = tmp_path / "density.csv", tmp_path / "pictures"
    arguments = ["--data", "moons", "power", "--seeds", "2", "--steps", "3", "--out", str(out)]
    density.main([*arguments, "--pictures", str(folder)])
    with open(out, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == COLUMNS
    assert [(row["data"], row["model"]) for row in rows] == [
        (key, name) for key in ("moons", "power") for name in MODELS
    ]
    assert all(float(row["std_nll"]) > 0 and float(row["sampling_time"]) > 0 for row in rows)
    assert all(float(row["min_nll"]) <= float(row["mean_nll"]) <= float(row["max_nll"]) for row in rows)
    assert [row["training_time"] for row in rows[:: len(MODELS)]] == ["1", "1"]
    assert all(f"zuko {density.describe()['zuko']}" in row["about"] for row in rows)
    assert [file.name for file in folder.iterdir()] == ["density-moons.png"]
    assert Image.open(folder / "density-moons.png").width > 500
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


class Recorder(nn.Module):
    """A flow of one parameter that keeps its training batches."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.batches: list[Tensor] = []

    def log_prob(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.batches.append(x)
        return -0.5 * (x - self.shift).square().sum(dim=1)


def test_batches_depend_on_the_seed_alone() -> None:
    x = torch.arange(400.0)[:, None].expand(-1, 2) + torch.randn(400, 1)
    data = DataSet(lambda: x, blocks=1, hidden=1, batch=7, steps=4)
    flows = [Recorder() for _ in range(3)]
    for flow, seed in zip(flows, (0, 0, 1), strict=True):
        torch.manual_seed(len(flow.batches))
        torch.randn(seed + 3)  # weights of different libraries take different numbers of draws
        density.train(Model(flow, flow.log_prob, lambda n: x[:n]), data, x, seed, steps=4)
    first, same, other = (torch.cat(flow.batches) for flow in flows)
    assert torch.equal(first, same) and not torch.equal(first, other)
    held_out = x[::4, 0]
    assert not bool(torch.isin(first[:, 0], held_out).any())


@pytest.mark.parametrize("key, features", [("moons", 2), ("power", 6), ("tabular", 43), ("digits", 784)])
def test_data_sets_are_finite_and_repeatable(key: str, features: int) -> None:
    x = DATA[key].draw()
    assert x.shape[1] == features and bool(x.isfinite().all())
    assert torch.equal(x, DATA[key].draw())
