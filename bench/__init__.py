"""Benchmarks, installed as ``fastmaf.bench`` and run by ``fastmaf bench``.

``cases.py`` lists what is measured, ``libraries/`` holds one adapter per library, ``check.py`` compares the results of
a library before it is timed, ``worker.py`` runs it in a process of its own, and ``run.py`` goes through the cases.
``dev/`` holds tools for developers; neither it nor ``results/`` is part of the wheel.
"""

from __future__ import annotations

if __name__ != "fastmaf.bench":
    raise ImportError(
        f"this package is part of fastmaf and must be imported as 'fastmaf.bench', not as {__name__!r}; "
        "install fastmaf (pip install .) or run from the root of its checkout and 'import fastmaf'"
    )
