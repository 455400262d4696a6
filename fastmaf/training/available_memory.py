"""Memory that this process can still allocate: free memory, container limits, resource limits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # version 1 of cgroups reports "no limit" as a larger number


def available_memory(device: torch.device) -> int | None:
    """Returns the bytes that this process can still allocate on a device, or None if that is unknown."""
    limits = list(_on_cuda(device) if device.type == "cuda" else _on_cpu())
    return max(0, min(limits)) if limits else None


def _on_cuda(device: torch.device) -> Iterator[int]:
    with contextlib.suppress(RuntimeError, AssertionError, ValueError):  # not reported by this driver or torch
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        unused = reserved - torch.cuda.memory_allocated(device)
        yield free + unused
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)
        if fraction is not None:
            yield int(fraction(device) * total) - reserved + unused


def _on_cpu() -> Iterator[int]:
    if (free := _table(_PROC / "meminfo").get("MemAvailable")) is not None:
        yield free
    with contextlib.suppress(OSError):
        for line in (_PROC / "self" / "cgroup").read_text().splitlines():
            yield from _in_cgroup(*line.split(":", 2))
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        process = _table(_PROC / "self" / "status")
        for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
            most = resource.getrlimit(limit)[0]
            if most != resource.RLIM_INFINITY and used in process:
                yield most - process[used]


def _in_cgroup(number: str, controllers: str, path: str) -> Iterator[int]:
    """Yields what is left of the memory limits of a control group (container) and of those that it is in."""
    if number == "0":
        root, names = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
    elif "memory" in controllers.split(","):
        root = _CGROUPS / "memory"
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    else:
        return
    group = root / path.lstrip("/")
    for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
        with contextlib.suppress(OSError, ValueError):  # a file is missing, or the limit is "max"
            limit, used = (int((folder / name).read_text()) for name in names[:2])
            if limit < _UNLIMITED:
                yield limit - used + _table(folder / "memory.stat").get(names[2], 0)  # the page cache is reclaimable


def _table(file: Path) -> dict[str, int]:
    """Parses lines of a name and a size, in bytes or kB, into sizes in bytes."""
    with contextlib.suppress(OSError):
        rows = (line.replace(":", " ").split() for line in file.read_text().splitlines())
        return {
            name: int(size[0]) * (1024 if size[1:] == ["kB"] else 1)
            for name, *size in filter(None, rows)
            if size and size[0].isdigit()
        }
    return {}
