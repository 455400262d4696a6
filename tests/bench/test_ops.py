"""The ops one by one: every op has its rows, a wrong one is not timed, and so with pytest-benchmark's entries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmaf.bench import machine, ops
from fastmaf.bench.check import WrongResultError
from fastmaf.bench.op_cases import BATCHES, check, flow_of, module, ops_of, present
from fastmaf.bench.rows import read

LIMITS = {f"{name}_per_s": 100.0 for name in ("read_gb", "copy_gb", "adam_gb", "sgemm_gflop")} | {"launch_us": 1.0}
# Where D is small, log-determinants may cancel to all but nothing, and their relative errors grow: not so at this one.
D, BLOCKS = 96, 2
NAMES = [op.name for op in ops_of(flow_of(D, BLOCKS), 1)]
FUNCTIONS = [
    ("masked_linear", "forward", "masked_linear D → H"),
    ("masked_linear", "backward", "masked_linear D → H, grad of input"),
    ("masked_linear", "backward", "masked_linear D → H, grads"),
    ("masked_linear", "adam_", "masked_linear D → H, grad and Adam"),
    ("affine_output", "forward", "affine_output"),
    ("affine_output", "adam_", "affine_output, grad and Adam"),
    ("flow", "inverse", "flow_inverse, one block"),
    ("flow", "inverse", "flow_inverse"),
    ("flow", "forward", "flow_forward"),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No limits, which take seconds to measure, and one thread: two wait for each other where a machine is busy."""
    monkeypatch.setattr(machine, "limits", lambda: LIMITS)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def poison(
    op: str, function: str, backend: str, how: Callable[[Tensor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spoils a function's first result, that of float32 inputs alone: the truth is float64's."""
    of = module(op, backend)
    right = getattr(of, function)

    def wrong(first: Any, *rest: Any, **options: Any) -> Any:
        result = right(first, *rest, **options)
        like = first[0] if isinstance(first, tuple) else first
        if like.dtype == torch.float32:
            how(result[0] if isinstance(result, tuple) else result)
        return result

    monkeypatch.setattr(of, function, wrong)


def test_a_small_run_writes_a_row_for_every_op_and_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--features", str(D), "--blocks", str(BLOCKS), "--repeats", "2", "--out", str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", ["fastmaf.bench.ops", *settings])
    ops.main()
    rows, about = read(tmp_path / "new" / "cpu-ops.csv")
    expected = [(name, str(n), side) for n in BATCHES for name in NAMES for side in present()]
    assert [(row["case"], row["batch"], row["side"]) for row in rows] == expected
    for row in rows:
        assert (row["features"], row["hidden_features"], row["unit"], row["repeats"]) == (str(D), "512x512", "s", "2")
        assert row["blocks"] == (str(BLOCKS) if row["case"] in ("flow_forward", "flow_inverse") else "1")
        assert 0 < float(row["p20"]) <= float(row["median"]) <= float(row["p80"])
        assert float(row["fraction_of_limit"]) == pytest.approx(float(row["limit"]) / float(row["median"]), rel=1e-3)
        assert row["must_move"].endswith(("MB", "GFLOP")) and 0 <= float(row["error"]) < 1e-5
        assert row["times_fastmaf"] and (row["side"] != present()[0] or float(row["times_fastmaf"]) == 1)
    assert float(about["read_gb_per_s"]) == 100 and about["processor"]
    printed = capsys.readouterr().out
    assert all(f"{name} 64 " in printed for name in NAMES)
    assert f"written to {tmp_path / 'new' / 'cpu-ops.csv'}" in printed


def test_the_limit_is_the_larger_of_bytes_and_operations() -> None:
    flow = flow_of(D, BLOCKS)
    sizes = [layer.layout.visible for layer in flow._mades()[0].layers]
    few, many = ({op.name: op for op in ops_of(flow, n)} for n in (1, 64))
    assert few["masked_linear H → H"].must_move == 4 * sizes[1]
    assert few["flow_inverse, one block"].must_move == 4 * sum(sizes)
    assert few["flow_forward"].must_move == few["flow_inverse"].must_move == 4 * flow.visible_weights
    assert few["affine_output, grad and Adam"].must_move == 24 * sizes[2]
    assert many["affine_output, grad and Adam"].operations == 4 * 64 * sizes[2]
    megabytes = f"{4e-6 * sizes[1]:.4g} MB"
    assert ops.limit_of(few["masked_linear H → H"], LIMITS) == (pytest.approx(4e-11 * sizes[1]), megabytes)
    slow = LIMITS | {"sgemm_gflop_per_s": 1.0}
    time, words = ops.limit_of(many["masked_linear H → H"], slow)
    assert (time, words) == (pytest.approx(128e-9 * sizes[1]), f"{128e-9 * sizes[1]:.3g} GFLOP")
    assert ops.limit_of(few["masked_linear D → H"], LIMITS)[0] == 1e-6, "nothing is shorter than a call"


@pytest.mark.parametrize(
    "how", [lambda t: t.mul_(1.001), lambda t: t.view(-1)[-1:].fill_(torch.nan)], ids=["off", "nan"]
)
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(("op", "function", "name"), FUNCTIONS)
def test_a_wrong_op_is_refused(
    op: str,
    function: str,
    name: str,
    backend: str,
    how: Callable[[Tensor], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend not in present():
        pytest.skip(f"backend {backend!r} is not here")
    own = next(found for found in ops_of(flow_of(D, BLOCKS), 8) if found.name == name)
    assert check(own, backend) < 1e-5
    poison(op, function, backend, how, monkeypatch)
    with pytest.raises(
        WrongResultError, match=rf"{re.escape(name)} of '{backend}' is off by a relative (1\.0e-03|nan)"
    ):
        check(own, backend)


def test_a_step_of_adam_on_the_wrong_weights_is_refused() -> None:
    """The weight that a step has moved is compared, not only what it returns."""
    own = next(found for found in ops_of(flow_of(D, BLOCKS), 8) if found.name == "affine_output, grad and Adam")

    def prepare(backend: str, dtype: torch.dtype) -> Callable[[], Any]:
        right = own.prepare(backend, dtype)

        def twice() -> Any:
            if dtype == torch.float32:
                right()
            return right()

        return twice

    with pytest.raises(WrongResultError, match="grad and Adam"):
        check(own._replace(prepare=prepare), present()[0])


def test_nothing_is_timed_when_an_op_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*_: Any) -> float:
        raise AssertionError("timed all the same")

    monkeypatch.setattr(machine, "seconds_once", timed)
    poison("masked_linear", "forward", present()[0], lambda y: y.add_(1), monkeypatch)
    with pytest.raises(WrongResultError, match="masked_linear D → H of"):
        ops.run(D, 1, 1)


def test_every_entry_of_pytest_benchmark_passes() -> None:
    command = [sys.executable, "-m", "fastmaf.bench.benchmark_ops", "--benchmark-disable", "-q"]
    environment = os.environ | {"FASTMAF_BENCH_FEATURES": str(D), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"\n{len(NAMES) * len(BATCHES) * len(present())} passed" in done.stdout
