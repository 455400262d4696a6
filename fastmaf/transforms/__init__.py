"""Invertible transforms: the steps that a flow is a sequence of; one per file."""

from __future__ import annotations

from fastmaf.transforms.affine import AffineAutoregressive
from fastmaf.transforms.base import NotInvertibleError, Transform
from fastmaf.transforms.local import LocalAutoregressive
from fastmaf.transforms.logit import Logit
from fastmaf.transforms.permutation import Permutation
from fastmaf.transforms.whitening import GaussianWhitening

__all__ = [
    "TRANSFORMS",
    "AffineAutoregressive",
    "GaussianWhitening",
    "LocalAutoregressive",
    "Logit",
    "NotInvertibleError",
    "Permutation",
    "Transform",
]

TRANSFORMS: dict[str, type[Transform]] = {
    "permutation": Permutation,
    "logit": Logit,
    "affine_autoregressive": AffineAutoregressive,
    "local_autoregressive": LocalAutoregressive,
    "gaussian_whitening": GaussianWhitening,
}
"""The transforms that can be saved, by the name that a file gives them; add a class here to save it."""
