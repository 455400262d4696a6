"""The network of an autoregressive block, and the element-wise map that it gives parameters to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

from fastmaf.kernels.masked_linear.args import LinearArgs

# Of z ``[...]`` and the outputs for it ``[..., outputs]``: x and log dx/dz, ``[...]``.
Invert: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Network(NamedTuple):
    """The network of a block.

    Attributes:
        layers: the hidden layers, then the output layer, whose rows are the outputs of one dimension after the other.
            Their own activations are not used.
        schedule: the block's ``level_schedule``.
        activations: of the hidden layers, by name.
        residual: each third, fifth, … hidden layer adds the sums of the one two layers before it to its own, before
            the activation. These layers have the same degrees.
        terms: ``[N, units]`` for each layer, added to its sums; empty for none.
    """

    layers: Sequence[LinearArgs]
    schedule: Tensor
    activations: Sequence[str]
    residual: bool = False
    terms: Sequence[Tensor] = ()

    def adds_before(self, layer: int) -> bool:
        """Returns whether a hidden layer adds the sums of the one two layers before it."""
        return self.residual and layer >= 2 and layer % 2 == 0

    def keeps_sums(self, layer: int) -> bool:
        """Returns whether the sums of a hidden layer, which are not its units, are needed by a later one."""
        is_added = layer + 2 < len(self.layers) - 1 and self.adds_before(layer + 2)
        return is_added and self.activations[layer] != "identity"

    @property
    def tensors(self) -> list[Tensor]:
        """What it is differentiable in: the weights, the biases, the terms."""
        return [*[layer.weight for layer in self.layers], *[layer.bias for layer in self.layers], *self.terms]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Network:
        """Returns the network with other ``tensors``."""
        count = len(self.layers)
        pairs = zip(self.layers, tensors[:count], tensors[count : 2 * count], strict=True)
        layers = [layer._replace(weight=weight, bias=bias) for layer, weight, bias in pairs]
        return self._replace(layers=layers, terms=list(tensors[2 * count :]))
