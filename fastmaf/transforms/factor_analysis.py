"""Estimation of a factor-analysis covariance from few samples of many dimensions.

    x ~ N(μ, Ψ^½ (I + P S² Pᵀ) Ψ^½)

P comes from a singular value decomposition. The variances of the noise, Ψ, and of the factors, S², are estimated from
samples that were held out from the decomposition. Estimated from the same samples they would be far too small when
there are fewer samples than dimensions, since the directions P were chosen to explain these samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmaf.transforms.augmented_rows import Augment
from fastmaf.transforms.cross_fit import CrossFit, FactorModel

__all__ = ["Augment", "FactorModel", "fit_factors", "fit_factors_of_folds"]


def fit_factors(
    x: Tensor,
    rank: int,
    *,
    augment: Augment | None = None,
    source: Tensor | None = None,
    folds: int = 5,
    floor: float | None = None,
    seed: int = 0,
) -> FactorModel:
    """Fits mean, noise and factors to samples.

    Args:
        x: ``[n, D]``, n >= 2, floating point, finite.
        rank: maximum number of factors; fewer are returned if n does not support them.
        augment: augmented samples, such as shifted images, that the factors must explain as well. Noise and variances
            are those of the samples themselves. Of more than 6,000 rows a random selection is used, in which those of
            large variance are more frequent.
        source: what ``augment`` takes, ``[n, ...]``, such as the same images at twice the size; None for ``x``.
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
    _check(x)
    if rank < 0 or folds < 2:
        raise ValueError(f"rank must be at least 0 and folds at least 2; found {rank} and {folds}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    folds = min(folds, len(x))
    parts = [order[i::folds].sort().values for i in range(folds)]
    fit = CrossFit(x, rank, parts, augment, x if source is None else source, floor, seed)
    return fit.model(None)


def fit_factors_of_folds(
    x: Tensor,
    rank: int,
    parts: Sequence[Tensor],
    *,
    augment: Augment | None = None,
    source: Tensor | None = None,
    floor: float | None = None,
    seed: int = 0,
) -> tuple[list[FactorModel], FactorModel]:
    """Fits one model without each part of the samples, and one to all, for little more than the cost of one.

    All share one Gram matrix. Noise and variances of the model without a part are those of the samples outside this
    part, each under the factors fitted without its own part.

    Args:
        x, rank, augment, source, floor, seed: as ``fit_factors``.
        parts: indices of at least two disjoint sets of samples.

    Returns:
        The models without each part, and the model of all samples.
    """
    _check(x)
    if len(parts) < 2 or rank < 0:
        raise ValueError(f"expected at least 2 parts and a rank of at least 0; found {len(parts)} and {rank}")
    fit = CrossFit(x, rank, parts, augment, x if source is None else source, floor, seed)
    return fit.models()


def _check(x: Tensor) -> None:
    if x.dim() != 2 or x.shape[0] < 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [n, D] with n >= 2; found {x.dtype} {list(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds values that are not finite")
