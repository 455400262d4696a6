"""Models and data that the tests of the core share."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastmaf
from fastmaf.kernels import layout
from fastmaf.naive import NaiveMAF


@contextlib.contextmanager
def shared_widths(widths: int = 2) -> Iterator[None]:
    """Lets neighbouring panels of small layers share a width, as in large ones, for layouts that are built inside."""
    with mock.patch.object(layout, "WIDTHS", widths):
        yield


def build(features: int, *, widths: str = "shared", scale: float = 1.0, **options: Any) -> fastmaf.MAF:
    """Builds a MAF for tests: float64, runs of several panels, no warning about gaps, all parameters times ``scale``.

    With ``widths="own"`` each panel has its own width, as production code has it for layers of this size.
    """
    options = {"blocks": 2, "hidden_features": (7, 5), "seed": 0, "dtype": torch.float64, **options}
    with warnings.catch_warnings(), shared_widths() if widths == "shared" else contextlib.nullcontext():
        warnings.simplefilter("ignore", fastmaf.ConnectivityWarning)
        flow = fastmaf.MAF(features, **options)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(scale)
    return flow


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def correlated(n: int, features: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns data with linear and curved dependence: a random walk, every third dimension bent by the last."""
    x = normal(n, features, seed=seed).cumsum(dim=1) / features**0.5
    x[:, 2::3] += 0.5 * x[:, 1:-1:3][:, : x[:, 2::3].shape[1]] ** 2
    return x.to(dtype)


def train(flow: fastmaf.Flow, data: Tensor, steps: int = 150, lr: float = 3e-3, batch: int = 64) -> list[float]:
    """Trains with Adam and returns the loss of each step, in nats per dimension."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        start = step * batch % (data.shape[0] - batch + 1)
        loss = -flow.log_prob(data[start : start + batch]).mean() / flow.features
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def blocks_of(flow: fastmaf.Flow) -> list[fastmaf.AffineAutoregressive]:
    return [t for t in flow.transforms if isinstance(t, fastmaf.AffineAutoregressive)]


def layers_of(flow: fastmaf.Flow) -> dict[str, fastmaf.MaskedLinear]:
    """Returns all masked layers by name."""
    return {name: module for name, module in flow.named_modules() if isinstance(module, fastmaf.MaskedLinear)}


def padding_of(layer: fastmaf.MaskedLinear) -> Tensor:
    """Returns the mask of the padding, computed by packing a matrix of ones."""
    rows, columns = layer.bias.shape[0], layer.layout.in_features
    return layer.layout.pack(torch.ones(rows, columns, dtype=torch.float64)) == 0


def naive_gradients(flow: fastmaf.MAF, naive: NaiveMAF) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns, by name, each gradient of ``flow`` as a dense matrix and that of ``naive``, in the same order."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    dense: Any
    for i, (block, dense, order) in enumerate(zip(blocks_of(flow), naive.blocks, naive.orders, strict=True)):
        layers = block.made.layers
        # order[k] is the dimension at place k of the block: columns of the first layer, pairs of rows of the last.
        rows = torch.stack((order, order + flow.features), dim=1).flatten()
        for k, layer in enumerate(layers):
            weight, bias = dense.weights[k].grad, dense.biases[k].grad
            assert weight is not None and bias is not None
            if k == 0:
                weight = weight[:, order]
            if k == len(layers) - 1:
                weight, bias = weight[rows], bias[rows]
            assert layer.weight.grad is not None and layer.bias.grad is not None
            pairs[f"block {i} layer {k} weight"] = layer.layout.unpack(layer.weight.grad), weight
            pairs[f"block {i} layer {k} bias"] = layer.bias.grad, bias
    return pairs


def jacobian(function: Any, x: Tensor) -> Tensor:
    """Returns d function(x) / dx ``[D_out, D]`` for one row ``x`` ``[D]``."""
    return torch.autograd.functional.jacobian(lambda row: function(row[None])[0], x)
