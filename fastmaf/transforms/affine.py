"""Affine autoregressive transforms: the blocks of a MAF."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastmaf.kernels import (
    AffineArgs,
    AffineMap,
    Block,
    affine_output,
    bounded_map,
    flow_args,
    flow_forward,
    flow_inverse,
)
from fastmaf.kernels.flow.terms import forward_with_terms, inverse_with_terms, takes_terms
from fastmaf.kernels.flow.torch.network import Network
from fastmaf.kernels.op import records_gradients
from fastmaf.nn import MADE
from fastmaf.transforms.autoregressive import Autoregressive
from fastmaf.transforms.base import NotInvertibleError
from fastmaf.transforms.networks import network_config, network_from
from fastmaf.validation import check_context


class AffineAutoregressive(Autoregressive):
    """An affine autoregressive transform, the block of a MAF::

        z[d] = (x[d] − shift[d]) exp(−log_scale[d]),    shift[d], log_scale[d] = MADE(x[0..d−1])
        ladj = −Σ_d log_scale[d]

    The inverse x[d] = z[d] exp(log_scale[d]) + shift[d] is exact. It takes one step per distinct degree of the last
    hidden layer (``made.steps``) and reads each weight once.

    Args:
        made: the network, with two outputs per feature: the shift and the unbounded log-scale.
        log_scale_bound: bound of the absolute log-scales in nats; None for no bound.
        soft_bound: bound by ``B tanh(u / B)``, which keeps a gradient everywhere, instead of a clamp.
        affine_map: another map of these two outputs, such as those of other libraries; see ``AffineMap``. The two
            bounds are then part of it.

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

    def __init__(
        self,
        made: MADE,
        *,
        log_scale_bound: float | None = 5.0,
        soft_bound: bool = False,
        affine_map: AffineMap | None = None,
    ) -> None:
        super().__init__()
        if affine_map is not None:
            affine_map.check()
            log_scale_bound, soft_bound = None, False
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
        self.affine_map = affine_map

    @property
    def _map(self) -> AffineMap:
        if self.affine_map is not None:
            return self.affine_map
        bound = math.inf if self.log_scale_bound is None else float(self.log_scale_bound)
        return bounded_map(bound, bool(self.soft_bound))

    def map_forward(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = out.unbind(-1)
        log_scale = self._map.log_scale(raw)
        return self._map.forward(x, shift, log_scale), self._map.log_derivative(log_scale)

    def map_inverse(self, z: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = out.unbind(-1)
        log_scale = self._map.log_scale(raw)
        return self._map.inverse(z, shift, log_scale), -self._map.log_derivative(log_scale)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if (block := self._one_block(context, dropout=True)) is not None:
            return flow_forward(x, flow_args([block], [None, None]))
        if (result := self._with_terms(x, context)) is not None:
            return result
        return self._by_layers(x)[:2] if self._ends_in_an_op(context) else super().forward(x, context)

    def forward_per_dim(self, x: Tensor, terms: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self._ends_in_an_op(context):
            return super().forward_per_dim(x, terms, context)
        z, _, log_scale = self._by_layers(x)
        return z, terms - self._map.log_derivative(log_scale)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_invertible()
        if (block := self._one_block(context, dropout=False)) is not None:
            return flow_inverse(z, flow_args([block], [None, None]))
        return super().inverse(z, context)

    def steps(self, z: Tensor, network: Network) -> tuple[Tensor, Tensor]:
        result = inverse_with_terms(z, network, self._map)
        return super().steps(z, network) if result is None else result

    def _with_terms(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Returns the result of an op of the whole block with a context, where there is one."""
        if context is None or not self.context_features or self.calls_modules or not takes_terms(x):
            return None
        if self.made.drops_units:
            return None
        if context.dim() != 2 or len(context) != len(x) or not self.made.has_plain_layers:
            return None
        if records_gradients([x, context, *self.made.parameters()]):
            return None
        return forward_with_terms(x, self.made.network(context), self._map)

    def _one_block(self, context: Tensor | None, *, dropout: bool) -> Block | None:
        """Returns the block as the ops of whole blocks see it, None where its layers run one by one.

        A context that is the same in all rows, such as that of several samples, is a part of the biases. One with
        derivatives is not, as each of its rows has its own.
        """
        made = self.made
        if self.calls_modules or (dropout and made.drops_units) or not made.has_plain_layers:
            return None
        if context is None:
            return None if self.context_features else self.block()
        check_context(context, self.context_features)
        if context.dim() != 2 or not len(context) or (len(context) > 1 and context.stride(0)):
            return None
        if len(context) > 1 and records_gradients([context]):
            return None
        block, terms = self.block(), made.context_terms(context[:1])
        return block._replace(biases=[bias + term[0] for bias, term in zip(block.biases, terms, strict=True)])

    def _ends_in_an_op(self, context: Tensor | None) -> bool:
        """Returns whether an op computes the output layer with the map. A context that is missing or unexpected is
        found by the network.
        """
        return context is None and not self.context_features and not self.calls_modules

    def _by_layers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns z ``[N, D]``, ladj ``[N]`` and log-scales ``[N, D]``, layer by layer."""
        self._warn_of_layers(x)
        weight, bias, prefix, panels, _, scale = self.made.output.args()  # torch.compile of torch 2.7 takes no slice
        args = AffineArgs(weight, bias, prefix, panels, self._map, scale)
        return affine_output(self.made.hidden_units(x), x, args)

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
        return Block(weights, biases, prefixes, panels, made.schedule, made.activations[0], self._map, scales)

    def config(self) -> dict[str, Any]:
        return {
            **network_config(self.made),
            "strict": self.made.strict,
            "log_scale_bound": self.log_scale_bound,
            "soft_bound": self.soft_bound,
            **({} if self.affine_map is None else {"affine_map": _map_config(self.affine_map)}),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AffineAutoregressive:
        made = network_from(config, tensors, strict=config["strict"])
        affine_map = None
        if (numbers := config.get("affine_map")) is not None:
            limit = math.inf if numbers["limit"] is None else numbers["limit"]
            affine_map = AffineMap.of(numbers["form"], numbers["scale"], limit=limit, epsilon=numbers["epsilon"])
        bounds = {name: config[name] for name in ("log_scale_bound", "soft_bound")}
        return cls(made, **bounds, affine_map=affine_map)

    def extra_repr(self) -> str:
        bounds = f"log_scale_bound={self.log_scale_bound}, soft_bound={self.soft_bound}"
        return f"{bounds if self.affine_map is None else self.affine_map}, steps={self.made.steps}"


def _map_config(affine_map: AffineMap) -> dict[str, Any]:
    form, scale = affine_map.names
    limit = None if math.isinf(affine_map.limit) else float(affine_map.limit)
    return {"form": form, "scale": scale, "limit": limit, "epsilon": float(affine_map.epsilon)}
