"""What every test gets: one hypothesis profile, and the backend choice put back after each test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from fastmaf.kernels import backends

# HYPOTHESIS_PROFILE=explore looks for new failures; the default repeats the same examples on every machine.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, max_examples=300, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def default_backend() -> Iterator[None]:
    """Undoes a backend that a test has set for the whole process."""
    before = backends.chosen()
    yield
    backends.use_backend(before)
