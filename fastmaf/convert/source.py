"""Checks of a source: that its modules compute what the classes of their library do."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastmaf.convert.converted import ConvertedFlow
from fastmaf.convert.errors import NotConvertibleError
from fastmaf.convert.evaluation import computed_tensors, evaluating
from fastmaf.convert.parts import kind
from fastmaf.hooks import any_global_forward, computing_hooks

Converted = TypeVar("Converted", bound=ConvertedFlow)

_HARMLESS = {"__init__", "__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__qualname__"}
_HARMLESS |= {"__repr__", "__parameters__", "__orig_bases__", "__abstractmethods__", "_abc_impl", "extra_repr"}
_HARMLESS |= {"__firstlineno__", "__static_attributes__", "__slotnames__"}

_OF_ANY_DTYPE = ".mask", "._log_z"  # factors that products with weights promote; a constant that is compared


def converter(
    library: str, uses: Collection[str]
) -> Callable[[Callable[[nn.Module], Converted]], Callable[[nn.Module], Converted]]:
    """Returns a decorator of a converter: it checks the source first, and names what the converter cannot read.

    Args:
        library: the package of the source.
        uses: the submodules of the source that are converted; others, such as embedding nets, are not checked.
    """

    def decorate(convert: Callable[[nn.Module], Converted]) -> Callable[[nn.Module], Converted]:
        @functools.wraps(convert)
        def checked(flow: nn.Module) -> Converted:
            used = _used(flow, uses)
            with _one_thread(), evaluating(used.values()):
                if used:
                    check_source(flow, library, used)
                try:
                    result = convert(flow)
                except NotConvertibleError:
                    raise
                except Exception as error:  # not the parts of the library: their attributes may raise anything
                    raise NotConvertibleError(f"{kind(flow)} cannot be converted: {error}") from error
            modules: list[nn.Module] = [result, *result.parts.modules()]
            for module in modules:
                module.training = flow.training
            parameters = list(flow.parameters())
            if parameters and not any(one.requires_grad for one in parameters):
                result.requires_grad_(False)
            return result

        return checked

    return decorate


@contextmanager
def _one_thread() -> Iterator[None]:
    # Hundreds of copies of a few megabytes: a second thread that has to be waited for costs more than it saves.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _used(flow: nn.Module, uses: Collection[str]) -> dict[str, nn.Module]:
    """Returns the modules of a source that are converted, by name; none of what is no flow of the library."""
    if not all(hasattr(flow, name) for name in uses):
        return {}
    return {name: module for name, module in flow.named_modules() if not name or name.split(".")[0] in uses}


def check_source(flow: nn.Module, library: str, modules: Mapping[str, nn.Module]) -> None:
    """Checks every module of a source that is converted.

    Args:
        flow: the source, in evaluation mode.
        library: its library.
        modules: the modules, by name.

    Raises:
        NotConvertibleError: a class overrides a method of the library, a method of the library was replaced, a module
            has forward hooks or a replaced method, or a tensor has no numbers; the message names it.
    """
    if any_global_forward():
        raise NotConvertibleError("forward hooks are registered for all modules, and may change results; remove them")
    for name, module in modules.items():
        if "parametrizations" not in name.split("."):  # they are called, and may be of any class
            check_class(type(module), library)
            _check_module(f"{name or 'the flow'}, {kind(module)},", module, library)
    tensors = dict(_tensors(modules))
    if len(devices := {str(one.device) for one in tensors.values()}) > 1 or "meta" in devices:
        raise NotConvertibleError(f"expected all tensors on one device, with values; found {sorted(devices)}")
    weights = {name: one for name, one in tensors.items() if isinstance(one, nn.Parameter)}
    if len(dtypes := {str(one.dtype) for one in weights.values()}) > 1:
        raise NotConvertibleError(f"expected parameters of one dtype; found {sorted(dtypes)}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        if not _is_finite(tensor):
            raise NotConvertibleError(f"{name} contains numbers that are not finite")
        if dtypes and str(tensor.dtype) not in dtypes and not name.endswith(_OF_ANY_DTYPE):
            raise NotConvertibleError(f"{name} is {tensor.dtype}, the parameters {dtypes.pop()}; expected one dtype")


def _tensors(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in modules.items():
        own = module.named_parameters(recurse=False), module.named_buffers(recurse=False)
        for part in (*own, computed_tensors(module)):
            for name, tensor in part:
                yield f"{prefix}.{name}" if prefix else name, tensor


def _is_finite(tensor: torch.Tensor) -> bool:
    # Of numbers that are not finite no sum is. It takes a quarter of the time; of large numbers it may overflow.
    return math.isfinite(float(tensor.detach().sum())) or bool(torch.isfinite(tensor).all())


def check_class(cls: type, library: str) -> None:
    """Checks that the methods of a class, as far as it is the library's, are those of the library.

    Raises:
        NotConvertibleError: one was replaced while the program runs; the message names it.
    """
    for one in cls.__mro__:
        if not is_of(one, (library,)):
            continue
        for name, value in vars(one).items():
            function = inspect.unwrap(value, stop=lambda f: not _is_from(f, library)) if callable(value) else value
            if not _is_from(function, library):
                raise NotConvertibleError(f"{one.__module__}.{one.__name__}.{name} was replaced while the program runs")


def _is_from(value: Any, library: str) -> bool:
    """Returns whether a function was defined in a library, or is what a decorator of torch or Python made of one."""
    if isinstance(value, property):
        return all(_is_from(one, library) for one in (value.fget, value.fset, value.fdel))
    value = getattr(value, "__func__", value)
    if not inspect.isfunction(value):
        return True
    return value.__globals__.get("__name__", "").partition(".")[0] in (library, "torch", "functools", "contextlib")


def is_of(cls: type, libraries: Collection[str]) -> bool:
    """Returns whether a class is one of these libraries, and not one that merely bears the name of its module."""
    if cls.__module__.partition(".")[0] not in libraries:
        return False
    itself = getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is cls
    return itself or cls.__module__ == parametrize.__name__  # which makes a class for each module


def _check_module(name: str, module: Any, library: str) -> None:
    known = [one for one in type(module).__mro__ if is_of(one, (library, "torch"))]
    for one in type(module).__mro__:
        if one in known or one is object:
            continue
        for attribute in set(vars(one)) - _HARMLESS:
            if any(attribute in vars(base) for base in known):
                raise NotConvertibleError(f"{name} overrides {attribute} and cannot be converted")
    for attribute in vars(module):
        if inspect.isroutine(getattr(type(module), attribute, None)):
            raise NotConvertibleError(f"{name} has its {attribute} replaced and cannot be converted")
    hooks_of_module = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if any(hook not in computing_hooks(module) for hook in hooks_of_module):
        raise NotConvertibleError(
            f"{name} has forward hooks, other than those of weight_norm, spectral_norm and pruning; remove them first"
        )
