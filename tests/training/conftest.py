"""Fixtures of the tests of training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fastmaf


@pytest.fixture
def triton() -> Iterator[None]:
    with fastmaf.use_backend("triton"):
        yield
