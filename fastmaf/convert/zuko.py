"""Conversion of masked affine autoregressive flows of zuko."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastmaf.convert.activations import slope_of, smooth_name
from fastmaf.convert.affine import Affine
from fastmaf.convert.converted import ConditionalBlock
from fastmaf.convert.errors import NotConvertibleError
from fastmaf.convert.network import Network
from fastmaf.convert.parts import (
    affine_block,
    base_of,
    class_name,
    expected,
    inverted,
    kind,
    masked,
    outputs_of,
    spline_block,
)
from fastmaf.convert.probe import probe
from fastmaf.convert.smooth import zuko_network
from fastmaf.convert.source import converter
from fastmaf.convert.zuko_flow import ZukoFlow
from fastmaf.kernels import AffineMap
from fastmaf.transforms import ElementwiseAffine, Permutation, SplineMap, Transform

Parts = list[Transform | ConditionalBlock]


@converter("zuko", ("transform", "base"))
def from_zuko(flow: nn.Module) -> ZukoFlow:
    """Converts a ``zuko.flows.MAF``, or another flow of masked affine autoregressive transforms.

    Orders, masks, the scale map ``exp(a / (1 + |a / log slope|))`` with the slope of the installed version, context and
    base are the source's; degrees are recovered from the masks. ``passes`` below the number of features are
    converted, too. Residual blocks become hidden layers of more units.

    Args:
        flow: a ``zuko.flows.Flow``.

    Returns:
        A flow of equal density: ``flow(context)`` gives a distribution.

    Raises:
        NotConvertibleError: a part has no exact counterpart; the message names it.

    Example:
        >>> import zuko
        >>> source = zuko.flows.MAF(3, 2, transforms=2)
        >>> flow = fastmaf.from_zuko(source)
        >>> x, context = torch.randn(5, 3), torch.randn(5, 2)
        >>> torch.allclose(flow(context).log_prob(x), source(context).log_prob(x), atol=1e-4)
        True
    """
    if class_name(flow) == "BayesianModel":
        raise NotConvertibleError(
            f"{kind(flow)} is a distribution of flows: convert one that is drawn from it, flow.sample_model()"
        )
    transform, base = getattr(flow, "transform", None), getattr(flow, "base", None)
    if transform is None or base is None:
        raise NotConvertibleError(f"{kind(flow)} is no zuko.flows.Flow")
    distribution = expected(base, "UnconditionalDistribution")()
    vectors = not distribution.batch_shape and len(distribution.event_shape) == 1
    if _name_of(type(distribution)) != "DiagNormal" or not vectors:
        raise NotConvertibleError(
            f"the base {kind(distribution)} cannot be converted; supported is a DiagNormal of vectors"
        )
    parts = _parts(transform, distribution.mean.detach())
    [features] = distribution.event_shape
    return ZukoFlow(features, parts, base_of(distribution.mean, distribution.base_dist.scale), flow)


def _parts(transform: Any, like: Tensor) -> Parts:
    """Returns the parts of a transform of vectors ``like`` this one."""
    if class_name(transform) == "LazyComposedTransform":
        return [part for one in transform.transforms for part in _parts(one, like)]
    if class_name(transform) == "LazyInverse":
        return inverted(_parts(transform.transform, like))
    parts = _leaf(transform)
    network = getattr(transform, "hyper", None)
    context = 0 if network is None else network[0].in_features - len(like)
    probe(transform, parts, lambda x, c: transform(c).call_and_ladj(x), like, context, inverse=False)
    return parts


def _leaf(transform: Any) -> Parts:
    name = class_name(transform)
    if name == "MaskedAutoregressiveTransform":
        return _block(transform)
    if name == "ElementWiseTransform" and hasattr(transform, "phi"):
        univariate = _univariate(transform.univariate, transform.shapes)
        if isinstance(univariate, AffineMap):
            shift, raw = transform.phi
            return [ElementwiseAffine(shift, univariate.log_scale(raw))]
    if name == "UnconditionalTransform" and _name_of(transform.f) == "PermutationTransform" and not transform.kwargs:
        return [Permutation(transform.args[0])]
    raise NotConvertibleError(f"the transform {kind(transform)} cannot be converted exactly")


def _name_of(cls: Any) -> str:
    """Returns the name of a class of zuko; of others, with their module."""
    name, module = getattr(cls, "__name__", None) or kind(cls), str(getattr(cls, "__module__", ""))
    return name if module.startswith("zuko.") else f"{module}.{name}"


def _univariate(univariate: Any, shapes: Any) -> AffineMap | SplineMap:
    """Returns the element-wise map of a transform, with the constants of the installed version."""
    function, options = univariate, {}
    if isinstance(univariate, functools.partial) and not univariate.args:
        function, options = univariate.func, univariate.keywords
    name = _name_of(function)
    if name not in ("MonotonicAffineTransform", "MonotonicRQSTransform") or set(options) - {"slope", "bound"}:
        raise NotConvertibleError(f"the univariate transformation {name} is neither affine nor a spline")
    parameters = inspect.signature(function).parameters
    values = {key: options.get(key, parameters[key].default) for key in ("slope", "bound") if key in parameters}
    if name == "MonotonicAffineTransform":
        return AffineMap.of("scale_first", "soft_clip", limit=abs(math.log(values["slope"])))
    bound = float(values["bound"])
    return SplineMap(shapes[0][0], -bound, bound, tails=True, least=values["slope"], squash=True)


class _Context(nn.Module):
    def forward(self, context: Tensor) -> Tensor:
        """Returns the context: the network reads it beside x."""
        return context


def _block(transform: Any) -> Parts:
    univariate = _univariate(transform.univariate, transform.shapes)
    if transform.order is None:
        raise NotConvertibleError("an adjacency matrix is no order of the features")
    if int(transform.order.max()) >= transform.passes:
        raise NotConvertibleError(f"{transform.passes} passes do not invert an order of more")
    layers, features = list(expected(transform.hyper, "MaskedMLP")), len(transform.order)
    masked(layers[0])
    passed = layers[0].in_features - features
    *hidden, last = layers
    if not hidden:
        raise NotConvertibleError("a network without hidden layers cannot be converted")
    context, order = _Context() if passed else None, transform.order.cpu() + 1
    if any(smooth_name(module) for layer in hidden for module in layer.modules()):
        (network, h), passed = zuko_network(hidden, order), 0
    else:
        network, h = _piecewise_linear(hidden, order, passed)
    outputs = outputs_of(network, h, last, transform.total)
    if isinstance(univariate, SplineMap):
        return spline_block(network, outputs, univariate, context, passed)
    shift, raw = outputs
    return affine_block(network, shift, raw, univariate, context, passed)


def _piecewise_linear(hidden: list[Any], order: Tensor, passed: int) -> tuple[Network, Affine]:
    """Returns a network whose first inputs are the context, and its last hidden layer."""
    first, *rest = hidden
    network = Network(torch.cat([torch.zeros(passed, dtype=torch.int64), order]), first.weight)
    columns = torch.arange(passed + len(order)).roll(passed)
    h = network.linear(network.last(), first.weight[:, columns], first.bias, first.mask[:, columns])
    for layer in rest:
        name = class_name(layer)
        if name.endswith("MaskedLinear"):
            masked(layer)
            h = network.linear(network.plain(h), layer.weight, layer.bias, layer.mask)
        elif name == "Residual":
            h = _residual(network, h, list(layer))
        else:
            h, _ = network.activation(slope_of(layer), h)
    return network, h


def _residual(network: Network, h: Affine, layers: list[Any]) -> Affine:
    first, activation, second = layers
    masked(first), masked(second)
    h = network.plain(h)
    value = network.linear(h, first.weight, first.bias, first.mask)
    value, [h] = network.activation(slope_of(activation), value, [h])
    return h + network.linear(value, second.weight, second.bias, second.mask)
