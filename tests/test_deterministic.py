"""``--deterministic --seed``: the same bits at any number of threads, and the caller's settings afterwards."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastmaf

ROOT = Path(__file__).parents[1]

# A digest of weights, samples and scores, less what tells the time.
CHILD = """
import hashlib, sys
from pathlib import Path
from safetensors.torch import load_file
from typer.testing import CliRunner
from fastmaf.capsule.synthetic import draw_dataset
from fastmaf.cli.app import app
folder = Path(sys.argv[1])
draw_dataset(folder / "data", train=24, good=4, defects={}, size=32, progress=False)
common = ["--seed", "3", "--deterministic", "--quiet"]
images, fit, train = str(folder / "data"), str(folder / "fit"), str(folder / "train")
small = ["--blocks", "2", "--hidden", "64,64", "--epochs", "3", "--batch-size", "5", "--size", "16"]
for command in (
    ["inspect", "fit", "--data", images, "--out", fit, "--size", "32", *common],
    ["capsule", "train", "--data", images, "--out", train, *small, "--device", "cpu", *common],
    ["capsule", "sample", train, "--out", train, "-n", "7", "--device", "cpu", *common],
    ["inspect", "score", fit, images + "/test/good", "--out", fit + "/rows.csv", "--device", "cpu", *common[2:]],
):
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    found = hashlib.sha256()
    out = Path(command[command.index("--out") + 1])
    for file in sorted((out if out.is_dir() else out.parent).rglob("*")):
        if file.name == "model.safetensors":
            for name, tensor in sorted(load_file(file).items()):
                found.update(name.encode() + tensor.numpy().tobytes())
        elif file.suffix == ".png" and file.name != "nll_curve.png":
            found.update(file.read_bytes())
        elif file.name == "rows.csv":
            found.update("".join(line.rsplit(",", 2)[0] for line in file.read_text().splitlines()[1:]).encode())
    print(found.hexdigest())
"""


@pytest.mark.slow
def test_any_number_of_threads_gives_the_same_bits(tmp_path: Path) -> None:
    printed = {}
    (folder := tmp_path / "same").mkdir()
    for threads in ("1", "2", "5"):
        environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)}
        command = [sys.executable, "-c", CHILD, str(folder)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        printed[threads] = done.stdout.split()
        folder.rename(tmp_path / threads)
        folder.mkdir()
    assert len(printed["1"]) == 4 and printed["1"] == printed["2"] == printed["5"]


def test_settings_are_those_of_the_caller_afterwards() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyError), fastmaf.deterministic():
            assert torch.get_num_threads() == 1 and torch.are_deterministic_algorithms_enabled()
            raise KeyError
        assert torch.get_num_threads() == 3
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.set_num_threads(before)


def test_steps_of_training_do_not_depend_on_threads() -> None:
    before, digests = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            with fastmaf.deterministic():
                flow = fastmaf.MAF(768, 2, (64, 64), seed=0, order="natural")
                step = fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-3))
                x = torch.from_numpy(np.random.default_rng(0).random((33, 768), dtype=np.float32))
                step(x)
                found = hashlib.sha256()
                for tensor in (*flow.parameters(), flow.log_prob(x), flow.sample(9, seed=1)):
                    found.update(tensor.detach().numpy().tobytes())
                digests.add(found.hexdigest())
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 1
