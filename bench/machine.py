"""The machine a benchmark runs on: its name, its versions, and its limits as measured in the same process."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fastmaf


def describe() -> dict[str, str]:
    """Returns processor, thread count, versions and commit."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "fastmaf": fastmaf.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _git(*arguments: str) -> str:
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    details = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    return f"{name} (family {details.get('cpu family')}, model {details.get('model')}), {os.cpu_count()} cores"


def seconds(call: Callable[[], object], repeats: int) -> list[float]:
    """Returns the time of each of ``repeats`` calls, after one that is not counted."""
    call()
    return [seconds_once(call) for _ in range(repeats)]


def seconds_once(call: Callable[[], object]) -> float:
    """Returns the time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_seconds_once(call: Callable[[], object]) -> float:
    """Returns the time of one call on the GPU, waits for its launches from Python included."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def cuda_limits() -> dict[str, float]:
    """Measures what nothing on this GPU can beat: copy rate (read and written) in GB/s, float32 matrix rate in GFLOP/s,
    and the time of an empty kernel within a graph in microseconds.
    """
    numbers, side, kernels = 256 * 2**20, 4096, 200
    source, target = torch.rand(numbers, device="cuda"), torch.empty(numbers, device="cuda")
    copy = min(cuda_seconds_once(lambda: target.copy_(source)) for _ in range(9))
    a, b, c = (torch.randn(side, side, device="cuda") for _ in range(3))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    product = min(cuda_seconds_once(lambda: torch.mm(a, b, out=c)) for _ in range(9))
    torch.backends.cuda.matmul.allow_tf32 = before
    small, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    small.add_(1)
    with torch.cuda.graph(graph):
        for _ in range(kernels):
            small.add_(1)
    launch = min(cuda_seconds_once(graph.replay) for _ in range(9)) / kernels
    return {
        "copy_gb_per_s": 8 * numbers / copy / 1e9,
        "sgemm_gflop_per_s": 2 * side**3 / product / 1e9,
        "launch_us": launch * 1e6,
    }


def limits() -> dict[str, float]:
    """Measures what nothing on this machine can beat: read, copy and fused Adam rates in GB/s, matrix rate in GFLOP/s.

    Adam's is that of torch's fused step: four numbers read and three written per parameter.
    """
    numbers, side = 64 * 2**20, 2048
    source, target = torch.ones(numbers), torch.empty(numbers)
    matrix, vector = source.view(-1, 8 * side), torch.ones(8 * side)
    read = min(*seconds(source.sum, 7), *seconds(lambda: torch.mv(matrix, vector), 7))
    copy = min(seconds(lambda: target.copy_(source), 7))
    parameter = torch.nn.Parameter(torch.rand(numbers))
    parameter.grad = torch.rand(numbers)
    optimizer = torch.optim.Adam([parameter], fused=True)
    adam = statistics.median(seconds(optimizer.step, 7))
    a, b, c = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
    product = min(seconds(lambda: torch.mm(a, b, out=c), 7))
    return {
        "read_gb_per_s": 4 * numbers / read / 1e9,
        "copy_gb_per_s": 8 * numbers / copy / 1e9,
        "adam_gb_per_s": 28 * numbers / adam / 1e9,
        "sgemm_gflop_per_s": 2 * side**3 / product / 1e9,
    }
