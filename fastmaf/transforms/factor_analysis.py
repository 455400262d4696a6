"""Estimation of a factor-analysis covariance from few samples of many dimensions.

    x ~ N(μ, Ψ^½ (I + P S² Pᵀ) Ψ^½)

P comes from a singular value decomposition. The variances of the noise, Ψ, and of the factors, S², are estimated from
samples that were held out from the decomposition. Estimated from the same samples they would be far too small when
there are fewer samples than dimensions, since the directions P were chosen to explain these samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Augment: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps ``x`` ``[n, D]`` to ``basis`` ``[n, p, D]`` and ``weights`` ``[c, p]``, whose rows sum to 1: augmented sample k
of sample i is ``weights[k] @ basis[i]``. The cost grows with p, not with c."""

_MAX_ROWS = 4096  # of the decomposed matrix, whose Gram matrix is decomposed as a whole
_FIRST_SAMPLES = 40  # for a first estimate of the noise, which scales the data for the final one


class FactorModel(NamedTuple):
    """A fitted covariance.

    Attributes:
        mean: μ ``[D]``.
        scale: Ψ^½ ``[D]``.
        factors: P ``[D, r]``.
        variance: S² ``[r]``.
    """

    mean: Tensor
    scale: Tensor
    factors: Tensor
    variance: Tensor


