"""Instructions of a compiled kernel, as NVIDIA's disassembler prints them."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import triton

Kind: TypeAlias = Literal[
    "float", "double", "tensor", "special", "integer", "constant", "shuffle", "barrier", "branch",
    "load_global", "store_global", "copy_async", "load_shared", "store_shared", "load_local", "store_local",
]  # fmt: skip

# By the first word of an opcode; what is not here works on integers, predicates or registers.
_KINDS: dict[str, Kind] = {}
_NAMES: dict[Kind, str] = {
    "float": "FFMA FMUL FADD FFMA32I FMUL32I FADD32I",
    "double": "DADD DMUL DFMA DSETP",
    "tensor": "HMMA IMMA DMMA BMMA HGMMA QGMMA IGMMA",
    "special": "MUFU RRO F2F FRND F2I I2F I2I POPC FLO",
    "constant": "LDC ULDC",
    "shuffle": "SHFL REDUX CREDUX",
    "barrier": "BAR",
    "branch": "BRA BRX JMP SYNC BSYNC EXIT RET CALL BREAK BRK",
    "load_global": "LDG LD ATOM ATOMG",
    "store_global": "STG ST RED",
    "copy_async": "LDGSTS UBLKCP UTMALDG",
    "load_shared": "LDS LDSM ATOMS",
    "store_shared": "STS STSM",
    "load_local": "LDL",
    "store_local": "STL",
}
for _kind, _names in _NAMES.items():
    _KINDS |= dict.fromkeys(_names.split(), _kind)

_Boards: TypeAlias = tuple[int, ...]
_MEMORY = {"load_global", "store_global", "copy_async", "load_shared", "store_shared", "load_local", "store_local"}
_LABEL = re.compile(r"^(\.L_\w+|\$?[\w$]+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s*\{?\s*(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*)")
_WORD = re.compile(r"/\* (0x[0-9a-f]{16}) \*/")
_PLACE = re.compile(r'"([^"]+)", line (\d+)')


class Instruction(NamedTuple):
    """An instruction of a warp.

    Attributes:
        address: in bytes.
        opcode: with its modifiers, such as ``LDG.E.128``.
        kind: its class.
        guarded: whether a predicate decides if it is executed.
        size: bytes that a thread moves, of accesses to memory; else 0.
        target: address of the instruction to which it may branch, or None.
        stall: cycles before the warp's next instruction.
        sets: scoreboards that it sets until its result is there.
        holds: scoreboards that it sets until its operands are read.
        waits: scoreboards that it waits for.
        operands: as disassembled.
        lines: ``file.py:line`` of the source, the innermost call first; empty where nothing is known.
    """

    address: int
    opcode: str
    kind: Kind
    guarded: bool
    size: int
    target: int | None
    stall: int
    sets: tuple[int, ...]
    holds: tuple[int, ...]
    waits: tuple[int, ...]
    operands: str
    lines: tuple[str, ...]


def kind_of(opcode: str) -> Kind:
    """Returns the class of an opcode."""
    return _KINDS.get(opcode.split(".")[0], "integer")


def size_of(opcode: str) -> int:
    """Returns how many bytes a thread moves by an access to memory."""
    words = opcode.split(".")[1:]
    if "M88" in words or "MT88" in words:  # one, two or four matrices of 8 x 8 numbers of 16 bits
        return 4 * int(words[-1] if words[-1] in ("2", "4") else "1")
    for word in words:
        if word in ("32", "64", "96", "128"):
            return int(word) // 8
        if word in ("U8", "S8", "U16", "S16"):
            return int(word[1:]) // 8
    return 4


def run_tool(tool: str, options: list[str], cubin: bytes) -> str:
    """Returns the output of the first of Triton's tools that knows the architecture: newer ones forget old cards."""
    packages = [Path(triton.__file__).parent, *(Path(sys.prefix).glob("triton-*/triton"))]
    error = "none was found"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        for package in packages:
            if (program := package / "backends" / "nvidia" / "bin" / tool).exists():
                run = subprocess.run([str(program), *options, str(file)], capture_output=True, text=True)
                if run.returncode == 0:
                    return run.stdout
                error = run.stderr.strip()
    raise RuntimeError(f"no {tool} reads this kernel ({error}); the one of Triton 3.6 or older knows Pascal")


def parse(text: str) -> list[Instruction]:
    """Returns the instructions that ``nvdisasm -c -hex -gi`` printed."""
    words = [int(word, 16) for word in _WORD.findall(text)]  # in order of addresses, eight bytes each
    wide = not re.search(r"EF_CUDA_SM[56]\d", text)
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: list[str] = []  # labels of the next instruction
    targets: list[str | None] = []
    joins: dict[str, str] = {}  # by a barrier of divergent threads: where they join
    lines: list[str] = []
    last_was_line = False
    for line in text.splitlines():
        if match := _LABEL.match(line):
            pending.append(match[1])
        elif "//##" in line:
            if not last_was_line:
                lines = []
            lines += [f"{Path(file).name}:{number}" for file, number in _PLACE.findall(line)[:1]]
            last_was_line = True
            continue
        elif match := _INSTRUCTION.match(line):
            address, opcode, operands = int(match[1], 16), match[3], match[4]
            labels |= dict.fromkeys(pending, address)
            pending = []
            kind = kind_of(opcode)
            named = re.findall(r"\.L_\w+", operands)
            if opcode.startswith("BSSY") and named:
                joins[operands.split(",")[0].strip()] = named[0]
            if opcode.startswith("BSYNC") and not named:
                named = [joins[place] for place in joins if place in operands]
            targets.append(named[0] if kind == "branch" and named else None)
            scheduling = _scheduling(words, address, wide)
            size = size_of(opcode) if kind in _MEMORY else 0
            operands = re.split(r"\s*[;}]", operands)[0].strip()
            guarded = match[2] is not None
            found.append(Instruction(address, opcode, kind, guarded, size, None, *scheduling, operands, tuple(lines)))
        last_was_line = False
    return [
        one._replace(target=labels.get(target)) if target else one
        for one, target in zip(found, targets, strict=True)
    ]  # fmt: skip


def _scheduling(words: list[int], address: int, wide: bool) -> tuple[int, _Boards, _Boards, _Boards]:
    """Returns the stall, the scoreboards set, those held and those waited for.

    From Volta on they lie in the upper half of an instruction; before, one word holds those of the three after it.
    """
    fields = words[address // 8 + 1] >> 41 if wide else words[address // 32 * 4] >> 21 * (address % 32 // 8 - 1)
    sets, holds = ((one,) if one < 7 else () for one in (fields >> 5 & 7, fields >> 8 & 7))
    return fields & 15, sets, holds, tuple(i for i in range(6) if fields >> 11 + i & 1)
