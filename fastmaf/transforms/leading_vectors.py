"""Leading eigenvectors of large symmetric matrices."""

from __future__ import annotations

import torch
from torch import Tensor

_OVERSAMPLING = 20  # vectors beyond the rank, at least; else a quarter of the rank
_SMALL = 512  # rows up to which a full decomposition takes no noticeable time
_TOLERANCE = 1e-4  # relative change of what is captured, beyond the first vector
_STEPS = 8  # at most, of two products each


def leading_vectors(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns the largest eigenvalues ``[r]``, descending, and their vectors ``[m, r]``, r <= rank, of a matrix.

    Of a large matrix they are found by subspace iteration from random vectors (a randomised singular value
    decomposition): two products with the matrix in each step, until the sum of the eigenvalues but the first changes by
    less than 1e-4 of itself. Single vectors may still be mixtures of neighbours; the subspace is what matters to a
    covariance. Where eigenvalues fall slowly, a wider basis finds it in fewer steps than a narrow one.

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
    width = rank + max(_OVERSAMPLING, rank // 4)
    if m <= _SMALL or 2 * width > m:
        values, vectors = torch.linalg.eigh(gram.double())
        return values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    start = torch.randn(m, width, generator=torch.Generator().manual_seed(0), device="cpu").to(gram)
    basis, captured = torch.linalg.qr(gram @ start)[0], -1.0
    for _ in range(_STEPS):
        product = gram @ basis
        values = torch.linalg.eigvalsh(_in_basis(basis, product))
        before, captured = captured, float(values[-rank:-1].sum())
        if before >= 0 and abs(captured - before) <= _TOLERANCE * captured:
            break
        basis = torch.linalg.qr(gram @ product)[0]
    else:
        product = gram @ basis
    values, vectors = torch.linalg.eigh(_in_basis(basis, product))
    return values.flip(0)[:rank], (basis.double() @ vectors.flip(1)[:, :rank])


def _in_basis(basis: Tensor, product: Tensor) -> Tensor:
    """Returns a matrix in a basis, float64, from its product with the basis."""
    small = (basis.T @ product).double()
    return (small + small.T) / 2


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
