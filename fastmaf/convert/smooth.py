"""Networks with activations that are not piecewise linear: their layers become those of a MADE, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastmaf.convert.activations import name_of, not_in_place, smooth_name
from fastmaf.convert.affine import Affine
from fastmaf.convert.errors import NotConvertibleError
from fastmaf.convert.network import Network
from fastmaf.convert.parts import class_name, expected, masked, scale_and_shift


def is_smooth(made: Any) -> bool:
    """Returns whether a MADE of nflows or normflows has an activation that is kept as it is."""
    return any(smooth_name(module.activation) for module in (made, *made.blocks) if hasattr(module, "activation"))


def made_network(
    made: Any, inputs: Tensor, first: Any, contexts: tuple[int, int] | None = None
) -> tuple[Network, Affine]:
    """Returns the network of a MADE of nflows or normflows, and its last hidden layer; dropout is left out.

    Args:
        made: the MADE.
        inputs: the degrees of its inputs.
        first: the activation after the first layer, where no residual block follows.
        contexts: how many numbers of the context the first layer adds, and how many each residual block reads.
    """
    layer, added = masked(made.initial_layer), None
    if contexts is not None:
        added = torch.eye(layer.out_features, sum(contexts), dtype=layer.weight.dtype, device=layer.weight.device)
    residual = [block for block in made.blocks if class_name(block) == "MaskedResidualBlock"]
    if residual and len(residual) == len(made.blocks):
        network, names = Network(inputs, layer.weight, residual=True), [name_of(block.activation) for block in residual]
        network.layer(layer.weight, layer.bias, layer.mask, names[0], added)
        for block, own, following in zip(residual, names, [*names[1:], "identity"], strict=True):
            _residual(network, block, own, following, contexts)
        return network, network.last()
    network = Network(inputs, layer.weight)
    network.layer(layer.weight, layer.bias, layer.mask, name_of(first), added)
    for block in made.blocks:
        expected(expected(block, "MaskedFeedforwardBlock").dropout, "Dropout", "Identity")
        linear = masked(block.linear)
        weight, bias = linear.weight.detach(), linear.bias.detach()
        if block.batch_norm:
            scale, shift = scale_and_shift(block.batch_norm)
            weight, bias = weight * scale, bias + (weight * linear.mask).to(weight.dtype) @ shift
        network.layer(weight, bias, linear.mask, name_of(block.activation))
    return network, network.last()


def _residual(network: Network, block: Any, own: str, following: str, contexts: tuple[int, int] | None) -> None:
    expected(block.dropout, "Dropout", "Identity")
    not_in_place(block.activation)
    if block.use_batch_norm:
        raise NotConvertibleError(
            "a batch normalisation in a residual block with a smooth activation cannot be converted"
        )
    first, second = map(masked, block.linear_layers)
    bias, context = first.bias.detach(), None
    if contexts is not None:
        layer = expected(block.context_layer, "Linear")
        context = functional.pad(layer.weight.detach(), (contexts[0], 0))
        bias = bias + layer.bias.detach()
    network.layer(first.weight, bias, first.mask, own, context)
    network.layer(second.weight, second.bias, second.mask, following)


def zuko_network(layers: Sequence[Any], inputs: Tensor) -> tuple[Network, Affine]:
    """Returns the network of the hidden layers of a MaskedMLP of zuko, and the last of them.

    Args:
        layers: without the output layer; the first reads x and the context.
        inputs: the degrees of x.
    """
    first, *rest = layers
    weight, mask, features = first.weight.detach(), first.mask, len(inputs)
    residual = bool(rest) and class_name(rest[0]) == "Residual"
    network = Network(inputs, weight, residual=residual)
    context = (weight * mask)[:, features:] if weight.shape[1] > features else None
    name = "identity" if residual else name_of(rest.pop(0))
    network.layer(weight[:, :features], first.bias, mask[:, :features], name, context)
    if residual:
        for block in rest:
            if class_name(block) != "Residual":
                raise NotConvertibleError(
                    "residual blocks of several widths with a smooth activation are not converted"
                )
            one, activation, two = block
            network.layer(masked(one).weight, one.bias, one.mask, name_of(activation))
            network.layer(masked(two).weight, two.bias, two.mask, "identity")
        return network, network.last()
    for layer, activation in zip(rest[::2], rest[1::2], strict=True):
        network.layer(masked(layer).weight, layer.bias, layer.mask, name_of(activation))
    return network, network.last()
