"""What ``bench.dev.proofs`` counts, on small kernels that have a fault and on others that do not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.cases import needs
from tests.kernels.triton_common.compiling import output

pytestmark = [pytest.mark.slow, needs("triton")]


@pytest.fixture(params=[("", "90"), ("3.3.1", "61"), ("3.6.0", "80")], ids=" sm_".join, scope="module")
def counts(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    version, arch = request.param
    found: dict[str, dict[str, Any]] = output("tests.kernels.triton_common.faulty_kernels", arch, version=version)
    return found


def test_loads_of_less_than_16_bytes(counts: dict[str, dict[str, Any]]) -> None:
    assert counts["aligned"]["tiles"] == counts["unaligned"]["tiles"] == 1
    assert counts["aligned"]["narrow"] == 0
    assert counts["unaligned"]["narrow"] == 2  # 64 x 16 weights are 8 for each of 128 threads
    # The assembler keeps them; it may repeat the loop's body.
    assert counts["aligned"]["wide"] >= 2 and counts["aligned"]["wide"] % 2 == 0
    assert counts["unaligned"]["wide"] == 0


def test_layouts_changed_within_loops(counts: dict[str, dict[str, Any]]) -> None:
    assert {name: counts[name]["converted"] for name in ("as loaded", "turned after", "turned within")} == {
        "as loaded": 0,
        "turned after": 0,
        "turned within": 1,
    }


def test_transposed_operands(counts: dict[str, dict[str, Any]]) -> None:
    assert counts["row by row"]["ways"] == 1
    assert counts["transposed"]["ways"] >= 8


def test_barriers_of_nested_loops(counts: dict[str, dict[str, Any]]) -> None:
    assert counts["few barriers"]["barriers"] == 2  # of the outer loop
    assert counts["many barriers"]["barriers"] == 7  # of the inner one, not of both


def test_what_comes_before_the_wait_of_a_kernel_that_starts_early(counts: dict[str, dict[str, Any]]) -> None:
    if "nothing" not in counts:
        pytest.skip("only kernels of compute capability 9.0 start early")
    early = {name: one["early"] for name, one in counts.items() if one["kernel"] == "starts"}
    assert early.pop("nothing") == 0
    assert min(early.values()) > 0, early


def test_spills_and_shared_memory(counts: dict[str, dict[str, Any]]) -> None:
    assert counts["small"]["spills"] == 0
    assert counts["large"]["spills"] > 0
    assert counts["small"]["shared"] == 2 * 32 * 32 * 4
    assert counts["large"]["shared"] == 2 * 64 * 64 * 4
