"""Fixtures of the kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastmaf.kernels import native_library


@pytest.fixture(params=["avx512", "avx2", "baseline", "scalar"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test with each instruction set; skips those that this machine lacks."""
    best, *others = native_library.isas()
    if request.param not in (best, *others):
        pytest.skip(f"this CPU has {', '.join((best, *others))}")
    native_library.use_isa(request.param)
    yield request.param
    native_library.use_isa(best)
