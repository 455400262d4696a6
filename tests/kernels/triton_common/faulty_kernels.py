"""Small kernels with and without the faults that ``bench.dev.proofs`` counts; run as a module, it prints the counts.

A process of its own compiles them: where the tests run, Triton may interpret kernels.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
import triton.language as tl

from fastmaf.bench.dev import machine_code
from fastmaf.bench.dev.resources import Source, built, compiled
from fastmaf.kernels.triton_common import overlap

POINTERS = {"x_ptr": "*fp32", "w_ptr": "*fp32", "y_ptr": "*fp32"}  # the first three arguments, whatever their names


@triton.jit
def loads(x_ptr, w_ptr, y_ptr, n, STRIDE: tl.constexpr):
    """Rows that start at multiples of 16 bytes, or do not."""
    j, k = tl.arange(0, 16), tl.arange(0, 64)
    y = tl.zeros([64, 16], tl.float32)
    for start in range(0, n):
        y += tl.load(w_ptr + (start * 64 + k)[:, None] * STRIDE + j[None, :])
    tl.store(y_ptr + k[:, None] * 16 + j[None, :], y)


@triton.jit
def layouts(x_ptr, w_ptr, y_ptr, n, TURN: tl.constexpr):
    """A tile stored as it was loaded, or turned: within a loop, or once after it."""
    j, k = tl.arange(0, 16), tl.arange(0, 64)
    y = tl.zeros([64, 16], tl.float32)
    for start in range(0, n):
        w = tl.load(w_ptr + (start * 64 + k)[:, None] * 16 + j[None, :])
        if TURN == "within":
            tl.store(y_ptr + start * 1024 + k[:, None] + j[None, :] * 64, 2.0 * w)
        else:
            y += w
    if TURN == "after":
        tl.store(y_ptr + k[:, None] + j[None, :] * 64, y)
    else:
        tl.store(y_ptr + k[:, None] * 16 + j[None, :], y)


@triton.jit
def operands(x_ptr, w_ptr, y_ptr, n, TRANSPOSED: tl.constexpr):
    """A product with a right operand that is stored row by row, or transposed."""
    i, j, k = tl.arange(0, 16), tl.arange(0, 64), tl.arange(0, 32)
    y = tl.zeros([16, 64], tl.float32)
    for start in range(0, n * 32, 32):
        x = tl.load(x_ptr + i[:, None] * 4096 + (start + k)[None, :])
        if TRANSPOSED:
            w = tl.trans(tl.load(w_ptr + j[:, None] * 4096 + (start + k)[None, :]))
        else:
            w = tl.load(w_ptr + (start + k)[:, None] * 64 + j[None, :])
        y = tl.dot(x, w, y, input_precision="ieee")
    tl.store(y_ptr + i[:, None] * 64 + j[None, :], y)


@triton.jit
def waits(x_ptr, w_ptr, y_ptr, n, WITHIN: tl.constexpr, AROUND: tl.constexpr):
    """Two loops, one in the other, with barriers of their own."""
    k = tl.arange(0, 128)
    for outer in range(0, n):
        for _ in tl.static_range(AROUND):
            tl.store(y_ptr + k, tl.load(x_ptr + k + outer))
            tl.debug_barrier()
        for inner in range(0, n):
            for _ in tl.static_range(WITHIN):
                tl.store(y_ptr + k, tl.load(y_ptr + (k + inner) % 128) + 1.0)
                tl.debug_barrier()


@triton.jit
def resources(x_ptr, w_ptr, y_ptr, n, SIZE: tl.constexpr):
    """A product that fits into registers and shared memory, or does not."""
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    y = tl.zeros([SIZE, SIZE], tl.float32)
    for start in range(0, n):
        y = tl.dot(tl.load(x_ptr + start + at), tl.load(w_ptr + start + at), y, input_precision="ieee")
    tl.store(y_ptr + at, y)


@triton.jit
def starts(items_ptr, x_ptr, y_ptr, n, FAULT: tl.constexpr):
    """Starts before the kernels ahead of it have ended; does too much before it waits for them, or does not wait."""
    k = tl.arange(0, 128)
    at = tl.load(items_ptr + tl.program_id(0)).to(tl.int32) + k
    if FAULT == "loads":
        x = tl.load(x_ptr + at)
    if FAULT == "loads where a table says":
        x = tl.load((tl.load(items_ptr + 1).to(tl.int64) + at).to(tl.pointer_type(tl.float32)))
    if FAULT == "stores":
        tl.store(y_ptr + at, 0.0)
    if FAULT == "adds":
        tl.atomic_add(y_ptr + at, 1.0)
    if FAULT == "loads from one of two":
        x = tl.load(tl.where(n > 5, items_ptr.to(tl.int64), x_ptr.to(tl.int64)).to(tl.pointer_type(tl.float32)) + k)
    if FAULT == "waits in a loop":
        for _ in range(n):
            overlap.wait(True)
    overlap.prefetch(x_ptr, tl.max(at, 0), n, True)
    if FAULT == "does not always wait":
        if n > 5:
            overlap.wait(True)
    elif FAULT != "never waits" and FAULT != "waits in a loop":
        overlap.wait(True)
    if FAULT != "loads" and FAULT != "loads where a table says" and FAULT != "loads from one of two":
        x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x)


# What each kernel is compiled with.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "aligned": (loads, {"STRIDE": 16}),
    "unaligned": (loads, {"STRIDE": 17}),
    "as loaded": (layouts, {"TURN": "no"}),
    "turned after": (layouts, {"TURN": "after"}),
    "turned within": (layouts, {"TURN": "within"}),
    "row by row": (operands, {"TRANSPOSED": False}),
    "transposed": (operands, {"TRANSPOSED": True}),
    "few barriers": (waits, {"WITHIN": 1, "AROUND": 2}),
    "many barriers": (waits, {"WITHIN": 7, "AROUND": 2}),
    "small": (resources, {"SIZE": 32}),
    "large": (resources, {"SIZE": 64}),
}
# Only Hopper has kernels that start early.
LOADS = ("loads", "loads where a table says", "loads from one of two")
FAULTS = ("nothing", *LOADS, "stores", "adds", "does not always wait", "never waits", "waits in a loop")
CASES_90 = {fault: (starts, {"FAULT": fault}) for fault in FAULTS}
# Registers of a thread, at most: too few for a large product.
MAXNREG = 64


def main() -> None:
    """Prints the counts of each case for the architecture that is named."""
    found = {}
    for name, (kernel, constants) in (CASES | (CASES_90 if sys.argv[1] == "90" else {})).items():
        pointers = dict(zip(kernel.arg_names, POINTERS.values(), strict=False))
        signature = pointers | {"n": "i32"} | dict.fromkeys(constants, "constexpr")
        options: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "maxnreg": MAXNREG}
        if kernel is starts:
            options["launch_pdl"] = True
        function = kernel.fn
        source = Source(function.__module__, function.__name__, signature, constants, (0, 1, 2, 3), options)
        found[name] = compiled(source, int(sys.argv[1]))
        if kernel is loads:
            code = machine_code.disassemble(built(source, int(sys.argv[1])).asm["cubin"])
            found[name]["wide"] = code.count(None, "load_global", 16)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
