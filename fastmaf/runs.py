"""Runs a flow's transforms: consecutive blocks and permutations in one op, all others one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmaf import hooks
from fastmaf.kernels import Block, chain_forward, chain_inverse
from fastmaf.kernels.block import chain
from fastmaf.kernels.chain.kept import kept_numel
from fastmaf.nn import MADE
from fastmaf.transforms import AffineAutoregressive, Permutation, Transform


def forward(transforms: Sequence[Transform], x: Tensor) -> tuple[Tensor, Tensor]:
    """Applies the transforms in turn; returns ``z`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dz/dx|."""
    ladj = x.new_zeros(x.shape[0])
    for run in _cut(transforms):
        x, term = run(x) if isinstance(run, Transform) else _chained(run, x, inverse=False)
        ladj = ladj + term
    return x, ladj


def inverse(transforms: Sequence[Transform], z: Tensor) -> tuple[Tensor, Tensor]:
    """Inverts the transforms, the last one first; returns ``x`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dx/dz|."""
    ladj = z.new_zeros(z.shape[0])
    backwards = transforms[::-1]
    for run in backwards if _records_gradients(z, transforms) else _cut(backwards):
        if isinstance(run, Transform):
            z, term = run.inverse(z)
        else:
            z, term = _chained(run, z, inverse=True) if len(run) > 1 else run[0].inverse(z)
        ladj = ladj + term
    return z, ladj


def saved_numel(transforms: Sequence[Transform], n: int) -> int:
    """Returns how many numbers a forward pass over a batch of ``n`` saves for the backward pass, its input and output
    aside.

    A transform of a class that is not fastmaf's own counts as a block: its input, log-scale and output are saved.
    """
    total = 0
    for run in _cut(transforms):
        if isinstance(run, Transform):
            hidden = sum(layer.out_features for made in mades_of(run) for layer in made.layers[:-1])
            total += n * (3 * run.features + hidden)
        elif (found := _chain_of(run, inverse=False))[0]:
            total += kept_numel(chain(*found), n)
    return total


def mades_of(module: nn.Module) -> list[MADE]:
    """Returns the MADE networks of a module and of those below it."""
    return [part for part in module.modules() if isinstance(part, MADE)]


def _records_gradients(x: Tensor, transforms: Sequence[Transform]) -> bool:
    parameters = (p for transform in transforms for p in transform.parameters())
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))


def _cut(transforms: Sequence[Transform]) -> Sequence[Transform | list[Transform]]:
    """Cuts transforms into lists that one op can take together, and the transforms between them that none can."""
    if hooks.any_global():
        return transforms
    runs: list[Transform | list[Transform]] = []
    run: list[Transform] | None = None
    activation = ""  # of the run's blocks; "" while it has none
    for transform in transforms:
        own = _activation(transform)
        if own is None:
            runs.append(transform)
            run = None
        elif run is not None and (own == activation or "" in (own, activation)):
            run.append(transform)
            activation = activation or own
        else:
            runs.append(run := [transform])
            activation = own
    return runs


def _activation(transform: Transform) -> str | None:
    """Returns the activation of a chain that holds this transform, "" where any will do; None: no chain can hold it."""
    if hooks.is_called(transform):
        return None
    if type(transform) is AffineAutoregressive:
        made = transform._modules["made"]
        return None if type(made) is not MADE or made.calls_modules else made.activation
    return "" if type(transform) is Permutation else None


def _chained(run: Sequence[Transform], x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
    """Applies the transforms of a run, or their inverses, in turn and in one call."""
    blocks, permutations = _chain_of(run, inverse=inverse)
    if not blocks:
        assert permutations[0] is not None
        return x[:, permutations[0]], x.new_zeros(x.shape[0])
    return (chain_inverse if inverse else chain_forward)(x, blocks, permutations)


def _chain_of(run: Sequence[Transform], *, inverse: bool) -> tuple[list[Block], list[Tensor | None]]:
    """Returns the blocks of a run, and the permutations before each of them and after the last one."""
    blocks: list[Block] = []
    permutations: list[Tensor | None] = [None]
    for transform in run:
        if isinstance(transform, AffineAutoregressive):
            if inverse:
                transform.check_invertible()
            blocks.append(transform.block())
            permutations.append(None)
        else:
            assert isinstance(transform, Permutation)
            own = transform.inverse_permutation if inverse else transform.permutation
            before = permutations[-1]
            permutations[-1] = own if before is None else before[own]
    return blocks, permutations
