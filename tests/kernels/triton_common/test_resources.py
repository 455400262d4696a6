"""The Triton kernels compiled ahead of time, for cards that need not be here, and held to limits: registers, spills and
shared memory, and what can be proven of loads, layouts, bank conflicts and barriers without a card.

In processes of their own: this one may have Triton interpret its kernels.
"""

from __future__ import annotations

from typing import Any

import pytest

from fastmaf.kernels.triton_common.launch_table import TABLES
from tests.kernels.cases import needs
from tests.kernels.triton_common.compiling import TRITONS, needs_triton, output
from tests.kernels.triton_common.limits import (
    AFFINE,
    AHEAD,
    BACKWARD,
    FAULTS,
    FORWARD,
    LIMITS,
    READ_WEIGHTS,
    REGISTERS,
    SHARED,
    SOLVE,
    holding,
)

pytestmark = [pytest.mark.slow, needs("triton")]
# Each version of Triton with the cards that it is used with: 3.3.1 is the last for Pascal; but torch builds with others
# still have kernels for it.
COMBINATIONS = [("3.3.1", 61), *(("", arch) for arch in TABLES), *(("3.6.0", arch) for arch in TABLES if arch != 61)]
NAMES = [f"Triton {version or 'installed'}, sm_{arch}" for version, arch in COMBINATIONS]

Report = dict[str, Any]


def reported(version: str, arch: int) -> list[Report]:
    """Returns what is reported of all kernels; each is compiled once in a session of tests."""
    # More than 64 samples: gradients of weights by matrix products, too.
    batches = (1, 8, 65) if version != "3.6.0" else (8, 65)
    arguments = [word for batch in batches for word in ("--batch", str(batch))]
    found: list[Report] = output(
        "fastmaf.bench.dev.resources", "--json", "--arch", str(arch), *arguments, version=version
    )
    return found


@pytest.fixture(params=COMBINATIONS, ids=NAMES, scope="module")
def reports(request: pytest.FixtureRequest) -> list[Report]:
    return reported(*request.param)


def test_every_kernel_is_there_in_every_mode(reports: list[Report]) -> None:
    assert {one["kernel"] for one in reports} == set(REGISTERS)
    assert len({one["triton"] for one in reports}) == len({one["arch"] for one in reports}) == 1
    layers = [
        one
        for one in reports
        if one["options"].get("LANES") == "False" and one["kernel"] in (FORWARD, AFFINE, BACKWARD)
    ]
    precisions = {"ieee"} if reports[0]["arch"] < 80 else {"ieee", "tf32", "tf32x3", "bf16"}
    assert {one["options"]["PRECISION"] for one in layers} == precisions
    for precision in precisions:
        of_precision = [one for one in layers if one["options"]["PRECISION"] == precision]
        assert {one["kernel"] for one in of_precision} == {FORWARD, AFFINE, BACKWARD}, precision
    assert {one["options"]["WEIGHT"] for one in reports if "WEIGHT" in one["options"]} == {
        "none",
        "store",
        "adam",
        "norm",
    }
    for kernel in (AHEAD, SOLVE):
        inverse = [one["options"] for one in reports if one["kernel"] == kernel]
        assert {one["W_TYPE"] for one in inverse} == {"fp32", "bf16", "uint8"}, kernel
        if kernel == AHEAD or reports[0]["arch"] == 61:
            assert len({one["BLOCK_N"] for one in inverse}) > 1, f"{kernel}: one sample a program, and several"


def test_registers_and_shared_memory(reports: list[Report]) -> None:
    for one in reports:
        limits = REGISTERS[one["kernel"]]
        assert one["registers"] <= limits.get(int(one["options"].get("BLOCK_N", 0)), limits.get(0, 0)), one
        assert one["shared"] <= SHARED[one["arch"]], one
        warps = one["options"].get("num_warps", 4)
        assert one["registers"] * 32 * warps <= 65_536, f"does not fit a multiprocessor: {one}"


def test_kernels_that_read_weights_are_seen_to(reports: list[Report]) -> None:
    """Otherwise the test below could not fail for them."""
    for one in reports:
        if one["kernel"] in READ_WEIGHTS and (
            one["options"].get("NEED_X") != "False" or one["options"].get("WEIGHT") == "adam"
        ):
            assert one["tiles"] > 0, one


@pytest.mark.parametrize("what", sorted({limit.what for limit in LIMITS}))
def test_counts(reports: list[Report], what: str) -> None:
    """Spills, narrow loads of weights, changes of their layout in loops, bank conflicts, barriers in loops."""
    for one in reports:
        assert one[what] <= holding(what, one).most, f"{what}: {one}"


def test_known_faults_are_there() -> None:
    for version in TRITONS:
        needs_triton(version)
    most = {id(limit): -1 for limit in FAULTS}
    for version, arch in COMBINATIONS:
        for one in reported(version, arch):
            for limit in (holding(what, one) for what in {limit.what for limit in FAULTS}):
                if id(limit) in most:
                    most[id(limit)] = max(most[id(limit)], one[limit.what])
    assert not [f"{limit}: found {most[id(limit)]}" for limit in FAULTS if most[id(limit)] != limit.most]
