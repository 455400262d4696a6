"""What the Triton kernels may cost, by what ``bench.dev.resources`` reports of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# The most registers a thread may take, by the samples of a program's tile (0: any): a multiprocessor has 65,536.
REGISTERS: dict[str, dict[int, int]] = {
    "_masked_linear_fwd_kernel": {1: 128, 2: 128, 4: 128, 8: 128, 16: 128, 64: 255},  # 4 programs an SM
    "_affine_output_fwd_kernel": {1: 128, 2: 128, 4: 128, 8: 128, 16: 128, 64: 255},  # 64 are bound by multiply-adds
    "_masked_linear_bwd_kernel": {0: 255},  # weight, moments and both products: 2 or 3 programs, much in flight
    "_flow_inverse_kernel": {0: 255},  # one program is all that runs on a multiprocessor
    "_sum_slots_kernel": {0: 64},  # the rest stream: all threads of a multiprocessor should fit
    "_affine_output_grad_kernel": {0: 64},
    "_ladj_kernel": {0: 64},
    "_adam_kernel": {0: 64},
}
# Bytes of shared memory that a program may take.
SHARED = {61: 48 * 1024, 75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024}
# Kernels that read weights, and so must be seen to load tiles of them.
READ_WEIGHTS = ("_masked_linear_fwd_kernel", "_affine_output_fwd_kernel", "_masked_linear_bwd_kernel")


class Limit(NamedTuple):
    """How much of something the kernels of a name may have ("" for all), in the modes of ``where``."""

    what: str
    most: int
    kernel: str = ""
    where: Mapping[str, str] = {}

    def concerns(self, report: dict[str, Any]) -> bool:
        """Returns whether a kernel is meant."""
        modes = report["options"] | {"arch": str(report["arch"])}
        return self.kernel in ("", report["kernel"]) and all(modes.get(key) == self.where[key] for key in self.where)


FORWARD, AFFINE, BACKWARD, INVERSE = list(REGISTERS)[:4]
LANES, PRODUCTS = {"LANES": "True"}, {"LANES": "False"}
# The counts of ``bench.dev.proofs``. The last limit that concerns a kernel holds.
LIMITS = [
    Limit("narrow", 0),
    Limit("converted", 0),
    Limit("ways", 2),  # two, where bfloat16 operands are rounded after float32 was read from shared memory
    # A sum across warps takes two barriers, operands of a product one before they are written and one before they are
    # read; so does each change of layout.
    Limit("barriers", 4),
    Limit("barriers", 8, BACKWARD),
]
# Faults that are known. Each of these limits is reached by some kernel: lower it, or delete it, where it no longer is.
FAULTS: list[Limit] = []
