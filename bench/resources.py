"""Compiles every Triton kernel ahead of time, for cards that need not be here, and reports what ptxas says of it.

    python -m fastmaf.bench.resources --arch 61 --arch 90

What is compiled is what the library would launch: training steps, densities and samples run on a card that is only
described (``triton_parts.recording``), of the reference model and of an odd small one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastmaf
from fastmaf.kernels.triton_common.device import Launched, recording

# Compute capability: multiprocessors of a card that has it, for the size of grids.
CARDS = {61: 6, 75: 40, 80: 108, 90: 132}
# One sample, and the smallest and largest tile of samples.
BATCHES = (1, 8, 64)
_TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Source(NamedTuple):
    """A kernel and what it is specialised for."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[int, ...]
    options: dict[str, int]


@dataclass(frozen=True)
class Report:
    """One compiled kernel.

    Attributes:
        kernel, arch, options: what was compiled, for which compute capability, and its constants.
        registers, spills, stack: of a thread; the last two in bytes.
        shared: bytes of a program.
        triton: the compiler's version.
    """

    kernel: str
    arch: int
    options: dict[str, Any]
    registers: int
    spills: int
    stack: int
    shared: int
    triton: str


def recorded(arch: int, use: Callable[[], object]) -> list[Launched]:
    """Returns what the library launches on a card while ``use`` runs."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills with NaN what nothing will write to
    try:
        with recording(arch, CARDS[arch]) as found, fastmaf.use_backend("triton"):
            use()
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return found.launches


def launches(arch: int, batches: Sequence[int]) -> list[Launched]:
    """Returns what the library launches on a card, in every mode."""

    def use() -> None:
        _use(fastmaf.MAF(12_288, 1, (512, 512), order="natural", init="empty", validate_args=False), batches)
        _use(fastmaf.MAF(101, 2, (37,), soft_bound=True, levels=9, seed=0, validate_args=False), (9,))

    return recorded(arch, use)


def _use(flow: fastmaf.MAF, batches: Sequence[int]) -> None:
    stored = flow.to_inference()
    for batch in batches:
        x = torch.zeros(batch, flow.features)
        flow.log_prob(x).sum().backward()
        flow.nll_per_dim(x)
        optimizer = fastmaf.optim.FusedAdam(flow.parameters())
        optimizer.zero_grad()
        optimizer.minimize(flow.log_prob(x).sum(), check_finite=False)  # nothing has values
        gradients = optimizer.capture_gradients(flow.log_prob(x.requires_grad_()).sum())
        gradients.squared_norm()
        optimizer.capture_step(gradients, optimizer.captured_updates())
        with torch.no_grad():
            for model in (flow, stored) if batch == batches[0] else (flow,):
                model.log_prob(x)
                model.sample(batch)


def sources(arch: int, batches: Sequence[int] = BATCHES) -> list[Source]:
    """Returns the distinct specialisations among ``launches``."""
    found = {repr(source): source for source in map(_source, launches(arch, batches))}
    return list(found.values())


def _source(launched: Launched) -> Source:
    names = launched.kernel.arg_names
    values = {**dict(zip(names, launched.args, strict=False)), **launched.options}
    options = {name: values.pop(name) for name in _OPTIONS if name in values}
    signature, constants, aligned = {}, {}, []
    for i, name in enumerate(names):
        value = values[name]
        if isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                aligned.append(i)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, int) and not isinstance(value, bool) and value != 1 and name.islower():
            signature[name] = "i32"
            if value % 16 == 0:
                aligned.append(i)
        else:
            signature[name], constants[name] = "constexpr", value
    return Source(
        launched.kernel.fn.__module__, launched.kernel.fn.__name__, signature, constants, tuple(aligned), options
    )


def compiled(source: Source, arch: int) -> Report:
    """Compiles for a compute capability, down to machine code."""
    kernel = getattr(importlib.import_module(source.module), source.kernel)
    attributes = {(i,): [["tt.divisibility", 16]] for i in source.aligned}
    result = triton.compile(
        ASTSource(kernel, source.signature, constexprs=source.constants, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options=source.options,
    )
    constants = {name: str(value) for name, value in source.constants.items() if name.isupper()}
    ptx = result.asm["ptx"]
    return Report(
        source.kernel, arch, {**constants, **source.options}, *_ptxas(ptx), result.metadata.shared, triton.__version__
    )


def _ptxas(ptx: str) -> tuple[int, int, int]:
    """Returns registers, bytes of spills and bytes of stack of a thread, as ptxas reports them."""
    arch = re.findall(r"^\.target (\w+)", ptx, re.M)[0]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        for tool in sorted(_TOOLS.glob("ptxas*")):  # Triton brings an older and a newer one, for different targets
            command = [str(tool), "-v", f"-arch={arch}", str(file), "-o", str(file.with_suffix(".cubin"))]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode == 0:
                break
        else:
            raise RuntimeError(f"no ptxas assembles this for {arch}: {run.stderr}")
    sizes = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    stack, stores, loads = map(int, sizes[0])
    return int(re.findall(r"Used (\d+) registers", run.stderr)[0]), stores + loads, stack


def report(archs: Sequence[int], batches: Sequence[int] = BATCHES, workers: int = 2) -> list[Report]:
    """Compiles everything for each of ``archs``, as batches of the given sizes of the reference model need it."""
    work = [(source, arch) for arch in archs for source in sources(arch, batches)]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(compiled, *zip(*work, strict=True)))


def main() -> None:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=CARDS, help="compute capability; all if left out")
    parser.add_argument(
        "--batch", type=int, action="append", help="batch sizes of the reference model; 1, 8, 64 if left out"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    reports = report(args.arch or list(CARDS), args.batch or BATCHES)
    if args.json:
        print(json.dumps([asdict(one) for one in reports]))
        return
    for one in reports:
        said = f"{one.registers:3d} registers {one.spills:4d} spilled {one.stack:4d} stack {one.shared:6d} shared"
        print(f"sm_{one.arch} {said}  {one.kernel} {' '.join(f'{k}={v}' for k, v in one.options.items())}")


if __name__ == "__main__":
    main()
