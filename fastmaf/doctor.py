"""The report of ``fastmaf doctor``: versions, devices, and the backend of each op."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

import fastmaf
from fastmaf.io.wording import count
from fastmaf.kernels import dispatch, native_library

_PACKAGES = ("torch", "triton", "numpy", "pillow", "scikit-learn", "matplotlib", "safetensors")


def facts() -> dict[str, Any]:
    """Returns what ``report`` shows, as JSON types; what is missing is None."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    unavailable: dict[str, list[str]] = {}
    for name in dispatch.names():
        for op in dispatch.OPS:
            reason = dispatch.missing(op, name)
            if reason is None:
                continue
            text = reason.replace(f" for {op}", "").replace(f" of {op}", "")  # the same for every op, but for its name
            if text not in unavailable.setdefault(name, []):
                unavailable[name].append(text)
    return {
        "fastmaf": fastmaf.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": {
            "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
            "cuda": _gpus(),
            "cuda_of_torch": torch.version.cuda,
        },
        "native_library": _native(),
        "backends": {
            device: {op: dispatch.default_backend(op, torch.empty(0, device=device)) for op in dispatch.OPS}
            for device in devices
        },
        "unavailable": unavailable,
    }


def report() -> str:
    """Returns versions, devices, the backend of each op, and why other backends are unavailable, as text."""
    known = facts()
    cpu, native, missing = known["devices"]["cpu"], known["native_library"], known["unavailable"]
    lines = [f"fastmaf {known['fastmaf']}", f"python  {known['python']} on {known['platform']}"]
    lines += [f"{name:<13} {version or 'not installed'}" for name, version in known["packages"].items()]
    lines += ["", "devices", f"  cpu: {cpu['cores']} cores, torch uses {count(cpu['threads'], 'thread')}"]
    lines += [f"  {line}" for line in _gpu_lines(known["devices"])]
    lines += ["", "native library"]
    if native["build"] is None:
        lines += [f"  none: {native['error']}", "  ops run on the CPU as plain torch (backend 'torch') instead: slower"]
    else:
        lines += [f"  {native['build']}", f"  threads: {native['threads']}"]
    lines += ["", "backend of each op"]
    lines += [
        f"  {device:<5} {op:<14} → {name}" for device, ops in known["backends"].items() for op, name in ops.items()
    ]
    reasons = [f"  {name}: {reason}" for name, texts in missing.items() for reason in texts]
    return "\n".join([*lines, *(["", "backends that are not available", *reasons] if reasons else [])])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _native() -> dict[str, Any]:
    try:
        build = native_library.build_info()
    except ImportError as error:
        return {"build": None, "threads": None, "error": str(error)}
    return {"build": build, "threads": torch.get_num_threads(), "error": None}


def _gpus() -> list[dict[str, Any]]:
    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(i)
        capability = f"{card.major}.{card.minor}"
        gpus.append({"name": card.name, "compute_capability": capability, "memory_bytes": card.total_memory})
    return gpus


def _gpu_lines(devices: dict[str, Any]) -> list[str]:
    if not devices["cuda"]:
        built = devices["cuda_of_torch"]
        missing = f"torch is built for CUDA {built}, but found no usable GPU"
        return [f"cuda: {missing if built else 'this torch is built without CUDA'}"]
    lines = []
    for i, gpu in enumerate(devices["cuda"]):
        capability, memory = gpu["compute_capability"], gpu["memory_bytes"] / 2**30
        lines.append(f"cuda:{i}: {gpu['name']}, compute capability {capability}, {memory:.1f} GiB")
    return lines
