"""A Gaussian whitening of rows of numbers, such as measurements: ``fastmaf.Detector`` where X holds no images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import fastmaf
from fastmaf.inspection.calibration import k_fold
from fastmaf.inspection.cross import without
from fastmaf.inspection.float64 import rounded

_FLOOR = 1e-6  # of the noise's variance in a column of variance 1: one that never varied still scores in finite nats


@dataclass(frozen=True, eq=False)
class RowModel:
    """The Gaussian of standardised rows: ``shift`` and ``scale`` ``[D]`` of the columns, and a whitening as a flow."""

    shift: np.ndarray
    scale: np.ndarray
    flow: fastmaf.Flow

    @classmethod
    def of(cls, rows: Tensor, rank: int, folds: int, seed: int) -> RowModel:
        """Fits it to float64 ``[n >= 1, D]``; arguments as of ``fastmaf.GaussianWhitening.fit_``."""
        rows = rows if len(rows) > 1 else rows.repeat(2, 1)  # a fold of two rows leaves one
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

        Rounded, so that a row's does not depend on the others; see ``fastmaf.inspection.float64``.
        """
        # A row so far away that its terms overflow is no normal one: NaN would be above no threshold.
        largest = np.finfo(np.float64).max
        with np.errstate(over="ignore"):
            standard = torch.from_numpy((rows.numpy() - self.shift) / self.scale)
        found = np.log(self.scale).sum() - self.flow.log_prob(standard)
        return np.nan_to_num(rounded(found).numpy(), nan=largest, posinf=largest)


@fastmaf.torch_defaults()
def fit_rows(rows: Tensor, rank: int, folds: int, seed: int) -> tuple[RowModel, np.ndarray]:
    """Fits a model to float64 ``[n >= 2, D]`` and returns the NLL of each row by the model of the other folds, too."""
    scores = np.empty(len(rows))
    for fold in k_fold(len(rows), folds, seed):
        scores[fold] = RowModel.of(without(rows, fold), rank, folds, seed).nll(rows[fold])
    return RowModel.of(rows, rank, folds, seed), scores
