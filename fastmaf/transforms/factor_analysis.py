"""Fitting a covariance of factors and noise to few samples of many dimensions.

    x ~ N(μ, Ψ^½ (I + P S² Pᵀ) Ψ^½)

P comes from a singular value decomposition; the noise Ψ of each dimension and the variance S² of each factor come from
samples that the decomposition has not seen. Taken from the same samples they are far too small wherever there are fewer
samples than dimensions: each direction of P was chosen to explain them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Augment: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Turns ``x [n, D]`` into ``(basis [n, p, D], weights [c, p])``: copy k of sample i is ``weights[k] @ basis[i]``, and
the rows of ``weights`` sum to 1. Many copies that are mixtures of few cost no more than those few."""

_MOST_ROWS = 4096  # of the matrix whose singular vectors are sought: its Gram matrix is decomposed in one piece
_ENOUGH = 40  # samples for a first estimate of the noise, which scales the data that it is then found from once more


class FactorModel(NamedTuple):
    """A fitted covariance: ``mean [D]``, ``scale [D]`` = Ψ^½, ``factors [D, r]`` = P, ``variance [r]`` = S²."""

    mean: Tensor
    scale: Tensor
    factors: Tensor
    variance: Tensor


def fit_factors(
    x: Tensor,
    rank: int,
    *,
    augment: Augment | None = None,
    folds: int = 5,
    floor: float | None = None,
    seed: int = 0,
) -> FactorModel:
    """Fits mean, noise and factors to samples.

    Args:
        x: ``[n, D]``, n >= 2, floating point, finite.
        rank: at most this many factors; fewer where n does not support them.
        augment: copies that the factors shall explain too, such as shifted images. Noise and variances are those of the
            samples themselves. Where there are more than 4,096 rows (samples x basis), the factors are found from as
            many samples, drawn by the seed, as make up those.
        folds: of the cross-validation, each sample's residual being that of factors found without it.
        floor: smallest variance of the noise, in the unit of x squared; None takes a millionth of the mean variance.
        seed: of the split into folds.

    Raises:
        ValueError: ``x`` or an argument does not fit.
    """
    if x.dim() != 2 or x.shape[0] < 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [n, D] with n >= 2; found {x.dtype} {list(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds values that are not finite")
    if rank < 0 or folds < 2:
        raise ValueError(f"rank must be at least 0 and folds at least 2; found {rank} and {folds}")
    n, generator = len(x), torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    parts = [order[i :: min(folds, n)].sort().values for i in range(min(folds, n))]
    mean, rows, owner, part_of_mean = _rows(x, augment, order)
    centred = x - mean
    total = float(centred.double().square().mean())
    least = max(1e-6 * total, torch.finfo(x.dtype).tiny) if floor is None else floor
    if not 0 < least < math.inf:
        raise ValueError(f"floor must be positive and finite; found {floor}")
    # A start for the scale; a tenth, as most of the variance is the factors'.
    noise = (0.1 * centred.double().square().mean(dim=0)).clamp_min(least)
    before, components = noise, torch.zeros(0, dtype=torch.float64)
    # What only scales the data may come from fewer folds.
    enough = parts[: math.ceil(_ENOUGH * len(parts) / n)]
    for folds_of_round in (enough, parts):
        before = noise
        noise, components = _cross_validated(centred, rows, owner, part_of_mean, before, rank, folds_of_round)
        noise = noise.clamp_min(least)
    scale = noise.sqrt().to(x.dtype)
    scaled = rows / before.sqrt().to(x.dtype)
    found = _leading(scaled, _gram(scaled), len(components)).double()
    # Along a factor lies its own variance and the noise's, both in units of the noise before the last round.
    own = (components[: found.shape[1]] - (noise / before) @ found.square()).clamp_min(0)
    factors, variance = _orthogonal(found * own.sqrt() * (before / noise).sqrt()[:, None])
    return FactorModel(mean, scale, factors.to(x.dtype), variance.to(x.dtype))


def _orthogonal(loadings: Tensor) -> tuple[Tensor, Tensor]:
    """Returns P and S² with P S² Pᵀ = ``loadings @ loadings.T``, strongest first; float64 ``[D, r]``."""
    if not loadings.shape[1]:
        return loadings, loadings.new_zeros(0)
    q, r = torch.linalg.qr(loadings)
    u, s, _ = torch.linalg.svd(r)
    used = s > 0
    return (q @ u)[:, used], s[used].square()


def _rows(x: Tensor, augment: Augment | None, order: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the mean of all copies, centred rows with the copies' second moment, which sample each row is of, and how
    much of the mean was taken from it.
    """
    if augment is None:
        mean = x.double().mean(dim=0).to(x.dtype)
        index = order[:_MOST_ROWS].sort().values
        return mean, x[index] - mean, index, x.new_ones(len(index))
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    kept: list[Tensor] = []
    owners: list[Tensor] = []
    mixing, room = None, torch.zeros(len(x), dtype=torch.bool)
    for index in torch.arange(len(x)).split(32):  # the copies of all samples at once may be too large
        basis, weights = augment(x[index])
        if mixing is None:
            _check(basis, weights, x[index])
            # The copies' second moment about any centre is basisᵀ M basis, M = weightsᵀ weights / c: its root mixes the
            # basis into as few rows as it has dimensions.
            values, vectors = torch.linalg.eigh(weights.double().T @ weights.double() / len(weights))
            used = values > 1e-9 * values[-1]
            mixing = (vectors[:, used] * values[used].sqrt()).T.to(x.dtype)
            room[order[: max(2, _MOST_ROWS // len(mixing))]] = True
        total += torch.einsum("npd,p->d", basis.double(), weights.double().mean(dim=0))
        chosen = room[index]
        kept.append(torch.einsum("qp,npd->nqd", mixing, basis[chosen]))
        owners.append(index[chosen])
    assert mixing is not None
    mean = (total / len(x)).to(x.dtype)
    part = mixing.sum(dim=1)
    rows, owner = torch.cat(kept) - part[:, None] * mean, torch.cat(owners)
    return mean, rows.flatten(0, 1), owner.repeat_interleave(len(mixing)), part.repeat(len(owner))


def _check(basis: Tensor, weights: Tensor, x: Tensor) -> None:
    n, d = x.shape
    if basis.dim() != 3 or (basis.shape[0], basis.shape[2]) != (n, d) or not basis.shape[1]:
        raise ValueError(f"augment must give a basis [{n}, p, {d}]; found {list(basis.shape)}")
    if weights.dim() != 2 or weights.shape[1] != basis.shape[1] or not len(weights):
        raise ValueError(f"augment must give weights [copies, {basis.shape[1]}]; found {list(weights.shape)}")
    if not bool(torch.isfinite(basis).all()):
        raise ValueError("augment's basis holds values that are not finite")
    sums = weights.double().sum(dim=1)
    if not torch.allclose(sums, torch.ones_like(sums), atol=1e-5):
        worst = float(sums[(sums - 1).abs().argmax()])
        raise ValueError(f"augment's weights must sum to 1 in each row, copies being mixtures; found {worst}")


def _cross_validated(
    centred: Tensor,
    rows: Tensor,
    owner: Tensor,
    part_of_mean: Tensor,
    noise: Tensor,
    rank: int,
    parts: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Returns the noise, and the variance along factors in its unit (float64), that samples show which the factors have
    not seen.
    """
    scale = noise.sqrt().to(centred.dtype)
    scaled = rows / scale
    gram = _gram(scaled)
    without = [~torch.isin(owner, part) for part in parts]
    rank = min(rank, centred.shape[1], *(int(mask.sum()) for mask in without))
    squares, count = torch.zeros_like(noise), sum(len(part) for part in parts)
    components = torch.zeros(rank, dtype=torch.float64, device=rows.device)
    for part, mask in zip(parts, without, strict=True):
        # Nor has the mean: less the mean of all, the samples add up to zero, and the others would betray the last one.
        kept = torch.ones(len(centred), dtype=torch.bool)
        kept[part] = False
        shift, share = centred[kept].mean(dim=0) / scale, part_of_mean[mask]
        own, products = scaled[mask] - share[:, None] * shift, None
        if gram is not None:
            cross = torch.outer(share, scaled[mask] @ shift)
            products = gram[mask][:, mask] - cross - cross.T + torch.outer(share, share) * (shift @ shift)
        factors = _leading(own, products, rank)
        y = centred[part] / scale - shift
        along = y @ factors
        # A residual lacks the share of its own noise that lies along the factors.
        left = (1 - factors.double().square().sum(dim=1)).clamp_min(1e-3)
        squares += (y - along @ factors.T).double().square().sum(dim=0) / left
        components[: along.shape[1]] += along.double().square().sum(dim=0)
    # Factors of different folds are matched by rank: the k-th one of each explains about the same variance.
    return noise * squares / count, components / count


def _gram(rows: Tensor) -> Tensor | None:
    """Returns the rows' Gram matrix, or None where there are no fewer rows than dimensions: theirs is smaller then."""
    return rows @ rows.T if rows.shape[0] < rows.shape[1] else None


def _leading(rows: Tensor, gram: Tensor | None, rank: int) -> Tensor:
    """Returns the leading right singular vectors of ``rows``, ``[D, <= rank]``, orthonormal to their dtype's rounding.

    Through the rows' Gram matrix, or the dimensions' where ``gram`` is None, in float64: its square root of precision
    is lost on directions that hold less than 1e-10 of the largest variance, which are left out.
    """
    if rank == 0:
        return rows.new_zeros(rows.shape[1], 0)
    values, vectors = torch.linalg.eigh((rows.T @ rows if gram is None else gram).double())
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    used = values > 1e-10 * values[0].clamp_min(torch.finfo(torch.float64).tiny)
    if gram is None:
        return vectors[:, used].to(rows.dtype)
    found = rows.T @ (vectors[:, used] * values[used].rsqrt()).to(rows.dtype)
    return orthonormalised(found)


def orthonormalised(factors: Tensor) -> Tensor:
    """Returns the orthonormal columns nearest to nearly orthonormal ones, or zero where they are zero.

    One step of the Newton-Schulz iteration, ``P (3I - PᵀP) / 2``: the error is squared.
    """
    identity = torch.eye(factors.shape[1], dtype=factors.dtype, device=factors.device)
    return factors @ (1.5 * identity - 0.5 * (factors.T @ factors))
