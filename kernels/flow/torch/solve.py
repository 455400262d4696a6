"""The level-scheduled inverse of an autoregressive block in plain torch, for any element-wise map.

For each step of the schedule:

    out = b + W_out[rows of the step] h_last[units finished before]
    x[dims of the step] = the inverse of the element-wise map with parameters out
    finish the hidden units that have become computable, layer by layer

in groups of steps, as ``schedule.py`` describes. Every weight is read about once and every hidden unit is computed
once, so the whole inverse costs the arithmetic of one forward pass. It is exact for any weights and any strictly
autoregressive degrees.

What a context adds to a layer is part of its bias, row by row of the batch. The layers that a residual sum adds have
equal degrees, so that a step finishes the same units of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastmaf.kernels.activations import activate_
from fastmaf.kernels.float8 import decode
from fastmaf.kernels.flow.torch.network import Invert, Network
from fastmaf.kernels.flow.torch.plan import Rows, plan_of
from fastmaf.kernels.layout import PANEL


@contextmanager
def _one_thread_if_small(z: Tensor) -> Iterator[None]:
    """Keeps small batches on one thread of the CPU.

    The products of a step are so small that a second thread costs more than it saves (5 samples of a flow of 12,288
    dimensions took 0.36 s on two threads, 0.24 s on one). From about 32 samples on it pays.
    """
    threads = torch.get_num_threads()
    if z.device.type != "cpu" or z.shape[0] > 16 or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def solve(z: Tensor, network: Network, invert: Invert) -> tuple[Tensor, Tensor]:
    """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dx/dz| of a block.

    Args:
        z: ``[N, D]``.
        network: that gives the parameters of the map.
        invert: the inverse of the element-wise map.
    """
    layers, activations = network.layers, network.activations
    outputs = layers[-1].bias.shape[0] // z.shape[1]
    plan = plan_of([layer.panels for layer in layers], network.schedule, outputs)
    # Stored in fewer bits, they are the same function of rounded weights.
    weights = [decode(layer.weight, layer.weight_scale, z.dtype) for layer in layers]
    biases = [layer.bias[:, None] for layer in layers]
    if network.terms:
        biases = [bias + term.t() for bias, term in zip(biases, network.terms, strict=True)]
    # Everything is kept units x samples, so that whatever a step reads or writes is one contiguous block, and is split
    # into the blocks of all steps beforehand: per-step slicing would cost more than the arithmetic.
    z_t = z.t().contiguous()
    x_t, terms = torch.empty_like(z_t), []
    units = [z.new_empty(bias.shape[0], z.shape[0]) for bias in biases[:-1]]
    # Sums become units in place, but for those that a later layer adds.
    sums = [torch.empty_like(h) if network.keeps_sums(k) else h for k, h in enumerate(units)]
    below = [x_t, *units]
    dims = [count // outputs for of_layers in plan for count in of_layers[-1].counts]
    dim_of = zip(z_t.split(dims), x_t.split(dims), strict=True)
    last = len(layers) - 1
    with _one_thread_if_small(z):
        for of_layers in plan:
            solves: list[_Solve] = []  # of the output layer, then of the hidden layers
            values: list[Sequence[Tensor]] = []  # of the hidden units, step by step
            for step in range(len(of_layers[0].counts)):
                for k in (last, *range(last)):
                    of = of_layers[k]
                    if step == 0:
                        own = z.new_empty(_count(of.rows), z.shape[0]) if k == last else sums[k][of.rows]
                        solves.append(_Solve(own, weights[k], biases[k], of, below[k]))
                        if k < last:
                            values.append(units[k][of.rows].split(of.counts))
                    if k == last:
                        z_d, x_d = next(dim_of)
                        out = solves[0].step(step).unflatten(0, (len(z_d), outputs)).transpose(1, 2)
                        found, term = invert(z_d, out)
                        x_d.copy_(found)
                        terms.append(term)
                    elif of.counts[step]:
                        h = solves[k + 1].step(step)
                        if network.adds_before(k):
                            h += solves[k - 1].sums[step]
                        if network.keeps_sums(k):
                            h = values[k][step].copy_(h)
                        activate_(h, activations[k])
    return x_t.t().contiguous(), torch.cat(terms).sum(0)


def _count(rows: slice) -> int:
    return int(rows.stop - rows.start)


class _Solve:
    """The products of one layer in a group of steps.

    Args:
        sums: ``[rows, N]``, where they are written to.
        weight: of the layer.
        bias: ``[rows of the layer, 1 or N]``.
        of: its rows.
        below: ``[units, N]``, the layer below, as far as it is finished.
    """

    def __init__(self, sums: Tensor, weight: Tensor, bias: Tensor, of: Rows, below: Tensor) -> None:
        self.of, self.below = of, below
        self._ahead(sums.copy_(bias[of.rows]), weight)
        self.sums = sums.split(of.counts)
        if len(of.counts) > 1:
            self.weights = of.matrix(weight, slice(of.below[0], of.below[-1])).split(of.counts)

    def _ahead(self, sums: Tensor, weight: Tensor) -> None:
        finished, rows = self.below[: self.of.below[0]].t(), self.of.rows
        for run in self.of.runs:
            panels = run.of(weight)[:, : finished.shape[1]]
            seen = finished[:, : panels.shape[1]].expand(len(panels), -1, -1)
            product = torch.bmm(seen, panels).mT.flatten(0, 1)
            start, stop = max(PANEL * run.start, rows.start), min(PANEL * run.end, rows.stop)
            sums[start - rows.start : stop - rows.start] += product[start - PANEL * run.start :][: stop - start]

    def step(self, step: int) -> Tensor:
        """Returns the finished sums of a step ``[rows, N]``."""
        sums, start = self.sums[step], self.of.below[0]
        if step:
            weight = self.weights[step]
            columns = min(self.of.below[step] - start, weight.shape[1])
            sums.addmm_(weight.narrow(1, 0, columns), self.below.narrow(0, start, columns))
        return sums
