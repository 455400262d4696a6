"""Invertible transforms, one class per file."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastmaf.transforms.affine import AffineAutoregressive
from fastmaf.transforms.base import NotInvertibleError, Transform
from fastmaf.transforms.elementwise import ElementwiseAffine
from fastmaf.transforms.inverted import Inverted
from fastmaf.transforms.local import LocalAutoregressive
from fastmaf.transforms.logit import Logit
from fastmaf.transforms.permutation import Permutation
from fastmaf.transforms.spline import MonotonicRQS
from fastmaf.transforms.spline_map import SplineMap
from fastmaf.transforms.whitening import GaussianWhitening

__all__ = [
    "TRANSFORMS",
    "AffineAutoregressive",
    "ElementwiseAffine",
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
]

TRANSFORMS: dict[str, type[Transform]] = {
    "permutation": Permutation,
    "logit": Logit,
    "affine_autoregressive": AffineAutoregressive,
    "local_autoregressive": LocalAutoregressive,
    "gaussian_whitening": GaussianWhitening,
    "elementwise_affine": ElementwiseAffine,
    "monotonic_rqs": MonotonicRQS,
}
"""The classes of transforms that can be saved, by their names in files. Add a class here to make it savable."""


def transform_config(transform: nn.Module) -> dict[str, Any]:
    """Returns the entry of a transform in the configuration of a flow: its name in files and its ``config()``.

    Raises:
        TypeError: the class of the transform is not in ``TRANSFORMS``.
    """
    for name, cls in TRANSFORMS.items():
        if isinstance(transform, Transform) and type(transform) is cls:
            return {"type": name, **transform.config()}
    raise TypeError(
        f"{type(transform).__name__} cannot be saved: list it in fastmaf.transforms.TRANSFORMS; "
        f"known are {sorted(cls.__name__ for cls in TRANSFORMS.values())}"
    )
