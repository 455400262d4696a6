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
is what a forward pass saves:

    CLAMP       1 if |a| < limit else 0
    TANH        1 - (a / limit)^2
    SOFTPLUS    -expm1(epsilon - e^a) / e^a, and e^-a where e^a - epsilon > 20
    SIGMOID     (epsilon - expm1(a)) (1 - epsilon e^-a)
    SOFT_CLIP   (1 - |a| / limit)^2

All are finite, with their derivatives, for any finite ``u``. The softplus is that of torch, hence of nflows: above 20
it is ``u``, which differs from log(1 + e^u) by 2e-9, less than float32 resolves. With epsilon = 0, SOFTPLUS tends to
``a = u`` for small ``u`` and SIGMOID to ``a = u + limit``: below -40 the former is that exactly, and the latter is a
logsigmoid.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

SHIFT_FIRST, SCALE_FIRST = range(2)
CLAMP, TANH, SOFTPLUS, SIGMOID, SOFT_CLIP = range(5)
# Above, the softplus of torch is its argument.
_THRESHOLD = 20.0
# e^-40 is less than a unit of rounding of float64: log(softplus(u)) is u below -40.
_LEAST = -40.0


FORMS = ("shift_first", "scale_first")
SCALES = ("clamp", "tanh", "softplus", "sigmoid", "soft_clip")


class AffineMap(NamedTuple):
    """The element-wise map of an affine autoregressive block, for data x, base z and the network's raw output u::

        form SHIFT_FIRST    z = (x − shift) exp(−a),    ladj = −a
        form SCALE_FIRST    z = exp(a) x + shift,       ladj = +a

        CLAMP       a = clamp(u, −limit, limit)
        TANH        a = limit tanh(u / limit)
        SOFTPLUS    a = log(softplus(u) + epsilon)          of nflows: SCALE_FIRST, epsilon 1e-3
        SIGMOID     a = log(sigmoid(u + limit) + epsilon)   of normflows: SCALE_FIRST, limit 2, epsilon 1e-3
        SOFT_CLIP   a = u / (1 + |u| / limit)               of zuko: SCALE_FIRST, limit log 1000

    Four numbers, as the ops receive it; ``AffineMap.of`` takes the names of a form and a scale, ``AffineMap.named`` the
    name of a library.

    Attributes:
        form: ``SHIFT_FIRST`` or ``SCALE_FIRST``.
        scale: one of ``CLAMP``, ``TANH``, ``SOFTPLUS``, ``SIGMOID``, ``SOFT_CLIP``.
        limit: the bound of log-scales, or what SIGMOID adds to ``u``; not used by SOFTPLUS.
        epsilon: the least scale of SOFTPLUS and SIGMOID.

    Example:
        >>> affine_map = fastmaf.AffineMap.of("scale_first", "soft_clip", limit=7.0)
        >>> affine_map.log_scale(torch.tensor([0.0, 7.0, 1e9]))
        tensor([0.0000, 3.5000, 7.0000])
    """

    form: float = SHIFT_FIRST
    scale: float = CLAMP
    limit: float = math.inf
    epsilon: float = 0.0

    @classmethod
    def of(cls, form: str, scale: str, *, limit: float = math.inf, epsilon: float = 0.0) -> AffineMap:
        """Returns the map of a form and a scale by their names in lower case.

        Raises:
            ValueError: a name is unknown, or a number out of range.

        Example:
            >>> affine_map = fastmaf.AffineMap.of("scale_first", "softplus", epsilon=1e-3)
            >>> made = fastmaf.MADE(features=3, hidden_features=16)
            >>> block = fastmaf.AffineAutoregressive(made, affine_map=affine_map)
            >>> block(torch.zeros(5, 3))[0].shape
            torch.Size([5, 3])
        """
        for name, value, known in (("form", form, FORMS), ("scale", scale, SCALES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; found {value!r}")
        found = cls(FORMS.index(form), SCALES.index(scale), limit, epsilon)
        found.check()
        return found

    @classmethod
    def named(cls, name: str) -> AffineMap:
        """Returns the map of a library's MAF: ``"nflows"``, ``"normflows"`` or ``"zuko"``.

        Raises:
            ValueError: the name is unknown.

        Example:
            >>> fastmaf.AffineMap.named("nflows").names
            ('scale_first', 'softplus')
        """
        if name not in NAMED:
            raise ValueError(f"an affine map is named {', '.join(map(repr, NAMED))}; found {name!r}")
        return NAMED[name]

    @property
    def names(self) -> tuple[str, str]:
        """The names of the form and the scale, as ``of`` takes them."""
        return FORMS[int(self.form)], SCALES[int(self.scale)]

    def check(self) -> None:
        """Raises ValueError unless the numbers describe a map."""
        if self.form not in (SHIFT_FIRST, SCALE_FIRST) or self.scale not in range(5):
            raise ValueError(f"an affine map needs a form of 0 or 1 and a scale of 0 to 4; found {tuple(self)}")
        if self.scale in (CLAMP, TANH, SOFT_CLIP) and not self.limit > 0:
            raise ValueError(f"the limit of log-scales must be positive; found {self.limit}")
        if self.scale == SIGMOID and not math.isfinite(self.limit):
            raise ValueError(f"SIGMOID needs a finite limit, which it adds to the raw output; found {self.limit}")
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon must be finite and not negative; found {self.epsilon}")

    @property
    def sign(self) -> int:
        """The sign of the log-scale in log |dz/dx|."""
        return -1 if self.form == SHIFT_FIRST else 1

    def log_derivative(self, a: Tensor) -> Tensor:
        """Returns log |dz/dx| for the log-scale ``a``."""
        return -a if self.form == SHIFT_FIRST else a

    def log_scale(self, u: Tensor) -> Tensor:
        """Returns the log-scale ``a`` for the network's raw output ``u``."""
        if self.scale == SOFTPLUS:
            if self.epsilon:
                return torch.log(softplus(u, threshold=_THRESHOLD) + self.epsilon)
            return torch.where(u < _LEAST, u, torch.log(softplus(u.clamp(min=_LEAST), threshold=_THRESHOLD)))
        if self.scale == SIGMOID:
            u = u + self.limit
            return torch.log(torch.sigmoid(u) + self.epsilon) if self.epsilon else logsigmoid(u)
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
            of_softplus = torch.where(s - self.epsilon > _THRESHOLD, 1, -torch.expm1(self.epsilon - s))
            return torch.where(s == 0, 1, of_softplus / s)
        if self.scale == SIGMOID:
            above = self.epsilon - torch.expm1(a)  # 1 - sigmoid, accurate where it is small
            return above * (1 - self.epsilon * torch.exp(-a)) if self.epsilon else above
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
        return torch.addcmul(shift, z, torch.exp(a)) if self.form == SHIFT_FIRST else (z - shift) * torch.exp(-a)


NAMED = {
    "nflows": AffineMap(SCALE_FIRST, SOFTPLUS, epsilon=1e-3),
    "normflows": AffineMap(SCALE_FIRST, SIGMOID, limit=2.0, epsilon=1e-3),
    "zuko": AffineMap(SCALE_FIRST, SOFT_CLIP, limit=math.log(1000)),
}


def bounded_map(bound: float, soft: bool) -> AffineMap:
    """Returns the map of a MAF whose log-scales stay within ``±bound``, by a tanh if ``soft``, else by a clamp."""
    return AffineMap(SHIFT_FIRST, TANH if soft else CLAMP, bound)
