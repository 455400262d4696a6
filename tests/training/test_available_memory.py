"""Memory that this process can still allocate, from files as Linux writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastmaf.training import available_memory as module
from fastmaf.training.available_memory import available_memory

CPU = torch.device("cpu")


class Machine:
    """A root folder for the files of /proc and /sys/fs/cgroup."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        monkeypatch.setattr(module, "_PROC", root / "proc")
        monkeypatch.setattr(module, "_CGROUPS", root / "cgroup")

    def write(self, name: str, text: object) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(f"{text}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_available_memory_of_the_system(machine: Machine) -> None:
    assert available_memory(CPU) is None
    machine.write("proc/meminfo", "MemTotal:  900 kB\nMemFree:  10 kB\nMemAvailable:     700 kB\n")
    assert available_memory(CPU) == 700 * 1024


def test_the_limit_of_a_container_of_cgroups_2(machine: Machine) -> None:
    machine.write("proc/meminfo", "MemAvailable: 700 kB")
    machine.write("proc/self/cgroup", "0::/jobs/one")
    machine.write("cgroup/jobs/one/memory.max", "max")
    machine.write("cgroup/jobs/one/memory.current", 100)
    machine.write("cgroup/jobs/memory.max", 5000)
    machine.write("cgroup/jobs/memory.current", 3000)
    machine.write("cgroup/jobs/memory.stat", "anon 7\ninactive_file 500\n\n")
    assert available_memory(CPU) == 2500
    machine.write("cgroup/jobs/memory.current", 9000)
    assert available_memory(CPU) == 0


def test_the_limit_of_a_container_of_cgroups_1(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/not/visible/here\n0::/")
    machine.write("cgroup/memory/memory.limit_in_bytes", 5000)
    machine.write("cgroup/memory/memory.usage_in_bytes", 4000)
    assert available_memory(CPU) == 1000
    machine.write("cgroup/memory/memory.limit_in_bytes", 9223372036854771712)
    assert available_memory(CPU) is None


def test_the_limit_of_the_process(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    machine.write("proc/self/status", "Name:\tpython\nVmSize:\t   3 kB\nVmData:\t  1 kB\n")
    limits = {resource.RLIMIT_AS: resource.RLIM_INFINITY, resource.RLIMIT_DATA: 3000}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], limits[which]))
    assert available_memory(CPU) == 3000 - 1024
    limits[resource.RLIMIT_AS] = 4000
    assert available_memory(CPU) == 4000 - 3 * 1024


def test_available_memory_of_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "mem_get_info", lambda device: (700, 1000))
    monkeypatch.setattr(cuda, "memory_reserved", lambda device: 200)
    monkeypatch.setattr(cuda, "memory_allocated", lambda device: 150)
    monkeypatch.setattr(cuda, "get_per_process_memory_fraction", lambda device: 0.5, raising=False)
    device = torch.device("cuda", 0)
    assert available_memory(device) == 500 - 150
    monkeypatch.setattr(cuda, "get_per_process_memory_fraction", lambda device: 1.0, raising=False)
    assert available_memory(device) == 700 + 50
    monkeypatch.delattr(cuda, "get_per_process_memory_fraction", raising=False)
    assert available_memory(device) == 700 + 50

    def silent(device: torch.device) -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(cuda, "mem_get_info", silent)
    assert available_memory(device) is None
