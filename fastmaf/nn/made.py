"""The MADE network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmaf import hooks
from fastmaf.constants import Constants
from fastmaf.degrees import DegreeKind, check_features, hidden_degrees, input_degrees, layer_sizes
from fastmaf.kernels import level_schedule
from fastmaf.kernels.activations import ACTIVATIONS, OP_ACTIVATIONS
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.kernels.flow.torch.network import Network
from fastmaf.mirrored import mirror_
from fastmaf.nn.layer_options import activations_of_layers, checked_activation, context_layer
from fastmaf.nn.masked_linear import Init, MaskedLinear
from fastmaf.validation import as_integer, check_context


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
        self.residual = bool(residual)
        self.activation = checked_activation(activation, len(self.hidden_features), self.residual)
        names = self.activations
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
                context_layer(layer, self.context_features, init, generator)
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
        return activations_of_layers(self.activation, len(self.hidden_features), self.residual)

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
