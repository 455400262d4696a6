"""Autoregressive rational-quadratic splines: the blocks of a neural spline flow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmaf.kernels import composite
from fastmaf.kernels.flow.torch.solve import solve
from fastmaf.kernels.op import records_gradients
from fastmaf.nn import MADE
from fastmaf.transforms.base import Transform
from fastmaf.transforms.implicit import implicit_inverse
from fastmaf.transforms.networks import network_config, network_from
from fastmaf.transforms.spline_map import SplineMap


class MonotonicRQS(Transform):
    """An autoregressive transform by monotonic rational-quadratic splines::

        z[d] = spline(x[d]; MADE(x[0..d−1])),    ladj = Σ_d log dz[d]/dx[d]

    The inverse is exact. It takes one step per distinct degree of the last hidden layer (``made.steps``) and reads each
    weight once, in plain torch; its backward pass takes one backward pass of the network per step. The layers of the
    network run on every backend.

    Args:
        made: the network, with ``spline.outputs`` outputs per feature.
        spline: the spline, and what is made of the network's outputs for it.

    Raises:
        ValueError: the network has another number of outputs, or a leaky output mask.

    References:
        Durkan, Bekasov, Murray and Papamakarios 2019, Neural Spline Flows.

    Example:
        >>> spline = fastmaf.SplineMap(bins=4)
        >>> made = fastmaf.MADE(features=3, hidden_features=16, outputs_per_feature=spline.outputs)
        >>> block = fastmaf.MonotonicRQS(made, spline)
        >>> x = torch.randn(5, 3)
        >>> z, ladj = block(x)
        >>> torch.allclose(block.inverse(z)[0], x, atol=1e-4)
        True
    """

    def __init__(self, made: MADE, spline: SplineMap) -> None:
        super().__init__()
        spline.check()
        if made.outputs_per_feature != spline.outputs:
            raise ValueError(
                f"a spline of {spline.bins} bins needs a MADE with {spline.outputs} outputs per feature; found "
                f"{made.outputs_per_feature}"
            )
        if not made.strict:
            raise ValueError("a spline block needs a MADE with a strict output mask; found strict=False")
        self.features, self.made, self.spline = made.features, made, spline

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, terms = self.spline.forward(x, self.made(x))
        return z, terms.sum(1)

    def forward_per_dim(self, x: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        z, own = self.spline.forward(x, self.made(x))
        return z, terms - own

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if composite.needed():
            return self._inverse_by_modules(z)
        with torch.no_grad():
            x, ladj = self._inverse_by_modules(z) if self.made.calls_modules else self._inverse_by_steps(z)
        if not records_gradients((z, *self.made.parameters())):
            return x, ladj
        ends = self.made.schedule[:, 0].tolist()
        return implicit_inverse(lambda x: self.spline.forward(x, self.made(x)), x, z, ends)

    def _inverse_by_steps(self, z: Tensor) -> tuple[Tensor, Tensor]:
        made = self.made

        def invert(out: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            return self.spline.inverse(z, out.unflatten(0, (-1, self.spline.outputs)).transpose(1, 2))

        layers = [layer.args() for layer in made.layers]
        return solve(z, layers, made.schedule, made.activation, self.spline.outputs, invert)

    def _inverse_by_modules(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, dimension = torch.zeros_like(z), torch.arange(self.features, device=z.device)
        terms = x
        for finished in self.made.schedule[:, 0].tolist():
            found, terms = self.spline.inverse(z, self.made(x))
            x = torch.where(dimension < finished, found, 0)
        return x, terms.sum(1)

    def config(self) -> dict[str, Any]:
        return {**network_config(self.made), "spline": self.spline._asdict()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> MonotonicRQS:
        spline = SplineMap(**config["spline"])
        return cls(network_from(config, tensors, outputs_per_feature=spline.outputs), spline)

    def extra_repr(self) -> str:
        return f"{self.spline}, steps={self.made.steps}"
