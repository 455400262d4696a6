"""Invertible transforms: the steps that a flow is a sequence of.

``forward`` takes data towards the base distribution (x to z), ``inverse`` takes it back; both return the log absolute
determinant of their own Jacobian, in nats. A new transform subclasses ``Transform`` and is listed in ``TRANSFORMS``,
which lets it be saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmaf import hooks
from fastmaf.degrees import check_permutation
from fastmaf.kernels import Block, affine_output, level_inverse
from fastmaf.kernels.affine_output.reference import bound_log_scale
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.nn import MADE, MaskedLinear


class NotInvertibleError(RuntimeError):
    """The inverse of a model was asked for that has none, such as one with the notebook's leaky output mask."""


class Transform(nn.Module):
    """An invertible map of ``[N, D]`` to ``[N, D]``.

    ``forward``, ``inverse`` and ``forward_per_dim`` of every subclass run without ambient ``torch.autocast``, and take
    bfloat16 and float16 inputs from within an autocast region in the transform's dtype. A conditioner that is to run in
    half precision enters ``torch.autocast`` itself.

    Attributes:
        features: D.
    """

    features: int

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("forward", "inverse", "forward_per_dim"):
            if name in vars(cls):
                setattr(cls, name, outside_autocast(vars(cls)[name]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``z`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dz/dx|."""
        raise NotImplementedError

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dx/dz|."""
        raise NotImplementedError

    def forward_per_dim(self, x: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``z`` and ``terms`` with each dimension's share of −ladj added, both in the frame of ``z``.

        Args:
            x: ``[N, D]``.
            terms: ``[N, D]``, what the transforms before this one contributed, in the frame of ``x``.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say how its log-determinant is shared among the dimensions"
        )

    def config(self) -> dict[str, Any]:
        """Returns what ``from_config`` needs beside the tensors of ``state_dict``; plain JSON types."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Transform:
        """Builds the transform that ``config`` describes; ``tensors`` are then loaded into it as its state_dict."""
        raise NotImplementedError


class Permutation(Transform):
    """Reorders the dimensions: ``z[:, k] = x[:, permutation[k]]``. Its log-determinant is 0.

    Args:
        permutation: ``[D]`` integers, each of 0..D-1 once.
    """

    permutation: Tensor

    def __init__(self, permutation: Tensor) -> None:
        super().__init__()
        self.features = permutation.numel()
        self._first = check_permutation("permutation", permutation, self.features)
        self.register_buffer("permutation", self._first.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, self.permutation], x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z[:, self.inverse_permutation], z.new_zeros(z.shape[0])

    @property
    def inverse_permutation(self) -> Tensor:
        """``[D]`` int64: where each dimension of the data stands."""
        places = torch.arange(self.features, device=self.permutation.device)
        return torch.zeros_like(self.permutation).scatter(0, self.permutation, places)

    def forward_per_dim(self, x: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, self.permutation], terms[:, self.permutation]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Permutation:
        was_meta = self.permutation.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.permutation.is_meta:  # ``to_empty`` of a flow that was planned without memory
            self.permutation.copy_(self._first)
        return self

    def config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Permutation:
        return cls(tensors["permutation"])

    def extra_repr(self) -> str:
        return f"features={self.features}"


class Logit(Transform):
    """``z = logit(a + (1 - 2a) x)``: takes data in (0, 1), such as dequantised pixels, to the whole real line.

    Dinh et al. 2017, Density estimation using Real NVP, section 4.1.

    Args:
        features: D.
        alpha: a, in [0, ½): keeps 0 and 1 themselves within reach; 0 leaves them out.

    The domain is ``0 < a + (1 - 2a) x < 1``. ``forward`` takes values outside of it to the z of the nearest number
    inside, with ``ladj`` −inf, so that the density of such a row is zero: ``log_prob`` −inf. ``inverse`` takes every
    real z to a number within the domain: where its sigmoid rounds to 0 or 1, to the nearest number beside it.
    """

    def __init__(self, features: int, alpha: float = 0.05) -> None:
        super().__init__()
        if not 0 <= alpha < 0.5:
            raise ValueError(f"alpha must lie in [0, 0.5); found {alpha}")
        self.features, self.alpha = features, float(alpha)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, terms = self.forward_per_dim(x, torch.zeros_like(x))
        return z, -terms.sum(dim=1)

    def forward_per_dim(self, x: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        p, numbers = self.alpha + (1 - 2 * self.alpha) * x, torch.finfo(x.dtype)
        outside = (p <= 0) | (p >= 1)
        p = torch.where(outside, p.clamp(numbers.tiny, 1 - numbers.eps / 2), p)
        terms = terms + p.log() + (-p).log1p() - math.log(1 - 2 * self.alpha)
        return torch.logit(p), terms.masked_fill(outside, math.inf)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        # As far within (0, 1) that the roundings of x, and of forward, do not leave it again.
        numbers = torch.finfo(z.dtype)
        margin = 4 * numbers.eps if self.alpha else numbers.eps / 2
        p = torch.sigmoid(z).clamp(numbers.tiny + self.alpha * margin, 1 - margin)
        x = (p - self.alpha) / (1 - 2 * self.alpha)
        # log of sigmoid's slope, which is symmetric, without the product of two small numbers.
        slopes = -z.abs() - 2 * torch.exp(-z.abs()).log1p()
        return x, slopes.sum(dim=1) - self.features * math.log(1 - 2 * self.alpha)

    def config(self) -> dict[str, Any]:
        return {"features": self.features, "alpha": self.alpha}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Logit:
        return cls(config["features"], config["alpha"])

    def extra_repr(self) -> str:
        return f"features={self.features}, alpha={self.alpha}"


class AffineAutoregressive(Transform):
    """One MAF block: ``z[d] = (x[d] - shift[d]) exp(-log_scale[d])``, where a MADE gives shift and log_scale from
    x[0..d-1].

    Papamakarios et al. 2017, Masked Autoregressive Flow, eq. 3-5. The inverse is exact and takes one step per distinct
    degree of the last hidden layer (``made.steps``), reading each weight once.

    Args:
        made: the network, with two outputs per feature: shift and raw log-scale.
        log_scale_bound: log-scales stay within ± this; None leaves them free.
        soft_bound: bound by ``B tanh(u / B)``, which never loses its gradient, instead of by a clamp.
    """

    def __init__(self, made: MADE, *, log_scale_bound: float | None = 5.0, soft_bound: bool = False) -> None:
        super().__init__()
        if made.outputs_per_feature != 2:
            raise ValueError(
                f"an affine block needs a MADE with 2 outputs per feature; found {made.outputs_per_feature}"
            )
        if log_scale_bound is not None and not 0 < log_scale_bound < math.inf:
            raise ValueError(
                f"log_scale_bound must be a positive number of nats, or None for no bound; found {log_scale_bound}"
            )
        if soft_bound and log_scale_bound is None:
            raise ValueError("soft_bound needs a log_scale_bound to be soft about; found None")
        self.features = made.features
        self.made = made
        self.log_scale_bound = log_scale_bound
        self.soft_bound = soft_bound

    @property
    def calls_modules(self) -> bool:
        """Whether its network must be called as a module: hooks or parametrisations hang on its parts, or one of them
        is of another class than ``MADE`` and ``MaskedLinear``.
        """
        return self._plain_layers() is None

    def _plain_layers(self) -> list[MaskedLinear] | None:
        made = self._modules["made"]
        return made.plain_layers() if type(made) is MADE and not hooks.any_global() else None

    def _shift_and_log_scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both ``[N, D]``, of the network called as a module."""
        shift, raw = self.made(x).unbind(-1)
        return shift, bound_log_scale(raw, self._bound, self.soft_bound)

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.calls_modules:
            shift, log_scale = self._shift_and_log_scale(x)
            return (x - shift) * torch.exp(-log_scale), -log_scale.sum(dim=1), log_scale
        out = self.made.output
        return affine_output(
            self.made.hidden_units(x),
            out.packed_weight,
            out.bias,
            x,
            out.prefix,
            out.layout.table,
            self._bound,
            self.soft_bound,
        )

    @property
    def _bound(self) -> float:
        return math.inf if self.log_scale_bound is None else float(self.log_scale_bound)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, ladj, _ = self._affine(x)
        return z, ladj

    def forward_per_dim(self, x: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        z, _, log_scale = self._affine(x)
        return z, terms + log_scale

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self.check_invertible()
        if self.calls_modules:
            return self._inverse_by_modules(z)
        return level_inverse(z, *self.block())

    def _inverse_by_modules(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Inverts with one call of the network per step, each of which finishes the dimensions of one level."""
        x, log_scale = torch.zeros_like(z), torch.zeros_like(z)
        place = torch.arange(self.features, device=z.device)
        for finished in self.made.schedule[:, 0].tolist():
            shift, log_scale = self._shift_and_log_scale(x)
            # The others are of no use yet; left at zero they cannot overflow, which would reach the finished ones as
            # infinity times a weight of zero.
            x = torch.where(place < finished, z * torch.exp(log_scale) + shift, 0)
        return x, log_scale.sum(dim=1)

    def check_invertible(self) -> None:
        """Raises NotInvertibleError where the output mask leaks."""
        if not self.made.strict:
            raise NotInvertibleError(
                "this block has the leaky output mask (>= where it must be >): where an output shares its degree with "
                "a unit in every hidden layer it reads its own input, so the map has no autoregressive inverse, its "
                "log-determinant is not the sum of the log-scales and its NLL is no density. It can score, not "
                "sample; train with strict masks to sample"
            )

    def block(self) -> Block:
        """Returns the block as the ops that take several of them see it."""
        made = self.made  # once: nn.Module searches for every attribute, and a flow asks for hundreds
        layers = made.layers
        weights, biases, prefixes, tables = zip(
            *((layer.packed_weight, layer._parameters["bias"], layer.prefix, layer.layout.table) for layer in layers),
            strict=True,
        )
        return Block(
            list(weights),
            list(biases),
            list(prefixes),
            list(tables),
            made.schedule,
            made.activation,
            self._bound,
            self.soft_bound,
        )

    def config(self) -> dict[str, Any]:
        return {
            "features": self.features,
            "hidden_features": list(self.made.hidden_features),
            "activation": self.made.activation,
            "strict": self.made.strict,
            "log_scale_bound": self.log_scale_bound,
            "soft_bound": self.soft_bound,
            **({} if self.made.weight_dtype is None else {"weight_dtype": str(self.made.weight_dtype)}),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AffineAutoregressive:
        hidden: Sequence[int] = config["hidden_features"]
        degrees = [tensors[f"made.degrees_{k}"] for k in range(len(hidden))]
        dtype = tensors["made.output.bias"].dtype
        made = MADE(
            config["features"],
            hidden,
            degrees=degrees,
            activation=config["activation"],
            strict=config["strict"],
            init="empty",
            dtype=dtype,
        )
        if config.get("weight_dtype") == str(torch.bfloat16):
            made.store_weights_as_(torch.bfloat16)
        return cls(made, log_scale_bound=config["log_scale_bound"], soft_bound=config["soft_bound"])

    def extra_repr(self) -> str:
        return f"log_scale_bound={self.log_scale_bound}, soft_bound={self.soft_bound}, steps={self.made.steps}"


TRANSFORMS: dict[str, type[Transform]] = {
    "permutation": Permutation,
    "logit": Logit,
    "affine_autoregressive": AffineAutoregressive,
}
