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
    system = _table(_PROC / "meminfo")
    if "MemAvailable" in system:
        yield system["MemAvailable"]
    yield from _cgroup_limits()
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        process = _table(_PROC / "self" / "status")
        for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
            most = resource.getrlimit(limit)[0]
            if most != resource.RLIM_INFINITY and used in process:
                yield most - process[used]


def _cgroup_limits() -> Iterator[int]:
    """Yields what is left of the memory limit of each control group of this process (containers)."""
    with contextlib.suppress(OSError):
        for line in (_PROC / "self" / "cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                root, names = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                root = _CGROUPS / "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            group = root / path.lstrip("/")
            for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
                limit, used = (_number(folder / name) for name in names[:2])
                if limit is not None and used is not None and limit < _UNLIMITED:
                    yield (
                        limit - used + _table(folder / "memory.stat").get(names[2], 0)
                    )  # the page cache is reclaimable


def _number(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):  # missing, or "max"
        return int(file.read_text())
    return None


def _table(file: Path) -> dict[str, int]:
    """Parses lines of a name and a size, in bytes or kB, into sizes in bytes."""
    sizes: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            name, *rest = line.replace(":", " ").split() or [""]
            if rest and rest[0].isdigit():
                sizes[name] = int(rest[0]) * (1024 if rest[1:] == ["kB"] else 1)
    return sizes
