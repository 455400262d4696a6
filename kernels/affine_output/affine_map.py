"""The element-wise map of an affine autoregressive layer: what is made of a dimension's shift and raw scale.

    form SHIFT_FIRST:   z = (x - m) exp(-a),    log |dz/dx| = -a          (MAF, Papamakarios et al. 2017, eq. 3-5)
    form SCALE_FIRST:   z = exp(a) x + m,       log |dz/dx| = +a          (as nflows, zuko and normflows)

with the shift ``m`` and the log-scale ``a``, a function of the raw output ``u`` of the network:

    CLAMP       a = clamp(u, -limit, limit)
    TANH        a = limit tanh(u / limit)
    SOFTPLUS    a = log(softplus(u) + epsilon)
    SIGMOID     a = log(sigmoid(u + limit) + epsilon)
    SOFT_CLIP   a = u / (1 + |u| / limit)

An infinite limit leaves ``u`` alone in CLAMP, TANH and SOFT_CLIP. Each derivative da/du is a function of ``a``, which
is what a forward pass saves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

SHIFT_FIRST, SCALE_FIRST = range(2)
CLAMP, TANH, SOFTPLUS, SIGMOID, SOFT_CLIP = range(5)


class AffineMap(NamedTuple):
    """An element-wise map; four numbers, as the ops receive it.

    Attributes:
        form: ``SHIFT_FIRST`` or ``SCALE_FIRST``.
        scale: one of ``CLAMP``, ``TANH``, ``SOFTPLUS``, ``SIGMOID``, ``SOFT_CLIP``.
        limit: the bound of log-scales, or what SIGMOID adds to ``u``; not used by SOFTPLUS.
        epsilon: the least scale of SOFTPLUS and SIGMOID.
    """

    form: float = SHIFT_FIRST
    scale: float = CLAMP
    limit: float = math.inf
    epsilon: float = 0.0

    def check(self) -> None:
        """Raises ValueError unless the numbers describe a map."""
        if self.form not in (SHIFT_FIRST, SCALE_FIRST) or self.scale not in range(5):
            raise ValueError(f"an affine map needs a form of 0 or 1 and a scale of 0 to 4; found {tuple(self)}")
        if self.scale in (CLAMP, TANH, SOFT_CLIP) and not self.limit > 0:
            raise ValueError(f"the limit of log-scales must be positive; found {self.limit}")
        if not (0 <= self.epsilon < math.inf) or math.isnan(self.limit):
            raise ValueError(f"epsilon must be finite and not negative, and limit a number; found {tuple(self)}")

    @property
    def sign(self) -> int:
        """Of the log-scale in log |dz/dx|."""
        return -1 if self.form == SHIFT_FIRST else 1

    def log_scale(self, u: Tensor) -> Tensor:
        """Returns the log-scale ``a`` for the network's raw output ``u``."""
        if self.scale == SOFTPLUS:
            return torch.log(softplus(u) + self.epsilon)
        if self.scale == SIGMOID:
            return torch.log(torch.sigmoid(u + self.limit) + self.epsilon)
        if math.isinf(self.limit):
            return u
        if self.scale == TANH:
            return self.limit * torch.tanh(u / self.limit)
        if self.scale == SOFT_CLIP:
            return u / (1 + u.abs() / self.limit)
        return u.clamp(-self.limit, self.limit)

    def slope(self, a: Tensor) -> Tensor:
        """Returns da/du as a function of ``a``: zero where a clamp holds."""
        if self.scale == SOFTPLUS:
            s = torch.exp(a)
            return -torch.expm1(self.epsilon - s) / s
        if self.scale == SIGMOID:
            s = torch.exp(a)
            probability = s - self.epsilon
            return probability * (1 - probability) / s
        if math.isinf(self.limit):
            return torch.ones_like(a)
        if self.scale == TANH:
            return 1 - (a / self.limit).square()
        if self.scale == SOFT_CLIP:
            return (1 - a.abs() / self.limit).square()
        return (a.abs() < self.limit).to(a.dtype)

    def forward(self, x: Tensor, shift: Tensor, a: Tensor) -> Tensor:
        """Returns ``z``."""
        return (x - shift) * torch.exp(-a) if self.form == SHIFT_FIRST else x * torch.exp(a) + shift

    def inverse(self, z: Tensor, shift: Tensor, a: Tensor) -> Tensor:
        """Returns ``x``."""
        return z * torch.exp(a) + shift if self.form == SHIFT_FIRST else (z - shift) * torch.exp(-a)


def bounded_map(bound: float, soft: bool) -> AffineMap:
    """Returns the map of a MAF whose log-scales stay within ``±bound``, by a tanh if ``soft``, else by a clamp."""
    return AffineMap(SHIFT_FIRST, TANH if soft else CLAMP, bound)
