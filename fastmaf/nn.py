"""Masked layers and the MADE network, with their parameters in packed staircase storage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fastmaf import hooks
from fastmaf.constants import Constants
from fastmaf.degrees import DegreeKind, hidden_degrees, input_degrees, prefix
from fastmaf.kernels import LinearArgs, PackedLayout, empty_on_huge_pages, level_schedule, masked_linear
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.kernels.padding import keep_zero, without_padding

Init: TypeAlias = Literal["linear", "identity", "empty"]


class MaskedLinear(Constants):
    """A linear layer in which output unit j sees the inputs of degree <= its own (< when strict): ``y = act(W x + b)``.

    Args:
        in_degrees: ``[in_features]`` integers in ascending order.
        out_degrees: ``[out_features]`` integers in ascending order.
        strict: an output sees only inputs of smaller degree, as the last layer of a MADE must.
        activation: ``"identity"`` or ``"relu"``.
        group: keep this many consecutive rows in one tile.
        init: ``"linear"``: uniform within ±1/√in_features, as torch.nn.Linear; ``"identity"``: zeros; ``"empty"``: for
            loading.
        generator: source of randomness; None takes torch's global one.
        device, dtype: of the parameters.

    Attributes:
        weight: the packed weight, 1-D (``layout`` says where each number lies). Its padding is zero: what others write
            there is undone before the weight is used or saved.
        bias: ``[out_features]``.

    Raises:
        ValueError: degrees are not sorted.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self,
        in_degrees: Tensor,
        out_degrees: Tensor,
        *,
        strict: bool = False,
        activation: str = "identity",
        group: int = 1,
        init: Init = "linear",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, degrees in (("in_degrees", in_degrees), ("out_degrees", out_degrees)):
            if degrees.dim() != 1 or degrees.numel() == 0 or bool((degrees[1:] < degrees[:-1]).any()):
                raise ValueError(
                    f"{name} must be a non-empty 1-D tensor in ascending order: sort the units by degree first "
                    "(a relabelling: the function is unchanged)"
                )
        self.activation = activation
        self.strict = strict
        self.layout = PackedLayout(prefix(in_degrees, out_degrees, strict=strict), in_degrees.numel(), group=group)
        self.in_features, self.out_features = self.layout.in_features, self.layout.out_features
        self.weight = nn.Parameter(empty_on_huge_pages(self.layout.numel, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype))
        self.set_constant("prefix", self.layout.prefix, self.weight.device)
        self.reset_parameters(init, generator)

    @property
    def prefix(self) -> Tensor:
        """How many inputs each output sees, int64 ``[out_features]``, where the weight is."""
        return self.constant("prefix", self.weight.device)

    def reset_parameters(self, init: Init = "linear", generator: torch.Generator | None = None) -> None:
        """Draws the parameters anew; see the class for ``init``."""
        if init not in ("linear", "identity", "empty"):
            raise ValueError(f"init must be 'linear' or 'identity'; found {init!r}")
        if init == "empty" or self.weight.is_meta:  # there are no numbers to draw
            return
        with torch.no_grad():
            if init == "identity":
                self.weight.zero_()
                self.bias.zero_()
            else:
                bound = 1 / math.sqrt(self.in_features)
                self.layout.zero_padding_(self.weight.uniform_(-bound, bound, generator=generator))
                self.bias.uniform_(-bound, bound, generator=generator)

    @outside_autocast
    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[..., out_features]`` for ``x`` ``[..., in_features]``."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"MaskedLinear expects [..., {self.in_features}]; found {tuple(x.shape)}")
        y = masked_linear(x.reshape(-1, self.in_features), self.args())
        return y.reshape(*x.shape[:-1], self.out_features)

    def args(self) -> LinearArgs:
        """Returns the layer as the ops take it.

        The weight is the parameter, whose padding ops keep zero in place, or, where ``weight`` is a tensor that was
        computed (by a parametrisation, pruning, ``torch.func.functional_call``), a copy with zeros there.
        """
        weight, bias, table = self._parameters.get("weight"), self._parameters.get("bias"), self.layout.table
        if type(weight) is nn.Parameter and bias is not None:
            return LinearArgs(weight, bias, self.constant("prefix", weight.device), table, self.activation)
        prefix = self.prefix
        return LinearArgs(without_padding(self.weight, prefix, table), self.bias, prefix, table, self.activation)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        zero_padding_([self])
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self._parameters.get("weight")
        if weight is None or keep_vars or weight.is_meta or weight.shape != (self.layout.numel,):
            return
        if not _can_be_zeroed(weight):
            saved = without_padding(weight.detach(), self.prefix, self.layout.table)
            destination[f"{prefix}weight"] = saved

    def dense_weight(self) -> Tensor:
        """Returns the masked weight as a dense ``[out_features, in_features]`` matrix: for export and inspection.

        Where the weight or the bias is computed in a hook, such as by pruning, both are up to date afterwards.
        """
        hooks.compute_parameters(self)
        return self.layout.unpack(self.weight.detach())

    @torch.no_grad()
    def load_dense_(self, weight: Tensor, bias: Tensor) -> None:
        """Copies a dense weight and a bias, rows and columns sorted by degree; what the mask hides is dropped."""
        self.weight.copy_(self.layout.pack(weight.to(self.weight)))
        self.bias.copy_(bias)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        packed = state_dict.get(f"{prefix}weight")
        if isinstance(packed, Tensor) and packed.shape == self.weight.shape and not self.layout.padding_is_zero(packed):
            raise ValueError(
                f"{prefix}weight holds numbers where the mask hides the weight: it was packed for other degrees, or "
                f"is damaged"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        sizes = f"stored={self.layout.numel}, visible={self.layout.visible}"
        return f"{self.in_features}, {self.out_features}, activation={self.activation!r}, {sizes}"


def zero_padding_(layers: Iterable[MaskedLinear]) -> None:
    """Makes the padding of the layers' weights zero, where it may have been written to; see ``kernels/padding.py``."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for layer in layers:
        for name, parameter in layer._parameters.items():
            # "weight_orig" and its kin, too: what pruning and its kin compute the weight from.
            if not name.startswith("weight") or parameter is None or parameter.is_meta:
                continue
            if parameter.shape == (layer.layout.numel,) and _can_be_zeroed(parameter):
                found.append((parameter, layer.prefix, layer.layout.table))
    if found:
        keep_zero(*zip(*found, strict=True))


def _can_be_zeroed(parameter: nn.Parameter) -> bool:
    """Says whether padding can be zeroed in place: not of other classes of parameters, nor of strided memory."""
    return type(parameter) is nn.Parameter and parameter.is_contiguous()


class MADE(Constants):
    """A masked autoencoder: the parameters of dimension d depend on the dimensions before it alone (Germain et al.
    2015).

    Dimensions are taken in their natural order; put a ``Permutation`` in front for another one. Hidden units are kept
    sorted by degree.

    Args:
        features: D.
        hidden_features: units of each hidden layer.
        degrees: ``"spread"``, ``"random"``, ``"cyclic"`` or explicit; see ``fastmaf.degrees.hidden_degrees``.
        outputs_per_feature: numbers that the network gives for each dimension.
        levels: at most this many distinct hidden degrees.
        activation: of the hidden layers, ``"relu"`` or ``"identity"``.
        strict: False lets an output see hidden units of its own degree, as the published notebook does. It is then no
            autoregressive network; for comparison alone.
        init: of the output layer: ``"linear"`` or ``"identity"`` (all zeros).
        generator, device, dtype: as in ``MaskedLinear``.
    """

    def __init__(
        self,
        features: int,
        hidden_features: Sequence[int] = (512, 512),
        *,
        degrees: DegreeKind | Sequence[Tensor] = "spread",
        outputs_per_feature: int = 2,
        levels: int | None = None,
        activation: str = "relu",
        strict: bool = True,
        init: Init = "linear",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = features
        self.hidden_features = tuple(hidden_features)
        self.outputs_per_feature = outputs_per_feature
        self.activation = activation
        self.strict = strict
        drawn = hidden_degrees(degrees, features, self.hidden_features, levels=levels, generator=generator)
        inputs = input_degrees(features)
        make: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
        hidden_init: Init = "empty" if init == "empty" else "linear"
        self.hidden = nn.ModuleList(
            MaskedLinear(below, above, activation=activation, init=hidden_init, **make)
            for below, above in zip((inputs, *drawn), drawn, strict=False)
        )
        outputs = inputs.repeat_interleave(outputs_per_feature)
        self.output = MaskedLinear(drawn[-1], outputs, strict=strict, group=outputs_per_feature, init=init, **make)
        for k, layer_degrees in enumerate(drawn):
            name, value = f"degrees_{k}", layer_degrees.to(torch.int32)
            self.set_constant(name, value, self.output.bias.device, persistent=True)
        self.schedule = level_schedule(inputs, drawn)

    @property
    def degrees(self) -> list[Tensor]:
        """The sorted degrees of each hidden layer, int32."""
        device = self.output.bias.device
        return [self.constant(f"degrees_{k}", device) for k in range(len(self.hidden_features))]

    @property
    def steps(self) -> int:
        """Dependent steps of an inverse: one per distinct degree of the last hidden layer, and one for the rest."""
        return self.schedule.shape[0]

    @property
    def layers(self) -> list[MaskedLinear]:
        """The hidden layers, then the output layer."""
        hidden = self._modules["hidden"]
        assert hidden is not None
        parts = (*hidden._modules.values(), self._modules["output"])
        return [layer for layer in parts if isinstance(layer, MaskedLinear)]

    @property
    def calls_modules(self) -> bool:
        """Whether modules must be called, for hooks, parametrisations or other classes: see ``fastmaf.hooks``."""
        hidden, output = self._modules["hidden"], self._modules["output"]
        if type(self) is not MADE or type(hidden) is not nn.ModuleList or hooks.is_called(self):
            return True
        for layer in hidden._modules.values():
            if type(layer) is not MaskedLinear or hooks.is_called(layer):
                return True
        return type(output) is not MaskedLinear or hooks.is_called(output)

    @property
    def weight_dtype(self) -> torch.dtype | None:
        """The dtype in which the weights are stored where it is not that of the biases, else None."""
        stored = self.output.weight.dtype
        return None if stored == self.output.bias.dtype else stored

    def store_weights_as_(self, dtype: torch.dtype) -> None:
        """Rounds the weights to ``dtype``, in which they take no more gradients; biases stay as they are."""
        for layer in self.layers:
            layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)

    def hidden_units(self, x: Tensor) -> Tensor:
        """Returns the last hidden layer ``[N, H]`` for ``x`` ``[N, D]``."""
        for layer in self.hidden:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[N, D, outputs_per_feature]`` for ``x`` ``[N, D]``."""
        result: Tensor = self.output(self.hidden_units(x))
        return result.unflatten(-1, (self.features, self.outputs_per_feature))

    def _differs(self, name: str) -> str:
        return (
            f"{name} differs from this model's degrees, so its packed weights mean another function: build the model "
            f"with the same degrees and seed, or use fastmaf.load, which restores them"
        )
