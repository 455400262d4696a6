"""Cross-validated factors of augmented samples: one decomposition for each part left out, from one Gram matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmaf.threads import map_on_threads
from fastmaf.transforms.augmented_rows import Augment, Rows, augmented_rows
from fastmaf.transforms.leading_vectors import leading_vectors, orthonormalised
from fastmaf.transforms.shared_directions import SharedDirections

_FIRST_SAMPLES = 40  # held out for a first estimate of the noise, which scales the data for the final one
_FIRST_ROWS = 4  # per sample, for that estimate
_FIRST_ROWS_OF_ALL = 2000  # about as many at most: of more samples, every second, third, ... is used
_GRAM_ROWS = 512  # of a Gram matrix at a time
_PRODUCT_ROWS = 512  # whose float32 products are added up in float64


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


class CrossFit:
    """Factors without each part of the samples, and what they leave of the held-out samples."""

    def __init__(
        self,
        x: Tensor,
        rank: int,
        parts: Sequence[Tensor],
        augment: Augment | None,
        source: Tensor,
        floor: float | None,
        seed: int,
    ) -> None:
        self.x, self.parts = x, parts
        self.rows = augmented_rows(x, parts, augment, source, torch.Generator().manual_seed(seed))
        variance = _mean_square(x, self.rows.mean)
        total = float(variance.mean())
        self.least = max(1e-6 * total, torch.finfo(x.dtype).tiny) if floor is None else floor
        if not 0 < self.least < math.inf:
            raise ValueError(f"floor must be positive and finite; found {floor}")
        # An initial scale: the factors explain most of the variance.
        self.noise = (0.1 * variance).clamp_min(self.least)
        values = self.rows.values.div_(self.noise.sqrt().to(x.dtype))
        samples = sum(len(part) for part in parts)
        few = parts[: math.ceil(_FIRST_SAMPLES * len(parts) / samples)]
        squares = self._held_out(self._few_rows(), rank, few)[0]
        before = self.noise
        self.noise = self.noise * squares.sum(dim=0) / sum(len(part) for part in few)
        self.noise = self.noise.clamp_min(self.least)
        values.mul_((before / self.noise).sqrt().to(x.dtype))
        self.squares, self.components, self.factors = self._held_out(self.rows, rank, parts)
        self.counts = torch.tensor([len(part) for part in parts], dtype=torch.float64, device=x.device)

    def _few_rows(self) -> Rows:
        """Returns the first rows of each sample, or of some of many: the first round only scales the data."""
        owner = self.rows.owner
        start = torch.searchsorted(owner, owner)
        few = torch.arange(len(owner)) - start < _FIRST_ROWS
        every = max(1, math.ceil(int(few.sum()) / _FIRST_ROWS_OF_ALL))
        # At random, as every k-th sample may be in one part.
        taken = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(0)) % every == 0
        few &= taken.to(owner.device)[owner]
        rows = self.rows
        return (
            rows if bool(few.all()) else rows._replace(values=rows.values[few], owner=owner[few], share=rows.share[few])
        )

    def _held_out(self, rows: Rows, rank: int, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Returns the squared residuals ``[parts, D]`` and squared components ``[parts, r]`` of the held-out samples.

        Both are sums over the samples of a part (float64), in units of the noise. The third result is the factors
        without each part ``[D, r]``.
        """
        training = [~torch.isin(rows.owner, part) for part in parts]
        rank = min(rank, rows.values.shape[1], *(int(mask.sum()) for mask in training))
        scale, gram = self.noise.sqrt().to(self.x.dtype), _gram(rows.values)
        most = len(rows.values) - min(int(mask.sum()) for mask in training)
        shared = SharedDirections.of(rows.values, rows.share, gram, rank, most)

        def without(k: int) -> tuple[Tensor, Tensor, Tensor]:
            # The mean of the training samples is subtracted, since centred samples reveal the held-out ones.
            shift = (rows.mean_without[k] - rows.mean) / scale
            if shared is None:
                factors = _leading(rows, gram, rank, training[k], shift)
            else:
                factors = shared.without(~training[k], shift, rank)
            # A residual lacks the noise along the factors.
            remaining = (1 - factors.square().sum(dim=1, dtype=torch.float64)).clamp_min(1e-3)
            squares, components = self.noise.new_zeros(len(scale)), self.noise.new_zeros(rank)
            for some in parts[k].split(256):
                y = (self.x[some] - rows.mean_without[k]) / scale
                along = y @ factors
                squares += torch.addmm(y, along, factors.T, alpha=-1).square_().sum(dim=0, dtype=torch.float64)
                components[: along.shape[1]] += along.square().sum(dim=0, dtype=torch.float64)
            return squares / remaining, components, factors

        squares, components, found = zip(*map_on_threads(without, range(len(parts))), strict=True)
        self.gram, self.shared = gram, shared
        return torch.stack(squares), torch.stack(components), list(found)

    def models(self) -> tuple[list[FactorModel], FactorModel]:
        """Returns the models without each part of the samples, and that of all."""
        whole, *without = map_on_threads(self.model, [None, *range(len(self.parts))])
        return without, whole

    def model(self, without: int | None) -> FactorModel:
        """Returns the model without one part of the samples, or of all."""
        others = torch.ones(len(self.parts), dtype=torch.bool)
        if without is not None:
            others[without] = False
        count = self.counts[others].sum()
        # Factors of different parts are matched by their rank, which determines their variance approximately.
        noise = (self.noise * self.squares[others].sum(dim=0) / count).clamp_min(self.least)
        components = self.components[others].sum(dim=0) / count
        directions = self._of_all(len(components)) if without is None else self.factors[without]
        ratio, dtype = noise / self.noise, self.x.dtype
        # The variance along a direction includes the noise, both in units of the noise before the last round.
        excess = (components[: directions.shape[1]] - (ratio.to(dtype) @ directions.square()).double()).clamp_min(0)
        factors, variance = _orthogonal(directions * ratio.rsqrt().to(dtype)[:, None], excess, exact=without is None)
        mean = self.rows.mean if without is None else self.rows.mean_without[without]
        return FactorModel(mean, noise.sqrt().to(dtype), factors, variance.to(dtype))

    def _of_all(self, rank: int) -> Tensor:
        if self.shared is None:
            return _leading(self.rows, self.gram, rank, None, None)
        return self.shared.basis[:, :rank]


