"""Invertible transforms, one class per file."""

from __future__ import annotations

from fastmaf.transforms.act_norm import ActNorm
from fastmaf.transforms.affine import AffineAutoregressive
from fastmaf.transforms.base import NotInvertibleError, Transform
from fastmaf.transforms.batch_norm import BatchNorm
from fastmaf.transforms.elementwise import ElementwiseAffine
from fastmaf.transforms.fallback import FallbackWarning
from fastmaf.transforms.inverted import Inverted
from fastmaf.transforms.local import LocalAutoregressive
from fastmaf.transforms.logit import Logit
from fastmaf.transforms.permutation import Permutation
from fastmaf.transforms.registry import TRANSFORMS, transform_config, transform_from
from fastmaf.transforms.spline import MonotonicRQS
from fastmaf.transforms.spline_map import SplineMap
from fastmaf.transforms.whitening import GaussianWhitening

__all__ = [
    "TRANSFORMS",
    "ActNorm",
    "AffineAutoregressive",
    "BatchNorm",
    "ElementwiseAffine",
    "FallbackWarning",
    "GaussianWhitening",
    "Inverted",
    "LocalAutoregressive",
    "Logit",
    "MonotonicRQS",
    "NotInvertibleError",
    "Permutation",
    "SplineMap",
    "Transform",
    "transform_config",
    "transform_from",
]

TRANSFORMS |= {
    "permutation": Permutation,
    "logit": Logit,
    "affine_autoregressive": AffineAutoregressive,
    "local_autoregressive": LocalAutoregressive,
    "gaussian_whitening": GaussianWhitening,
    "elementwise_affine": ElementwiseAffine,
    "monotonic_rqs": MonotonicRQS,
    "inverted": Inverted,
    "act_norm": ActNorm,
    "batch_norm": BatchNorm,
}
