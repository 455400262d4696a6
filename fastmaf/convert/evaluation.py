"""Sources in evaluation mode, in which they are read, called and copied."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastmaf import hooks
from fastmaf.convert.errors import NotConvertibleError


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts modules into evaluation mode, with what their hooks compute of their parameters (``weight_norm``,
    ``spectral_norm``, pruning) up to date; gradients are not recorded.
    """
    modules = list(modules)
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            for module in modules:
                hooks.compute_parameters(module)
            yield
    finally:
        for module in training:
            module.training = True


def copied(module: nn.Module) -> nn.Module:
    """Returns a copy of a module that is called and not converted, in the modes of the original.

    Raises:
        NotConvertibleError: it cannot be copied.
    """
    try:
        with evaluating(module.modules()):  # weights that a hook computed with gradients could not be copied
            result = copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        raise NotConvertibleError(f"{type(module).__name__} cannot be copied: {error}") from error
    for original, new in zip(module.modules(), result.modules(), strict=True):
        new.training = original.training
    return result


def computed_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields, by name, the tensors that a parametrization or a hook computes of the module's parameters."""
    if parametrize.is_parametrized(module):
        for name in module.parametrizations:  # type: ignore[union-attr]
            yield name, getattr(module, name)
    if hooks.computing_hooks(module):
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield name, value