def _mean_square(x: Tensor, mean: Tensor) -> Tensor:
    """Returns the mean of ``(x - mean)²`` over the samples ``[D]``, float64."""
    return sum((part - mean).square().sum(dim=0, dtype=torch.float64) for part in x.split(256)) / len(x)  # type: ignore[return-value]


def _orthogonal(directions: Tensor, excess: Tensor, *, exact: bool) -> tuple[Tensor, Tensor]:
    """Returns P and S² with P S² Pᵀ = ``directions @ excess.diag() @ directions.T``, S² descending, float64.

    From the Gram matrix of the directions, which takes a tenth of the time of their decomposition. They are nearly
    orthonormal, so that float32 is enough for their products, which take nearly all of the time; only their scales,
    which differ by orders of magnitude, need float64. Directions with less than 1e-12 of the largest S² are omitted.

    Args:
        directions: ``[D, r]``, well conditioned.
        excess: ``[r]``, not negative, float64.
        exact: whether PᵀP is to be the identity up to the rounding of P, about 1e-8. Else it is to about 1e-7, which is
            enough for held-out figures, in half of the time.
    """
    if not directions.shape[1]:
        return directions, excess
    root = excess.sqrt()
    products = sum((rows.T @ rows).double() for rows in directions.split(_PRODUCT_ROWS))
    variance, vectors = torch.linalg.eigh(products * torch.outer(root, root))
    variance, vectors = variance.flip(0), vectors.flip(1)
    used = variance > 1e-12 * variance[0].clamp_min(torch.finfo(torch.float64).tiny)
    variance = variance[used]
    mixing = root[:, None] * vectors[:, used] * variance.rsqrt()
    factors = directions @ mixing.to(directions.dtype)
    return orthonormalised(factors, products=torch.float64) if exact else factors, variance


def _gram(rows: Tensor) -> Tensor | None:
    """Returns the Gram matrix of the rows, or None if there are at least as many rows as dimensions."""
    m = rows.shape[0]
    if m >= rows.shape[1]:
        return None
    gram = rows.new_empty(m, m)
    for start in range(0, m, _GRAM_ROWS):  # one triangle is computed, the other copied
        stop = min(start + _GRAM_ROWS, m)
        torch.mm(rows[start:stop], rows[:stop].T, out=gram[start:stop, :stop])
        gram[:start, start:stop] = gram[start:stop, :start].T
    return gram


def _leading(rows: Rows, gram: Tensor | None, rank: int, mask: Tensor | None, shift: Tensor | None) -> Tensor:
    """Returns the leading right singular vectors of some rows, ``[D, <= rank]``, orthonormal up to rounding.

    They are computed from the Gram matrix of the rows, or of the dimensions if ``gram`` is None, in float64. Squaring
    halves the precision, so directions with less than 1e-10 of the largest variance are omitted.

    Args:
        rows: in units of the noise.
        gram: of all rows.
        rank: maximum number of vectors.
        mask: which rows to use; None for all.
        shift: new mean of these rows, relative to the present one; None to leave it.
    """
    values = rows.values
    if rank == 0:
        return values.new_zeros(values.shape[1], 0)
    share = rows.share if mask is None else rows.share[mask]
    if gram is None:
        some = values if mask is None else values[mask]
        some = some if shift is None else some - share[:, None] * shift
        energy, vectors = leading_vectors(some.T @ some, rank)
        used = energy > 1e-10 * energy[0].clamp_min(torch.finfo(torch.float64).tiny)
        return vectors[:, used].to(values.dtype)
    products = gram if mask is None else gram[mask][:, mask]
    if shift is not None:
        along = (values @ shift if mask is None else (values @ shift)[mask]) - 0.5 * (shift @ shift) * share
        products = products.addr(share, along, alpha=-1).addr_(along, share, alpha=-1)
    energy, vectors = leading_vectors(products, rank)
    used = energy > 1e-10 * energy[0].clamp_min(torch.finfo(torch.float64).tiny)
    weights = (vectors[:, used] * energy[used].rsqrt()).to(values.dtype)
    if mask is not None:  # zeros for the other rows cost less than a copy of these
        weights = values.new_zeros(len(values), weights.shape[1]).index_put_((mask.nonzero()[:, 0],), weights)
    factors = values.T @ weights
    if shift is not None:
        factors -= torch.outer(shift, rows.share @ weights)
    return orthonormalised(factors)
