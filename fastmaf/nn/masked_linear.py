"""Masked linear layers, with weights in packed staircase storage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from fastmaf import hooks
from fastmaf.constants import Constants
from fastmaf.degrees import prefix
from fastmaf.kernels import LinearArgs, PackedLayout, empty_on_huge_pages, masked_linear
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.kernels.float8 import BYTE, FLOAT8, decode, encode
from fastmaf.kernels.layout import decreases
from fastmaf.kernels.padding import keep_zero, without_padding
from fastmaf.kernels.storage import uniform_
from fastmaf.nn.state import checked_weight, scale_to_load

Init: TypeAlias = Literal["linear", "identity", "mirrored", "empty"]


class MaskedLinear(Constants):
    """A linear layer in which an output unit sees the input units of degree up to its own::

        y[j] = act(b[j] + Σ_{i: in_degrees[i] ≤ out_degrees[j]} W[j, i] x[i])

    Args:
        in_degrees: integers ``[in_features]`` in ascending order.
        out_degrees: integers ``[out_features]`` in ascending order.
        strict: an output sees only inputs of smaller degree (``<``), as the last layer of a MADE requires.
        activation: ``"identity"`` or ``"relu"``.
        init: ``"linear"``: uniform within ±1/√in_features, as ``torch.nn.Linear``; ``"identity"``: zeros; ``"empty"``:
            uninitialised, for loading.
        generator: source of randomness; None uses torch's global generator.
        device: the device of the parameters.
        dtype: the dtype of the parameters.

    Attributes:
        weight: the packed weight, 1-D; ``layout`` maps it to the matrix. Its padding is zero: values written there are
            cleared before the weight is used or saved. A ``state_dict`` holds it as it is; one of an earlier version,
            packed otherwise, is converted when it is loaded.
        bias: ``[out_features]``.
        weight_scale: the factor of a weight that is bytes, in a flow of ``to_inference(torch.float8_e4m3fn)``.

    Raises:
        ValueError: the degrees are not sorted, or ``init`` is unknown.

    Example:
        >>> layer = fastmaf.MaskedLinear(torch.tensor([1, 2, 3]), torch.tensor([1, 3]))
        >>> layer(torch.randn(5, 3)).shape
        torch.Size([5, 2])
        >>> layer.dense_weight() != 0
        tensor([[ True, False, False],
                [ True,  True,  True]])
    """

    weight: nn.Parameter
    bias: nn.Parameter
    _version = 2  # of state dicts: 1 had the weight in tiles

    def __init__(
        self,
        in_degrees: Tensor,
        out_degrees: Tensor,
        *,
        strict: bool = False,
        activation: str = "identity",
        init: Init = "linear",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, degrees in (("in_degrees", in_degrees), ("out_degrees", out_degrees)):
            if degrees.dim() != 1 or degrees.numel() == 0 or decreases(degrees):
                raise ValueError(
                    f"{name} must be a non-empty 1-D tensor in ascending order: sort the units by degree first "
                    "(a relabelling: the function is unchanged)"
                )
        self.activation = activation
        self.weight_scale = 1.0
        self.layout = PackedLayout(prefix(in_degrees, out_degrees, strict=strict), in_degrees.numel())
        self.in_features, self.out_features = self.layout.in_features, self.layout.out_features
        self.weight = nn.Parameter(empty_on_huge_pages(self.layout.numel, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype))
        self.set_constant("prefix", self.layout.prefix, self.weight.device)
        self.reset_parameters(init, generator)

    @property
    def prefix(self) -> Tensor:
        """Number of inputs that each output sees, int64 ``[out_features]``, on the device of the weight."""
        return self.constant("prefix", self.weight.device)

    @torch.no_grad()
    def reset_parameters(self, init: Init = "linear", generator: torch.Generator | None = None) -> None:
        """Reinitialises the parameters; see the class for ``init``."""
        self._refuse_float8()
        if init not in ("linear", "identity", "empty"):
            raise ValueError(f"init must be 'linear' or 'identity', or for a MADE 'mirrored'; found {init!r}")
        if init == "empty" or self.weight.is_meta:
            return
        if init == "identity":
            self.weight.zero_()
            self.bias.zero_()
        else:
            bound = 1 / math.sqrt(self.in_features)
            uniform_(self.weight, self.layout, bound, generator)
            self.bias.uniform_(-bound, bound, generator=generator)

    @outside_autocast
    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[..., out_features]`` for ``x`` ``[..., in_features]``."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"MaskedLinear expects [..., {self.in_features}]; found {tuple(x.shape)}")
        y = masked_linear(x.reshape(-1, self.in_features), self.args())
        return y.reshape(*x.shape[:-1], self.out_features)

    def args(self) -> LinearArgs:
        """Returns the layer as the argument of the ops.

        The weight is the parameter, whose padding the ops clear in place. If it is computed (by a parametrisation,
        pruning or ``torch.func.functional_call``), it is a copy with cleared padding.
        """
        weight: Tensor = self.weight
        prefix, panels = self.prefix, self.layout.panels
        if not _is_parameter(weight):
            weight = without_padding(weight, prefix, panels)
        return LinearArgs(weight, self.bias, prefix, panels, self.activation, self.weight_scale)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the weights, which float8 weights, kept as bytes, do not have themselves."""
        return FLOAT8 if self.weight.dtype == BYTE else self.weight.dtype

    def stored_as(self, dtype: torch.dtype) -> tuple[Tensor, float]:
        """Returns a copy of the weight as ``dtype``, and its ``weight_scale``.

        Raises:
            ValueError: it is to be float8, and a weight is not finite.
        """
        weight = decode(self.weight.detach(), self.weight_scale, self.bias.dtype)
        return encode(weight) if dtype == FLOAT8 else (weight.to(dtype, copy=True), 1.0)

    def _refuse_float8(self) -> None:
        if self.weight.dtype == BYTE:
            raise ValueError("a float8 weight cannot be written to: change the flow that to_inference() was called on")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        zero_padding_([self])
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self._parameters.get("weight")
        if weight is not None and weight.dtype == BYTE:
            destination[f"{prefix}weight_scale"] = torch.tensor(self.weight_scale, dtype=torch.float32, device="cpu")
        if weight is None or keep_vars or weight.is_meta or _can_be_zeroed(weight):
            return
        if weight.shape == (self.layout.numel,):
            destination[f"{prefix}weight"] = without_padding(weight.detach(), self.prefix, self.layout.panels)

    def dense_weight(self) -> Tensor:
        """Returns the masked weight as a dense matrix ``[out_features, in_features]``, for export and inspection.

        Parameters that are computed in a hook, such as by pruning, are updated first.
        """
        hooks.compute_parameters(self)
        weight = self.weight.detach()
        if weight.dtype == BYTE:
            weight = decode(weight, self.weight_scale, self.bias.dtype)
        return self.layout.unpack(weight)

    @torch.no_grad()
    def load_dense_(self, weight: Tensor, bias: Tensor) -> None:
        """Copies a dense weight and a bias into the layer; masked entries of the weight are dropped.

        Args:
            weight: ``[out_features, in_features]``, with rows and columns sorted by degree.
            bias: ``[out_features]``.
        """
        self._refuse_float8()
        self.layout.pack(weight, out=self.weight)
        self.bias.copy_(bias)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        name, metadata = f"{prefix}weight", args[0]
        packed = state_dict.get(name)
        if isinstance(packed, Tensor) and not packed.is_meta:
            packed = checked_weight(packed, self.layout, self.weight.shape, metadata.get("version"), name)
            state_dict = {**state_dict, name: packed}
        scale = scale_to_load(state_dict, prefix, self._parameters.get("weight"))
        if scale is not None and scale != self.weight_scale:
            self.weight_scale = scale
            if self.weight.is_cuda:  # CUDA graphs hold the factor: at another address they are recorded again
                self.weight.data = self.weight.data.clone()
        super()._load_from_state_dict(state_dict, prefix, *args)
        args[3][:] = [key for key in args[3] if key != f"{prefix}weight_scale"]  # those that are unexpected

    def extra_repr(self) -> str:
        sizes = f"stored={self.layout.numel}, visible={self.layout.visible}"
        return f"{self.in_features}, {self.out_features}, activation={self.activation!r}, {sizes}"


def zero_padding_(layers: Iterable[MaskedLinear]) -> None:
    """Sets the padding of the weights to zero; see ``kernels/padding.py``."""
    operands: list[tuple[Tensor, Tensor, Tensor]] = []
    for layer in layers:
        for name, parameter in layer._parameters.items():
            # Also "weight_orig" and the like, from which pruning computes the weight.
            if not name.startswith("weight") or parameter is None or parameter.is_meta:
                continue
            if parameter.shape == (layer.layout.numel,) and _can_be_zeroed(parameter):
                operands.append((parameter, layer.prefix, layer.layout.panels))
    if operands:
        keep_zero(*zip(*operands, strict=True))


def _is_parameter(weight: Tensor) -> bool:
    """Returns whether a weight is a parameter, or one of ``torch.export``, which has no numbers."""
    return type(weight) is nn.Parameter or isinstance(weight, FakeTensor) and isinstance(weight, nn.Parameter)


def _can_be_zeroed(parameter: nn.Parameter) -> bool:
    """Returns whether padding can be cleared in place: only in contiguous parameters of torch's own class."""
    return type(parameter) is nn.Parameter and parameter.is_contiguous()
