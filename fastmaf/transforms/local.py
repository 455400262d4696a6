"""A masked autoregressive block for images whose network is a masked convolution.

A MADE over 12,288 pixels has millions of weights, which a few hundred images cannot determine. Here pixels at the same
position of each p x p patch share one degree per channel. A block then has C p² degrees, its masked layers are
convolutions over the patches, and its few weights are learnt from all patches of all images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pixel_shuffle, pixel_unshuffle, relu

from fastmaf.constants import Constants
from fastmaf.kernels import AffineMap, bounded_map
from fastmaf.transforms.base import Transform


class MaskedConv2d(Constants):
    """A zero-padded convolution in which an output channel sees the input channels of degree up to its own.

    Args:
        in_degrees, out_degrees: of the channels, ascending.
        kernel: side of the window, odd.
        strict: an output sees only inputs of smaller degree.
        bias: whether to add a bias.
        zero: initialise with zeros; else uniformly within ±1/√(number of inputs that the last output sees).
        generator: source of randomness; None uses torch's global generator.
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
        """The mask of the weight, bool ``[out, in, 1, 1]``, on its device."""
        return self.constant("mask", self.weight.device)

    @property
    def masked_weight(self) -> Tensor:
        """The weight ``[out, in, kernel, kernel]`` with zeros where the mask is False."""
        return torch.where(self.mask, self.weight, 0.0)

    def forward(self, x: Tensor, outputs: slice = slice(None)) -> Tensor:
        """Returns some output channels ``[N, len(outputs), h, w]`` of the convolution.

        Args:
            x: the first input channels ``[N, channels, h, w]``, at least those that the outputs see.
            outputs: the output channels.
        """
        weight = self.masked_weight[outputs, : x.shape[1]]
        bias = None if self.bias is None else self.bias[outputs]
        if not weight.numel():  # conv2d refuses empty weights
            zeros = x.new_zeros(len(x), len(weight), *x.shape[2:])
            return zeros if bias is None else zeros + bias[:, None, None]
        return conv2d(x, weight, bias, padding=self.kernel // 2)


class LocalAutoregressive(Constants, Transform):
    """An affine autoregressive transform of images with a convolutional network::

        z[d] = (x[d] − shift[d]) exp(−log_scale[d])

    where shift and log_scale depend on the pixels around d of smaller degree. Degrees follow the ordered-dither matrix
    of a patch, so that consecutive degrees are far apart and later ones see neighbours on all sides; the channels of a
    pixel have consecutive degrees. The inverse is exact and takes C p² steps, one per degree. Each step computes a part
    of both convolutions, so that a sample costs the arithmetic of one forward pass. It starts as the identity.

    Args:
        shape: (C, H, W) of the images whose flattened values are the rows of x.
        patch: p, a power of two that divides H and W.
        kernel: side of the window of each convolution in patches, odd. Both together see 2 · kernel − 1 patches.
        hidden: number of hidden channels per degree; 0 gives a linear shift and a constant log_scale.
        reverse: use the degrees in reverse order.
        log_scale_bound: bound B of the absolute log-scales in nats, by ``B tanh(u / B)``.
        generator: source of randomness of the parameters; None uses torch's global generator.

    Raises:
        ValueError: an argument is out of range; the message states what was expected and found.

    References:
        Papamakarios, Pavlakou and Murray 2017 (MAF). Van den Oord, Kalchbrenner and Kavukcuoglu 2016, Pixel Recurrent
        Neural Networks (masked convolutions). Bayer 1973 (ordered dither).

    Example:
        >>> block = fastmaf.LocalAutoregressive((3, 8, 8), hidden=2)
        >>> x = torch.rand(5, 3 * 8 * 8)
        >>> z, ladj = block(x)
        >>> torch.allclose(block.inverse(z)[0], x, atol=1e-5)
        True
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
        # The channel of a patch, c p² + position, of each degree: positions by the dither matrix, then channels.
        on_cpu = torch.arange(channels, device="cpu")
        order = (on_cpu * patch**2 + _dither(patch).flatten().argsort()[:, None]).flatten()
        order = order.flip(0) if reverse else order
        degrees = torch.arange(groups, device="cpu")
        of_hidden = degrees.repeat_interleave(hidden)
        of_outputs = degrees.repeat_interleave(2)
        self.linear = MaskedConv2d(degrees, degrees, kernel, strict=True, bias=False, zero=True, generator=generator)
        self.first = MaskedConv2d(degrees, of_hidden, kernel, generator=generator)
        self.second = MaskedConv2d(of_hidden, of_outputs, kernel, strict=True, zero=True, generator=generator)
        device = self.linear.weight.device
        self.set_constant("order", order, device)
        self.set_constant("back", order.argsort(), device)

    @property
    def order(self) -> Tensor:
        """The channel of a patch of each degree, int64 ``[C p²]``."""
        return self.constant("order", self.linear.weight.device)

    @property
    def _map(self) -> AffineMap:
        return bounded_map(self.log_scale_bound, soft=True)

    def _patches(self, x: Tensor) -> Tensor:
        """Returns ``x`` ``[N, D]`` as patches ``[N, C p², H/p, W/p]``, with channels sorted by degree."""
        return pixel_unshuffle(x.reshape(-1, *self.shape), self.patch)[:, self.constant("order", x.device)]

    def _pixels(self, u: Tensor) -> Tensor:
        """Inverts ``_patches``."""
        return pixel_shuffle(u[:, self.constant("back", u.device)], self.patch).reshape(-1, self.features)

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z and log_scale, both ``[N, C p², H/p, W/p]``."""
        u = self._patches(x)
        # One convolution for both layers that see u, whose windows are then gathered once.
        weight = torch.cat([self.linear.masked_weight, self.first.masked_weight])
        linear, units = conv2d(u, weight, padding=self.kernel // 2).tensor_split([u.shape[1]], dim=1)
        assert self.first.bias is not None
        shift, raw = self.second(relu(units + self.first.bias[:, None, None])).unflatten(1, (-1, 2)).unbind(2)
        log_scale = self._map.log_scale(raw)
        return (u - shift - linear) * torch.exp(-log_scale), log_scale

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
            log_scale = self._map.log_scale(raw)
            pixels = v[:, g] * torch.exp(log_scale) + shift + self.linear(u, slice(g, g + 1))[:, 0]
            u = torch.cat([u, pixels[:, None]], dim=1)
            units = torch.cat([units, relu(self.first(u, slice(g * self.hidden, (g + 1) * self.hidden)))], dim=1)
            ladj = ladj + log_scale.sum(dim=(1, 2))
        return self._pixels(u), ladj

    def config(self) -> dict[str, Any]:
        names = ("patch", "kernel", "hidden", "reverse", "log_scale_bound")
        return {"shape": list(self.shape), **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LocalAutoregressive:
        options = {k: v for k, v in config.items() if k not in ("type", "shape")}
        # The parameters are overwritten; a generator of its own leaves torch's global one unchanged.
        return cls(config["shape"], **options, generator=torch.Generator()).to(tensors["second.bias"].dtype)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config().items())


def _dither(side: int) -> Tensor:
    """Returns the ordered-dither matrix ``[side, side]`` of 0 .. side² − 1."""
    smallest = torch.tensor([[0, 2], [3, 1]], device="cpu")
    matrix = torch.zeros(1, 1, dtype=torch.long, device="cpu")
    while len(matrix) < side:
        matrix = 4 * matrix.repeat(2, 2) + smallest.kron(torch.ones_like(matrix))
    return matrix
