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
    assert {"torch", doctor.triton_package(), "numpy", "pillow", "matplotlib", "safetensors"} <= set(versions)
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
        if name == doctor.triton_package():
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert any(line.split() == [doctor.triton_package(), "not", "installed"] for line in doctor.report().splitlines())


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


# What torch's wheels list: of CUDA 12.6, of CUDA 13, and of a source build for one card and all newer ones.
CUDA_12_6 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
WITH_PTX = ("sm_60", "compute_60")


def fake_card(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    architectures: tuple[str, ...],
    *,
    triton: str | None = "3.3.1",
    system: str = "Linux",
    cuda: str | None = "12.6",
) -> None:
    """Lets the doctor see a card, a torch and a Triton that are not here."""
    card = SimpleNamespace(name="GTX 1050 Ti", major=capability[0], minor=capability[1], total_memory=4 * 2**30)
    installed = {"triton-windows" if system == "Windows" else "triton": triton}

    def version(name: str) -> str:
        found = installed.get(name) if "triton" in name else "1.0"
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(architectures))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(dispatch, "default_backend", lambda op, like: "torch")
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(platform, "system", lambda: system)


def test_it_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_card(monkeypatch, (6, 1), CUDA_12_6)
    assert section("devices")[1:] == [
        "cuda:0: GTX 1050 Ti, compute capability 6.1, 4.0 GiB",
        "torch has kernels for it",
    ]
    devices = doctor.facts()["devices"]
    assert devices["architectures_of_torch"] == list(CUDA_12_6)
    [gpu] = devices["cuda"]
    memory = 4 * 2**30
    card = {"name": "GTX 1050 Ti", "compute_capability": "6.1", "memory_bytes": memory}
    assert gpu == card | {"code_of_torch": "binary"}


@pytest.mark.parametrize(
    ("capability", "architectures", "form"),
    [
        ((6, 1), CUDA_12_6, "binary"),  # code for 6.0
        ((6, 1), ("sm_61",), "binary"),
        ((6, 0), ("sm_61",), None),  # not for an older one
        ((6, 1), CUDA_13, None),
        ((8, 9), CUDA_13, "binary"),
        ((9, 0), ("sm_90a",), "binary"),
        ((10, 3), ("sm_100",), "binary"),
        ((10, 3), ("sm_100a",), None),  # exactly 10.0
        ((10, 3), ("sm_100f",), "binary"),  # the family
        ((12, 0), CUDA_12_6, None),
        ((12, 0), WITH_PTX, "ptx"),
        ((6, 1), WITH_PTX, "binary"),
        ((5, 2), WITH_PTX, None),
        ((9, 0), ("gfx90a",), None),
        ((9, 0), (), None),
    ],
)
def test_which_code_runs_on_a_card(
    capability: tuple[int, int], architectures: tuple[str, ...], form: str | None
) -> None:
    assert doctor.code_for(capability, architectures) == form


def test_a_torch_without_pascal(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_card(monkeypatch, (6, 1), CUDA_13, triton="3.9.0", cuda="13.0")
    assert section("devices")[2:] == [
        "torch has no kernels for it, only for sm_75, sm_80, sm_86, sm_90, sm_100, sm_120",
        "CUDA 12.6 builds up to torch 2.10 have: pip install torch==2.7.1 --index-url "
        "https://download.pytorch.org/whl/cu126",
        "the last Triton for Pascal is 3.3.1: pip install triton==3.3.1",
    ]


def test_pascal_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_card(monkeypatch, (6, 1), CUDA_12_6, triton=None, system="Windows")
    assert section("devices")[2:] == [
        "torch has kernels for it",
        "the last Triton for Pascal is 3.3.1: pip install triton-windows==3.3.1.post19",
    ]
    fake_card(monkeypatch, (6, 1), CUDA_12_6, triton="3.3.1.post19", system="Windows")
    assert section("devices")[2:] == ["torch has kernels for it"]
    packages = doctor.facts()["packages"]
    assert packages["triton-windows"] == "3.3.1.post19" and "triton" not in packages


def test_a_newer_card_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_card(monkeypatch, (8, 6), CUDA_13, triton=None, system="Windows", cuda="13.0")
    assert section("devices")[2:] == [
        "torch has kernels for it",
        "fastmaf's own kernels need Triton: pip install triton-windows",
    ]


def test_a_card_newer_than_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_card(monkeypatch, (12, 0), CUDA_12_6, triton="3.6.0")
    assert section("devices")[3:] == ["a newer torch may have: pip install --upgrade torch"]
    fake_card(monkeypatch, (12, 0), WITH_PTX, triton="3.6.0")
    (only,) = section("devices")[2:]
    assert "only PTX" in only and "first used" in only


def test_a_card_older_than_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_card(monkeypatch, (5, 2), CUDA_12_6, triton=None)
    assert section("devices")[2:] == [
        "torch has kernels for it",
        "fastmaf's own kernels need compute capability 6.1 or newer: ops run as plain torch",
    ]


def test_a_card_of_another_make(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_card(monkeypatch, (9, 0), ("gfx90a",), cuda=None)
    assert len(section("devices")) == 2


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
