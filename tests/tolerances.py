"""Every tolerance of the tests of the core, in one table; each says what it was measured against.

Errors are norm-wise and relative, ``|found - expected| / |expected|``, unless a name ends in ``_abs``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

F32, F64 = torch.float32, torch.float64

# Ten to thirty times the worst error seen in 300 random models of each kind, so that another BLAS passes; real faults
# are far larger.
TOLERANCES: dict[str, dict[torch.dtype, float]] = {
    # One model, two summation orders: z, ladj, log_prob of the packed and of the dense model.
    "values": {F64: 1e-13, F32: 5e-6},
    # The same for the gradient of each parameter and of x.
    "gradients": {F64: 1e-13, F32: 5e-6},
    # x of the level-scheduled and of the D-pass inverse, base drawn from the normal.
    "inverse": {F64: 1e-13, F32: 5e-6},
    # inverse(forward(x)) and forward(inverse(z)), norm-wise and in the largest entry, on trained models too.
    "round_trip": {F64: 1e-14, F32: 5e-6},
    # ladj against slogdet of the autograd Jacobian; relative, so a ladj near zero costs digits.
    "slogdet": {F64: 1e-12, F32: 5e-6},
    # log_prob returned beside a sample, against log_prob of that sample.
    "sample_log_prob": {F64: 1e-14, F32: 1e-6},
    # log_prob of a GaussianWhitening against a Cholesky factor of its covariance, condition numbers up to 1e6.
    "normal": {F64: 1e-9},
}

# A float32 backend may err this many times as much as an independent float32 computation does (design, section 4).
FLOAT32_FACTOR = 2.0
# Below this many units of float32 rounding an error is luck, and a ratio of two such errors says nothing.
FLOAT32_FLOOR = 1.0 * torch.finfo(F32).eps


def error(found: Tensor, expected: Tensor) -> float:
    """Returns the norm-wise relative error of ``found``, in float64; absolute where ``expected`` is all zero."""
    assert found.shape == expected.shape, f"shape {tuple(found.shape)} where {tuple(expected.shape)} was expected"
    assert torch.isfinite(found).all(), "not all finite"
    truth = expected.detach().to(F64)
    norm = float(torch.linalg.vector_norm(truth))
    distance = float(torch.linalg.vector_norm(found.detach().to(F64) - truth))
    return distance / norm if norm > 0.0 else distance


def assert_close(kind: str, found: Tensor, expected: Tensor, what: str = "") -> None:
    """Fails where ``error`` exceeds the table's entry for ``kind`` and the dtype of ``found``."""
    worst, limit = error(found, expected), TOLERANCES[kind][found.dtype]
    assert worst <= limit, f"{what or kind}: relative error {worst:.3e} exceeds {limit:.0e} ({kind}, {found.dtype})"


def distance(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Returns |found - expected|² and |expected|², in float64: what errors of several inputs are pooled from."""
    truth = expected.detach().to(F64)
    return float((found.detach().to(F64) - truth).square().sum()), float(truth.square().sum())


def pooled(errors: Sequence[tuple[float, float]]) -> float:
    """Returns the norm-wise relative error of all inputs together, as if they were one; absolute where all are zero.

    Not a mean of relative errors: one input whose truth happens to be near zero would be most of that.
    """
    distances, norms = (sum(part) for part in zip(*errors, strict=True))
    return float((distances / norms if norms > 0 else distances) ** 0.5)


def assert_float32(
    own: Mapping[str, Sequence[tuple[float, float]]], peer: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    """Fails where the float32 errors of a computation exceed ``FLOAT32_FACTOR`` times those of another one.

    The contract is about how much a summation order loses, and one draw does not show that: the ratio of the errors of
    two equally good orders, both about one unit of rounding, was seen between 0.3 and 3.7 from input to input. So both
    errors are taken over several inputs (at least 4) before they are compared.

    Args:
        own: by the name of a quantity, its ``distance`` from the truth for each input.
        peer: the same of the computation to hold it against, for the same inputs.
    """
    report = []
    for name, errors in own.items():
        assert len(errors) == len(peer[name]) >= 4, f"{name}: too few draws to tell precision from luck"
        found, other = pooled(errors), pooled(peer[name])
        if not found <= max(FLOAT32_FACTOR * other, FLOAT32_FLOOR):
            report.append(f"{name}: {found:.2e}, the other {other:.2e}")
    assert not report, f"float32 errs more than {FLOAT32_FACTOR:g} times as much as its peer:\n" + "\n".join(report)
