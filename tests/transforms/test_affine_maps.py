"""Blocks of other element-wise maps than a MAF's keep what every transform guarantees."""

from __future__ import annotations

import torch

from fastmaf import MADE, AffineAutoregressive
from fastmaf.kernels import AffineMap
from fastmaf.kernels.affine_output.affine_map import SCALE_FIRST, SHIFT_FIRST, SIGMOID, SOFT_CLIP, SOFTPLUS
from tests.core.contract import TransformContract
from tests.core.helpers import generator, shared_widths
from tests.tolerances import F64


class Mapped(AffineAutoregressive):
    """An affine block of any map."""

    def __init__(self, made: MADE, affine_map: AffineMap) -> None:
        super().__init__(made)
        self.affine_map = affine_map

    @property
    def _map(self) -> AffineMap:
        return self.affine_map


class Contract(TransformContract):
    features = 9
    affine_map: AffineMap
    # A file has no place for other maps yet.
    test_save_and_load = test_what_became_float64_is_as_exact_as_float64 = None  # type: ignore[assignment]

    def transform(self, dtype: torch.dtype = F64) -> Mapped:
        with shared_widths():
            made = MADE(self.features, (11, 20), degrees="random", generator=generator(1), dtype=dtype)
        return Mapped(made, self.affine_map)

    def fresh(self, dtype: torch.dtype = F64) -> Mapped:
        fresh = self.transform(dtype)
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.neg_()
        return fresh


class TestSoftplus(Contract):
    affine_map = AffineMap(SCALE_FIRST, SOFTPLUS, epsilon=1e-3)


class TestSigmoid(Contract):
    affine_map = AffineMap(SCALE_FIRST, SIGMOID, 2.0, 1e-3)


class TestSoftClip(Contract):
    affine_map = AffineMap(SHIFT_FIRST, SOFT_CLIP, 2.0)
