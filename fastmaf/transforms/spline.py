"""Autoregressive rational-quadratic splines: the blocks of a neural spline flow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastmaf.nn import MADE
from fastmaf.transforms.autoregressive import Autoregressive
from fastmaf.transforms.networks import network_config, network_from
from fastmaf.transforms.spline_map import SplineMap


class MonotonicRQS(Autoregressive):
    """An autoregressive transform by monotonic rational-quadratic splines::

        z[d] = spline(x[d]; MADE(x[0..d−1])),    ladj = Σ_d log dz[d]/dx[d]

    The inverse is exact. It takes one step per distinct degree of the last hidden layer (``made.steps``) and reads each
    weight once, in plain torch; its backward pass is a triangular solve. The layers of the network run on every
    backend.

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

    map_without_op = "splines"

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

    def map_forward(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        return self.spline.forward(x, out)

    def map_inverse(self, z: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        return self.spline.inverse(z, out)

    def config(self) -> dict[str, Any]:
        return {**network_config(self.made), "spline": self.spline._asdict()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> MonotonicRQS:
        spline = SplineMap(**config["spline"])
        return cls(network_from(config, tensors, outputs_per_feature=spline.outputs), spline)

    def extra_repr(self) -> str:
        return f"{self.spline}, steps={self.made.steps}"
