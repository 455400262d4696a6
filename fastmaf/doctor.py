"""The report of ``fastmaf doctor``: versions, devices, and the backend of each op."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import fastmaf
from fastmaf.kernels import dispatch, native_library

_PACKAGES = ("torch", "triton", "numpy", "pillow", "scikit-learn", "matplotlib", "safetensors")


def report() -> str:
    """Returns versions, devices, the backend of each op, and why other backends are unavailable, as text."""
    lines = [f"fastmaf {fastmaf.__version__}", f"python  {platform.python_version()} on {platform.platform()}"]
    lines += [f"{name:<13} {_version(name)}" for name in _PACKAGES]
    lines += ["", "devices", *(f"  {line}" for line in _devices())]
    lines += ["", "native library", *(f"  {line}" for line in _native()), "", "backends"]
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for op in dispatch.OPS:
            lines.append(f"  {device:<5} {op:<14} → {dispatch.default_backend(op, torch.empty(0, device=device))}")
    missing: dict[str, None] = {}
    for name in dispatch.names():
        for op in dispatch.OPS:
            reason = dispatch.missing(op, name)
            if reason is not None:  # the same for every op, but for its name
                missing.setdefault(f"  {name}: {reason.replace(f' for {op}', '').replace(f' of {op}', '')}")
    return "\n".join([*lines, *(["", "not in use", *missing] if missing else [])])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _native() -> list[str]:
    try:
        info = native_library.build_info()
    except ImportError as error:
        return [f"none: {error}", "without it the ops run on the CPU as plain torch (backend 'torch'): slower"]
    return [info, f"threads: {1 if 'no OpenMP' in info else torch.get_num_threads()}"]


def _devices() -> list[str]:
    lines = [f"cpu: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"]
    if not torch.cuda.is_available():
        built = torch.version.cuda and f"torch is built for CUDA {torch.version.cuda}, but found no usable GPU"
        return [*lines, f"cuda: {built or 'this torch is built without CUDA'}"]
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        capability = f"compute capability {card.major}.{card.minor}"
        lines.append(f"cuda:{i}: {card.name}, {capability}, {card.total_memory / 2**30:.1f} GiB")
    return lines
