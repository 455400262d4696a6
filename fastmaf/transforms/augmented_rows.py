"""The rows of a matrix whose second moment is that of augmented samples, in far fewer rows than there are of these.

Copies of an image that are shifted by parts of a pixel are nearly linear combinations of a few derivatives of it. The
principal components over the copies are found once, and the rows are these components of each sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Augment: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps samples ``[n, ...]`` to ``basis`` ``[n, p, D]`` and ``weights`` ``[c, p]``, whose rows sum to 1: augmented
sample k of sample i is ``weights[k] @ basis[i]``."""

_MAX_ROWS = 6000
_MAX_VALUES = 2**28  # of all rows: 1 GiB in float32
_BATCH_VALUES = 2**21  # of augmented samples at a time; more would not stay in the cache
_FIRST_SAMPLES = 32  # that determine the components over the copies
_KEPT = 0.998  # share of the variance that the components kept have at least


class Rows(NamedTuple):
    """Rows with the second moment of augmented samples.

    Attributes:
        values: rows ``[m, D]`` less their ``share`` of the mean, those of large variance first.
        owner: the sample of each row ``[m]``.
        share: the factor of the mean that was subtracted from each row ``[m]``.
        mean: of all augmented samples ``[D]``.
        mean_without: of those of all samples outside each part ``[parts, D]``.
    """

    values: Tensor
    owner: Tensor
    share: Tensor
    mean: Tensor
    mean_without: Tensor


