"""Work buffers of the BLAS library that multiplies matrices for torch, which ``fastmaf.memory_estimate`` leaves out.

Libraries such as MKL pack matrices into buffers of their own, and keep those for later products. Their size depends on
the library, the CPU, the number of threads and the shapes, from nothing to tens of megabytes, and no library tells it.
So they are not predicted: they are allocated before the memory that is left is looked at.
"""

from __future__ import annotations

import torch

from fastmaf.flows import Flow
from fastmaf.kernels import PackedLayout
from fastmaf.training.memory_estimate import runs_on


@torch.no_grad()
def allocate_work_buffers(
    flow: Flow, batch: int, *, training: bool = True, device: torch.device | str | None = None
) -> None:
    """Lets the BLAS library allocate the work buffers that it keeps while a flow runs; what is free then, stays free.

    Where the flow runs on the torch backend and the CPU, matrices of zeros are multiplied, of the shapes and strides
    that each layer of a block multiplies, with as many threads as torch uses now. This takes about the time of one
    block's part of a training step, and the memory of one layer's inputs, outputs and largest tile. Elsewhere
    nothing is done: other backends multiply by themselves.

    Args:
        flow: gives the shapes; it may be on ``device="meta"``, and is not run.
        batch: N.
        training: the backward pass's products too.
        device: where the flow is to run, if not where it is; a flow on ``"meta"`` is meant for the CPU.
    """
    where, backend = runs_on(flow, device)
    if where.type != "cpu" or backend != "torch":
        return
    dtype = flow._like().dtype
    done: set[tuple[object, ...]] = set()
    for made in flow._mades():
        for layer in made.layers:
            if (shape := (layer.in_features, *layer.layout.tiles)) not in done:
                done.add(shape)
                _multiply(layer.layout, batch, dtype, training)


def _multiply(layout: PackedLayout, batch: int, dtype: torch.dtype, training: bool) -> None:
    """The products of ``kernels/masked_linear/torch.py``, tile by tile."""
    inputs = torch.zeros(batch, layout.in_features, dtype=dtype, device="cpu")
    outputs = torch.zeros(batch, layout.out_features, dtype=dtype, device="cpu")
    outputs_t = outputs.t().contiguous()
    bias = torch.zeros(layout.out_features, dtype=dtype, device="cpu")
    for tile in layout.tiles:
        if not tile.width:
            continue
        rows = slice(tile.row_start, tile.row_end)
        x, y = inputs[:, : tile.width], outputs[:, rows]
        weight = torch.zeros(tile.row_end - tile.row_start, tile.width, dtype=dtype, device="cpu")
        torch.addmm(bias[rows], x, weight.t(), out=y)
        if training:
            x.addmm_(y, weight)
            torch.mm(outputs_t[rows], x, out=weight)
