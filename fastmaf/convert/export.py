"""What the converters to other libraries have in common: the parts of a flow, and its networks as dense layers."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmaf.convert.activations import ACTIVATIONS, Activation
from fastmaf.convert.converted import ConditionalBlock, ConvertedFlow
from fastmaf.convert.errors import NotConvertibleError
from fastmaf.convert.parts import kind
from fastmaf.flows import Flow
from fastmaf.nn import MADE, MaskedLinear
from fastmaf.transforms import Transform


def module_of(library: str, name: str) -> Any:
    """Returns a module of the library that a flow is converted to, which fastmaf itself does not need.

    Raises:
        ImportError: the library is not installed.
    """
    try:
        return importlib.import_module(f"{library}.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(f"a flow of {library} needs {library}: pip install {library}") from error


class DenseLayer(NamedTuple):
    """A masked layer as other libraries store it.

    Attributes:
        weight: ``[out, in]``, zero where the mask hides.
        mask: boolean, of the same shape.
        bias: ``[out]``.
    """

    weight: Tensor
    mask: Tensor
    bias: Tensor

    def taken(self, rows: Tensor | None = None, columns: Tensor | None = None) -> DenseLayer:
        """Returns some rows and columns of it, in their order."""
        weight, mask, bias = self
        if rows is not None:
            weight, mask, bias = weight[rows.to(weight.device)], mask[rows], bias[rows.to(bias.device)]
        if columns is not None:
            weight, mask = weight[:, columns.to(weight.device)], mask[:, columns]
        return DenseLayer(weight, mask, bias)

    def copy_to(self, linear: nn.Linear) -> None:
        """Copies it to a masked layer of the same shape."""
        with torch.no_grad():
            linear.weight.copy_(self.weight)
            linear.bias.copy_(self.bias)
            linear.get_buffer("mask").copy_(self.mask)


def parts_of(flow: Flow | ConvertedFlow) -> list[Transform | ConditionalBlock]:
    """Returns transforms and conditional blocks, in the order in which x passes through them.

    Raises:
        NotConvertibleError: it is no flow with the standard normal base, or has forward hooks.
    """
    if not isinstance(flow, (Flow, ConvertedFlow)):
        raise NotConvertibleError(f"{kind(flow)} is no fastmaf.Flow and no converted flow")
    for module in flow.modules():
        if isinstance(module, Flow) and not module.has_standard_base:
            raise NotConvertibleError(f"{kind(module)} has another base than the standard normal one")
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise NotConvertibleError(f"{kind(module)} has hooks or a replaced forward, which would be lost")
    parts: list[Transform | ConditionalBlock] = []
    for part in [flow] if isinstance(flow, Flow) else flow.parts:
        parts += part._transforms() if isinstance(part, Flow) else [part]  # type: ignore[list-item]
    return parts


def activation_of(made: MADE) -> Activation:
    """Returns the activation of all hidden layers of a network.

    Raises:
        NotConvertibleError: it has another one for each.
    """
    if not isinstance(made.activation, str):
        raise NotConvertibleError(f"the activation {made.activation} is not converted")
    return ACTIVATIONS[made.activation]


def layers_of(made: MADE) -> list[DenseLayer]:
    """Returns the layers of a network; units are in the order of their degrees.

    Raises:
        NotConvertibleError: the network has further parts, or its output mask leaks.
    """
    parts = [name for name, _ in made.named_children()]
    if type(made) is not MADE or parts != ["hidden", "output"]:
        raise NotConvertibleError(f"the network {kind(made)} with the parts {parts} is no plain chain of masked layers")
    if made.residual:
        raise NotConvertibleError("residual blocks are not converted to other libraries")
    if not made.strict:
        raise NotConvertibleError("a leaky output mask has no inverse, in no library")
    layers = []
    for layer in (*made.hidden, made.output):
        if type(layer) is not MaskedLinear or nn.utils.parametrize.is_parametrized(layer):
            raise NotConvertibleError(f"the layer {kind(layer)} is no plain MaskedLinear: merge it into one first")
        bias = layer.bias.detach()
        layers.append(DenseLayer(layer.dense_weight().to(bias.dtype), layer.layout.mask(), bias))
    return layers


def finished(result: nn.Module, flow: nn.Module) -> nn.Module:
    """Returns a new flow with the dtype, the device and the mode of the one that it was made of; frozen if that is."""
    parameters = list(flow.parameters())
    like = next((one for one in parameters if one.dtype in (torch.float32, torch.float64)), torch.empty(0))
    result.to(like)
    if parameters and not any(one.requires_grad for one in parameters):
        result.requires_grad_(False)
    return result.train(flow.training)
