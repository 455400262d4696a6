"""The machine a benchmark runs on: its name, its versions, and its limits as measured in the same process."""

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
    """Returns how much memory a device has free."""
    free: int = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]
    return free


def describe(device: str = "cpu") -> dict[str, str]:
    """Returns processor, thread count, versions and commit."""
    return {
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
        **{name: version for name in PEERS if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    if _git("ls-files", "--error-unmatch", Path(__file__).name) in ("", UNKNOWN):  # no checkout, or another one's
        return UNKNOWN
    return _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str:
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return found.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    details = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    return f"{name} (family {details.get('cpu family')}, model {details.get('model')}), {os.cpu_count()} cores"


def _huge_pages() -> str:
    """Returns who gets huge pages: always, madvise (whoever asks, as fastmaf does) or never."""
    with contextlib.suppress(OSError):
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return modes[modes.index("[") + 1 : modes.index("]")]
    return UNKNOWN


def reset_peak(device: str) -> None:
    """Lets the peak of memory start again from what is held now; does nothing where that cannot be."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


class Busy:
    """Tells what share of the processors' time other processes took since it was made."""

    def __init__(self) -> None:
        self._before = self._now()

    def _now(self) -> tuple[float, float, float]:
        every, own = psutil.cpu_times(), psutil.Process().cpu_times()
        busy = sum(getattr(every, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
        return time.monotonic(), busy, own.user + own.system

    def others(self) -> float:
        """Returns the share, 0 to 1; 0 after less than a tenth of a second, as the clock ticks in hundredths."""
        wall, every, own = (now - before for now, before in zip(self._now(), self._before, strict=True))
        return max(0.0, every - own) / (wall * (psutil.cpu_count() or 1)) if wall > 0.1 else 0.0


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
        # Whatever is read or written, by Adam too, goes over the same bus.
        **dict.fromkeys(("read_gb_per_s", "copy_gb_per_s", "adam_gb_per_s"), 8 * numbers / copy / 1e9),
        "sgemm_gflop_per_s": 2 * side**3 / product / 1e9,
        "launch_us": launch * 1e6,
    }


def clock(device: str) -> Callable[[Callable[[], object]], float]:
    """Returns what times one call on a device."""
    return seconds_once if device == "cpu" else cuda_seconds_once


def peak(device: str) -> Callable[[], int | None]:
    """Returns what tells the peak of memory of this process so far, in bytes: its own, or what it allocated on the
    GPU.
    """
    return peak_bytes if device == "cpu" else torch.cuda.max_memory_allocated


def limits() -> dict[str, float]:
    """Measures what nothing on this machine can beat: read, copy and fused Adam rates in GB/s, matrix rate in GFLOP/s,
    and the time of the smallest call of torch in microseconds.

    Adam's is that of torch's fused step: four numbers read and three written per parameter.
    """
    numbers, side = 64 * 2**20, 2048
    # On huge pages, which read faster: fastmaf's own weights lie on them too.
    source, target = (empty_on_huge_pages(numbers, device=None, dtype=None).fill_(1.0) for _ in range(2))
    matrix, vector = source.view(-1, 8 * side), torch.ones(8 * side)
    read = min(*seconds(source.sum, 7), *seconds(lambda: torch.mv(matrix, vector), 7))
    copy = min(seconds(lambda: target.copy_(source), 7))
    parameter = torch.nn.Parameter(source)
    parameter.grad = target
    optimizer = torch.optim.Adam([parameter], fused=True)
    adam = min(seconds(optimizer.step, 7))
    a, b, c = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
    product = min(seconds(lambda: torch.mm(a, b, out=c), 7))
    small = torch.zeros(1)
    launch = statistics.median(seconds(lambda: [small.add_(1) for _ in range(1000)], 7)) / 1000
    return {
        "read_gb_per_s": 4 * numbers / read / 1e9,
        "copy_gb_per_s": 8 * numbers / copy / 1e9,
        "adam_gb_per_s": 28 * numbers / adam / 1e9,
        "sgemm_gflop_per_s": 2 * side**3 / product / 1e9,
        "launch_us": launch * 1e6,
    }


def file_limits(megabytes: int = 256) -> dict[str, float]:
    """Measures at what rate a file is written and read, in GB/s, the operating system's cache included."""
    data = torch.rand(megabytes * 2**18).numpy()
    target = memoryview(bytearray(data.nbytes))
    held = np.frombuffer(target, dtype=np.uint8)

    def into() -> None:
        with open(path, "rb") as file:
            file.readinto(target)  # memory that is there already: new pages cost more than the copy

    with tempfile.TemporaryDirectory(prefix="fastmaf-bench-") as folder:
        path = Path(folder, "file")
        write = min(seconds(lambda: path.write_bytes(data.data), 3))
        mapped = np.memmap(path, dtype=np.uint8)
        read = min(*seconds(into, 3), *seconds(lambda: np.copyto(held, mapped), 3))  # the latter as safetensors does
    return {"write_file_gb_per_s": data.nbytes / write / 1e9, "read_file_gb_per_s": data.nbytes / read / 1e9}


def peak_bytes() -> int | None:
    """Returns the peak of this process's resident memory; None where the operating system does not tell."""
    # Linux hands getrusage's peak on from the process that started this one, so a large parent would hide all growth.
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        found = next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")), None)
        if found is not None:
            return found
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
