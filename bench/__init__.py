"""Benchmarks, installed as ``fastmaf.bench``: correctness first, then times beside the limits of the machine.

``fastmaf bench`` runs them. ``cases.py`` says what is measured, ``sides/`` holds one file per way of running a MAF,
``worker.py`` is the process that each side has to itself, ``run.py`` asks them in turn, and ``report.py``, ``plot.py``,
``compare.py`` and ``readme.py`` show what came out. ``ops.py``, ``tune.py``, ``resources.py`` and ``pascal.py`` are
for developers.
"""

from __future__ import annotations

if __name__ != "fastmaf.bench":
    raise ImportError(
        f"this package is part of fastmaf and must be imported as 'fastmaf.bench', not as {__name__!r}; "
        "install fastmaf (pip install .) or run from the root of its checkout and 'import fastmaf'"
    )
