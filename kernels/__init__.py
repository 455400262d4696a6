"""The ops of fastmaf and their backends, installed as ``fastmaf.kernels``.

One folder per op: ``op.py`` (of a flow: ``forward.py`` and ``inverse.py``) is its interface, ``torch`` the truth in
plain torch, and each faster backend a module or folder beside it with the same functions. ``dispatch.py`` is the only
place that chooses between them.
"""

from __future__ import annotations

if __name__ != "fastmaf.kernels":
    raise ImportError(
        f"this package is part of fastmaf and must be imported as 'fastmaf.kernels', not as {__name__!r}; "
        "install fastmaf (pip install .) or run from the root of its checkout and 'import fastmaf'"
    )

from fastmaf.kernels.affine_output.affine_map import AffineMap, bounded_map
from fastmaf.kernels.affine_output.args import AffineArgs
from fastmaf.kernels.affine_output.op import affine_output
from fastmaf.kernels.dispatch import BackendUnavailableError, use_backend
from fastmaf.kernels.flow.args import Block, FlowArgs, flow_args
from fastmaf.kernels.flow.forward import flow_forward
from fastmaf.kernels.flow.inverse import flow_inverse
from fastmaf.kernels.flow.schedule import level_schedule
from fastmaf.kernels.huge_pages import empty_on_huge_pages
from fastmaf.kernels.layout import PackedLayout
from fastmaf.kernels.masked_linear.args import LinearArgs
from fastmaf.kernels.masked_linear.op import masked_linear

__all__ = [
    "AffineArgs",
    "AffineMap",
    "BackendUnavailableError",
    "Block",
    "FlowArgs",
    "LinearArgs",
    "PackedLayout",
    "affine_output",
    "bounded_map",
    "empty_on_huge_pages",
    "flow_args",
    "flow_forward",
    "flow_inverse",
    "level_schedule",
    "masked_linear",
    "use_backend",
]
