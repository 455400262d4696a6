"""The Triton kernels compiled ahead of time, for cards that need not be here, with what ptxas says held to limits.

In processes of their own: this one may have Triton interpret its kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fastmaf.kernels.triton_common.launch_table import TABLES
from tests.kernels.cases import needs

ROOT = Path(__file__).resolve().parents[3]
PASCAL = Path(sys.prefix) / "triton-3.3.1"
pytestmark = [pytest.mark.slow, needs("triton")]

# The most registers a thread may take, by the samples of a program's tile (0: any): a multiprocessor has 65,536.
REGISTERS: dict[str, dict[int, int]] = {
    # Up to 8 samples, 12 programs of a warp on a multiprocessor; the sums of 32 and more take most registers.
    "_masked_linear_fwd_kernel": {1: 128, 2: 168, 4: 168, 8: 168, 16: 128, 32: 255, 64: 255},
    "_affine_output_fwd_kernel": {1: 128, 2: 168, 4: 168, 8: 168, 16: 128, 32: 255, 64: 255},
    "_masked_linear_bwd_kernel": {0: 255},  # weight, moments and both products: 2 or 3 programs, much in flight
    "_flow_inverse_kernel": {0: 255},  # one program is all that runs on a multiprocessor
    "_sum_slots_kernel": {0: 64},  # the rest stream: all threads of a multiprocessor should fit
    "_affine_output_grad_kernel": {0: 64},
    "_ladj_kernel": {0: 64},
    "_adam_kernel": {0: 64},
}
# Bytes of shared memory that a program may take.
SHARED = {61: 48 * 1024, 75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024}


def reports(tmp_path: Path, *arguments: str, triton: Path | None = None) -> list[dict[str, Any]]:
    """Returns what bench.dev.resources reports, compiled anew."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    if triton is not None:
        environment["PYTHONPATH"] = str(triton)
    run = subprocess.run(
        [sys.executable, "-m", "fastmaf.bench.dev.resources", "--json", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(run.stdout)
    return found


def check(found: list[dict[str, Any]], arch: int) -> None:
    """Checks that every kernel is there, in every mode, and stays within the limits of the card."""
    assert {one["kernel"] for one in found} == set(REGISTERS)
    assert {one["arch"] for one in found} == {arch}
    modes = {one["options"]["WEIGHT"] for one in found if one["kernel"] == "_masked_linear_bwd_kernel"}
    assert modes == {"none", "store", "adam", "norm"}
    inverse = [one["options"] for one in found if one["kernel"] == "_flow_inverse_kernel"]
    assert {one["W_TYPE"] for one in inverse} == {"fp32", "bf16"}
    assert len({one["BLOCK_N"] for one in inverse}) > (arch == 61), "one sample a program, and several"
    for one in found:
        assert one["spills"] == 0, f"spills registers: {one}"
        limits = REGISTERS[one["kernel"]]
        assert one["registers"] <= limits.get(int(one["options"].get("BLOCK_N", 0)), limits.get(0, 0)), one
        assert one["shared"] <= SHARED[arch], one
        warps = one["options"].get("num_warps", 4)
        assert one["registers"] * 32 * warps <= 65_536, f"does not fit a multiprocessor: {one}"


@pytest.mark.parametrize("arch", sorted(TABLES))
def test_kernels_fit(arch: int, tmp_path: Path) -> None:
    batches = [] if arch == 61 else ["--batch", "1", "--batch", "64"]
    found = reports(tmp_path, "--arch", str(arch), *batches)
    check(found, arch)


def test_kernels_fit_pascal_under_the_triton_of_its_last_torch(tmp_path: Path) -> None:
    if not (PASCAL / "triton").is_dir():
        pytest.skip(f"Triton 3.3.1 is not in {PASCAL.name}: make test installs it, where it exists for this Python")
    found = reports(tmp_path, "--arch", "61", triton=PASCAL)
    assert Counter(one["triton"] for one in found) == {"3.3.1": len(found)}
    check(found, 61)
