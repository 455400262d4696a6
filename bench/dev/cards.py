"""Rates and latencies of cards for ``predict``, with where they are from."""

from __future__ import annotations

from typing import NamedTuple

from fastmaf.bench.dev.disassembly import Instruction, Kind


class Card(NamedTuple):
    """A card.

    Attributes:
        name, arch, sms: name, compute capability and number of multiprocessors.
        hertz: its clock under load.
        dram: bytes per second of a copy, read and written.
        cache: bytes per second from the second-level cache.
        cache_size: bytes of that cache.
        launch_s: from one kernel of a graph to the next, an empty kernel's run included.
        shared: bytes of shared memory of a multiprocessor.
        warps: that a multiprocessor holds.
        latency: cycles until a result is there, of the classes of instructions whose results are waited for.
        near, far: cycles of a load that the second-level cache has, and of one that it does not have.
        cycles: of a multiprocessor's units for one instruction of a warp, by class. Accesses to memory take one for
            each 128 bytes.
        tensor: multiply-adds per cycle and multiprocessor of tensor units, in TF32.
    """

    name: str
    arch: int
    sms: int
    hertz: float
    dram: float
    cache: float
    cache_size: int
    launch_s: float
    shared: int
    warps: int
    latency: dict[Kind, int]
    near: int
    far: int
    cycles: dict[Kind, float]
    tensor: float = 0.0

    def units(self, one: Instruction) -> float:
        """Returns the cycles of a multiprocessor's units for one instruction of a warp."""
        if one.kind == "tensor":
            wide = 2.0 if "TF32" in one.opcode else 1.0
            shape = next((part for part in one.opcode.split(".") if part.isdigit()), "1688")
            products = {"1684": 512, "1688": 1024, "16816": 2048, "16832": 4096}.get(shape, 1024)
            return products * wide / 2 / self.tensor
        if one.size and one.kind != "load_local":
            return max(1.0, 32 * one.size / 128)
        return self.cycles.get(one.kind, 0.25)


# H100 SXM5. Measured on the card (bench/results/gpu-h100.csv): copy, time of a kernel in a graph. Latencies: Luo et
# al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking, 2024 (shared 29, second
# level 263, memory 479 cycles). Units of a multiprocessor: CUDA C++ Programming Guide, throughput of arithmetic
# instructions. Assumed: a clock of 1.75 GHz under load; 5.5 TB/s from the second level, as public microbenchmarks read
# it; mma.sync at some 60 % of the data sheet's dense rate; latencies of units that the paper leaves out.
H100 = Card(
    name="H100",
    arch=90,
    sms=132,
    hertz=1.75e9,
    dram=2.98e12,
    cache=5.5e12,
    cache_size=50 << 20,
    launch_s=1.03e-6,
    shared=227 << 10,
    warps=64,
    latency={
        "load_shared": 29,
        "shuffle": 23,
        "special": 23,
        "constant": 30,
        "barrier": 24,
        "double": 16,
        "tensor": 33,
    },
    near=263,
    far=479,
    cycles={"integer": 0.5, "special": 2.0, "double": 0.5, "shuffle": 1.0, "constant": 0.5},
    tensor=650.0,
)
# The same chip with faster memory: 4.8 TB/s on the data sheet, of which an H100 reaches 89 % in a copy.
H200 = H100._replace(name="H200", dram=4.27e12)
# GTX 1050 Ti. Data sheet: 112 GB/s, of which copies reach some 85 %; 1.39 GHz. Latencies and the second level's rate:
# Jia et al., Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking, 2018, for the P4, whose SMs
# are the same (shared 24, second level 216 cycles; 979 GB/s with twice the memory channels). Assumed: 450 cycles to
# memory, and 4 microseconds from one kernel of a graph to the next.
GTX_1050_TI = Card(
    name="GTX 1050 Ti",
    arch=61,
    sms=6,
    hertz=1.39e9,
    dram=0.85 * 112e9,
    cache=490e9,
    cache_size=1 << 20,
    launch_s=4e-6,
    shared=96 << 10,
    warps=64,
    latency={"load_shared": 24, "shuffle": 24, "special": 20, "constant": 30, "barrier": 30, "double": 48},
    near=216,
    far=450,
    cycles={"special": 1.0, "double": 8.0, "shuffle": 1.0, "constant": 0.5},
)
CARDS = {"h100": H100, "h200": H200, "gtx1050ti": GTX_1050_TI}
