"""Whether a training run fits into memory and on the disk, asked before anything large is allocated."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import fastmaf
from fastmaf.capsule.config import TrainConfig
from fastmaf.training.blas import allocate_work_buffers

# For what the estimate leaves out or misjudges: the images, batches to validate on, the curve, the allocator's gaps.
_RESERVE = 1.05
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroups of version 1 say "no limit" with a number above this


class DoesNotFitError(ValueError):
    """A training run needs more memory or disk than there is; the message says how much."""


def check_room(config: TrainConfig, device: torch.device, *, images: int, resume: bool = False) -> None:
    """Refuses a run that will not fit.

    Where it cannot be found out what is available, nothing is refused.

    Args:
        config: of the run.
        device: where it trains.
        images: how many there are to train on: no batch is larger.
        resume: it goes on from a checkpoint.

    Raises:
        DoesNotFitError: with the largest batch size that fits, or, where even one image does not, the largest number of
            blocks.
    """
    config = dataclasses.replace(config, batch_size=min(config.batch_size, images))
    available, needed = available_memory(device), needed_memory(config, device)
    if available is not None and needed <= available:
        # The estimate leaves out the buffers of the BLAS library: those are allocated now, and no longer available.
        allocate_work_buffers(_planned(config), config.batch_size, device=device)
        available = available_memory(device)
    if available is None or needed <= available:
        return
    hidden = ",".join(map(str, config.hidden_features))
    advice = _advice(config, device, available)
    if resume:
        advice = f"free memory, or start a new run in another --out, as --resume keeps the settings: {advice}"
    raise DoesNotFitError(
        f"training {config.blocks} blocks of {config.features:,} dimensions and hidden units {hidden} at batch size "
        f"{config.batch_size} needs about {in_bytes(needed)} on {device}, where {in_bytes(available)} are available; "
        f"{advice}"
    )


def _advice(config: TrainConfig, device: torch.device, available: int) -> str:
    def fits(blocks: int, batch_size: int) -> bool:
        smaller = dataclasses.replace(config, blocks=blocks, batch_size=batch_size)
        return needed_memory(smaller, device) <= available

    if batch := _largest(config.batch_size - 1, partial(fits, config.blocks)):
        return f"the largest batch that fits is --batch-size {batch}"
    for batch in (config.batch_size, 1):
        if blocks := _largest(config.blocks - 1, partial(fits, batch_size=batch)):
            return f"one image at a time does not fit either; at --batch-size {batch} the most is --blocks {blocks}"
    return "not even one block and one image fit: choose fewer --hidden units or a smaller --size"


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """Returns the largest number of 1..limit that fits, 0 if none does; what fits goes on fitting when smaller."""
    return bisect.bisect_left(range(1, limit + 1), True, key=lambda n: not fits(n))


def needed_memory(config: TrainConfig, device: torch.device) -> int:
    """Returns the bytes that a run will take on a device, with some reserve, aside from libraries' work buffers."""
    clips = config.max_grad_norm is not None
    estimate = fastmaf.memory_estimate(
        _planned(config), config.batch_size, update="clip" if clips else "minimize", device=device
    )
    return int(_RESERVE * estimate)


def _planned(config: TrainConfig) -> fastmaf.Flow:
    """Returns the flow of a run without its numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastmaf.ConnectivityWarning)  # it will come with the run itself
        return config.build(device="meta")


def disk_needed(config: TrainConfig) -> int:
    """Returns the bytes of a checkpoint, model and the optimiser's two moments: written before the last one goes."""
    flow = _planned(config)
    weights = sum(tensor.nbytes for tensor in flow.state_dict().values())
    return weights + 2 * sum(parameter.nbytes for parameter in flow.parameters())


def check_disk(out: Path, needed: int) -> None:
    """Refuses a run whose files will not fit on the disk beside those that they replace.

    Args:
        out: the folder; it exists.
        needed: bytes.

    Raises:
        DoesNotFitError: there is less room; says how much.
    """
    free = shutil.disk_usage(out).free
    if free < needed:
        raise DoesNotFitError(
            f"the files of the run take about {in_bytes(needed)} in {out}, where {in_bytes(free)} are free; what is "
            "there is replaced only after they are written. Free some room, or choose another --out"
        )


def in_bytes(size: int) -> str:
    """Returns a number of bytes for people: "1.23 GB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def available_memory(device: torch.device) -> int | None:
    """Returns the bytes that this process can still allocate on a device; None where that cannot be found out."""
    found = list(_on_cuda(device) if device.type == "cuda" else _on_cpu())
    return max(0, min(found)) if found else None


def _on_cuda(device: torch.device) -> Iterator[int]:
    with contextlib.suppress(RuntimeError, AssertionError, ValueError):  # a driver or a torch that does not say
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
    yield from _cgroup_rooms()
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        own = _table(_PROC / "self" / "status")
        for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
            most = resource.getrlimit(limit)[0]
            if most != resource.RLIM_INFINITY and used in own:
                yield most - own[used]


def _cgroup_rooms() -> Iterator[int]:
    """Yields what is left of the limit of every control group that this process is in, as in a container."""
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
                    yield limit - used + _table(folder / "memory.stat").get(names[2], 0)  # files' pages give way


def _number(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):  # not there, or "max"
        return int(file.read_text())
    return None


def _table(file: Path) -> dict[str, int]:
    """Reads lines of a name and a number of bytes or kB."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            name, *rest = line.replace(":", " ").split() or [""]
            if rest and rest[0].isdigit():
                found[name] = int(rest[0]) * (1024 if rest[1:] == ["kB"] else 1)
    return found
