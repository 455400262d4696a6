"""What the tests of CUDA graphs share."""

from __future__ import annotations

import contextlib
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


class RunAgain:
    """Replaces a CUDA graph on the CPU: a replay runs the recorded code again, which versions of tensors do not show;
    recording it changes nothing.
    """

    running = False

    def __init__(self, run: Callable[[], None], device: torch.device, pool: Any = None) -> None:
        self._run = run
        owner = run.__self__  # type: ignore[attr-defined]
        tensors = [p.detach() for p in owner._flow.parameters()]
        tensors += [v for state in owner._optimizer.state.values() for v in state.values()]
        self._tensors = tensors
        before = [tensor.clone() for tensor in tensors]
        try:
            self.replay()
        finally:
            for tensor, value in zip(tensors, before, strict=True):
                if not torch.equal(tensor, value):  # autograd sees every write, also of the same numbers
                    tensor.copy_(value)

    def replay(self) -> None:
        RunAgain.running = True
        with contextlib.ExitStack() as versions:
            for tensor in self._tensors:
                versions.enter_context(torch.autograd._unsafe_preserve_version_counter(tensor))
            try:
                self._run()
            finally:
                RunAgain.running = False

    def pool(self) -> None:
        return None
