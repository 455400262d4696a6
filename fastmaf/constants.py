"""Constant tensors of a module, which follow from its architecture."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Constants(nn.Module):
    """A module with constant tensors.

    They are not buffers. Buffers are averaged with those of other models, broadcast, replaced by ``functional_call``
    and left uninitialised by ``to_empty``: an index that is rounded or not initialised makes another function.
    """

    def __init__(self) -> None:
        super().__init__()
        self._constants: dict[str, Tensor] = {}  # on the CPU
        self._placed: dict[str, Tensor] = {}  # where the module's other tensors are
        self._saved_constants: list[str] = []
        self.register_load_state_dict_post_hook(_follow)

    def set_constant(self, name: str, value: Tensor, device: torch.device, *, persistent: bool = False) -> None:
        """Sets a constant to a tensor of the CPU, and puts a copy on ``device``.

        A persistent constant is part of the ``state_dict``, and nothing but its value can be loaded.
        """
        self._constants[name], self._placed[name] = value, value.to(device)
        if persistent:
            self._saved_constants.append(name)

    def constant(self, name: str, device: torch.device) -> Tensor:
        """Returns a constant on a device: that of the tensors that it is used with, which may be another's here."""
        placed = self._placed[name]
        return placed if placed.device == device else self._constants[name].to(device)

    def _place(self, device: torch.device) -> None:
        self._placed = {name: self.constant(name, device) for name in self._constants}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Constants:
        super()._apply(fn, recurse)
        if self._placed:
            self._place(fn(next(iter(self._placed.values()))).device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._saved_constants:
            destination[prefix + name] = self._placed[name]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        names = {prefix + name: self._constants[name] for name in self._saved_constants}
        for name, value in names.items():
            loaded = state_dict.get(name)
            if isinstance(loaded, Tensor) and not loaded.is_meta and not torch.equal(loaded.to(value), value):
                raise ValueError(self._differs(name))
        super()._load_from_state_dict(state_dict, prefix, *args)
        _, strict, missing_keys, unexpected_keys, _ = args
        unexpected_keys[:] = [key for key in unexpected_keys if key not in names]
        missing_keys += [name for name in names if strict and name not in state_dict]

    def _differs(self, name: str) -> str:
        """Returns what is wrong where a ``state_dict`` has another value of a constant."""
        return f"{name} differs from this module's: it was saved by a module of another architecture"


def _follow(module: nn.Module, _: Any) -> None:
    """Puts constants where the tensors are that ``load_state_dict(assign=True)`` brought."""
    assert isinstance(module, Constants)
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    if tensor is not None:
        module._place(tensor.device)


def constants(module: nn.Module) -> Iterator[Tensor]:
    """Yields the constants of a module and of those below it, where they lie."""
    for part in module.modules():
        if isinstance(part, Constants):
            yield from part._placed.values()
