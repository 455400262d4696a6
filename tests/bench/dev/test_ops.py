"""The benchmarks of single ops: every entry runs, and a wrong result is refused."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastmaf
from fastmaf.bench.check import WrongResultError
from fastmaf.bench.dev import ops


@pytest.mark.parametrize("backend", ops.present())
@pytest.mark.parametrize("name", ops.OPS)
def test_results_are_those_of_float64_and_others_are_refused(name: str, backend: str) -> None:
    flow = fastmaf.MAF(96, 2, (64, 64), order="natural", seed=0)
    assert ops.check(name, flow, 8, backend) < ops.LARGEST
    op, other = ops.OPS[name], copy.deepcopy(flow)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.001)
    wrong = op._replace(prepare=lambda flow, x: op.prepare(other if x.dtype == torch.float32 else flow, x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ops.OPS, name, wrong)
        with pytest.raises(WrongResultError, match=f"{name} of '{backend}' is off by a relative"):
            ops.check(name, flow, 8, backend)


@pytest.mark.slow
def test_pytest_benchmark_times_an_op_beside_its_limit() -> None:
    command = [sys.executable, "-m", "fastmaf.bench.dev.ops", "-q", "-k", "inverse and 64"]
    environment = os.environ | {"FASTMAF_BENCH_FEATURES": "96"}
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{2 * len(ops.present())} passed" in done.stdout
    # Which of both decides, and in which unit, depends on the machine.
    assert re.search(r"flow, inverse, batch 64: at least [\d.]+ (s|ms|µs) \([\d.]+ (GFLOP|MB)\)", done.stdout)
