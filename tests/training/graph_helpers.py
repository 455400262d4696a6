"""What the tests of CUDA graphs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastmaf
from fastmaf.kernels import dispatch
from tests.core.helpers import build, normal
from tests.tolerances import F32

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
MISSING = next((why for op in dispatch.OPS if (why := dispatch.missing(op, "triton")) is not None), None)
needs_triton = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test for a GPU, where it runs with the Triton kernels."""
    return pytest.mark.usefixtures("triton")(needs_gpu(pytest.mark.gpu(test)))


def flow_on(device: str, **options: Any) -> fastmaf.MAF:
    return build(13, seed=3, hidden_features=(9, 11), dtype=F32, **options).to(device)


def batches(device: str, sizes: list[int]) -> list[torch.Tensor]:
    return [normal(n, 13, seed=i, dtype=F32).to(device) for i, n in enumerate(sizes)]
