"""Import of models trained by the published capsule notebook.

Its keys are ``flows.{i}.made.fc{1,2,3}.{weight,bias,mask}``, repeated under ``made.net.{0,2,4}``. The rows of the
output layer are all shifts, then all log-scales, and log-scales are clamped to ±5. Degrees are not stored; they are
recovered from the masks. The output mask compares with ``>=`` where an autoregressive network needs ``>``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastmaf.degrees import input_degrees, warn_if_disconnected
from fastmaf.flows import MAF
from fastmaf.io.safe_json import shown
from fastmaf.nn import MADE
from fastmaf.transforms import AffineAutoregressive

# The notebook registers each layer twice: as fc1, fc2, fc3, and inside an nn.Sequential with its activations.
_NAMES = (("fc1", "net.0"), ("fc2", "net.2"), ("fc3", "net.4"))
_LOG_SCALE_BOUND = 5.0


class LeakyMaskError(ValueError):
    """The output mask of a model lets outputs depend on their own input, so its NLL is not that of a density.

    Example:
        >>> try:
        ...     raise fastmaf.LeakyMaskError("5 outputs see their own input")
        ... except ValueError as error:
        ...     print(error)
        5 outputs see their own input
    """


class _Layer(NamedTuple):
    weight: Tensor
    bias: Tensor
    mask: Tensor


_Layers: TypeAlias = tuple[_Layer, _Layer, _Layer]


def from_published(state_dict: Mapping[str, Tensor], *, strict: bool = True) -> MAF:
    """Converts a model trained by the published notebook to a MAF of equal density.

    Args:
        state_dict: the ``state_dict`` of the notebook's model, masks included.
        strict: refuse models whose output mask leaks. False accepts them for scoring; their inverse raises.

    Returns:
        A MAF in natural order, with the dtype of the weights.

    Raises:
        LeakyMaskError: with ``strict``, some outputs depend on their own input.
        ValueError: keys, shapes or masks differ from the notebook's.

    Example:
        One block with D = 3 and two hidden layers of 2 units of degrees 1 and 2:

        >>> inputs, hidden = torch.tensor([1, 2, 3]), torch.tensor([1, 2])
        >>> masks = {
        ...     "fc1": hidden[:, None] >= inputs,
        ...     "fc2": hidden[:, None] >= hidden,
        ...     "fc3": (inputs[:, None] > hidden).repeat(2, 1),
        ... }
        >>> state_dict = {}
        >>> for name, mask in masks.items():
        ...     state_dict[f"flows.0.made.{name}.mask"] = mask.float()
        ...     state_dict[f"flows.0.made.{name}.weight"] = torch.randn(mask.shape)
        ...     state_dict[f"flows.0.made.{name}.bias"] = torch.randn(mask.shape[0])
        >>> fastmaf.from_published(state_dict).log_prob(torch.randn(5, 3)).shape
        torch.Size([5])
    """
    count = _count_blocks(state_dict)
    layers = [_layers_of(state_dict, i) for i in range(count)]
    degrees = [_recover_degrees(i, block) for i, block in enumerate(layers)]
    leaking = sum(leaks for _, leaks in degrees)
    if leaking and strict:
        raise LeakyMaskError(
            f"{leaking} outputs over {count} blocks see their own input: the output mask was built with '>=' where it "
            "must be '>'. There the log-determinant is wrong, so the NLL is no density and the model has no inverse. "
            "from_published(..., strict=False) accepts it for scoring only"
        )
    features, dtype = layers[0][0].mask.shape[1], layers[0][0].weight.dtype
    for i, block in enumerate(layers):
        if (kind := (block[0].mask.shape[1], block[0].weight.dtype)) != (features, dtype):
            raise ValueError(f"flows.{i}.made: expected {features} features in {dtype}, as in flows.0; found {kind}")
    warn_if_disconnected(features, [[d.sort().values for d in block_degrees] for block_degrees, _ in degrees])
    blocks = [_build(block, *recovered) for block, recovered in zip(layers, degrees, strict=True)]
    return MAF.from_transforms(features, blocks)


def _count_blocks(state_dict: Mapping[str, Tensor]) -> int:
    pattern = re.compile(r"flows\.(0|[1-9][0-9]{0,5})\.made\.(?:fc[123]|net\.[024])\.")
    blocks = {int(m[1]) for key in state_dict if isinstance(key, str) and (m := pattern.match(key))}
    if blocks != set(range(len(blocks))) or not blocks:
        raise ValueError(
            "not a model of the published notebook: expected keys flows.{i}.made.fc{1,2,3}.{weight,bias,mask}; "
            f"found blocks {shown(sorted(blocks)) if blocks else 'none'} among {len(state_dict)} keys such as "
            f"{shown(sorted(map(str, state_dict))[:3])}"
        )
    return len(blocks)


def _layers_of(state_dict: Mapping[str, Tensor], block: int) -> _Layers:
    layers = []
    for names in _NAMES:
        fields = []
        for field in _Layer._fields:
            keys = [f"flows.{block}.made.{name}.{field}" for name in names]
            tensors = [_tensor(key, state_dict[key], 1 if field == "bias" else 2) for key in keys if key in state_dict]
            if not tensors:
                raise ValueError(f"the state_dict has neither {keys[0]} nor {keys[1]}")
            if len(tensors) == 2 and not (tensors[0].dtype == tensors[1].dtype and torch.equal(*tensors)):
                raise ValueError(f"{keys[0]} and {keys[1]} must be the same tensor; found two that differ")
            fields.append(tensors[0])
        layers.append(_Layer(*fields))
    first, second, third = layers
    dtypes = {tensor.dtype for layer in layers for tensor in (layer.weight, layer.bias)}
    if len(dtypes) > 1 or not first.weight.is_floating_point():
        raise ValueError(
            f"flows.{block}.made: weights and biases must have one floating-point dtype; found "
            f"{', '.join(sorted(map(str, dtypes)))}"
        )
    features, h1, h2 = first.mask.shape[1], first.mask.shape[0], second.mask.shape[0]
    for layer, expected in ((first, (h1, features)), (second, (h2, h1)), (third, (2 * features, h2))):
        shapes = tuple(layer.weight.shape), tuple(layer.mask.shape), tuple(layer.bias.shape)
        if shapes != (expected, expected, expected[:1]):
            raise ValueError(
                f"flows.{block}.made: expected weight and mask {expected} and bias {expected[:1]}; "
                f"found weight {shapes[0]}, mask {shapes[1]}, bias {shapes[2]}"
            )
        if not bool(torch.isfinite(layer.weight).all() and torch.isfinite(layer.bias).all()):
            raise ValueError(f"flows.{block}.made: weights and biases must be finite; found NaN or infinities")
        if not bool(((layer.mask == 0) | (layer.mask == 1)).all()):
            raise ValueError(f"flows.{block}.made: masks must hold 0 and 1 alone; found other numbers")
    return first, second, third


def _tensor(key: str, value: object, axes: int) -> Tensor:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.dim() != axes:
        what = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{key} must be a tensor of {axes} axes that holds numbers; found {what}")
    return value.detach().cpu()


def _recover_degrees(block: int, layers: _Layers) -> tuple[list[Tensor], int]:
    """Returns the degrees of both hidden layers, in the order of their units, and the number of leaking outputs.

    Without leaks, a strict output mask of these degrees equals the mask of the model. With leaks, the degrees are the
    notebook's own, for which its mask is ``>=``.
    """
    features = layers[0].mask.shape[1]
    inputs = input_degrees(features)
    first = layers[0].mask.ne(0).sum(1)  # the number of inputs that a unit sees is its degree
    seen_by = layers[2].mask[:features].ne(0).sum(0)
    at_least = features + 1 - seen_by  # the lowest degree of the outputs that see a unit of the second layer
    for second, strict in ((at_least - 1, True), (at_least, False)):
        degrees = ((first, inputs), (second, first), (inputs.repeat(2), at_least))
        if all(_is_mask(layer.mask, *pair) for layer, pair in zip(layers, degrees, strict=True)):
            # The strict reading fails only if units of both layers share a degree; the output of that degree leaks.
            shared = first[torch.isin(first, second)].unique()
            return [first, second], 0 if strict else shared.numel()
    raise ValueError(
        f"flows.{block}.made: the masks do not come from degrees 1..D in natural order, compared by >= (> at the "
        "output), so they are not the published notebook's"
    )


def _is_mask(mask: Tensor, above: Tensor, below: Tensor) -> bool:
    """Returns whether the mask lets units of degrees ``above`` see those ``below`` of at most their own degree."""
    # In slices, since the whole comparison would be as large as the dense model.
    slices = zip(mask.split(1024), above.split(1024), strict=True)
    return all(torch.equal(rows.ne(0), degrees[:, None] >= below) for rows, degrees in slices)


def _build(layers: _Layers, degrees: list[Tensor], leaks: int) -> AffineAutoregressive:
    features = layers[0].mask.shape[1]
    widths = [d.numel() for d in degrees]
    made = MADE(features, widths, degrees=degrees, strict=not leaks, init="empty", dtype=layers[0].weight.dtype)
    # Hidden units are sorted by degree, and the shift and the log-scale of a dimension become adjacent rows.
    interleaved = torch.arange(2 * features).view(2, features).t().flatten()
    columns = torch.arange(features)
    orders = [*(d.argsort(stable=True) for d in degrees), interleaved]
    for layer, source, rows in zip(made.layers, layers, orders, strict=True):
        layer.load_dense_(source.weight[rows][:, columns], source.bias[rows])
        columns = rows
    return AffineAutoregressive(made, log_scale_bound=_LOG_SCALE_BOUND)
