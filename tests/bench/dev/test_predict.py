"""The model of kernels: trip counts, addresses, chains; and what it predicts from the library's own launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmaf.kernels import dispatch

MISSING = next((why for op in dispatch.OPS if (why := dispatch.missing(op, "triton")) is not None), None)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
ROOT = Path(__file__).parents[3]

# For each program: a loop to a bound in a table, with a branch in it; then a loop that halves the program's number.
# Both loops' bodies call their values %t.
TTIR = """
#loc1 = loc("/somewhere/kernel.py":5:7)
#loc2 = loc("/somewhere/called.py":8:1)
#loc3 = loc("rows"(#loc1))
#loc4 = loc(callsite(#loc2 at #loc3))
module {
  tt.func public @kernel(%table: !tt.ptr<i32> loc("table"(#loc1)), %n: i32 loc("n"(#loc1))) {
    %c0 = arith.constant 0 : i32 loc(#loc1)
    %c-1_i32 = arith.constant -1 : i32 loc(#loc1)
    %c1 = arith.constant 1 : i32 loc(#loc1)
    %c2 = arith.constant 2 : i32 loc(#loc1)
    %cst = arith.constant dense<1.000000e+00> : tensor<8xf32> loc(#loc1)
    %pid = tt.get_program_id x : i32 loc(#loc1)
    %at = tt.addptr %table, %pid : !tt.ptr<i32>, i32 loc(#loc1)
    %end = tt.load %at : !tt.ptr<i32> loc(#loc1)
    %sum = scf.for %i = %c0 to %end step %c2 iter_args(%acc = %cst) -> (tensor<8xf32>)  : i32 {
      %t = arith.addf %acc, %acc : tensor<8xf32> loc(#loc4)
      %ok = arith.cmpi slt, %i, %n : i32 loc(#loc4)
      %chosen = scf.if %ok -> (tensor<8xf32>) {
        %u = arith.mulf %t, %t : tensor<8xf32> loc(#loc2)
        scf.yield %u : tensor<8xf32> loc(#loc4)
      } else {
        scf.yield %t : tensor<8xf32> loc(#loc4)
      } loc(#loc4)
      scf.yield %chosen : tensor<8xf32> loc(#loc4)
    } loc(#loc4)
    %last = scf.while (%x = %pid) : (i32) -> i32 {
      %t = arith.cmpi sgt, %x, %c0 : i32 loc(#loc1)
      scf.condition(%t) %x : i32 loc(#loc1)
    } do {
    ^bb0(%y: i32 loc("y"(#loc1))):
      %t = arith.divsi %y, %c2 : i32 loc(#loc1)
      scf.yield %t : i32 loc(#loc1)
    } loc(#loc1)
    tt.return loc(#loc1)
  } loc(#loc1)
} loc(#loc1)
"""


def test_loops_are_counted_with_the_launches_own_tables() -> None:
    from fastmaf.bench.dev.trip_counts import ControlFlow

    table = np.array([7, 0, 4, 5, 100], np.int32)
    flow = ControlFlow(TTIR)
    programs, counts = flow.counts([table.ctypes.data, 4], 5)
    assert programs == [0, 1, 2, 3, 4]
    assert [region.kind for region in flow.regions] == ["scf.for", "scf.if", "scf.if", "scf.while"]
    assert flow.regions[0].lines == ("called.py:8", "kernel.py:5")
    expected = [
        [-(-end // 2), min(2, -(-end // 2)), max(0, -(-end // 2) - 2), i.bit_length()] for i, end in enumerate(table)
    ]
    assert counts.tolist() == expected


def test_what_a_bound_needs_and_nothing_knows_is_named() -> None:
    from fastmaf.bench.dev.trip_counts import ControlFlow

    unknown = TTIR.replace("arith.divsi %y", "math.ctlz %y")
    with pytest.raises(NotImplementedError, match="math.ctlz"):
        ControlFlow(unknown)


def _code(*lines: str) -> Any:
    from fastmaf.bench.dev import machine_code

    text = ["\t.target\tsm_90a"]
    for i, line in enumerate([*lines, "EXIT"]):
        text += [f"        /*{16 * i:04x}*/  {line} ;  /* 0x0000000000000000 */", "   /* 0x000fc40000000000 */"]
    return machine_code.read("\n".join(text))


@pytest.mark.parametrize(("shift", "passes"), [(4, 4), (5, 8), (6, 16), (7, 32), (0, 1)])
def test_bank_conflicts(shift: int, passes: int) -> None:
    """16 bytes a thread: side by side, then every other 16 bytes of the banks, and so on; last, mostly the same."""
    from fastmaf.bench.dev import lanes

    code = _code("S2R R0, SR_TID.X", f"SHF.L.U32 R1, R0, {shift:#x}, RZ", "LDS.128 R4, [R1+UR4+0x100]")
    addresses = lanes.Lanes(code).addresses(2)
    assert addresses is not None and addresses[3] - addresses[0] == 3 << shift
    if shift:
        assert lanes.shared_cycles(code.instructions[2], addresses) == passes


def test_sectors_of_global_memory() -> None:
    from fastmaf.bench.dev import lanes

    code = _code(
        "S2R R0, SR_TID.X",
        "LOP3.LUT R1, R0, 0x3, RZ, 0xc0, !PT",
        "LEA R2, P0, R1, UR4, 0x4",
        "LDG.E.128 R4, desc[UR6][R2.64]",
        "LDG.E R8, desc[UR6][R0.64]",
        "MUFU.RCP R9, R0",
        "LDG.E.128 R12, desc[UR6][R9.64]",
    )
    found = lanes.Lanes(code)
    assert lanes.sectors(code.instructions[3], found.addresses(3)) == 2, "four threads' 16 bytes, eight times"
    assert lanes.sectors(code.instructions[4], found.addresses(4)) == 2, "a word from each of 32 bytes and the next"
    assert found.addresses(6) is None, "not an integer function"
    assert lanes.sectors(code.instructions[6], None) == 16


def test_the_stated_uncertainty_is_that_of_the_committed_rows() -> None:
    from fastmaf.bench.dev import predict

    lines = (ROOT / "bench" / "results" / "gpu-h100-predicted.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines if not line.startswith("#")][1:]
    measured = [line.split(",") for line in (ROOT / "bench" / "results" / "gpu-h100.csv").read_text().splitlines()]
    assert {tuple(row[:4]) for row in rows} == {(*row[1:4], row[5]) for row in measured if row[0] == "after"}
    ratios = [float(row[3]) / float(row[4]) for row in rows]
    assert (round(min(ratios), 2), round(max(ratios), 2)) == predict.MEASURED
    later = (ROOT / "bench" / "results" / "gpu-h200-predicted.csv").read_text().splitlines()
    times = [line.split(",") for line in (ROOT / "bench" / "results" / "gpu-h200.csv").read_text().splitlines()]
    rows = [line.split(",") for line in later if not line.startswith("#")][1:]
    assert {tuple(row[:4]) for row in rows} <= {tuple(row[:4]) for row in times}
    assert all(predict.MEASURED[0] <= round(float(row[3]) / float(row[4]), 2) <= predict.MEASURED[1] for row in rows)


_REPORT = """
import json, torch, fastmaf
from fastmaf.bench.dev import predict, resources
from fastmaf.bench.dev.cards import H100
found = {}
for blocks in (1, 2):
    flow = resources.published_flow(blocks)
    cases = predict.cases(flow)
    for name in ("log_prob 1", "log_prob 8", "train step 8", "sample 1"):
        launches = resources.recorded(H100.arch, cases[name])
        costs = predict.costs(launches, H100, 4 * flow.stored_weights)
        memory = sum(c.bounds["memory"] for c in costs)
        found[f"{name} of {blocks}"] = [len(launches), sum(c.seconds for c in costs), memory]
    found[f"bytes of {blocks}"] = 4 * flow.stored_weights
    launches = resources.recorded(H100.arch, cases["sample 1"])
    slower = H100._replace(name="slower", near=2 * H100.near, far=2 * H100.far)
    found[f"slower sample of {blocks}"] = sum(c.seconds for c in predict.costs(launches, slower))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_predictions_from_the_librarys_launches(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    run = subprocess.run([sys.executable, "-c", _REPORT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout)
    from fastmaf.bench.dev.cards import H100

    for blocks in (1, 2):
        stored = found[f"bytes of {blocks}"]
        launches, seconds, memory = found[f"log_prob 1 of {blocks}"]
        assert seconds > max(memory, launches * H100.launch_s / 2)  # launches overlap
        if stored > H100.cache_size:  # then each pass reads every weight from memory, once
            assert 0.95 * stored < memory * H100.dram < 1.3 * stored
        else:
            assert memory == 0
        assert found[f"train step 8 of {blocks}"][1] > found[f"log_prob 8 of {blocks}"][1] > seconds
        # The inverse loads the addresses of its weights, and reads each from memory once where the cache is too small.
        assert (found[f"sample 1 of {blocks}"][2] * H100.dram > 0.99 * stored) == (stored > H100.cache_size)
    assert found["sample 1 of 2"][1] > 1.6 * found["sample 1 of 1"][1], "blocks are sampled one after another"
    ratio = found["slower sample of 1"] / found["sample 1 of 1"][1]
    assert 1.05 < ratio < 1.5, "a sample waits for loads, most of which are ahead of their use"
