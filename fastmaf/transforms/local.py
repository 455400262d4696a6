"""A masked autoregressive block for images, whose network sees a neighbourhood and is the same at every place.

A MADE over 12,288 pixels has millions of weights, which a few hundred images cannot determine. Here the degrees are
grouped: pixels at the same place of each p x p patch share one degree a channel, so a block has C p² degrees, its
masked layers are convolutions over the patches, and a handful of weights is learnt from all patches of all images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, relu

from fastmaf.constants import Constants
from fastmaf.transforms.base import Transform


class MaskedConv2d(Constants):
    """A convolution of zero-padded patches in which an output channel sees the input channels of degree <= its own.

    Args:
        in_degrees, out_degrees: of the channels, ascending.
        kernel: side of the window, odd.
        strict: an output sees only inputs of smaller degree.
        bias: add one.
        zero: start at zero; else uniform within ±1/√(inputs seen by the last output).
        generator: source of randomness.
    """

    def __init__(
        self,
        in_degrees: Tensor,
        out_degrees: Tensor,
        kernel: int,
        *,
        strict: bool = False,
        bias: bool = True,
        zero: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        seen = in_degrees < out_degrees[:, None] if strict else in_degrees <= out_degrees[:, None]
        self.kernel = kernel
        shape = (len(out_degrees), len(in_degrees), kernel, kernel)
        bound = 0.0 if zero else 1 / math.sqrt(max(1, shape[1]) * kernel**2)
        weight = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        self.set_constant("mask", seen[:, :, None, None], weight.device)
        self.weight = nn.Parameter(torch.where(self.constant("mask", weight.device), weight, 0.0))
        self.bias = nn.Parameter(torch.empty(shape[0]).uniform_(-bound, bound, generator=generator)) if bias else None

    @property
    def mask(self) -> Tensor:
        """Which weights are let through, bool ``[out, in, 1, 1]``, where the weight is."""
        return self.constant("mask", self.weight.device)

    def forward(self, x: Tensor, outputs: slice = slice(None)) -> Tensor:
        """Returns output channels ``outputs`` of the convolution of ``x`` ``[N, channels, h, w]``, where ``x`` holds
        the first input channels, all that these outputs see.
        """
        weight = torch.where(self.mask, self.weight, 0.0)[outputs, : x.shape[1]]
        bias = None if self.bias is None else self.bias[outputs]
        if not weight.numel():  # nothing seen, or nothing asked for: conv2d refuses
            nothing = x.new_zeros(len(x), len(weight), *x.shape[2:])
            return nothing if bias is None else nothing + bias[:, None, None]
        return conv2d(x, weight, bias, padding=self.kernel // 2)


class LocalAutoregressive(Constants, Transform):
    """One MAF block with a convolutional conditioner: ``z[d] = (x[d] - shift[d]) exp(-log_scale[d])``, where shift and
    log_scale come from the pixels around d whose degree is smaller.

    Degrees follow the ordered-dither matrix of a patch, so that consecutive ones are far apart and later ones see
    neighbours on all sides; within a place, channels follow one another. The inverse is exact and takes one step per
    degree, C p² in all, in each of which a share of both convolutions is computed: the arithmetic of one forward pass.

    Args:
        shape: (C, H, W) of the images that rows of x are flattened from.
        patch: p, a power of two that divides H and W.
        kernel: side of each convolution's window in patches, odd; through both a place is seen 2 kernel - 1 wide.
        hidden: hidden channels a degree; 0 for a shift that is linear and a log_scale that is constant.
        reverse: take the degrees in the opposite order.
        log_scale_bound: log-scales stay within ± this many nats, by ``B tanh(u / B)``.
        generator: makes the parameters repeatable. The block starts as the identity.

    References:
        Papamakarios et al. 2017 (MAF); van den Oord et al. 2016 (masked convolutions, PixelCNN); Bayer 1973 (the
        order).
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        patch: int = 2,
        kernel: int = 3,
        hidden: int = 4,
        reverse: bool = False,
        log_scale_bound: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if len(shape) != 3 or any(n < 1 or n != int(n) for n in shape):
            raise ValueError(f"shape must be (channels, height, width), whole numbers from 1; found {tuple(shape)}")
        channels, height, width = (int(n) for n in shape)
        if patch < 1 or patch & (patch - 1) or height % patch or width % patch:
            raise ValueError(
                f"patch must be a power of two that divides height and width; found {patch} for {height} x {width}"
            )
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd; found {kernel}")
        if hidden < 0:
            raise ValueError(f"hidden must be at least 0; found {hidden}")
        if not 0 < log_scale_bound < math.inf:
            raise ValueError(f"log_scale_bound must be a positive number of nats; found {log_scale_bound}")
        self.features = channels * height * width
        self.shape, self.patch, self.kernel, self.hidden = (channels, height, width), patch, kernel, hidden
        self.reverse, self.log_scale_bound = reverse, log_scale_bound
        groups = channels * patch**2
        # The channel of a patch, c p² + place, that has each degree: places by the dither matrix, then channels.
        on_cpu = torch.arange(channels, device="cpu")
        order = (on_cpu * patch**2 + _dither(patch).flatten().argsort()[:, None]).flatten()
        order = order.flip(0) if reverse else order
        degrees = torch.arange(groups, device="cpu")
        of_hidden = degrees.repeat_interleave(hidden)
        make: dict[str, Any] = {"generator": generator}
        self.linear = MaskedConv2d(degrees, degrees, kernel, strict=True, bias=False, zero=True, **make)
        self.first = MaskedConv2d(degrees, of_hidden, kernel, **make)
        self.second = MaskedConv2d(of_hidden, degrees.repeat_interleave(2), kernel, strict=True, zero=True, **make)
        device = self.linear.weight.device
        self.set_constant("order", order, device)
        self.set_constant("back", order.argsort(), device)

    @property
    def order(self) -> Tensor:
        """The channel of a patch that has each degree, int64 ``[C p²]``."""
        return self.constant("order", self.linear.weight.device)

    def _patches(self, x: Tensor) -> Tensor:
        """``[N, D]`` -> ``[N, C p², H/p, W/p]``, channels by degree."""
        channels, height, width = self.shape
        h, w, p = height // self.patch, width // self.patch, self.patch
        u = x.reshape(-1, channels, h, p, w, p).permute(0, 1, 3, 5, 2, 4)
        return u.reshape(-1, channels * p * p, h, w)[:, self.constant("order", x.device)]

    def _pixels(self, u: Tensor) -> Tensor:
        """The way back; torch's pixel_shuffle gives an empty batch another shape."""
        channels, height, width = self.shape
        h, w, p = height // self.patch, width // self.patch, self.patch
        x = u[:, self.constant("back", u.device)].reshape(-1, channels, p, p, h, w).permute(0, 1, 4, 2, 5, 3)
        return x.reshape(-1, self.features)

    def _bounded(self, raw: Tensor) -> Tensor:
        return self.log_scale_bound * torch.tanh(raw / self.log_scale_bound)

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z and log_scale, both ``[N, C p², H/p, W/p]``."""
        u = self._patches(x)
        shift, raw = self.second(relu(self.first(u))).unflatten(1, (-1, 2)).unbind(2)
        log_scale = self._bounded(raw)
        return (u - shift - self.linear(u)) * torch.exp(-log_scale), log_scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_scale = self._affine(x)
        return self._pixels(z), -log_scale.sum(dim=(1, 2, 3))

    def forward_per_dim(self, x: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        z, log_scale = self._affine(x)
        return self._pixels(z), terms + self._pixels(log_scale)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        v = self._patches(z)
        n, groups, h, w = v.shape
        u, units = v.new_empty(n, 0, h, w), v.new_empty(n, 0, h, w)
        ladj = z.new_zeros(n)
        for g in range(groups):
            shift, raw = self.second(units, slice(2 * g, 2 * g + 2)).unbind(1)
            log_scale = self._bounded(raw)
            own = v[:, g] * torch.exp(log_scale) + shift + self.linear(u, slice(g, g + 1))[:, 0]
            u = torch.cat([u, own[:, None]], dim=1)
            units = torch.cat([units, relu(self.first(u, slice(g * self.hidden, (g + 1) * self.hidden)))], dim=1)
            ladj = ladj + log_scale.sum(dim=(1, 2))
        return self._pixels(u), ladj

    def config(self) -> dict[str, Any]:
        names = ("patch", "kernel", "hidden", "reverse", "log_scale_bound")
        return {"shape": list(self.shape), **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LocalAutoregressive:
        options = {k: v for k, v in config.items() if k not in ("type", "shape")}
        # A generator of its own: what it draws is replaced, and loading leaves the global one alone.
        found = cls(config["shape"], **options, generator=torch.Generator())
        return found.to(tensors["second.bias"].dtype)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config().items())


def _dither(side: int) -> Tensor:
    """Returns the ordered-dither matrix ``[side, side]``: each of 0 .. side² - 1 once, neighbours far apart."""
    matrix = torch.zeros(1, 1, dtype=torch.long, device="cpu")
    while len(matrix) < side:
        matrix = torch.cat(
            [torch.cat([4 * matrix, 4 * matrix + 2], dim=1), torch.cat([4 * matrix + 3, 4 * matrix + 1], dim=1)]
        )
    return matrix
