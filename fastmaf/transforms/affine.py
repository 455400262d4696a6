"""Affine autoregressive transforms: the blocks of a MAF."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmaf import hooks
from fastmaf.kernels import (
    AffineArgs,
    AffineMap,
    Block,
    affine_output,
    bounded_map,
    empty_on_huge_pages,
    flow_args,
    flow_forward,
    flow_inverse,
)
from fastmaf.kernels.float8 import BYTE, FLOAT8
from fastmaf.nn import MADE
from fastmaf.transforms.base import NotInvertibleError, Transform


class AffineAutoregressive(Transform):
    """An affine autoregressive transform, the block of a MAF::

        z[d] = (x[d] − shift[d]) exp(−log_scale[d]),    shift[d], log_scale[d] = MADE(x[0..d−1])
        ladj = −Σ_d log_scale[d]

    The inverse x[d] = z[d] exp(log_scale[d]) + shift[d] is exact. It takes one step per distinct degree of the last
    hidden layer (``made.steps``) and reads each weight once.

    Args:
        made: the network, with two outputs per feature: the shift and the unbounded log-scale.
        log_scale_bound: bound of the absolute log-scales in nats; None for no bound.
        soft_bound: bound by ``B tanh(u / B)``, which keeps a gradient everywhere, instead of a clamp.

    Raises:
        ValueError: an argument is out of range; the message states what was expected and found.

    References:
        Papamakarios, Pavlakou and Murray 2017, Masked Autoregressive Flow for Density Estimation, eq. 3-5.

    Example:
        >>> block = fastmaf.AffineAutoregressive(fastmaf.MADE(features=3, hidden_features=16))
        >>> x = torch.randn(5, 3)
        >>> z, ladj = block(x)
        >>> torch.allclose(block.inverse(z)[0], x, atol=1e-4)
        True
    """

    def __init__(self, made: MADE, *, log_scale_bound: float | None = 5.0, soft_bound: bool = False) -> None:
        super().__init__()
        if made.outputs_per_feature != 2:
            raise ValueError(
                f"an affine block needs a MADE with 2 outputs per feature; found {made.outputs_per_feature}"
            )
        if log_scale_bound is not None and not 0 < log_scale_bound < math.inf:
            raise ValueError(
                f"log_scale_bound must be a positive number of nats, or None for no bound; found {log_scale_bound}"
            )
        if soft_bound and log_scale_bound is None:
            raise ValueError("soft_bound needs a log_scale_bound; found None")
        self.features = made.features
        self.made = made
        self.log_scale_bound = log_scale_bound
        self.soft_bound = soft_bound

    @property
    def calls_modules(self) -> bool:
        """Whether the network must be called as a module, because of hooks, parametrisations or other classes."""
        return hooks.any_global() or type(self.made) is not MADE or self.made.calls_modules

    def _shift_and_log_scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns shift and log-scale ``[N, D]``; calls the network as a module."""
        shift, raw = self.made(x).unbind(-1)
        return shift, self._map.log_scale(raw)

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.calls_modules:
            shift, log_scale = self._shift_and_log_scale(x)
            return self._map.forward(x, shift, log_scale), self._map.sign * log_scale.sum(dim=1), log_scale
        args = AffineArgs(*self.made.output.args()[:4], self._map, self.made.output.weight_scale)
        return affine_output(self.made.hidden_units(x), x, args)

    @property
    def _map(self) -> AffineMap:
        bound = math.inf if self.log_scale_bound is None else float(self.log_scale_bound)
        return bounded_map(bound, bool(self.soft_bound))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.calls_modules:
            return self._affine(x)[:2]
        return flow_forward(x, flow_args([self.block()], [None, None]))

    def forward_per_dim(self, x: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        z, _, log_scale = self._affine(x)
        return z, terms - self._map.sign * log_scale

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self.check_invertible()
        if self.calls_modules:
            return self._inverse_by_modules(z)
        return flow_inverse(z, flow_args([self.block()], [None, None]))

    def _inverse_by_modules(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Inverts with one call of the network per level."""
        x, log_scale = torch.zeros_like(z), torch.zeros_like(z)
        dimension = torch.arange(self.features, device=z.device)
        for finished in self.made.schedule[:, 0].tolist():
            shift, log_scale = self._shift_and_log_scale(x)
            # Unfinished dimensions are zero: they could overflow, and infinity times a weight of zero is NaN.
            x = torch.where(dimension < finished, self._map.inverse(z, shift, log_scale), 0)
        return x, -self._map.sign * log_scale.sum(dim=1)

    def check_invertible(self) -> None:
        """Raises NotInvertibleError if the output mask leaks."""
        if not self.made.strict:
            raise NotInvertibleError(
                "this block has the leaky output mask (>= where it must be >): an output whose degree also occurs in "
                "every hidden layer depends on its own input, so the map has no autoregressive inverse, its "
                "log-determinant is not the sum of the log-scales, and its NLL is not that of a density. It can "
                "score but not sample; train with strict masks to sample"
            )

    def block(self) -> Block:
        """Returns the block as the ops of whole flows see it."""
        made = self.made
        weights, biases, prefixes, panels, _, scales = zip(*[layer.args() for layer in made.layers], strict=True)
        return Block(weights, biases, prefixes, panels, made.schedule, made.activation, self._map, scales)

    def config(self) -> dict[str, Any]:
        output = self.made.output
        return {
            "features": self.features,
            "hidden_features": list(self.made.hidden_features),
            "activation": self.made.activation,
            "strict": self.made.strict,
            "log_scale_bound": self.log_scale_bound,
            "soft_bound": self.soft_bound,
            **({} if output.weight_dtype == output.bias.dtype else {"weight_dtype": str(output.weight_dtype)}),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AffineAutoregressive:
        hidden = config["hidden_features"]
        options = {name: config[name] for name in ("activation", "strict")}
        degrees = [tensors[f"made.degrees_{k}"] for k in range(len(hidden))]
        dtype = tensors["made.output.bias"].dtype
        made = MADE(config["features"], hidden, degrees=degrees, init="empty", dtype=dtype, **options)
        if stored := {str(torch.bfloat16): torch.bfloat16, str(FLOAT8): BYTE}.get(config.get("weight_dtype", "")):
            for layer in made.layers:
                weight = empty_on_huge_pages(layer.layout.numel, device=layer.weight.device, dtype=stored)
                layer.weight = nn.Parameter(weight, requires_grad=False)
        return cls(made, log_scale_bound=config["log_scale_bound"], soft_bound=config["soft_bound"])

    def extra_repr(self) -> str:
        return f"log_scale_bound={self.log_scale_bound}, soft_bound={self.soft_bound}, steps={self.made.steps}"
