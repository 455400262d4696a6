"""Reading machine code: a few lines as the disassembler prints them, and kernels that the library launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastmaf.kernels import dispatch

MISSING = next((why for op in dispatch.OPS if (why := dispatch.missing(op, "triton")) is not None), None)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
ROOT = Path(__file__).parents[3]

# A loop with an inner loop, each branching back; the last branch is never reached. Upper halves: a stall of 5, waiting
# for scoreboard 1, setting 0; and a stall of 2 alone.
NEW = """
	.target	sm_90a
.text._kernel:
	//## File "/somewhere/kernels/device.py", line 7 inlined at "/somewhere/kernels/linear.py", line 9
	//## File "/somewhere/kernels/linear.py", line 9
        /*0000*/                   LDG.E.128 R4, desc[UR6][R2.64] ;     /* 0x0000000000000000 */
                                                                        /* 0x002e0a0000000000 */
.L_x_1:
        /*0010*/              @!P0 LDS.64 R8, [R5] ;                    /* 0x0000000000000000 */
                                                                        /* 0x000fc40000000000 */
.L_x_2:
        /*0020*/                   FFMA R1, R2, R3, R1 ;                /* 0x0000000000000000 */
                                                                        /* 0x000fc40000000000 */
        /*0030*/              @!P1 BRA `(.L_x_2) ;                      /* 0x0000000000000000 */
                                                                        /* 0x000fc40000000000 */
        /*0040*/               @P0 BRA `(.L_x_1) ;                      /* 0x0000000000000000 */
                                                                        /* 0x000fc40000000000 */
        /*0050*/                   EXIT ;                               /* 0x0000000000000000 */
                                                                        /* 0x000fc40000000000 */
.L_x_3:
        /*0060*/                   BRA `(.L_x_3);                       /* 0x0000000000000000 */
                                                                        /* 0x000fc40000000000 */
"""
# One word of scheduling for three instructions: stalls of 6 and 0, the second issued together with the third, which
# stalls for 13 and sets scoreboard 2.
OLD = """
	.headerflags	@"EF_CUDA_64BIT_ADDRESS EF_CUDA_SM61"
.text._kernel:
                                                                        /* 0x%016x */
        /*0008*/                   MOV R1, c[0x0][0x20] ;               /* 0x4c98078000870001 */
        /*0010*/         {         IADD32I R0, R0, 0x7 ;                /* 0x1c00000000770000 */
        /*0018*/                   S2R R11, SR_TID.X         }
                                                                        /* 0xf0c800000217000b */
""" % ((0x7E6) | (0x7E0 << 21) | (0x74D << 42))


def test_instructions_and_their_scheduling() -> None:
    from fastmaf.bench.dev import machine_code

    code = machine_code.read(NEW)
    first, second = code.instructions[:2]
    assert (first.kind, first.size, first.guarded, first.lines) == (
        "load_global",
        16,
        False,
        ("device.py:7", "linear.py:9"),
    )
    assert (first.stall, first.sets, first.waits) == (5, (0,), (1,))
    assert (second.kind, second.size, second.guarded, second.stall, second.sets) == ("load_shared", 8, True, 2, ())
    assert [(one.stall, one.sets, one.waits) for one in machine_code.read(OLD).instructions] == [
        (6, (), ()),
        (0, (), ()),
        (13, (2,), ()),
    ]


def test_loops_nest_and_unreached_code_is_left_out() -> None:
    from fastmaf.bench.dev import machine_code

    code = machine_code.read(NEW)
    assert [(loop.blocks, loop.depth, loop.parent) for loop in code.loops] == [((1, 2, 3), 0, None), ((2,), 1, 0)]
    assert code.innermost() == [None, 0, 1, 0, None]
    assert [one.opcode for one in code.within(code.loops[1])] == ["FFMA", "BRA"]
    assert code.count(code.loops[0], "load_shared") == 1 and code.count(code.loops[0], "load_shared", 16) == 0
    assert sum(1 for _ in code.within()) == 6, "the branch to itself behind the end is padding"


@pytest.mark.parametrize(
    ("opcode", "kind", "size"),
    [
        ("LDG.E.128", "load_global", 16),
        ("LDG.E.U16", "load_global", 2),
        ("STS", "store_shared", 4),
        ("LDSM.16.M88.4", "load_shared", 16),
        ("LDS.U.64", "load_shared", 8),
        ("STL.128", "store_local", 16),
        ("LDGSTS.E.BYPASS.128", "copy_async", 16),
    ],
)
def test_accesses_to_memory(opcode: str, kind: str, size: int) -> None:
    from fastmaf.bench.dev import disassembly

    assert (disassembly.kind_of(opcode), disassembly.size_of(opcode)) == (kind, size)


_REPORT = """
import json, sys, torch
from fastmaf.bench.dev import machine_code, resources
import fastmaf
arch = int(sys.argv[1])
flow = fastmaf.MAF(101, 1, (37,), seed=0, validate_args=False)
launches = resources.recorded(arch, lambda: torch.no_grad()(flow.log_prob)(torch.zeros(1, 101)))
source = next(s for s in map(resources.source_of, launches) if s.kernel == "_affine_output_fwd_kernel")
code = machine_code.disassemble(resources.built(source, arch).asm["cubin"])
print(json.dumps({
    "registers": code.registers,
    "loops": [[loop.depth, loop.parent, list(loop.lines)] for loop in code.loops],
    "weights": code.count(code.loops[0], "load_global", 16),
    "float": code.count(code.loops[0], "float"),
    "integer": code.count(code.loops[0], "integer"),
    "local": code.count(None, "load_local") + code.count(None, "store_local"),
    "exits": sum(one.opcode == "EXIT" for one in code.within()),
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [61, 90])
def test_the_loop_of_a_real_kernel(arch: int, tmp_path: Path) -> None:
    """The product of one sample: a thread of 32 takes 64 of the 128 x 16 weights in an iteration."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", _REPORT, str(arch)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if arch == 61 and "no nvdisasm reads this kernel" in run.stderr:
        pytest.skip("no disassembler for Pascal is at hand: make test-all installs Triton 3.3.1")
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout)
    assert [loop[:2] for loop in found["loops"]] == [[0, None]]
    assert found["loops"][0][2][0].startswith("few_samples.py:")
    assert (found["weights"], found["float"], found["local"]) == (16, 64, 0)
    assert found["integer"] > 0 and found["exits"] > 0
    assert 32 <= found["registers"] <= 128
