"""``fastmaf doctor``: versions, devices, and which backends are in use and why."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from types import SimpleNamespace

import pytest
import torch

import fastmaf
from fastmaf import doctor
from fastmaf.kernels import dispatch, native_library


def is_absent(backend: str) -> bool:
    """Whether this installation lacks the backend for some op."""
    try:
        with dispatch.use_backend(backend):
            return False
    except dispatch.BackendUnavailableError:
        return True


def section(name: str) -> list[str]:
    """The lines below a headline, up to the next empty one."""
    lines = doctor.report().splitlines()
    rest = lines[lines.index(name) + 1 :]
    return [line.strip() for line in rest[: rest.index("") if "" in rest else len(rest)]]


def test_it_names_versions() -> None:
    head = doctor.report().splitlines()
    assert head[0] == f"fastmaf {fastmaf.__version__}"
    assert platform.python_version() in head[1]
    versions = dict(line.split(maxsplit=1) for line in head[2 : head.index("")])
    assert {"torch", "triton", "numpy", "pillow", "matplotlib", "safetensors"} <= set(versions)
    assert versions["torch"] == importlib.metadata.version("torch")


def test_facts_are_json_and_those_of_the_report() -> None:
    facts, text = doctor.facts(), doctor.report()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["packages"]["torch"] == importlib.metadata.version("torch")
    assert facts["devices"]["cpu"]["threads"] == torch.get_num_threads()
    assert set(facts["backends"]["cpu"]) == set(dispatch.OPS)
    for op, backend in facts["backends"]["cpu"].items():
        assert [line.split()[-1] for line in text.splitlines() if line.split()[:2] == ["cpu", op]] == [backend]
    assert set(facts["unavailable"]) == {name for name in dispatch.names() if is_absent(name)}


def test_a_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert any(line.split() == ["triton", "not", "installed"] for line in doctor.report().splitlines())


def test_it_names_the_devices() -> None:
    cpu, *gpus = section("devices")
    assert cpu.startswith("cpu: ")
    assert f"torch uses {torch.get_num_threads()} thread" in cpu
    assert len(gpus) == max(1, torch.cuda.device_count())
    assert all(line.startswith("cuda") for line in gpus)


@pytest.mark.parametrize(
    ("built", "words"),
    [(None, "this torch is built without CUDA"), ("12.6", "built for CUDA 12.6, but found no usable GPU")],
)
def test_the_reason_for_no_gpu(monkeypatch: pytest.MonkeyPatch, built: str | None, words: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    assert any(words in line for line in section("devices"))


def test_it_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="GTX 1050 Ti", major=6, minor=1, total_memory=4 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    monkeypatch.setattr(dispatch, "default_backend", lambda op, like: "torch")
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    assert section("devices")[1] == "cuda:0: GTX 1050 Ti, compute capability 6.1, 4.0 GiB"
    (gpu,) = doctor.facts()["devices"]["cuda"]
    assert gpu == {"name": "GTX 1050 Ti", "compute_capability": "6.1", "memory_bytes": 4 * 2**30}


def test_it_describes_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "build_info", lambda: "avx2 (of avx2, baseline, scalar), g++ 12.2.0, -O3")
    assert section("native library") == [
        "avx2 (of avx2, baseline, scalar), g++ 12.2.0, -O3",
        f"threads: {torch.get_num_threads()}",
    ]


def test_it_describes_the_cost_of_a_missing_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_info() -> str:
        raise ImportError("it was not built; to build it: make native")

    monkeypatch.setattr(native_library, "build_info", build_info)
    why, cost = section("native library")
    assert why == "none: it was not built; to build it: make native"
    assert "slower" in cost


def test_it_names_the_backend_of_every_op_and_why_not_the_others() -> None:
    in_use = section("backend of each op")
    for op in dispatch.OPS:
        (line,) = [line for line in in_use if line.split()[:2] == ["cpu", op]]
        used = line.split()[-1]
        assert used in dispatch.names()
        assert not is_absent(used)
    absent = {name for name in dispatch.names() if is_absent(name)}
    if absent:
        reasons = section("backends that are not available")
        assert {line.split(":")[0] for line in reasons} == absent
        assert all(len(line.split(": ", 1)[1]) > 20 for line in reasons)


def test_the_reason_for_a_missing_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = dispatch.missing

    def without(op: str, backend: str) -> str | None:
        return "no compiler was found when fastmaf was installed" if backend == "native" else missing(op, backend)

    monkeypatch.setattr(dispatch, "missing", without)
    assert "native: no compiler was found when fastmaf was installed" in section("backends that are not available")
    assert not any(line.endswith("native") for line in section("backend of each op"))
