"""Conversion of flows to zuko 1.6."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastmaf.convert.converted import ConditionalBlock, ConvertedFlow
from fastmaf.convert.errors import NotConvertibleError
from fastmaf.convert.export import DenseLayer, activation_of, finished, layers_of, module_of, parts_of
from fastmaf.convert.parts import kind
from fastmaf.convert.zuko import _Context
from fastmaf.flows import Flow
from fastmaf.transforms import AffineAutoregressive, ElementwiseAffine, Inverted, MonotonicRQS, Permutation

_LIMIT = math.log(1000)  # of zuko's own log-scales


def to_zuko(flow: Flow | ConvertedFlow) -> nn.Module:
    """Converts a flow to a ``zuko.flows.Flow`` of equal density, z and samples.

    zuko can express affine blocks of its own map, z = exp(u / (1 + abs(u) / limit)) x + t
    (``AffineMap.of("scale_first", "soft_clip", limit=...)``), splines of its parameters (``SplineMap`` with
    ``squash``), ``Permutation`` (as the orders of the blocks), ``ElementwiseAffine``, ``Inverted`` ones of these, and
    the contexts of flows that came from zuko. Networks have fastmaf's masks. Weights are dense again, and samples take
    one pass of the network per dimension.

    Args:
        flow: a flow, or a converted one.

    Raises:
        ImportError: zuko is not installed.
        NotConvertibleError: zuko has no exact counterpart of a part; the message names it.

    Example:
        >>> import zuko
        >>> source = zuko.flows.MAF(3, 2, transforms=2)
        >>> again = fastmaf.to_zuko(fastmaf.accelerate(source))
        >>> x, context = torch.randn(5, 3), torch.randn(5, 2)
        >>> torch.allclose(again(context).log_prob(x), source(context).log_prob(x), atol=1e-4)
        True
    """
    lazy, normal = module_of("zuko", "lazy"), module_of("zuko", "distributions").DiagNormal
    parts, natural = parts_of(flow), torch.arange(flow.features)
    frame = natural  # frame[k]: the dimension of zuko that is at place k
    transforms: list[nn.Module] = []
    for part in parts:
        if type(part) is Permutation:
            frame = frame[part.permutation.cpu()]
        else:
            transforms.append(_transform(part, frame))
    if not torch.equal(frame, natural):
        permutation = module_of("zuko", "transforms").PermutationTransform
        transforms.append(lazy.UnconditionalTransform(permutation, frame, buffer=True))
    zeros, ones = torch.zeros(flow.features), torch.ones(flow.features)
    base = lazy.UnconditionalDistribution(normal, zeros, ones, buffer=True)
    return finished(lazy.Flow(transforms, base), flow)


def _transform(part: Any, frame: Tensor) -> nn.Module:
    """Returns a transform whose place k belongs to the dimension ``frame[k]``."""
    if isinstance(part, ConditionalBlock):
        if type(part.context) is not _Context:
            raise NotConvertibleError("zuko reads a context beside x, this flow a function of it")
        block, context = part.flow._transforms()[0], part.flow.features - len(frame)
        return _block(block, frame[part.permutation.permutation.cpu()], context)
    if type(part) in (AffineAutoregressive, MonotonicRQS):
        return _block(part, frame)
    if type(part) is ElementwiseAffine:
        return _elementwise(part.shift.detach(), part.log_scale.detach(), frame)
    if type(part) is Inverted:
        return module_of("zuko", "lazy").LazyInverse(_transform(part.transform, frame))  # type: ignore[no-any-return]
    raise NotConvertibleError(f"zuko has no counterpart of the transform {kind(part)}")


def _univariate(part: Any) -> tuple[Any, list[tuple[int, ...]]]:
    """Returns zuko's element-wise transform and the shapes of its parameters."""
    transforms = module_of("zuko", "transforms")
    if type(part) is MonotonicRQS:
        spline = part.spline
        if not (spline.squash and spline.tails and spline.low == -spline.high):
            raise NotConvertibleError(
                "zuko has no counterpart of this spline: expected squash=True and an interval [-B, B] with tails; "
                f"found {spline}"
            )
        options = {"bound": spline.high, "slope": spline.least}
        shapes: list[tuple[int, ...]] = [(spline.bins,), (spline.bins,), (spline.bins - 1,)]
        return functools.partial(transforms.MonotonicRQSTransform, **options), shapes
    affine_map = part._map
    if affine_map.names != ("scale_first", "soft_clip") or not math.exp(-affine_map.limit) > 0:
        raise NotConvertibleError(
            f"zuko has no counterpart of the affine map {affine_map.names} with limit {affine_map.limit}: its own is "
            "z = exp(a) x + shift with a = u / (1 + |u| / limit), AffineMap.of('scale_first', 'soft_clip', limit=...)"
        )
    return functools.partial(transforms.MonotonicAffineTransform, slope=math.exp(-affine_map.limit)), [(), ()]


def _block(part: Any, frame: Tensor, context: int = 0) -> nn.Module:
    """Returns a block: see ``_transform``. A context comes first, and last in zuko."""
    univariate, shapes = _univariate(part)
    first, *rest = layers_of(part.made)
    place = frame.argsort()  # of each dimension
    first = first.taken(columns=torch.cat([place + context, torch.arange(context)]))
    outputs = part.made.outputs_per_feature
    rows = ((place + context)[:, None] * outputs + torch.arange(outputs)).flatten()
    # Made for two dimensions: what zuko would find out about the masks takes long for many.
    make = module_of("zuko", "flows").MaskedAutoregressiveTransform
    block = make(2, univariate=univariate, shapes=shapes, hidden_features=())
    block.order, block.passes = place, len(frame)
    layers = [first, *rest[:-1], rest[-1].taken(rows=rows)]
    _fill(block.hyper, layers, activation_of(part.made).module)
    return block  # type: ignore[no-any-return]


def _fill(hyper: Any, layers: list[DenseLayer], activation: type[nn.Module]) -> None:
    hyper._modules.clear()
    for i, layer in enumerate(layers):
        linear = module_of("zuko", "nn").MaskedLinear(layer.mask).to(layer.weight)
        layer.copy_to(linear)
        for module in (linear, activation()) if i + 1 < len(layers) else (linear,):
            hyper.add_module(str(len(hyper)), module)
    hyper.in_features, hyper.out_features = layers[0].weight.shape[1], layers[-1].weight.shape[0]


def _elementwise(shift: Tensor, log_scale: Tensor, frame: Tensor) -> nn.Module:
    # A limit of twice the largest log-scale, so that no digits are lost where it saturates.
    limit = max(_LIMIT, 2 * float(log_scale.abs().max()))
    if not math.exp(-limit) > 0:
        raise NotConvertibleError(f"zuko has no counterpart of log-scales of {limit / 2:g} nats")
    affine = module_of("zuko", "transforms").MonotonicAffineTransform
    univariate = functools.partial(affine, slope=math.exp(-limit))
    place = frame.argsort().to(shift.device)
    transform = module_of("zuko", "flows").ElementWiseTransform(len(frame), univariate=univariate)
    raw = log_scale / (1 - log_scale.abs() / limit)
    transform.phi = nn.ParameterList(part[place].clone() for part in (shift, raw))
    return transform  # type: ignore[no-any-return]
