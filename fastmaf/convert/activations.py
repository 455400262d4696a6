"""Activations of other libraries by the names that a MADE has for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmaf.convert.errors import NotConvertibleError

SUPPORTED = "relu, leaky_relu, the identity, elu, gelu, silu and tanh"


class Activation(NamedTuple):
    """An activation with torch's default constants: the functions that compute it, and the class of its module."""

    functions: tuple[Callable[[Tensor], Tensor], ...]
    module: type[nn.Module]

    @property
    def function(self) -> Callable[[Tensor], Tensor]:
        """One of the functions."""
        return self.functions[0] if self.functions else self.module()


ACTIVATIONS = {
    "relu": Activation((functional.relu, torch.relu), nn.ReLU),
    "leaky_relu": Activation((functional.leaky_relu,), nn.LeakyReLU),
    "identity": Activation((), nn.Identity),
    "elu": Activation((functional.elu,), nn.ELU),
    "gelu": Activation((functional.gelu,), nn.GELU),
    "silu": Activation((functional.silu,), nn.SiLU),
    "tanh": Activation((functional.tanh, torch.tanh), nn.Tanh),
}
_OF_SLOPES = {0.0: "relu", 0.01: "leaky_relu", 1.0: "identity"}  # piecewise linear ones


def slope_of(activation: Any) -> float:
    """Returns the slope of an activation below zero, given as a function or a module.

    Raises:
        NotConvertibleError: it is not piecewise linear with a bend at zero.
    """
    if isinstance(activation, functools.partial):
        if activation.func is functional.leaky_relu and not activation.args:
            return float(activation.keywords.get("negative_slope", 0.01))
    elif isinstance(activation, nn.LeakyReLU):
        return float(activation.negative_slope)
    else:
        for slope, name in _OF_SLOPES.items():
            if _is(activation, ACTIVATIONS[name]):
                return slope
    name = getattr(activation, "__name__", None) or type(activation).__name__
    raise NotConvertibleError(f"the activation {name} cannot be converted exactly; supported are {SUPPORTED}")


def _is(activation: Any, known: Activation) -> bool:
    return isinstance(activation, known.module) or any(activation is function for function in known.functions)


def smooth_name(activation: Any) -> str | None:
    """Returns the name that a MADE has for a smooth activation, given as a function or a module; None for others."""
    constants = {"alpha": 1.0, "approximate": "none"}
    if any(getattr(activation, name, value) != value for name, value in constants.items()):
        return None
    names = [name for name in ACTIVATIONS if name not in _OF_SLOPES.values()]
    return next((name for name in names if _is(activation, ACTIVATIONS[name])), None)


def name_of(activation: Any) -> str:
    """Returns the name that a MADE has for an activation, smooth or not.

    Raises:
        NotConvertibleError: it has none.
    """
    if (name := smooth_name(activation)) is not None:
        return name
    if (slope := slope_of(activation)) in _OF_SLOPES:
        return _OF_SLOPES[slope]
    raise NotConvertibleError(f"a leaky ReLU of slope {slope} beside a smooth activation cannot be converted")


def not_in_place(activation: Any) -> Any:
    """Returns an activation of which a residual block needs the input afterwards.

    Raises:
        NotConvertibleError: it overwrites its input.
    """
    partial = isinstance(activation, functools.partial)
    if activation.keywords.get("inplace") if partial else getattr(activation, "inplace", False):
        raise NotConvertibleError("an activation in place changes what a residual block adds to, and is not converted")
    return activation
