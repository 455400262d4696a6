"""pytest-benchmark's entries for developers: every op on each of the CPU's backends, at batches 1, 8 and 64.

    python -m fastmaf.bench.benchmark_ops -k "level_inverse and native" --benchmark-autosave --benchmark-compare

takes all of pytest's options. ``FASTMAF_BENCH_FEATURES`` sets D. Each entry is checked against the float64 reference
before it is timed. ``python -m fastmaf.bench.ops`` lets the backends take turns and knows the machine's limits.
"""

from __future__ import annotations

import os
import re
import sys
from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastmaf.bench
from fastmaf.bench.op_cases import BATCHES, FEATURES, Op, check, flow_of, ops_of, present

ROUNDS = 15
NAMES = [op.name for op in ops_of(flow_of(8, 1), 1)]


@cache
def flow() -> fastmaf.MAF:
    return flow_of(int(os.environ.get("FASTMAF_BENCH_FEATURES", FEATURES)))


@cache
def ops(batch: int) -> dict[str, Op]:
    return {op.name: op for op in ops_of(flow(), batch)}


@cache
def flush() -> Tensor:
    """Larger than any cache: the other layers of a flow would push an op's weights out between two calls."""
    return torch.ones(32 * 2**20)


def clear_cache() -> None:
    flush().sum()


@pytest.mark.parametrize("backend", present())
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", NAMES, ids=[re.sub(r"\W+", "_", name.replace("→", "to")) for name in NAMES])
def test_op(benchmark: BenchmarkFixture, name: str, batch: int, backend: str) -> None:
    op = ops(batch)[name]
    error = check(op, backend)
    benchmark.group = f"{name}, batch {batch}"
    benchmark.extra_info |= {"must_move_bytes": op.must_move, "operations": op.operations, "error": error}
    benchmark.pedantic(op.prepare(backend, torch.float32), setup=clear_cache, rounds=ROUNDS, warmup_rounds=1)


def main() -> None:
    """Runs pytest on this file."""
    # In a checkout pytest calls the folder by its own name, bench, which it has for nobody else.
    sys.modules["bench"] = fastmaf.bench
    raise SystemExit(pytest.main([__file__, *sys.argv[1:]]))


if __name__ == "__main__":
    main()
