"""Masked linear layer on packed storage, in plain torch: the truth that the other backends are held against.

    y[n, j] = act(b[j] + sum_{i < prefix[j]} W[j, i] x[n, i])        (MADE, Germain et al. 2015, eq. 8-9, with sorted
    units)

Each run of panels is an array ``[panels, width, 16]`` with zeros in its padding: one product per run, no mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmaf.kernels.adam.op import adam_step_
from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.float8 import decode
from fastmaf.kernels.layout import PANEL, Run, runs_of, zero_padding
from fastmaf.kernels.masked_linear.args import LinearArgs, LinearBatch


def forward(x: Tensor, args: LinearArgs) -> Tensor:
    """Returns ``y`` ``[N, out]`` for ``x`` ``[N, in]``."""
    # Stored in fewer bits, it is the same function of rounded weights.
    weight = decode(args.weight, args.weight_scale, x.dtype).contiguous()
    bias, n = whole_panels(args.bias, args.panels).view(-1, PANEL), x.shape[0]
    y = x.new_empty(len(bias), n, PANEL)
    runs = runs_of(args.panels)
    counts = [run.end - run.start for run in runs]
    outputs = y.view(-1, PANEL).split([count * n for count in counts])
    for run, panels, of_bias, out in zip(runs, _of_runs(weight, runs), bias.split(counts), outputs, strict=True):
        seen, count = x.narrow(1, 0, run.width), len(of_bias)
        if count == 1:
            torch.addmm(of_bias, seen, panels, out=out)
        else:
            seen, panels = seen.expand(count, -1, -1), panels.view(count, run.width, PANEL)
            torch.baddbmm(of_bias[:, None], seen, panels, out=out.view(count, n, PANEL))
    y = y.transpose(0, 1).flatten(1)
    return activate_(y[:, : args.bias.shape[0]].contiguous(), args.activation)


def _of_runs(packed: Tensor, runs: Sequence[Run]) -> Sequence[Tensor]:
    """Returns the columns of each run's panels, made at once: a small layer is all call overhead."""
    return packed.view(-1, PANEL).split([run.width * (run.end - run.start) for run in runs])


def whole_panels(rows: Tensor, panels: Tensor) -> Tensor:
    """Returns ``rows`` ``[..., out]`` with zeros for the rows that the last panel has and the layer does not."""
    missing = PANEL * (len(panels) - 1) - rows.shape[-1]
    return pad(rows, (0, missing)) if missing else rows


def backward(batch: LinearBatch, args: LinearArgs, need_inputs: bool, need_weight: bool) -> tuple[Tensor, ...]:
    """Returns the gradients of ``x``, the packed weight (zero in the padding) and the bias.

    Those of ``x`` and of the weight are empty when not needed.
    """
    x, grad = batch.x, grad_activation(batch.grad_y, batch.y, args.activation)
    grad_x = grad_w = x.new_empty(0)
    if need_inputs:
        grad_x = grad_input(grad, decode(args.weight, args.weight_scale, x.dtype), args.panels, x.shape[1])
    if need_weight:
        grad_w = grad_weight(grad, x, args)
    return grad_x, grad_w, grad.sum(0)


def adam_(batch: LinearBatch, args: LinearArgs, need_inputs: bool, update: Update) -> tuple[Tensor, ...]:
    """Takes a step of Adam on the weight, in place; returns the gradients of ``x`` and the bias."""
    grad_x, grad, grad_bias = backward(batch, args, need_inputs, True)
    adam_step_(args.weight, grad.mul_(update.scale), update)
    return grad_x, grad_bias


def squared_norm(batch: LinearBatch, args: LinearArgs) -> Tensor:
    """Returns the sum of the squares of the weight's gradient."""
    return backward(batch, args, False, True)[1].double().square().sum()


def activate_(y: Tensor, activation: str) -> Tensor:
    """Applies the activation in place and returns ``y``."""
    return y.relu_() if activation == "relu" else y


def grad_activation(grad_y: Tensor, y: Tensor, activation: str) -> Tensor:
    """Returns the gradient before the activation, given the one after it and the activation's value ``y``."""
    return torch.where(y > 0, grad_y, 0) if activation == "relu" else grad_y


def grad_input(grad_y: Tensor, weight: Tensor, panels: Tensor, in_features: int) -> Tensor:
    """Returns ``grad_y @ W`` ``[N, in]``."""
    grad_x = grad_y.new_zeros(grad_y.shape[0], in_features)
    grad_y, weight = whole_panels(grad_y, panels), weight.to(grad_y.dtype).contiguous()
    runs = runs_of(panels)
    counts = [run.end - run.start for run in runs]
    buffer = weight.new_empty(max(PANEL * run.width * count for run, count in zip(runs, counts, strict=True)))
    of_rows = grad_y.split([PANEL * count for count in counts], dim=1)
    for run, count, matrix, grad in zip(runs, counts, _of_runs(weight, runs), of_rows, strict=True):
        if count > 1:  # a dense copy, one run at a time: products of 16 rows each take twice the time
            matrix = matrix.view(count, run.width, PANEL).transpose(0, 1)
            matrix = buffer[: matrix.numel()].view_as(matrix).copy_(matrix).flatten(1)
        grad_x.narrow(1, 0, run.width).addmm_(grad, matrix.t())
    return grad_x


def grad_weight(grad_y: Tensor, x: Tensor, args: LinearArgs) -> Tensor:
    """Returns ``grad_yᵀ @ x`` ``[numel]`` in packed storage, with exact zeros in the padding."""
    grad = grad_y.new_empty(args.weight.shape[0])
    grad_y, x_t = whole_panels(grad_y, args.panels), x.t().contiguous()
    runs = runs_of(args.panels)
    counts = [run.end - run.start for run in runs]
    of_rows = grad_y.split([PANEL * count for count in counts], dim=1)
    for run, count, panels, rows in zip(runs, counts, _of_runs(grad, runs), of_rows, strict=True):
        seen = x_t.narrow(0, 0, run.width)
        if count == 1:
            torch.mm(seen, rows, out=panels)
        else:
            rows, panels = rows.unflatten(1, (-1, PANEL)).transpose(0, 1), panels.view(count, run.width, PANEL)
            torch.bmm(seen.expand(count, -1, -1), rows, out=panels)
    return zero_padding(grad, args.prefix, args.panels)
