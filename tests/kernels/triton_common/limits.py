"""What the Triton kernels may cost, by what ``bench.dev.resources`` reports of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# The most registers a thread may take, by the samples of a program's tile (0: any): a multiprocessor has 65,536.
REGISTERS: dict[str, dict[int, int]] = {
    # Up to 8 samples, 12 programs of a warp on a multiprocessor, or 10 that unpack bytes for 4 samples; the sums of 32
    # and more take most registers.
    "_masked_linear_fwd_kernel": {1: 128, 2: 168, 4: 200, 8: 168, 16: 128, 32: 255, 64: 255},
    "_affine_output_fwd_kernel": {1: 128, 2: 168, 4: 200, 8: 168, 16: 128, 32: 255, 64: 255},
    "_masked_linear_bwd_kernel": {0: 255},  # weight, moments and both products: 2 or 3 programs, much in flight
    "_panel_ahead_kernel": {0: 255},
    "_panel_solve_kernel": {0: 255},  # one warp, with a chunk's weights and the next one's
    "_finish_units_kernel": {0: 64},
    "_sum_slots_kernel": {0: 64},  # the rest stream: all threads of a multiprocessor should fit
    "_affine_output_grad_kernel": {0: 64},
    "_ladj_kernel": {0: 64},
    "_adam_kernel": {0: 64},
}
# Bytes of shared memory that a program may take.
SHARED = {61: 48 * 1024, 75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024}
# Kernels that read weights, and so must be seen to load tiles of them.
READ_WEIGHTS = tuple(REGISTERS)[:5]


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


FORWARD, AFFINE, BACKWARD, AHEAD, SOLVE = READ_WEIGHTS
# Spilled bytes, and the counts of ``bench.dev.proofs``. The last limit that concerns a kernel holds.
LIMITS = [
    Limit("spills", 0),
    Limit("narrow", 0),
    Limit("converted", 0),
    Limit("early", 0),
    Limit("ways", 2),  # two, where bfloat16 operands are rounded after float32 was read from shared memory
    # Two for each tensor that goes through shared memory: one before it is written, one before it is read.
    Limit("barriers", 4),
    Limit("barriers", 8, BACKWARD),  # two matrix products
    Limit("barriers", 10, BACKWARD, {"PRECISION": "tf32x3"}),  # of numbers in two parts
    Limit("barriers", 12, BACKWARD, {"PRECISION": "bf16"}),  # of rounded copies
    Limit("barriers", 10, SOLVE),  # a single warp passes them at once
]
# Known faults. Some kernel reaches each of these limits: where none does any more, lower or delete it.
FAULTS = [
    # Weights of fewer bits become float32 in another layout than that of their loads; on Pascal, where two samples
    # share a program's warps, float32 ones too.
    Limit("converted", 1, SOLVE),
    Limit("barriers", 16, SOLVE, {"arch": "61"}),
    Limit("barriers", 30, SOLVE, {"arch": "61", "BLOCK_N": "2"}),
    # By matrix products, the gradient of a tile has another layout than the loads of weights and moments, which then go
    # through shared memory: three of each way, and prefixes.
    Limit("converted", 7, BACKWARD, {"WEIGHT": "adam", "LANES": "False"}),
    Limit("barriers", 14, BACKWARD, {"WEIGHT": "adam", "LANES": "False"}),
    # 16 bytes of a panel and one column are all that there is.
    Limit("narrow", 1, AHEAD, {"W_TYPE": "uint8", "LANES": "False"}),
]


def holding(what: str, report: dict[str, Any]) -> Limit:
    """Returns the limit that a kernel is held to."""
    return [limit for limit in (*LIMITS, *FAULTS) if limit.what == what and limit.concerns(report)][-1]
