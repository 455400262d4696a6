"""Normalizing flows: ``Flow``, any sequence of transforms, and ``MAF``."""

from __future__ import annotations

from fastmaf.flows.base import Flow
from fastmaf.flows.distribution import FlowDistribution
from fastmaf.flows.maf import MAF, interleave_permutations

__all__ = ["MAF", "Flow", "FlowDistribution", "interleave_permutations"]
