"""The ops of fastmaf and their backends, installed as ``fastmaf.kernels``.

One folder per op: ``op.py`` registers it with torch, ``reference.py`` is the plain torch truth, and each faster
backend adds one module beside it with the same signatures. ``backends.py`` is the only place that chooses between them.
"""

from __future__ import annotations

if __name__ != "fastmaf.kernels":
    raise ImportError(
        f"this package is part of fastmaf and must be imported as 'fastmaf.kernels', not as {__name__!r}; "
        "install fastmaf (pip install .) or run from the root of its checkout and 'import fastmaf'"
    )

from fastmaf.kernels.affine_output.op import affine_output
from fastmaf.kernels.backends import BackendUnavailableError, use_backend
from fastmaf.kernels.block import Block
from fastmaf.kernels.chain.op import chain_forward
from fastmaf.kernels.layout import PackedLayout
from fastmaf.kernels.level_inverse.op import chain_inverse, level_inverse
from fastmaf.kernels.level_inverse.schedule import level_schedule
from fastmaf.kernels.masked_linear.op import masked_linear
from fastmaf.kernels.native_library import empty_on_huge_pages

__all__ = [
    "BackendUnavailableError",
    "Block",
    "PackedLayout",
    "affine_output",
    "chain_forward",
    "chain_inverse",
    "empty_on_huge_pages",
    "level_inverse",
    "level_schedule",
    "masked_linear",
    "use_backend",
]
