"""Modules and parameters of a flow that are used in several places, and checks that a file can describe all of them.

A file stores a copy of a shared block, layer or parameter for each place, and the names of the places that share it;
``share_again`` restores the sharing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastmaf import hooks
from fastmaf.nn import MADE, MaskedLinear


def check_parts(flow: nn.Module) -> None:
    """Raises TypeError if a file cannot describe a module of the flow."""
    for name, module in flow.named_modules():
        if hooks.computing_hooks(module) or parametrize.is_parametrized(module):
            raise TypeError(
                f"{name} computes its parameters from others (pruning or a parametrisation), which a file cannot "
                "store: make it permanent first, with torch.nn.utils.prune.remove or "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
    for name, module in flow.named_modules():
        if isinstance(module, MADE):
            for part, layer in (*module.hidden.named_children(), ("output", module.output)):
                if type(layer) is not MaskedLinear:
                    raise TypeError(
                        f"layer {part} of {name} must be a MaskedLinear to be saved; found {type(layer).__name__}: "
                        "merge it into one first"
                    )
            for part, layer in module.context_layers.named_children() if module.context_features else ():
                if type(layer) is not nn.Linear or layer.bias is not None:
                    raise TypeError(
                        f"context layer {part} of {name} must be a torch.nn.Linear without bias to be saved; found "
                        f"{layer}: merge it into one, and its bias into that of the layer"
                    )


def shared_parts(flow: nn.Module) -> dict[str, str]:
    """Returns a mapping from the further names of shared modules and parameters to their first name.

    Modules and parameters within a shared module are not listed.

    Raises:
        ValueError: two tensors overlap in memory without being the same tensor.
    """
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, module in flow.named_modules(remove_duplicate=False):
        if not _within(name, shared) and (known := first.setdefault(id(module), name)) != name:
            shared[name] = known
    spans: list[tuple[int, int, str]] = []
    for name, tensor in flow.state_dict(keep_vars=True).items():
        if _within(name, shared):
            continue
        if (known := first.setdefault(id(tensor), name)) != name:
            shared[name] = known
        elif tensor.numel():
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            begin = tensor.data_ptr()
            spans.append((begin, begin + (last + 1) * tensor.element_size(), name))
    spans.sort()
    for (_, end, name), (begin, _, other) in zip(spans, spans[1:], strict=False):
        if begin < end:
            raise ValueError(
                f"{name} and {other} overlap in memory, but are two tensors, which a file cannot store: use one "
                "parameter in both places, or copy one of them"
            )
    return shared


def _within(name: str, shared: Mapping[str, str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in shared)


def share_again(flow: nn.Module, shared: Mapping[str, str]) -> None:
    """Restores the sharing that ``shared_parts`` returned for the saved flow.

    Raises:
        ValueError: a name does not exist, or the modules or parameters of a pair differ.
    """
    for name, first in shared.items():
        path, _, last = name.rpartition(".")
        try:
            owner = flow.get_submodule(path)
            kinds = owner._modules if last in owner._modules else owner._parameters
            copy: object = kinds[last]
            original: object = flow.get_submodule(first) if kinds is owner._modules else flow.get_parameter(first)
        except (AttributeError, KeyError) as error:
            raise ValueError(f"{name} is to be shared with {first}, but there are no two such parts") from error
        if not _equal(copy, original):
            raise ValueError(f"{name} is to be shared with {first}, but differs from it")
        kinds[last] = original  # type: ignore[assignment]


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if not isinstance(a, nn.Module) or not isinstance(b, nn.Module) or type(a) is not type(b) or repr(a) != repr(b):
        return False
    if (
        isinstance(a, MaskedLinear)
        and isinstance(b, MaskedLinear)
        and (a.weight_scale != b.weight_scale or not torch.equal(a.layout.prefix, b.layout.prefix))
    ):
        return False
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    buffers = zip(a.named_buffers(), b.named_buffers(), strict=True)
    return all(key == other and _equal(x, y) for (key, x), (other, y) in (*pairs, *buffers))
