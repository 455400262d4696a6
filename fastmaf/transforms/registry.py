"""The classes of transforms that model files hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastmaf.transforms.base import Transform

TRANSFORMS: dict[str, type[Transform]] = {}
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


def transform_from(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Transform:
    """Builds a transform from its ``transform_config``; ``tensors``, its ``state_dict``, are to be loaded into it."""
    return TRANSFORMS[entry["type"]].from_config(entry, tensors)
