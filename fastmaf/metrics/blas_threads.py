"""Threads of the linear algebra of NumPy and SciPy, on whose number sums depend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import scipy.linalg  # noqa: F401 - its library can be limited once it is loaded
from threadpoolctl import threadpool_limits


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Lets NumPy and SciPy compute on one thread within it."""
    with threadpool_limits(1):
        yield