def augmented_rows(
    x: Tensor, parts: Sequence[Tensor], augment: Augment | None, source: Tensor, generator: torch.Generator
) -> Rows:
    """Returns the rows of samples.

    Args:
        x: ``[n, D]``.
        parts: indices of disjoint sets of samples.
        augment: see ``Augment``; None for the samples alone.
        source: what ``augment`` takes ``[n, ...]``: ``x``, or the same samples in another form.
        generator: selects rows if there are more than 6,000: those of large variance more often, with their weight
            corrected.

    Raises:
        ValueError: ``augment`` gives something else.
    """
    n, d = x.shape
    mixing, energy = _components(x, augment, source, generator)
    budget = max(2, min(_MAX_ROWS, _MAX_VALUES // d))
    chosen = torch.zeros(n, len(mixing))
    for k, fraction in enumerate(_fractions(energy, budget / n)):
        count = min(n, max(2, round(fraction * n)))
        chosen[torch.randperm(n, generator=generator)[:count], k] = (n / count) ** 0.5
    sums = torch.zeros(len(parts) + 1, d, dtype=torch.float64, device=x.device)
    part_of = torch.full((n,), len(parts))
    for k, part in enumerate(parts):
        part_of[part] = k
    owner, component = (chosen > 0).nonzero(as_tuple=True)
    factor, share = chosen[owner, component].to(x), mixing.sum(dim=1)[component]
    values, first = x.new_empty(len(owner), d), 0
    for index, basis, weights in _batches(x, augment, source):
        means = weights.mean(dim=0)[None] @ basis
        sums.index_add_(0, part_of[index].to(x.device), means[:, 0].double())
        rows = (mixing @ basis)[chosen[index] > 0]
        values[first : first + len(rows)] = rows
        first += len(rows)
    total, counts = sums.sum(dim=0), part_of.bincount(minlength=len(parts) + 1)
    mean = (total / n).to(x.dtype)
    without = (total - sums[:-1]) / (n - counts[:-1]).clamp_min(1)[:, None].to(x.device)
    values.addr_(share, mean, alpha=-1)
    if bool((factor != 1).any()):
        values.mul_(factor[:, None])
    return Rows(values, owner, share * factor, mean, without.to(x.dtype))


def _batches(x: Tensor, augment: Augment | None, source: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields indices, basis and weights of a few samples at a time, since all may need too much memory."""
    size, start = 1, 0
    while start < len(x):
        index = torch.arange(start, min(start + size, len(x)))
        basis, weights = _augmented(x, augment, source, index)
        yield index, basis, weights
        start, size = start + size, max(1, _BATCH_VALUES // basis[0].numel())


def _augmented(x: Tensor, augment: Augment | None, source: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    if augment is None:
        return x[index][:, None], x.new_ones(1, 1)
    basis, weights = augment(source[index])
    n, d = len(index), x.shape[1]
    if basis.dim() != 3 or (basis.shape[0], basis.shape[2]) != (n, d) or not basis.shape[1]:
        raise ValueError(f"augment must give a basis [{n}, p, {d}]; found {list(basis.shape)}")
    if weights.dim() != 2 or weights.shape[1] != basis.shape[1] or not len(weights):
        raise ValueError(f"augment must give weights [copies, {basis.shape[1]}]; found {list(weights.shape)}")
    if not math.isfinite(float(basis.sum())) and not bool(torch.isfinite(basis).all()):
        raise ValueError("augment's basis holds values that are not finite")
    sums = weights.double().sum(dim=1)
    if not torch.allclose(sums, torch.ones_like(sums), atol=1e-5):
        worst = float(sums[(sums - 1).abs().argmax()])
        raise ValueError(f"augment's weights must sum to 1 in each row, copies being mixtures; found {worst}")
    return basis, weights


def _components(
    x: Tensor, augment: Augment | None, source: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Returns the matrix ``[q, p]`` that mixes a basis into rows, and the mean square of each row ``[q]``.

    With orthogonal rows U of the principal components over the copies, and a root A of M = weightsᵀ weights / c, the
    second moment (U A basis)ᵀ (U A basis) = basisᵀ M basis is that of the copies.
    """
    if augment is None:
        return x.new_ones(1, 1), torch.ones(1)
    index = torch.randperm(len(x), generator=generator)[:_FIRST_SAMPLES]
    pairs = [_augmented(x, augment, source, one) for one in index.split(4)]
    weights, d = pairs[0][1], x.shape[1]
    values, vectors = torch.linalg.eigh(weights.double().T @ weights.double() / len(weights))
    used = values > 1e-9 * values[-1]
    root = (vectors[:, used] * values[used].sqrt()).T
    mean = sum((basis.sum(dim=0) for basis, _ in pairs), x.new_zeros(())) / len(index)
    mean = weights.mean(dim=0) @ mean
    rows = [torch.einsum("qp,npd->nqd", root.to(x.dtype), basis - mean) for basis, _ in pairs]
    variance = sum((part.square().sum(dim=(0, 1)) for part in rows), x.new_zeros(()))
    scale = torch.where(variance > 0, variance, variance.new_ones(())).sqrt()
    moment = sum((_moment(part / scale) for part in rows), torch.zeros((), dtype=torch.float64, device=x.device))
    energy, turn = torch.linalg.eigh(moment)
    energy, turn = energy.flip(0).clamp_min(0), turn.flip(1)
    reached = (energy.cumsum(0) < _KEPT * energy.sum()).sum() + 1
    kept = min(int(reached), len(energy))
    return (turn[:, :kept].T @ root).to(x.dtype), energy[:kept].cpu() / d


def _moment(rows: Tensor) -> Tensor:
    return torch.einsum("npd,nqd->pq", rows, rows).double()


def _fractions(energy: Tensor, available: float) -> list[float]:
    """Returns the share of the samples whose row of each component is used: in proportion to its mean square, up to 1.

    Args:
        energy: mean square of each component.
        available: the sum of the shares, at most.
    """
    low, high = 0.0, 1.0 / float(energy[energy > 0].min()) if bool((energy > 0).any()) else 1.0
    if len(energy) <= available:
        return [1.0] * len(energy)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * energy).clamp_max(1).sum()) <= available else (low, middle)
    return (low * energy).clamp_max(1).tolist()
