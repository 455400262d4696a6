"""Leading eigenvectors of large symmetric matrices."""

from __future__ import annotations

import torch
from torch import Tensor

_OVERSAMPLING = 20  # vectors beyond the rank, at least; else half of the rank
_SMALL = 512  # rows up to which a full decomposition takes no noticeable time
_TOLERANCE = 1e-4  # relative change of what is captured, beyond the first vector
_ITERATIONS = 2, 12  # at least and at most


def leading_vectors(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns the largest eigenvalues ``[r]``, descending, and their vectors ``[m, r]``, r <= rank, of a matrix.

    Of a large matrix they are found by subspace iteration from random vectors (a randomised singular value
    decomposition): at least two steps, and until the sum of the eigenvalues but the first changes by less than 1e-4 of
    itself. Single vectors may still be mixtures of neighbours; the subspace is what matters to a covariance. Where
    eigenvalues fall slowly, a wider basis finds it in fewer steps than a narrow one, in the same time.

    The first vectors are random for a reason: those of a larger set of rows, from which some were then held out, would
    be nearer, but the subspace found from them still leans towards the held-out rows, whose residuals are then too
    small.

    Args:
        gram: positive semi-definite ``[m, m]``.
        rank: number of vectors.

    Returns:
        Both in float64.

    References:
        Halko, Martinsson and Tropp 2011, Finding structure with randomness.
    """
    m = len(gram)
    width = rank + max(_OVERSAMPLING, rank // 2)
    if m <= _SMALL or 3 * width > m:
        values, vectors = torch.linalg.eigh(gram.double())
        return values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    start = torch.randn(m, width, generator=torch.Generator().manual_seed(0), device="cpu").to(gram)
    basis, captured = torch.linalg.qr(gram @ start)[0], -1.0
    for step in range(1, _ITERATIONS[1] + 1):
        product = gram @ basis
        values, vectors = _ritz(basis, product)
        before, captured = captured, float(values[-rank:-1].sum())
        if step > _ITERATIONS[0] and abs(captured - before) <= _TOLERANCE * captured:
            break
        basis = torch.linalg.qr(product)[0]
    else:
        values, vectors = _ritz(basis, gram @ basis)
    return values.flip(0)[:rank], (basis.double() @ vectors.flip(1)[:, :rank])


def _ritz(basis: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """Returns eigenvalues, ascending, and vectors of the matrix in a basis, from its product with the basis."""
    small = (basis.T @ product).double()
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    return values, vectors


def orthonormalised(factors: Tensor, *, products: torch.dtype | None = None) -> Tensor:
    """Orthonormalises nearly orthonormal columns; columns of zeros stay zero.

    One step of the Newton-Schulz iteration, P + P (I − PᵀP) / 2, which squares the error.

    Args:
        factors: P ``[D, r]``.
        products: dtype of PᵀP; None for that of P. With float64, the remaining error is that of rounding the result.
    """
    exact = factors if products is None else factors.to(products)
    identity = torch.eye(factors.shape[1], dtype=exact.dtype, device=factors.device)
    return torch.addmm(factors, factors, ((identity - exact.T @ exact) / 2).to(factors.dtype))
