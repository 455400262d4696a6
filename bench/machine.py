"""The machine of a run: its name, its versions, its rates as measured in the same process, clocks and peak memory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from functools import partial
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
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # installed, perhaps below another project's checkout
        return UNKNOWN
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.check_output(command, cwd=root, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def _processor() -> str:
    with contextlib.suppress(OSError):
        info = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
        name = info.get("model name", platform.machine())
        return f"{name} (family {info.get('cpu family')}, model {info.get('model')}), {os.cpu_count()} cores"
    return platform.processor() or platform.machine()


def _huge_pages() -> str:
    """Returns which memory gets huge pages: always, madvise (on request, as by fastmaf) or never."""
    with contextlib.suppress(OSError):
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return modes.partition("[")[2].partition("]")[0]
    return UNKNOWN


def _cache_bytes() -> int:
    """Returns the size of the processor's largest cache, 0 where it is unknown."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)


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
    return partial(timeit.timeit, number=1) if device == "cpu" else cuda_seconds_once


def _best(call: Callable[[], object], repeats: int, device: str = "cpu") -> float:
    """Returns the shortest time of some calls, after one to warm up."""
    call()
    return min(clock(device)(call) for _ in range(repeats))


def limits() -> dict[str, float]:
    """Measures this machine's read, copy and fused Adam rates in GB/s, matrix rate in GFLOP/s, and the time of a call.

    The rates are those of arrays of 268 MB, the size of the published flow's weights. Where these fit in the cache,
    whose size in MB is returned as well, so do the weights of a flow that is called repeatedly.
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
    calls = timeit.repeat(partial(small.add_, 1), number=1000, repeat=8)
    return {
        "read_gb_per_s": 4 * numbers / read / 1e9,
        "copy_gb_per_s": 8 * numbers / copy / 1e9,
        "adam_gb_per_s": 28 * numbers / adam / 1e9,
        "sgemm_gflop_per_s": 2 * side**3 / product / 1e9,
        "launch_us": statistics.median(calls) / 1000 * 1e6,
        "cache_mb": _cache_bytes() / 1e6,
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
        "cache_mb": getattr(torch.cuda.get_device_properties(small.device), "L2_cache_size", 0) / 1e6,
    }


def file_limits(megabytes: int = 256) -> dict[str, float]:
    """Measures the rates of writing and reading a file in GB/s, with the operating system's cache."""
    data = torch.rand(megabytes * 2**18).numpy()
    target = np.ones_like(data)  # written: new pages would cost more than the copy
    with tempfile.TemporaryDirectory(prefix="fastmaf-bench-") as folder:
        path = Path(folder, "file")
        write = _best(lambda: path.write_bytes(data.data), 3)
        mapped = np.memmap(path, dtype=data.dtype)
        read = _best(lambda: np.copyto(target, mapped), 3)  # as in safetensors
    return {"write_file_gb_per_s": data.nbytes / write / 1e9, "read_file_gb_per_s": data.nbytes / read / 1e9}


def reset_peak(device: str) -> None:
    """Restarts the peak memory from the current one, where this is possible."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    """Returns this process's peak memory: resident on the CPU, allocated on the GPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    # On Linux getrusage's peak is inherited from the parent process, which may be larger.
    with contextlib.suppress(OSError, IndexError):
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
