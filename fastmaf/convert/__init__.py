"""Import of models from other libraries, and export to them, with equal densities."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from fastmaf.convert.converted import ConvertedFlow
from fastmaf.convert.errors import NotConvertibleError
from fastmaf.convert.export_nflows import to_nflows
from fastmaf.convert.export_zuko import to_zuko
from fastmaf.convert.nflows import from_nflows
from fastmaf.convert.normflows import from_normflows
from fastmaf.convert.parts import kind
from fastmaf.convert.published import LeakyMaskError, from_published
from fastmaf.convert.zuko import from_zuko

__all__ = [
    "ConvertedFlow",
    "LeakyMaskError",
    "NotConvertibleError",
    "accelerate",
    "from_nflows",
    "from_normflows",
    "from_published",
    "from_reference",
    "from_zuko",
    "to_nflows",
    "to_zuko",
]

from_reference = from_published  # its name in earlier versions


def accelerate(flow: nn.Module) -> ConvertedFlow:
    """Converts a flow of nflows, zuko or normflows, whichever it is, with the same methods and numbers.

    Raises:
        NotConvertibleError: the flow is of none of them, or a part has no exact counterpart; the message names it.

    Example:
        >>> from nflows.flows import MaskedAutoregressiveFlow
        >>> flow = MaskedAutoregressiveFlow(3, 16, num_layers=2, num_blocks_per_layer=2)
        >>> flow = fastmaf.accelerate(flow)
        >>> flow.sample(5).shape
        torch.Size([5, 3])
    """
    if (library := _library_of(flow)) is not None:
        return _CONVERTERS[library][0](flow)
    of = flow.named_modules() if isinstance(flow, nn.Module) else ()
    held = [name for name, module in of if (library := _library_of(module)) and _is_flow(module, library)]
    hint = f"; it holds one: convert its module {held[0]}" if held else ""
    if isinstance(flow, Mapping):
        hint = "; load a state dict into the flow that it is of, and convert that"
    raise NotConvertibleError(f"{kind(flow)} is no flow of nflows, zuko or normflows{hint}")


_CONVERTERS: dict[
    str, tuple[Callable[[nn.Module], ConvertedFlow], str]
] = {  # and what the class of its flows is called
    "nflows": (from_nflows, "Flow"),
    "zuko": (from_zuko, "Flow"),
    "normflows": (from_normflows, "NormalizingFlow"),
}


def _library_of(flow: object) -> str | None:
    modules = {one.__module__.partition(".")[0] for one in type(flow).__mro__}
    return next((name for name in _CONVERTERS if name in modules), None)


def _is_flow(module: nn.Module, library: str) -> bool:
    return any(one.__name__ == _CONVERTERS[library][1] for one in type(module).__mro__)
