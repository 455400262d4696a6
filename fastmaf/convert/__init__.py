"""Import of models from other libraries, and export to them, with equal densities."""

from __future__ import annotations

from torch import nn

from fastmaf.convert.converted import ConvertedFlow
from fastmaf.convert.export_nflows import to_nflows
from fastmaf.convert.export_zuko import to_zuko
from fastmaf.convert.network import NotConvertibleError
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
    for name, convert in (("nflows", from_nflows), ("zuko", from_zuko), ("normflows", from_normflows)):
        if any(one.__module__.partition(".")[0] == name for one in type(flow).__mro__):
            return convert(flow)
    raise NotConvertibleError(f"{kind(flow)} is no flow of nflows, zuko or normflows")
