"""The machine of a run: its name, its versions, its rates as measured in the same process, clocks and peak memory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch

import fastmaf
from fastmaf.kernels import dispatch, empty_on_huge_pages

UNKNOWN = "unknown"
PEERS = ("triton", "nflows", "zuko", "normflows", "flowjax", "jax")


def free_bytes(device: str) -> int:
    """Returns the free memory of a device."""
    return psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]


def describe(device: str = "cpu") -> dict[str, str]:
    """Returns processor, thread count, versions and commit."""
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "processor": _processor(),
        "huge_pages": _huge_pages(),
        "torch_threads": str(torch.get_num_threads()),
        **({} if device == "cpu" else {"card": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}),
        "fastmaf": fastmaf.__version__,
        "backend": dispatch.default_backend("flow", torch.empty(0, device=device)),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for name in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about[name] = importlib.metadata.version(name)
    return about


def _commit() -> str:
    if _git("ls-files", "--error-unmatch", Path(__file__).name) in ("", UNKNOWN):  # not a checkout of this file
        return UNKNOWN
    return _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    info = {key.strip(): text.strip() for key, _, text in (line.partition(":") for line in reversed(lines))}
    name = info.get("model name", platform.machine())
    return f"{name} (family {info.get('cpu family')}, model {info.get('model')}), {os.cpu_count()} cores"


def _huge_pages() -> str:
    """Returns which memory gets huge pages: always, madvise (on request, as by fastmaf) or never."""
    with contextlib.suppress(OSError):
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return modes[modes.index("[") + 1 : modes.index("]")]
    return UNKNOWN


class Busy:
    """Measures the share of the processors that other processes have taken since it was created."""

    def __init__(self) -> None:
        self._before = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        total, this = psutil.cpu_times(), psutil.Process().cpu_times()
        busy = sum(getattr(total, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
        return time.monotonic(), busy, this.user + this.system

    def others(self) -> float:
        """Returns the share, 0 to 1; 0 after less than a tenth of a second, as the clock ticks in hundredths."""
        wall, busy, this = (now - before for now, before in zip(self._now(), self._before, strict=True))
        return max(0.0, busy - this) / (wall * (psutil.cpu_count() or 1)) if wall > 0.1 else 0.0


def seconds_once(call: Callable[[], object]) -> float:
    """Returns the time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_seconds_once(call: Callable[[], object]) -> float:
    """Returns the time of one call on the GPU, including waits for its launches from Python."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def clock(device: str) -> Callable[[Callable[[], object]], float]:
    """Returns the function that times one call on a device."""
    return seconds_once if device == "cpu" else cuda_seconds_once


def _best(call: Callable[[], object], repeats: int, device: str = "cpu") -> float:
    """Returns the shortest time of some calls, after one to warm up."""
    call()
    return min(clock(device)(call) for _ in range(repeats))


def limits() -> dict[str, float]:
    """Measures this machine's read, copy and fused Adam rates in GB/s, matrix rate in GFLOP/s, and the time of a call.

    Adam's rate is that of torch's fused step, which reads four numbers and writes three per parameter. The call is the
    smallest one of torch, in microseconds.
    """
    numbers, side = 64 * 2**20, 2048
    # On huge pages, as fastmaf's weights: they are read faster.
    source, target = (empty_on_huge_pages(numbers, device=None, dtype=None).fill_(1.0) for _ in range(2))
    matrix, vector = source.view(-1, 8 * side), torch.ones(8 * side)
    read = min(_best(source.sum, 7), _best(lambda: torch.mv(matrix, vector), 7))
    copy = _best(lambda: target.copy_(source), 7)
    parameter = torch.nn.Parameter(source)
    parameter.grad = target
    adam = _best(torch.optim.Adam([parameter], fused=True).step, 7)
    a, b, c = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
    product = _best(lambda: torch.mm(a, b, out=c), 7)
    small = torch.zeros(1)
    calls = [seconds_once(lambda: [small.add_(1) for _ in range(1000)]) / 1000 for _ in range(8)]
    return {
        "read_gb_per_s": 4 * numbers / read / 1e9,
        "copy_gb_per_s": 8 * numbers / copy / 1e9,
        "adam_gb_per_s": 28 * numbers / adam / 1e9,
        "sgemm_gflop_per_s": 2 * side**3 / product / 1e9,
        "launch_us": statistics.median(calls) * 1e6,
    }


def cuda_limits() -> dict[str, float]:
    """Measures this GPU's copy rate (read and written), float32 matrix rate, and the time of an empty kernel in a
    graph, in the units of ``limits``.
    """
    numbers, side, kernels = 256 * 2**20, 4096, 200
    source, target = torch.rand(numbers, device="cuda"), torch.empty(numbers, device="cuda")
    copy = _best(lambda: target.copy_(source), 9, "cuda")
    a, b, c = (torch.randn(side, side, device="cuda") for _ in range(3))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    product = _best(lambda: torch.mm(a, b, out=c), 9, "cuda")
    torch.backends.cuda.matmul.allow_tf32 = before
    small, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    small.add_(1)
    with torch.cuda.graph(graph):
        for _ in range(kernels):
            small.add_(1)
    return {
        # Everything that is read or written, also by Adam, uses the same bus.
        **dict.fromkeys(("read_gb_per_s", "copy_gb_per_s", "adam_gb_per_s"), 8 * numbers / copy / 1e9),
        "sgemm_gflop_per_s": 2 * side**3 / product / 1e9,
        "launch_us": _best(graph.replay, 9, "cuda") / kernels * 1e6,
    }


def file_limits(megabytes: int = 256) -> dict[str, float]:
    """Measures the rates of writing and reading a file in GB/s, with the operating system's cache."""
    data = torch.rand(megabytes * 2**18).numpy()
    target = np.empty_like(data)
    target.fill(0)  # new pages would cost more than the copy

    def read() -> None:
        with open(path, "rb") as file:
            file.readinto(target.data)

    with tempfile.TemporaryDirectory(prefix="fastmaf-bench-") as folder:
        path = Path(folder, "file")
        write = _best(lambda: path.write_bytes(data.data), 3)
        mapped = np.memmap(path, dtype=data.dtype)
        best = min(_best(read, 3), _best(lambda: np.copyto(target, mapped), 3))  # the latter as in safetensors
    return {"write_file_gb_per_s": data.nbytes / write / 1e9, "read_file_gb_per_s": data.nbytes / best / 1e9}


def reset_peak(device: str) -> None:
    """Restarts the peak memory from the current one, where this is possible."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> Callable[[], int | None]:
    """Returns the function that returns this process's peak memory in bytes, on the GPU that which it allocated."""
    return peak_bytes if device == "cpu" else torch.cuda.max_memory_allocated


def peak_bytes() -> int | None:
    """Returns the peak of this process's resident memory; None where it is unknown."""
    # On Linux getrusage's peak is inherited from the parent process, which may be larger.
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
