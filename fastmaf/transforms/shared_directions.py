"""Leading directions of rows without a few of them, for many choices of these, from one basis of all rows.

Left-out rows change the covariance of all rows only along themselves. The leading directions of the other rows are
therefore found, to second order, in the span of the leading directions of all rows and of those left out: a problem of
a tenth of the size. The rows left out must be in this span. Without them, it would lean towards them, and what the
directions leave of these rows would be too small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmaf.transforms.leading_vectors import orthonormalised

_OVERSAMPLING = 60
_MOST_VALUES = 2**27  # of a basis: 512 MiB in float32
_LEAST_SHARE = 1.5  # rows for each dimension of the small problem, where it is worth it


class SharedDirections(NamedTuple):
    """The leading directions of all rows.

    Attributes:
        rows: ``[m, D]``.
        share: of the mean in each row ``[m]``.
        gram: the Gram matrix of the rows ``[m, m]``.
        basis: the directions ``[D, k]``, orthonormal up to rounding, the leading ones first.
        coordinates: of the rows ``[m, k]``.
        least: the variance below which directions are rounding errors of the Gram matrix.
    """

    rows: Tensor
    share: Tensor
    gram: Tensor
    basis: Tensor
    coordinates: Tensor
    least: float

    @classmethod
    def of(cls, rows: Tensor, share: Tensor, gram: Tensor | None, rank: int, left_out: int) -> SharedDirections | None:
        """Returns the directions of rows ``[m, D]``, or None where the small problems would be about as large.

        Half as many directions again are taken as are asked for: those of fewer rows are in the span of these. The last
        ones need not be exact, so that one step of subspace iteration is enough.

        Args:
            rows: less their share of the mean.
            share: of the mean in each row.
            gram: of the rows; None if there are more rows than dimensions.
            rank: number of directions that will be asked for.
            left_out: the most rows that will be left out.
        """
        width = min(rank + rank // 2, max(rank, _MOST_VALUES // rows.shape[1]))
        if gram is None or not rank or len(rows) - left_out < _LEAST_SHARE * (width + _OVERSAMPLING + left_out):
            return None
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(len(rows), width + _OVERSAMPLING, generator=generator, device="cpu").to(gram)
        vectors = torch.linalg.qr(gram @ torch.linalg.qr(gram @ start)[0])[0]
        small = vectors.T @ (gram @ vectors)
        energy, turn = (values.flip(-1) for values in torch.linalg.eigh((small + small.T).double() / 2))
        least = torch.finfo(gram.dtype).eps * float(energy[0])
        used = energy[:width] > least
        mixing = turn[:, :width][:, used] * energy[:width][used].rsqrt()
        basis = orthonormalised(rows.T @ (vectors @ mixing.to(gram.dtype)))
        # Not from the Gram matrix, whose rounding errors would be divided by small standard deviations.
        return cls(rows, share, gram, basis, rows @ basis, least)

    def without(self, left_out: Tensor, shift: Tensor, rank: int) -> Tensor:
        """Returns the leading directions of the other rows ``[D, <= rank]``, orthonormal up to rounding.

        Args:
            left_out: which rows to leave out, bool ``[m]``.
            shift: new mean of the others, relative to the present one ``[D]``.
            rank: number of directions.
        """
        index, k = left_out.nonzero()[:, 0], self.basis.shape[1]
        held, rows = self.coordinates[index], self.rows[index]
        # What the basis leaves of the rows left out, and its directions: rest.T @ mixing.
        products = self.gram[:, index] - self.coordinates @ held.T
        energy, vectors = torch.linalg.eigh(products[index].double())
        used = energy > self.least
        mixing = (vectors[:, used] * energy[used].rsqrt()).to(products.dtype)
        along = shift @ self.basis
        mean = torch.cat([along, (rows @ shift - held @ along) @ mixing])
        values = torch.cat([self.coordinates, products @ mixing], dim=1)[~left_out]
        values.addr_(self.share[~left_out], mean, alpha=-1)
        # In float64: rounding errors would be relative to the largest directions, and what a sample has along these is
        # far larger than its residual.
        energy, turn = (of.flip(-1)[..., :rank] for of in torch.linalg.eigh((values.T @ values).double()))
        turn = turn[:, energy > self.least].to(values)
        beyond = mixing @ turn[k:]
        return torch.addmm(self.basis @ (turn[:k] - held.T @ beyond), rows.T, beyond)