def fit_factors(
    x: Tensor, rank: int, *, augment: Augment | None = None, folds: int = 5, floor: float | None = None, seed: int = 0
) -> FactorModel:
    """Fits mean, noise and factors to samples.

    Args:
        x: ``[n, D]``, n >= 2, floating point, finite.
        rank: maximum number of factors; fewer are returned if n does not support them.
        augment: augmented samples, such as shifted images, that the factors must explain as well. Noise and variances
            are those of the samples themselves. If there are more than 4,096 rows (n times p), the factors are found
            from a random subset of the samples.
        folds: number of cross-validation folds; residuals of a sample are those of factors fitted without its fold.
        floor: smallest variance of the noise, in units of x squared; None uses a millionth of the mean variance.
        seed: of the folds.

    Raises:
        ValueError: ``x`` or an argument is out of range.

    References:
        Rubin and Thayer 1982, EM algorithms for ML factor analysis.

    Example:
        >>> from fastmaf.transforms.factor_analysis import fit_factors
        >>> model = fit_factors(torch.randn(50, 6), rank=2)
        >>> model.factors.shape, model.scale.shape
        (torch.Size([6, 2]), torch.Size([6]))
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
    # An initial scale: the factors explain most of the variance.
    noise = (0.1 * centred.double().square().mean(dim=0)).clamp_min(least)
    # The first round only scales the data, for which fewer folds suffice.
    for parts_of_round in (parts[: math.ceil(_FIRST_SAMPLES * len(parts) / n)], parts):
        before = noise
        scaled = rows / before.sqrt().to(x.dtype)
        gram = _gram(scaled)
        noise, components = _cross_validated(centred, scaled, gram, owner, part_of_mean, before, rank, parts_of_round)
        noise = noise.clamp_min(least)
    scale = noise.sqrt().to(x.dtype)
    directions = _leading(scaled, gram, len(components)).double()
    # The variance along a direction includes the noise, both in units of the noise before the last round.
    excess = (components[: directions.shape[1]] - (noise / before) @ directions.square()).clamp_min(0)
    factors, variance = _orthogonal(directions * excess.sqrt() * (before / noise).sqrt()[:, None])
    return FactorModel(mean, scale, factors.to(x.dtype), variance.to(x.dtype))


def _orthogonal(loadings: Tensor) -> tuple[Tensor, Tensor]:
    """Returns P and S² with P S² Pᵀ = ``loadings @ loadings.T``, in descending order of S², float64."""
    if not loadings.shape[1]:
        return loadings, loadings.new_zeros(0)
    q, r = torch.linalg.qr(loadings)
    u, s, _ = torch.linalg.svd(r)
    used = s > 0
    return (q @ u)[:, used], s[used].square()


def _rows(x: Tensor, augment: Augment | None, order: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the mean of all augmented samples, centred rows with their second moment, and, for each row, its sample
    and the factor of the mean that was subtracted.
    """
    if augment is None:
        mean = x.double().mean(dim=0).to(x.dtype)
        index = order[:_MAX_ROWS].sort().values
        return mean, x[index] - mean, index, x.new_ones(len(index))
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    mixed: list[Tensor] = []
    owners: list[Tensor] = []
    mixing, selected = None, torch.zeros(len(x), dtype=torch.bool)
    for index in torch.arange(len(x)).split(32):  # in batches, since all augmented samples may need too much memory
        basis, weights = augment(x[index])
        if mixing is None:
            _check(basis, weights, x[index])
            # The second moment of the augmented samples is basisᵀ M basis with M = weightsᵀ weights / c. A root of M
            # mixes the basis into at most p rows.
            values, vectors = torch.linalg.eigh(weights.double().T @ weights.double() / len(weights))
            used = values > 1e-9 * values[-1]
            mixing = (vectors[:, used] * values[used].sqrt()).T.to(x.dtype)
            selected[order[: max(2, _MAX_ROWS // len(mixing))]] = True
        total += torch.einsum("npd,p->d", basis.double(), weights.double().mean(dim=0))
        chosen = selected[index]
        mixed.append(torch.einsum("qp,npd->nqd", mixing, basis[chosen]))
        owners.append(index[chosen])
    assert mixing is not None
    mean = (total / len(x)).to(x.dtype)
    part = mixing.sum(dim=1)
    rows, owner = torch.cat(mixed) - part[:, None] * mean, torch.cat(owners)
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
    scaled: Tensor,
    gram: Tensor | None,
    owner: Tensor,
    part_of_mean: Tensor,
    noise: Tensor,
    rank: int,
    parts: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Returns the variances of the noise, and along the factors in its units, of held-out samples (float64).

    Args:
        centred: samples less their mean.
        scaled: rows in units of the noise.
        gram: of ``scaled``.
        owner, part_of_mean: of the rows, see ``_rows``.
        noise: variances of the noise.
        rank: maximum number of factors.
        parts: indices of the samples that each fold holds out.
    """
    scale = noise.sqrt().to(centred.dtype)
    training = [~torch.isin(owner, part) for part in parts]
    rank = min(rank, centred.shape[1], *(int(mask.sum()) for mask in training))
    squares, count = torch.zeros_like(noise), sum(len(part) for part in parts)
    components = torch.zeros(rank, dtype=torch.float64, device=scaled.device)
    for part, mask in zip(parts, training, strict=True):
        # The mean of the training samples is subtracted, since centred samples reveal the held-out ones: they sum to 0.
        in_training = torch.ones(len(centred), dtype=torch.bool)
        in_training[part] = False
        shift, share = centred[in_training].mean(dim=0) / scale, part_of_mean[mask]
        recentred, products = scaled[mask], None
        if gram is not None:
            cross = torch.outer(share, recentred @ shift)
            products = gram[mask][:, mask] - cross - cross.T + torch.outer(share, share) * (shift @ shift)
        recentred -= share[:, None] * shift  # in place: there are many rows
        factors = _leading(recentred, products, rank)
        y = centred[part] / scale - shift
        along = y @ factors
        # A residual lacks the noise along the factors.
        remaining = (1 - factors.double().square().sum(dim=1)).clamp_min(1e-3)
        squares += (y - along @ factors.T).double().square().sum(dim=0) / remaining
        components[: along.shape[1]] += along.double().square().sum(dim=0)
    # Factors of different folds are matched by their rank, which determines their variance approximately.
    return noise * squares / count, components / count


def _gram(rows: Tensor) -> Tensor | None:
    """Returns the Gram matrix of the rows, or None if there are at least as many rows as dimensions."""
    return rows @ rows.T if rows.shape[0] < rows.shape[1] else None


def _leading(rows: Tensor, gram: Tensor | None, rank: int) -> Tensor:
    """Returns the leading right singular vectors of ``rows``, ``[D, <= rank]``, orthonormal up to rounding.

    They are computed from the Gram matrix of the rows, or of the dimensions if ``gram`` is None, in float64. Squaring
    halves the precision, so directions with less than 1e-10 of the largest variance are omitted.
    """
    if rank == 0:
        return rows.new_zeros(rows.shape[1], 0)
    values, vectors = torch.linalg.eigh((rows.T @ rows if gram is None else gram).double())
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    used = values > 1e-10 * values[0].clamp_min(torch.finfo(torch.float64).tiny)
    if gram is None:
        return vectors[:, used].to(rows.dtype)
    return orthonormalised(rows.T @ (vectors[:, used] * values[used].rsqrt()).to(rows.dtype))


def orthonormalised(factors: Tensor) -> Tensor:
    """Orthonormalises nearly orthonormal columns; columns of zeros stay zero.

    One step of the Newton-Schulz iteration, P (3I − PᵀP) / 2, which squares the error.
    """
    identity = torch.eye(factors.shape[1], dtype=factors.dtype, device=factors.device)
    return factors @ (1.5 * identity - 0.5 * (factors.T @ factors))
