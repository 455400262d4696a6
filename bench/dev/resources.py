"""Compiles every Triton kernel ahead of time, also for cards that are not available, and reports its resources.

    python -m fastmaf.bench.dev.resources --arch 61 --arch 90

The kernels are those that the library would launch: training steps, densities and samples of the published run's model
and of an odd small one run on a card that is only described (``triton_common.device.recording``).
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
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastmaf
from fastmaf.bench.dev import proofs
from fastmaf.kernels.triton_common.device import Launched, recording
from fastmaf.kernels.triton_common.launch_table import Precision
from fastmaf.training.captured_updates import CapturedUpdates

# Compute capability: number of multiprocessors of a card, for the size of grids.
CARDS = {61: 6, 75: 40, 80: 108, 90: 132}
BATCHES = (1, 8, 64)  # one sample, and the smallest and largest tile of samples
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.uint8: "u8"}
_TYPES |= {torch.int32: "i32", torch.int64: "i64"}
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "launch_pdl")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Source(NamedTuple):
    """A kernel and its specialisation."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[int, ...]
    options: dict[str, int]


def published_flow(blocks: int) -> fastmaf.MAF:
    """Returns a flow of the published run's size, for recording alone: its weights have no values."""
    options: dict[str, Any] = {"order": "natural", "log_scale_bound": 5.0, "soft_bound": False}
    return fastmaf.MAF(12_288, blocks, (512, 512), init="empty", validate_args=False, **options)


def recorded(arch: int, use: Callable[[], object]) -> list[Launched]:
    """Returns what the library launches on a card while ``use`` runs."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        with recording(arch, CARDS[arch]) as launches, fastmaf.use_backend("triton"):
            use()
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return launches


def arguments(launched: Launched) -> dict[str, Any]:
    """Returns the arguments and options of a launch by name."""
    return dict(zip(launched.kernel.arg_names, launched.args, strict=False)) | launched.options


def sources(arch: int, batches: Sequence[int], precisions: Sequence[Precision] = ("ieee",)) -> list[Source]:
    """Returns the distinct specialisations that the library launches on a card in every mode; of precisions after the
    first, only what they change: kernels of matrix products.
    """

    def use() -> None:
        _use(published_flow(blocks=1), batches)
        _use(fastmaf.MAF(101, 2, (37,), levels=9, seed=0, validate_args=False), (9,))

    found: dict[str, Source] = {}
    for precision in precisions:
        with fastmaf.use_precision(precision):
            launched = list(map(source_of, recorded(arch, use)))
        products = [one for one in launched if one.constants.get("PRECISION") and not one.constants["LANES"]]
        found |= {repr(one): one for one in (products if found else launched)}
    return list(found.values())


def _use(flow: fastmaf.MAF, batches: Sequence[int]) -> None:
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.zero_()  # float8 weights must be finite
    stored = [flow.to_inference(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn)]
    for batch in batches:
        x = torch.zeros(batch, flow.features)
        flow.log_prob(x).sum().backward()
        flow.nll_per_dim(x)
        optimizer = fastmaf.optim.FusedAdam(flow.parameters())
        optimizer.zero_grad()
        optimizer.minimize(flow.log_prob(x).sum(), check_finite=False)  # the tensors have no values
        updates = CapturedUpdates(optimizer)
        gradients = updates.gradients(flow.log_prob(x.requires_grad_()).sum())
        gradients.squared_norm()
        updates.step(gradients)
        with torch.no_grad():
            for model in stored:
                model.log_prob(x)
            for model in (flow, *stored) if batch == batches[0] else (flow,):
                model.log_prob(x)
                model.sample(batch)


def source_of(launched: Launched) -> Source:
    """Returns the kernel and specialisation of a launch."""
    values = arguments(launched)
    options = {name: values.pop(name) for name in _OPTIONS if name in values}
    signature, constants, aligned = {}, {}, []
    for i, name in enumerate(launched.kernel.arg_names):
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
    function = launched.kernel.fn
    return Source(function.__module__, function.__name__, signature, constants, tuple(aligned), options)


def built(source: Source, arch: int) -> Any:
    """Returns what Triton compiles a kernel to: ``asm`` holds every form, ``metadata`` its shared memory."""
    kernel = getattr(importlib.import_module(source.module), source.kernel)
    attributes = {(i,): [["tt.divisibility", 16]] for i in source.aligned}
    specialised = ASTSource(kernel, source.signature, constexprs=source.constants, attrs=attributes)
    return triton.compile(specialised, target=GPUTarget("cuda", arch, 32), options=source.options)


def compiled(source: Source, arch: int) -> dict[str, Any]:
    """Compiles a kernel to machine code.

    Returns:
        Its name, compute capability and constants, the version of Triton, registers and bytes of spills and stack per
        thread, bytes of shared memory per program, and the counts of ``proofs``.
    """
    result = built(source, arch)
    names = [name for name, type_ in source.signature.items() if type_ != "constexpr"]
    constants = {name: str(value) for name, value in source.constants.items() if name.isupper()}
    return {
        "kernel": source.kernel,
        "arch": arch,
        "options": constants | source.options,
        **_ptxas(result.asm["ptx"]),
        "shared": result.metadata.shared,
        **proofs.counts(result, names, bool(source.options.get("launch_pdl"))),
        "triton": triton.__version__,
    }


def _ptxas(ptx: str) -> dict[str, int]:
    """Returns registers, bytes of spills and bytes of stack per thread, as reported by ptxas."""
    arch = re.findall(r"^\.target (\w+)", ptx, re.M)[0]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        for tool in sorted(_TOOLS.glob("ptxas*")):  # Triton has an older and a newer one, for different targets
            command = [str(tool), "-v", f"-arch={arch}", str(file), "-o", str(file.with_suffix(".cubin"))]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode == 0:
                break
        else:
            raise RuntimeError(f"no ptxas assembles a kernel for {arch}: {run.stderr}")
    sizes = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    stack, stores, loads = map(int, sizes[0])
    registers = re.findall(r"Used (\d+) registers", run.stderr)[0]
    return {"registers": int(registers), "spills": stores + loads, "stack": stack}


def main() -> None:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=CARDS, help="compute capability (default: all)")
    parser.add_argument("--batch", type=int, action="append", help="batch sizes (default: 1, 8, 64)")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="of matrix products")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    work = []
    for arch in args.arch or CARDS:
        precisions = args.precision or PRECISIONS
        available = [one for one in precisions if one == "ieee" or arch >= 80]  # the others need matrix units
        work += [(source, arch) for source in sources(arch, args.batch or BATCHES, available)]
    with ProcessPoolExecutor(2) as pool:
        reports = list(pool.map(compiled, *zip(*work, strict=True)))
    if args.json:
        print(json.dumps(reports))
        return
    for r in reports:
        resources = "{registers:3d} registers {spills:4d} spilled {stack:4d} stack {shared:6d} shared".format_map(r)
        faults = "{narrow:2d} narrow {converted} converted {ways:2d} ways {barriers:2d} barriers".format_map(r)
        options = " ".join(f"{name}={value}" for name, value in r["options"].items())
        print(f"sm_{r['arch']} {resources} {faults} {r['early']} early  {r['kernel']} {options}")


if __name__ == "__main__":
    main()
