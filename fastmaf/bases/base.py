"""The base class of the distributions that flows map data to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from fastmaf.kernels.autocast import outside_autocast
from fastmaf.validation import as_integer

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Base(nn.Module):
    """The distribution of z = f(x) under a flow, on vectors of D numbers.

    Samples are a function of standard normal numbers, a fixed count of them for each sample, so that
    ``Flow.sample(seed=...)`` repeats each row.

    A subclass implements ``log_prob`` and ``from_noise``; ``nll_per_dim`` for ``Flow.nll_per_dim``; and ``config`` and
    ``from_config``, with an entry in ``fastmaf.bases.BASES``, for ``Flow.save``. As in a ``fastmaf.Transform``, the
    methods run outside of ambient ``torch.autocast``.

    Attributes:
        features: D.
        has_rsample: whether the derivative of ``from_noise`` is that of a sample with respect to all parameters, as
            ``Flow.rsample`` requires.

    Example:
        >>> class Laplace(fastmaf.Base):
        ...     def __init__(self, features):
        ...         super().__init__()
        ...         self.features = features
        ...
        ...     def log_prob(self, z):
        ...         return -(z.abs() + 0.693147).sum(dim=1)
        ...
        ...     def from_noise(self, noise):
        ...         u = torch.special.ndtr(noise) - 0.5
        ...         return -u.sign() * (-2 * u.abs()).log1p()
        >>> block = fastmaf.AffineAutoregressive(fastmaf.MADE(features=3, hidden_features=16))
        >>> flow = fastmaf.Flow(3, [block], Laplace(3))
        >>> flow.log_prob(flow.sample(5)).shape
        torch.Size([5])
    """

    features: int
    has_rsample = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("log_prob", "from_noise", "nll_per_dim"):
            if name in vars(cls):
                setattr(cls, name, outside_autocast(vars(cls)[name]))

    @property
    def noise_features(self) -> int:
        """The count of standard normal numbers that a sample is made of."""
        return self.features

    def forward(self, z: Tensor) -> Tensor:
        """Returns ``log_prob``; flows call the module, so that hooks run."""
        return self.log_prob(z)

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns the log-density ``[N]`` in nats of ``z`` ``[N, D]``."""
        raise NotImplementedError

    def from_noise(self, noise: Tensor) -> Tensor:
        """Returns samples ``[N, D]`` for standard normal ``noise`` ``[N, noise_features]``, row by row."""
        raise NotImplementedError

    def nll_per_dim(self, z: Tensor, terms: Tensor) -> Tensor:
        """Returns ``terms`` plus the contribution of each dimension of ``z`` to −log_prob, all ``[N, D]``."""
        raise NotImplementedError(
            f"{type(self).__name__} does not define how its log-density is shared among the dimensions"
        )

    @torch.no_grad()
    def sample(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """Draws ``n`` samples ``[n, D]`` without recording gradients, with noise from ``generator``."""
        like = next((t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()), torch.empty(0))
        shape = n, self.noise_features
        return self.from_noise(torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype))

    def config(self) -> dict[str, Any]:
        """Returns the arguments of ``from_config`` other than the ``state_dict``, in plain JSON types."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Base:
        """Builds a base from its ``config()``; ``tensors``, its ``state_dict``, are loaded into it afterwards."""
        raise NotImplementedError

    def _hold(self, trainable: bool, **tensors: Tensor) -> None:
        """Keeps tensors as parameters, or as buffers where they are not to be trained."""
        for name, tensor in tensors.items():
            if trainable:
                setattr(self, name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def extra_repr(self) -> str:
        return f"features={self.features}"


def check_count(name: str, value: int, most: int | None = None) -> int:
    """Returns ``value`` as an int if it lies in 1..most.

    Raises:
        TypeError: it is not an integer.
        ValueError: it does not.
    """
    value = as_integer(name, value)
    if value < 1 or (most is not None and value > most):
        limits = "at least 1" if most is None else f"1 to {most}"
        raise ValueError(f"{name} must be {limits}; found {value}")
    return value


def vector_of(name: str, value: Tensor | float, features: int, like: Tensor, *, positive: bool = False) -> Tensor:
    """Returns a number, or one for each dimension, as a new ``[D]`` tensor of the dtype and device of ``like``.

    Raises:
        ValueError: there is another count of them, or one is not finite, or with ``positive`` not positive.
    """
    values = torch.as_tensor(value).detach()
    if values.dim() and tuple(values.shape) != (features,):
        raise ValueError(f"{name} must be a number or have shape [{features}]; found {list(values.shape)}")
    values = values.to(like).expand(features).clone()
    if not values.is_meta and not bool((values.isfinite() & ((values > 0) if positive else True)).all()):
        raise ValueError(f"{name} must be finite{' and positive' if positive else ''}; found {value}")
    return values
