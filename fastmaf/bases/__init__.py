"""Base distributions of flows, one class per file."""

from __future__ import annotations

from typing import Any

from fastmaf.bases.base import Base
from fastmaf.bases.gaussian import DiagonalGaussian
from fastmaf.bases.low_rank import LowRankGaussian
from fastmaf.bases.mixture import GaussianMixture
from fastmaf.bases.standard import StandardNormal
from fastmaf.bases.student_t import StudentT

__all__ = [
    "BASES",
    "Base",
    "DiagonalGaussian",
    "GaussianMixture",
    "LowRankGaussian",
    "StandardNormal",
    "StudentT",
    "base_config",
]

BASES: dict[str, type[Base]] = {
    "standard_normal": StandardNormal,
    "diagonal_gaussian": DiagonalGaussian,
    "low_rank_gaussian": LowRankGaussian,
    "student_t": StudentT,
    "gaussian_mixture": GaussianMixture,
}
"""The classes of bases that can be saved, by their names in files. Add a class here to make it savable."""


def base_config(base: Base) -> dict[str, Any]:
    """Returns the entry of a base in the configuration of a flow: its name in files and its ``config()``.

    Raises:
        TypeError: the class of the base is not in ``BASES``.
    """
    for name, cls in BASES.items():
        if type(base) is cls:
            return {"type": name, **base.config()}
    raise TypeError(
        f"{type(base).__name__} cannot be saved: list it in fastmaf.bases.BASES; "
        f"known are {sorted(cls.__name__ for cls in BASES.values())}"
    )
