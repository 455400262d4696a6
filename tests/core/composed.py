"""Flows to which other tools of PyTorch are applied: a MAF with all kinds of parts, and converted flows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastmaf
from tests.core.helpers import build, generator, normal
from tests.tolerances import F64

D = 7


def maf(dtype: torch.dtype = F64) -> fastmaf.MAF:
    """Returns a MAF with permutations, a fitted whitening and three blocks."""
    flow = build(D, blocks=3, hidden_features=(9, 8), order="random", whitening=2, dtype=dtype)
    flow.transforms[0].fit_(normal(60, D, dtype=dtype) @ normal(D, D, seed=1, dtype=dtype))  # type: ignore[union-attr, operator]
    return flow


def from_nflows(dtype: torch.dtype = F64) -> nn.Module:
    flows = pytest.importorskip("nflows.flows")
    torch.manual_seed(0)
    source = flows.MaskedAutoregressiveFlow(D, 16, num_layers=2, num_blocks_per_layer=2)
    return fastmaf.accelerate(source.to(dtype).eval())


def from_zuko(dtype: torch.dtype = F64) -> nn.Module:
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(0)
    return fastmaf.accelerate(zuko.flows.MAF(D, transforms=2, hidden_features=(16, 16)).to(dtype))


def splines(dtype: torch.dtype = F64) -> nn.Module:
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(0)
    return fastmaf.accelerate(zuko.flows.NSF(D, bins=3, transforms=2, hidden_features=(5,)).to(dtype))


FLOWS: dict[str, Callable[..., nn.Module]] = {
    "MAF": maf,
    "nflows": from_nflows,
    "zuko": from_zuko,
    "splines": splines,
}
EACH = pytest.mark.parametrize("name", list(FLOWS))


class Density(nn.Module):
    """A flow whose log-density a call returns, as tools want it that call modules."""

    def __init__(self, name: str = "MAF", dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.flow = FLOWS[name](dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = (self.flow.log_prob if hasattr(self.flow, "log_prob") else self.flow().log_prob)(x)
        return result


class Samples(Density):
    """A flow of which a call returns the samples for given noise."""

    def forward(self, z: Tensor) -> Tensor:
        result: Tensor = (self.flow.inverse if isinstance(self.flow, fastmaf.Flow) else self.flow.from_base)(z)[0]
        return result


def padding_is_zero(model: nn.Module) -> bool:
    """Returns whether the padding of all packed weights is zero as they lie in memory."""
    layers = [module for module in model.modules() if isinstance(module, fastmaf.MaskedLinear)]
    assert layers
    return all(layer.layout.padding_is_zero(layer.weight.data) for layer in layers)


def data(n: int = 6, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=generator(seed), dtype=F64).to(dtype)
