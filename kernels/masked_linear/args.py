"""The arguments of ``masked_linear`` and of its backward pass, as its backends receive them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Each derivative must follow from the activation's value: y is saved for the backward pass, its argument is not.
ACTIVATIONS = ("identity", "relu")


def check_activation(activation: str) -> None:
    """Raises ValueError unless the ops know the activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}; found {activation!r}")


class LinearArgs(NamedTuple):
    """A masked linear layer.

    Attributes:
        weight: ``[numel]``, packed as ``PackedLayout`` lays it out, zero in the padding; see also ``weight_scale``.
        bias: ``[out]``.
        prefix: ``[out]`` int64, how many inputs each output sees; on the device of ``weight``.
        panels: ``PackedLayout.panels``, int64 ``[P + 1]``, on the CPU.
        activation: ``"identity"`` or ``"relu"``.
        weight_scale: the factor of a weight that is bytes; see ``float8.py``.
    """

    weight: Tensor
    bias: Tensor
    prefix: Tensor
    panels: Tensor
    activation: str = "identity"
    weight_scale: float = 1.0


LINEAR_SCHEMA = "Tensor weight, Tensor bias, Tensor prefix, Tensor panels, str activation, float weight_scale"


class LinearBatch(NamedTuple):
    """The tensors of a backward pass that have the batch as their first dimension.

    Attributes:
        grad_y: ``[N, out]``, the gradient of the output.
        x: ``[N, in]``, the input.
        y: ``[N, out]``, the output; read only where there is an activation.
    """

    grad_y: Tensor
    x: Tensor
    y: Tensor
