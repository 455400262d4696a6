"""The error of models that have no exact counterpart."""

from __future__ import annotations


class NotConvertibleError(ValueError):
    """A model, or a part of it, has no exact counterpart; the message names it.

    Example:
        >>> try:
        ...     fastmaf.accelerate(torch.nn.Linear(2, 2))
        ... except fastmaf.NotConvertibleError as error:
        ...     print(error)
        Linear (of torch.nn.modules.linear) is no flow of nflows, zuko or normflows
    """
