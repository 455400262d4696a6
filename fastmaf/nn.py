"""Masked linear layers and the MADE network, with weights in packed staircase storage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional

from fastmaf import hooks
from fastmaf.constants import Constants
from fastmaf.degrees import DegreeKind, check_features, hidden_degrees, input_degrees, layer_sizes, prefix
from fastmaf.kernels import LinearArgs, PackedLayout, empty_on_huge_pages, level_schedule, masked_linear
from fastmaf.kernels.activations import ACTIVATIONS, OP_ACTIVATIONS
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.kernels.float8 import BYTE, FLOAT8, decode, encode
from fastmaf.kernels.flow.torch.network import Network
from fastmaf.kernels.layout import decreases
from fastmaf.kernels.padding import keep_zero, without_padding
from fastmaf.kernels.storage import uniform_
from fastmaf.mirrored import mirror_
from fastmaf.tiles import packs_tiles, tiles_to_panels
from fastmaf.validation import as_integer, check_context

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
            if packs_tiles(packed, self.layout, metadata.get("version")):
                packed = tiles_to_panels(packed, self.layout, name)
                state_dict = {**state_dict, name: packed}
            if packed.shape == self.weight.shape and not self.layout.padding_is_zero(packed):
                raise ValueError(
                    f"{name} holds numbers where the mask hides the weight: it was packed for other degrees, is "
                    "damaged, or noise was added to it (reparameterize of zuko's BayesianModel works, sample_model "
                    "does not)"
                )
        self._load_scale(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        args[3][:] = [key for key in args[3] if key != f"{prefix}weight_scale"]  # those that are unexpected

    def _load_scale(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        weight, scale = (state_dict.get(f"{prefix}{name}") for name in ("weight", "weight_scale"))
        own_weight = self._parameters.get("weight")
        has_bytes = own_weight is not None and own_weight.dtype == BYTE
        if (weight is not None or scale is not None) and has_bytes != (scale is not None):
            found, own = ("other", "float8") if has_bytes else ("float8", "other")
            raise ValueError(
                f"{prefix}weight: a state_dict with {found} weights cannot be loaded into a layer with {own} ones: "
                "call to_inference() after loading"
            )
        if scale is not None and float(scale) != self.weight_scale:
            self.weight_scale = float(scale)
            if self.weight.is_cuda:  # CUDA graphs hold the factor: at another address they are recorded again
                self.weight.data = self.weight.data.clone()

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


class MADE(Constants):
    """A masked autoencoder: the outputs of dimension d depend only on the dimensions before it::

        h_1 = act(W_1 x + b_1), …, h_k = act(W_k h_{k-1} + b_k),    y[d] = W h_k + b    with masked W

    Dimensions are processed in their natural order; a ``Permutation`` in front changes it. Hidden units are sorted by
    degree.

    With ``residual`` the hidden layers after the first are taken in pairs, each a residual block::

        h_0 = W_0 x + b_0,    h_i = h_{i-1} + V_i act(U_i act(h_{i-1}) + c_i) + d_i,    y[d] = W h_k + b

    With a context c, each layer, the output layer included, adds C_k c to what is written W_k … + b_k above: C_k is the
    weight of ``context_layers[k]``, of which every unit sees the whole context.

    Args:
        features: D.
        hidden_features: number of units of each hidden layer; an integer gives one hidden layer.
        degrees: ``"spread"``, ``"random"``, ``"cyclic"`` or explicit; see ``fastmaf.degrees.hidden_degrees``.
        outputs_per_feature: number of outputs for each dimension.
        levels: maximum number of distinct hidden degrees.
        activation: of the hidden layers: ``"relu"``, ``"identity"``, ``"elu"``, ``"gelu"``, ``"tanh"``,
            ``"leaky_relu"`` or ``"silu"``, as the functions of ``torch.nn.functional`` with their default constants; or
            one for each hidden layer.
        residual: residual blocks. The first, third, fifth, … hidden layer must have the same number of units; they get
            the same degrees.
        context_features: C, the size of a context; 0 for none.
        dropout: the probability with which a hidden unit is zero in training mode, as ``torch.nn.Dropout``; in residual
            blocks those between the two layers.
        strict: False lets an output see hidden units of its own degree, as the published notebook does. The network is
            then not autoregressive; for comparison only.
        init: initialisation of the output layer, ``"linear"`` or ``"identity"`` (zeros); see ``MaskedLinear``. Context
            weights are initialised as further columns of their layer. ``"mirrored"``: ReLU units in pairs of opposite
            weights, so that the network starts nearly linear, and small outputs, for networks without residual
            blocks and context; see ``fastmaf.mirrored``.
        generator: source of randomness; None uses torch's global generator.
        device: the device of the parameters.
        dtype: the dtype of the parameters.

    Raises:
        TypeError, ValueError: an argument is out of range; the message states what was expected and found.

    References:
        Germain, Gregor, Murray and Larochelle 2015, MADE: Masked Autoencoder for Distribution Estimation. Residual
        blocks: Nash and Durkan 2019, Autoregressive Energy Machines.

    Example:
        >>> made = fastmaf.MADE(features=4, hidden_features=(32, 32))
        >>> x = torch.randn(4)
        >>> jacobian = torch.autograd.functional.jacobian(lambda x: made(x)[:, 0], x)
        >>> torch.equal(jacobian, jacobian.tril(-1))
        True

        Residual blocks and a context:

        >>> made = fastmaf.MADE(4, (32, 32, 32), activation="silu", residual=True, context_features=3)
        >>> made(torch.randn(5, 4), torch.randn(5, 3)).shape
        torch.Size([5, 4, 2])
    """

    context_layers: nn.ModuleList  # where there is a context
    # Of networks that were pickled without them.
    residual = False
    context_features = 0
    dropout = 0.0

    def __init__(
        self,
        features: int,
        hidden_features: int | Sequence[int] = (512, 512),
        *,
        degrees: DegreeKind | Sequence[Tensor] = "spread",
        outputs_per_feature: int = 2,
        levels: int | None = None,
        activation: str | Sequence[str] = "relu",
        residual: bool = False,
        context_features: int = 0,
        dropout: float = 0.0,
        strict: bool = True,
        init: Init = "linear",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a probability of at least 0 and less than 1; found {dropout!r}")
        self.features = features = check_features(features)
        self.hidden_features = layer_sizes(hidden_features)
        self.outputs_per_feature = outputs_per_feature
        several = isinstance(activation, Sequence) and not isinstance(activation, str)
        self.activation = tuple(activation) if several else activation
        self.residual = bool(residual)
        names = self.activations if several or isinstance(activation, str) else []
        if len(names) != len(self.hidden_features) or not all(name in list(ACTIVATIONS) for name in names):
            raise ValueError(
                f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, or one of them for each of "
                f"{len(self.hidden_features)} hidden layers; found {activation!r}"
            )
        if not self.residual and len(set(names)) == 1:
            self.activation = names[0]  # one for all: ReLUs, listed or not, then run as one op
        self.context_features = as_integer("context_features", context_features)
        if self.context_features < 0:
            raise ValueError(f"context_features must be at least 0; found {context_features}")
        if init == "mirrored" and (set(names) != {"relu"} or self.residual or self.context_features):
            raise ValueError(
                "init='mirrored' is for plain ReLU networks; found "
                f"activation={activation!r}, residual={self.residual}, context_features={context_features}"
            )
        self.dropout = float(dropout)
        self.strict = strict
        degrees_of_layers = hidden_degrees(
            degrees, features, self.hidden_features, levels=levels, residual=self.residual, generator=generator
        )
        inputs = input_degrees(features)
        make: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
        hidden_init: Init = "empty" if init == "empty" else "linear"
        of_layers = names[0] if self.is_plain else "identity"
        output_init: Init = "linear" if init == "mirrored" else init
        self.hidden = nn.ModuleList(
            MaskedLinear(below, above, activation=of_layers, init=hidden_init, **make)
            for below, above in zip((inputs, *degrees_of_layers), degrees_of_layers, strict=False)
        )
        make |= {"strict": strict, "init": output_init}
        self.output = MaskedLinear(degrees_of_layers[-1], inputs.repeat_interleave(outputs_per_feature), **make)
        if self.context_features:
            inits = [hidden_init] * len(self.hidden) + [output_init]
            self.context_layers = nn.ModuleList(
                _context_layer(layer, self.context_features, init, generator)
                for layer, init in zip(self.layers, inits, strict=True)
            )
        for k, layer_degrees in enumerate(degrees_of_layers):
            value = layer_degrees.to(torch.int32)
            self.set_constant(f"degrees_{k}", value, self.output.bias.device, persistent=True)
        self.schedule = level_schedule(inputs, degrees_of_layers)
        if init == "mirrored" and not self.output.weight.is_meta:
            mirror_(self.layers, features)

    @property
    def degrees(self) -> list[Tensor]:
        """The sorted degrees of each hidden layer, int32."""
        device = self.output.bias.device
        return [self.constant(f"degrees_{k}", device) for k in range(len(self.hidden_features))]

    @property
    def steps(self) -> int:
        """Number of dependent steps of an inverse: one per distinct degree of the last hidden layer, and a last one."""
        return self.schedule.shape[0]

    @property
    def layers(self) -> list[MaskedLinear]:
        """The hidden layers, then the output layer."""
        return [layer for layer in (*self.hidden, self.output) if isinstance(layer, MaskedLinear)]

    @property
    def calls_modules(self) -> bool:
        """Whether modules must be called because of hooks, parametrisations or other classes; see ``fastmaf.hooks``."""
        if type(self.hidden) is not nn.ModuleList or hooks.is_called(self):
            return True
        return any(type(layer) is not MaskedLinear or hooks.is_called(layer) for layer in (*self.hidden, self.output))

    @property
    def composed(self) -> bool:
        """Whether the layers run as ops one by one: for what the ops of whole blocks do not compute (residual blocks, a
        context, activations other than ReLU and the identity, and dropout in training).
        """
        return not self.is_plain or (self.training and self.dropout > 0)

    @property
    def is_plain(self) -> bool:
        """Whether the ops of the layers compute all that is between them."""
        return self.has_plain_layers and not self.context_features

    @property
    def has_plain_layers(self) -> bool:
        """Whether they do so once the terms of a context are part of the biases."""
        return self.activation in OP_ACTIVATIONS and not self.residual

    def hidden_units(self, x: Tensor, terms: Sequence[Tensor] = ()) -> Tensor:
        """Returns the last hidden layer ``[..., H]`` for ``x`` ``[..., D]`` and the ``context_terms``."""
        added: Tensor | None = None
        for k, (layer, activation) in enumerate(zip(self.hidden, self.activations, strict=True)):
            x = layer(x) + terms[k] if terms else layer(x)
            if self.residual and k % 2 == 0:
                x = added = x if added is None else x + added
            if not self.is_plain:
                x = ACTIVATIONS[activation](x)
            if self.dropout and self.training and (k % 2 or not self.residual):
                x = functional.dropout(x, self.dropout)
        return x

    @property
    def activations(self) -> list[str]:
        """The activation of each hidden layer: of the last one of residual blocks, unless it is given, the identity."""
        if not isinstance(self.activation, str):
            return list(self.activation)
        count = len(self.hidden_features)
        return [self.activation] * (count - 1) + ["identity" if self.residual else self.activation]

    def context_terms(self, context: Tensor | None) -> list[Tensor]:
        """Returns what a context ``[..., C]`` adds to each layer, ``[..., units]``; nothing where there is none.

        Raises:
            ValueError: a context is missing, unexpected or of another size.
        """
        check_context(context, self.context_features)
        return [] if context is None else [layer(context) for layer in self.context_layers]

    @outside_autocast
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns ``[..., D, outputs_per_feature]`` for ``x`` ``[..., D]`` and ``context`` ``[..., C]``."""
        terms = self.context_terms(context)
        result: Tensor = self.output(self.hidden_units(x, terms))
        result = result + terms[-1] if terms else result
        return result.unflatten(-1, (self.features, self.outputs_per_feature))

    def network(self, context: Tensor | None = None) -> Network:
        """Returns the network as the level-scheduled inverse sees it, without dropout.

        Args:
            context: ``[N, C]``.
        """
        layers = [layer.args() for layer in self.layers]
        terms = self.context_terms(context)
        return Network(layers, self.schedule, self.activations, self.residual, terms)

    def _differs(self, name: str) -> str:
        return (
            f"{name} differs from this model's degrees, so its packed weights mean another function: build the model "
            f"with the same degrees and seed, or use fastmaf.load, which restores them"
        )


def _context_layer(layer: MaskedLinear, context_features: int, init: Init, generator: torch.Generator | None) -> Any:
    like = layer.bias
    result = nn.utils.skip_init(
        nn.Linear, context_features, layer.out_features, bias=False, device=like.device, dtype=like.dtype
    )
    with torch.no_grad():
        if init == "identity":
            result.weight.zero_()
        elif init == "linear" and not like.is_meta:
            bound = 1 / math.sqrt(layer.in_features + context_features)
            result.weight.uniform_(-bound, bound, generator=generator)
    return result
