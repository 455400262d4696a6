"""The naive MAF, as it is usually implemented: masked dense weights, and an inverse of one network pass per dimension.

Tests and benchmarks compare fastmaf with it. It shares no code with the fast model: units are not sorted by degree,
dimensions are in the order of the data, and masks are compared entry by entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmaf.kernels.activations import ACTIVATIONS
from fastmaf.transforms import AffineAutoregressive, Permutation, Transform


class NaiveMADE(nn.Module):
    """An affine autoregressive block with dense masks; see ``fastmaf.AffineAutoregressive`` for the equation.

    Args:
        in_degrees: degrees 1..D of the dimensions ``[D]``, in the order of the data.
        hidden_degrees: the degrees ``[H]`` of each hidden layer.
        weights: the dense weight ``[out, in]`` of each layer. The rows of the output layer are all shifts, then all
            log-scales.
        biases: the bias ``[out]`` of each layer.
        log_scale_bound: bound of the log-scales in nats, infinity for none.
        soft_bound: bound the log-scales by a tanh instead of a clamp.
        strict: output masks compare with ``>``; False uses the leaky ``>=`` of the published notebook.
        activations: of each hidden layer; ReLUs if empty.
        residual: whether the hidden layers after the first are residual blocks of two.
        context_weights: the weight ``[out, C]`` of the context in each layer; empty where there is none.
    """

    def __init__(
        self,
        in_degrees: Tensor,
        hidden_degrees: Sequence[Tensor],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        *,
        log_scale_bound: float = 5.0,
        soft_bound: bool = False,
        strict: bool = True,
        activations: Sequence[Callable[[Tensor], Tensor]] = (),
        residual: bool = False,
        context_weights: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        self.log_scale_bound, self.soft_bound = log_scale_bound, soft_bound
        self.activations, self.residual = list(activations) or [torch.relu] * len(hidden_degrees), residual
        degrees = [in_degrees, *hidden_degrees]
        masks = [above[:, None] >= below[None, :] for below, above in zip(degrees, degrees[1:], strict=False)]
        last = (torch.gt if strict else torch.ge)(in_degrees[:, None], degrees[-1][None, :])
        masks.append(torch.cat((last, last)))
        self.weights = nn.ParameterList(nn.Parameter(w.clone()) for w in weights)
        self.biases = nn.ParameterList(nn.Parameter(b.clone()) for b in biases)
        self.context_weights = nn.ParameterList(nn.Parameter(w.clone()) for w in context_weights)
        for k, mask in enumerate(masks):
            self.register_buffer(f"mask_{k}", mask.to(weights[0]))

    def _layer(self, k: int, x: Tensor, context: Tensor | None) -> Tensor:
        y = functional.linear(x, self.weights[k] * self.get_buffer(f"mask_{k}"), self.biases[k])
        return y if context is None else y + functional.linear(context, self.context_weights[k])

    def _parameters_of(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        last = len(self.weights) - 1
        if self.residual:
            x = self._layer(0, x, context)
            for k in range(1, last, 2):
                inner = self._layer(k, self.activations[k - 1](x), context)
                x = x + self._layer(k + 1, self.activations[k](inner), context)
            x = self.activations[-1](x)
        else:
            for k in range(last):
                x = self.activations[k](self._layer(k, x, context))
        x = self._layer(last, x, context)
        shift, u = x.chunk(2, dim=1)
        if math.isinf(self.log_scale_bound):
            return shift, u
        if self.soft_bound:
            return shift, self.log_scale_bound * torch.tanh(u / self.log_scale_bound)
        return shift, u.clamp(-self.log_scale_bound, self.log_scale_bound)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``z`` ``[N, D]`` and ``ladj`` ``[N]``, for a context ``[N, C]`` if there is one."""
        shift, log_scale = self._parameters_of(x, context)
        return (x - shift) * torch.exp(-log_scale), -log_scale.sum(dim=1)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, order: Tensor, passes: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]`` after one network pass per dimension.

        Args:
            z: ``[N, D]``.
            context: ``[N, C]``, if there is one.
            order: the dimensions in the order in which they are generated.
            passes: stop after this many passes, for timing only.
        """
        x = torch.zeros_like(z)
        log_scale = torch.zeros_like(z)
        for d in order[:passes]:
            shift, log_scale = self._parameters_of(x, context)
            x = x.clone()
            x[:, d] = z[:, d] * torch.exp(log_scale[:, d]) + shift[:, d]
        _, log_scale = self._parameters_of(x, context)
        return x, log_scale.sum(dim=1)


class NaiveMAF(nn.Module):
    """A MAF of ``NaiveMADE`` blocks over a standard normal base, with dimensions in the order of the data.

    Args:
        blocks: the blocks, in the order in which they are applied to x.
        orders: the order in which each block generates the dimensions, ``[D]``.

    References:
        Papamakarios, Pavlakou and Murray 2017, Masked Autoregressive Flow for Density Estimation.

    Example:
        >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16)
        >>> naive = flow.to_naive()
        >>> z = torch.randn(5, 3)
        >>> torch.allclose(naive.inverse(z)[0], flow.inverse(z)[0], atol=1e-4)
        True
    """

    def __init__(self, blocks: Iterable[NaiveMADE], orders: Sequence[Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.orders = list(orders)

    @classmethod
    @torch.no_grad()
    def from_transforms(cls, features: int, transforms: Iterable[Transform]) -> NaiveMAF:
        """Converts permutations and affine autoregressive blocks to dense form.

        Args:
            features: D.
            transforms: the transforms, in the order in which they are applied to x.

        Raises:
            TypeError: a transform is of another class, or the last one does not restore the order of the data.
        """
        frame = torch.arange(features)  # frame[k]: the dimension of x at position k
        blocks, orders = [], []
        for transform in transforms:
            if isinstance(transform, Permutation):
                frame = frame[transform.permutation.cpu()]
            elif isinstance(transform, AffineAutoregressive):
                blocks.append(_dense_block(transform, frame))
                orders.append(frame)
            else:
                raise TypeError(
                    f"a naive MAF holds permutations and affine autoregressive blocks; found {type(transform).__name__}"
                )
        if not torch.equal(frame, torch.arange(features)):
            raise TypeError("a naive MAF stays in the frame of the data, but these transforms end in another one")
        return cls(blocks, orders)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``z`` ``[N, D]`` and ``ladj`` ``[N]``, for a context ``[N, C]`` if there is one."""
        ladj = x.new_zeros(x.shape[0])
        for block in self.blocks:
            assert isinstance(block, NaiveMADE)
            x, term = block(x, context if block.context_weights else None)
            ladj = ladj + term
        return x, ladj

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]`` after D network passes per block."""
        ladj = z.new_zeros(z.shape[0])
        for block, order in zip(reversed(list(self.blocks)), reversed(self.orders), strict=True):
            assert isinstance(block, NaiveMADE)
            z, term = block.inverse(z, context if block.context_weights else None, order=order)
            ladj = ladj + term
        return z, ladj

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the log-density ``[N]`` of ``x`` ``[N, D]`` in nats."""
        z, ladj = self.forward(x, context)
        return ladj - 0.5 * z.square().sum(dim=1) - 0.5 * z.shape[1] * math.log(2 * math.pi)


