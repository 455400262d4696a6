"""A Gaussian whitening of rows of numbers, such as measurements: ``fastmaf.Detector`` if X holds no images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import fastmaf
from fastmaf.inspection.out_of_fold import drop_fold, k_fold
from fastmaf.inspection.scoring.float64_flow import rounded

_FLOOR = 1e-6  # of the noise variance, in columns of variance 1: a constant column has finite scores, too


@dataclass(frozen=True, eq=False)
class RowModel:
    """A Gaussian over standardised rows.

    Attributes:
        shift, scale: of the columns, ``[D]``.
        flow: a whitening as a flow.
    """

    shift: np.ndarray
    scale: np.ndarray
    flow: fastmaf.Flow

    @classmethod
    def of(cls, rows: Tensor, rank: int, folds: int, seed: int) -> RowModel:
        """Fits a model to float64 ``[n >= 1, D]``; arguments as of ``fastmaf.GaussianWhitening.fit_``."""
        rows = rows if len(rows) > 1 else rows.repeat(2, 1)  # dropping a fold of two rows leaves one
        scaler = StandardScaler().fit(rows.numpy())
        features = rows.shape[1]
        whitening = fastmaf.GaussianWhitening(features, min(rank, features), dtype=torch.float64)
        standard = torch.from_numpy((rows.numpy() - scaler.mean_) / scaler.scale_)
        whitening.fit_(standard, folds=folds, floor=_FLOOR, seed=seed)
        return cls(scaler.mean_, scaler.scale_, fastmaf.Flow(features, [whitening], validate_args=False))

    @fastmaf.torch_defaults()
    @torch.no_grad()
    def nll(self, rows: Tensor) -> np.ndarray:
        """Returns the NLL of float64 ``[n, D]``, float64 ``[n]`` nats in the units of the rows.

        Rounded, so that it does not depend on the other rows; see ``fastmaf.inspection.scoring.float64_flow``.
        """
        # Rows whose terms overflow get the largest finite score: NaN would not exceed any threshold.
        largest = np.finfo(np.float64).max
        with np.errstate(over="ignore"):
            standard = torch.from_numpy((rows.numpy() - self.shift) / self.scale)
        nll = np.log(self.scale).sum() - self.flow.log_prob(standard)
        return np.nan_to_num(rounded(nll).numpy(), nan=largest, posinf=largest)


@fastmaf.torch_defaults()
def fit_rows(rows: Tensor, rank: int, folds: int, seed: int) -> tuple[RowModel, np.ndarray]:
    """Fits a model to float64 ``[n >= 2, D]``; returns it with the held-out NLL of each row (K folds)."""
    scores = np.empty(len(rows))
    for fold in k_fold(len(rows), folds, seed):
        scores[fold] = RowModel.of(drop_fold(rows, fold), rank, folds, seed).nll(rows[fold])
    return RowModel.of(rows, rank, folds, seed), scores
