"""Normalizing flows: ``Flow``, any sequence of transforms, ``MAF`` and ``IAF``."""

from __future__ import annotations

from fastmaf.flows.base import Flow
from fastmaf.flows.distribution import FlowDistribution
from fastmaf.flows.iaf import IAF
from fastmaf.flows.maf import MAF, interleave_permutations

__all__ = ["IAF", "MAF", "Flow", "FlowDistribution", "interleave_permutations"]