def _dense_block(block: AffineAutoregressive, frame: Tensor) -> NaiveMADE:
    if block.affine_map is not None:
        raise ValueError(f"the naive model has no block with affine_map={block.affine_map}")
    made = block.made
    position = frame.argsort().to(made.output.bias.device)  # of each dimension of x in the order of the block
    weights = [layer.dense_weight() for layer in made.layers]
    biases = [layer.bias.detach() for layer in made.layers]
    weights[0] = weights[0][:, position]
    # From interleaved rows in the order of the block to all shifts, then all log-scales, in the order of x.
    rows = torch.cat((2 * position, 2 * position + 1))
    weights[-1], biases[-1] = weights[-1][rows], biases[-1][rows]
    of_context: list[Tensor] = []
    if made.context_features:
        of_context = [layer.weight.detach() for layer in made.context_layers if isinstance(layer, nn.Linear)]
        of_context[-1] = of_context[-1][rows]
    bound = math.inf if block.log_scale_bound is None else block.log_scale_bound
    degrees = [d.to(torch.int64) for d in made.degrees]
    return NaiveMADE(
        position + 1,
        degrees,
        weights,
        biases,
        log_scale_bound=bound,
        soft_bound=block.soft_bound,
        strict=made.strict,
        activations=[ACTIVATIONS[name] for name in made.activations],
        residual=made.residual,
        context_weights=of_context,
    )
