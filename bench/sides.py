"""The sides that are compared, each as its users would run it, all holding the same function.

``fastmaf``: the library, with its fused Adam. ``torch Adam``: the same with torch's. ``reference``: its plain torch
backend. ``bfloat16``: its weights stored in half the bytes, for inference. ``naive``: dense weights times dense masks
on every pass, torch's Adam, one whole pass per dimension when sampling; the way the published notebook does it.
``masked once``: the clever dense user, who masks the weights after each step instead of on each pass and takes torch's
fused Adam. ``masked gradients``: the same with the gradients masked in hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastmaf
from fastmaf.reference import NaiveMADE, NaiveMAF


@dataclass
class Side:
    """One way of running the model.

    Attributes:
        name: as printed.
        log_prob: ``[N, D]`` → ``[N]``.
        train_step: one optimiser step on a batch.
        parameter_numbers: numbers held as parameters, masks included.
        sample: n → ``[n, D]``; None where it is too slow to be timed whole.
    """

    name: str
    log_prob: Callable[[Tensor], Tensor]
    train_step: Callable[[Tensor], None]
    parameter_numbers: int
    sample: Callable[[int], Tensor] | None = None


def fast_side(flow: fastmaf.MAF, *, graphs: bool = False) -> Side:
    """Returns fastmaf as it is meant to be used; on a GPU that is with ``graphs``."""
    optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-4)
    step = fastmaf.TrainingStep(flow, optimizer, graphs=graphs)

    def train_step(x: Tensor) -> None:
        step(x)

    log_prob = fastmaf.ReplayedLogProb(flow) if graphs else flow.log_prob
    return Side("fastmaf", log_prob, train_step, flow.stored_weights, flow.sample)


def torch_adam_side(flow: fastmaf.MAF) -> Side:
    """Returns fastmaf with torch's fused Adam, which gets the gradients of the weights."""
    step = fastmaf.TrainingStep(flow, torch.optim.Adam(flow.parameters(), lr=1e-4, fused=True))

    def train_step(x: Tensor) -> None:
        step(x)

    return Side("torch Adam", flow.log_prob, train_step, flow.stored_weights, flow.sample)


def reference_side(flow: fastmaf.MAF) -> Side:
    """Returns fastmaf on its plain torch backend, with torch's fused Adam."""
    torch_adam = torch_adam_side(flow)

    def log_prob(x: Tensor) -> Tensor:
        with fastmaf.use_backend("reference"):
            return flow.log_prob(x)

    def sample(n: int) -> Tensor:
        with fastmaf.use_backend("reference"):
            return flow.sample(n)

    def train_step(x: Tensor) -> None:
        with fastmaf.use_backend("reference"):
            torch_adam.train_step(x)

    return Side("reference", log_prob, train_step, flow.stored_weights, sample)


def bfloat16_side(flow: fastmaf.MAF) -> Side:
    """Returns fastmaf with weights stored as bfloat16, which can score and sample but not train."""
    small = flow.to_inference(torch.bfloat16)

    def train_step(x: Tensor) -> None:
        raise RuntimeError("a flow with bfloat16 weights does not train")

    return Side("bfloat16", small.log_prob, train_step, flow.stored_weights, small.sample)


def naive_side(naive: NaiveMAF, *, compiled: bool = False) -> Side:
    """Returns the naive model with torch's default Adam; ``compiled``: its density by ``torch.compile``."""
    optimizer = torch.optim.Adam(naive.parameters(), lr=1e-4)
    log_prob: Callable[[Tensor], Tensor] = torch.compile(naive.log_prob) if compiled else naive.log_prob

    def train_step(x: Tensor) -> None:
        optimizer.zero_grad()
        (-log_prob(x).mean()).backward()
        optimizer.step()

    weights = sum(w.numel() for block in blocks_of(naive) for w in block.weights)
    return Side("naive, compiled" if compiled else "naive", log_prob, train_step, 2 * weights)


class MaskedOnce(nn.Module):
    """A naive model's function with masks applied to the weights beforehand, not on each pass."""

    def __init__(self, naive: NaiveMAF) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        self.masks: list[Tensor] = []
        self.depth = len(blocks_of(naive)[0].weights)
        self.bound = blocks_of(naive)[0].log_scale_bound
        for block in blocks_of(naive):
            for k, (weight, bias) in enumerate(zip(block.weights, block.biases, strict=True)):
                mask = block.get_buffer(f"mask_{k}")
                self.weights.append(nn.Parameter(weight.detach() * mask))
                self.biases.append(nn.Parameter(bias.detach().clone()))
                self.masks.append(mask)

    def log_prob(self, x: Tensor) -> Tensor:
        """Returns the log-density ``[N]`` in nats."""
        ladj = x.new_zeros(x.shape[0])
        for first in range(0, len(self.weights), self.depth):
            h = x
            for k in range(first, first + self.depth):
                h = functional.linear(h, self.weights[k], self.biases[k])
                if k < first + self.depth - 1:
                    h = torch.relu(h)
            shift, u = h.chunk(2, dim=1)
            log_scale = u.clamp(-self.bound, self.bound)
            x = (x - shift) * torch.exp(-log_scale)
            ladj = ladj - log_scale.sum(dim=1)
        return ladj - 0.5 * x.square().sum(dim=1) - 0.5 * x.shape[1] * math.log(2 * math.pi)

    @torch.no_grad()
    def mask_again(self) -> None:
        """Takes back what the optimiser did to hidden weights."""
        for weight, mask in zip(self.weights, self.masks, strict=True):
            weight.mul_(mask)


def masked_once_side(naive: NaiveMAF) -> Side:
    """Returns the clever dense user."""
    model = MaskedOnce(naive)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def train_step(x: Tensor) -> None:
        optimizer.zero_grad()
        (-model.log_prob(x).mean()).backward()
        optimizer.step()
        model.mask_again()

    return Side("masked once", model.log_prob, train_step, 2 * sum(w.numel() for w in model.weights))


def masked_gradients_side(naive: NaiveMAF) -> Side:
    """Returns the dense user who keeps hidden weights at zero by masking their gradients in hooks, instead of the
    weights.
    """
    model = MaskedOnce(naive)
    for weight, mask in zip(model.weights, model.masks, strict=True):
        weight.register_hook(partial(torch.mul, mask))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def train_step(x: Tensor) -> None:
        optimizer.zero_grad()
        (-model.log_prob(x).mean()).backward()
        optimizer.step()

    return Side("masked gradients", model.log_prob, train_step, 2 * sum(w.numel() for w in model.weights))


def nflows_side(features: int, blocks: int, hidden: int, device: torch.device) -> Side:
    """Returns nflows as its documentation builds a MAF of this size, two hidden layers a block: of weights of its own.

    Its affine form is another one (z = softplus(u) x + t), so its numbers cannot be the other sides'.

    Raises:
        ImportError: nflows is not installed.
    """
    from nflows.flows.autoregressive import MaskedAutoregressiveFlow

    model = MaskedAutoregressiveFlow(features, hidden, blocks, 1, use_residual_blocks=False).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def train_step(x: Tensor) -> None:
        optimizer.zero_grad()
        (-model.log_prob(x).mean()).backward()
        optimizer.step()

    numbers = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    return Side("nflows", model.log_prob, train_step, numbers)


def blocks_of(naive: NaiveMAF) -> list[NaiveMADE]:
    """Returns the blocks of a naive model."""
    return [block for block in naive.blocks if isinstance(block, NaiveMADE)]
