"""The tools for GPUs, on small flows and the interpreter."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastmaf
from fastmaf.bench import machine
from fastmaf.kernels import dispatch
from fastmaf.kernels.triton_common.launch_table import MOST_ROUNDS, TABLES, Launch, Table

MISSING = next((why for op in dispatch.OPS if (why := dispatch.missing(op, "triton")) is not None), None)
pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here"),
    pytest.mark.slow,  # the interpreter
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
SIZE = ["--features", "12", "--hidden", "8", "--blocks", "1", "--device", "cpu"]
RATES = {"read_gb_per_s": 2.0, "copy_gb_per_s": 2.0, "adam_gb_per_s": 2.0, "sgemm_gflop_per_s": 3.0, "launch_us": 1.0}


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("sys.argv", [name, *arguments])
    return importlib.import_module(f"fastmaf.bench.dev.{name}").main()


@pytest.mark.parametrize("name, batch", [("log_prob", 3), ("train step", 9), ("sample", 2)])
def test_one_runs_an_op(name: str, batch: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from fastmaf.bench.dev import one

    run("one", [name, str(batch), *SIZE], monkeypatch)
    printed = capsys.readouterr().out
    flow = fastmaf.MAF(12, 1, (8, 8), order="natural", log_scale_bound=5.0, soft_bound=False, seed=0)
    x = torch.rand(batch, 12, generator=torch.Generator().manual_seed(0))
    with fastmaf.use_backend("torch"):
        expected = {"log_prob": flow.log_prob, "sample": lambda z: flow.inverse(z)[0]}.get(name, lambda x: None)(x)
        if name == "train step":
            before = [parameter.detach().clone() for parameter in flow.parameters()]
            expected = one.op(flow, name, batch).run()
            assert all(map(torch.equal, before, flow.parameters())), "the step moved the weights"
    assert printed.startswith(f"{name} {batch}: 2 calls")
    assert float(printed.split()[-1]) == pytest.approx(float(expected.detach().double().sum()), rel=1e-4)


def test_times_writes_cases_beside_predictions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(machine, "limits", lambda: RATES)
    predicted = tmp_path / "predicted"
    predicted.write_text("log_prob 2          0.125 ms     12 launches\n    _kernel 3 x 0.1 ms\nsample 3   7.5 ms\n")
    options = ["--batches", "2", "--samples", "3", "--budget", "0", "--precisions", "ieee", "tf32x3"]
    run("times", [*SIZE, *options, "--predicted", str(predicted), "--out", str(tmp_path / "out.csv")], monkeypatch)
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert f"# copy_gb_per_s: {RATES['copy_gb_per_s']}" in lines
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [(row["case"], row["batch"]) for row in rows] == [("log_prob", "2"), ("train step", "2"), ("sample", "3")]
    assert [row["predicted_ms"] for row in rows] == ["0.125", "nan", "7.5"]
    assert all(float(row["graph_ms"]) > 0 and float(row["call_ms"]) > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "FAILED" not in printed and "skipped: precision 'tf32x3' needs compute capability 8.0" in printed


def test_times_prints_the_limits_alone(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(machine, "limits", lambda: RATES)
    run("times", [*SIZE, "--limits"], monkeypatch)
    assert "copy_gb_per_s 2" in (printed := capsys.readouterr().out) and len(printed.splitlines()) == 1


@pytest.mark.filterwarnings("ignore::fastmaf.ConnectivityWarning")
def test_smoke_passes_on_the_interpreter(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        assert run("smoke", [*SIZE, "--batches", "1", "9", "--precisions", "ieee", "bf16"], monkeypatch) == 0
    finally:
        torch.use_deterministic_algorithms(deterministic)
    printed = capsys.readouterr().out
    assert "0 wrong" in printed and "skipped: precision 'bf16'" in printed
    assert len([line for line in printed.splitlines() if " ieee " in line]) == 2 * 9


@pytest.fixture
def tables() -> Iterator[None]:
    before = dict(TABLES)
    yield
    TABLES.update(before)


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("key", TABLES)
def test_every_entry_of_a_table_has_an_op_that_depends_on_it(key: int) -> None:
    from fastmaf.bench.dev import resources, tune

    flow, before = resources.published_flow(blocks=1), TABLES[key]
    for entry in Table._fields:
        work = tune.work_of(entry, key, (key, 8), flow)
        if entry == "whole" and MOST_ROUNDS * before.whole.columns < 512:  # the inputs of the second hidden layer
            assert work is None
            continue
        assert work is not None, entry
        assert work[0] == "train step" or not entry.startswith("backward")
    assert TABLES[key] is before


@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize("entry", Table._fields)
def test_alternatives_differ_in_one_entry_and_can_be_launched(entry: str, stage: int) -> None:
    from fastmaf.bench.dev import tune

    for present in TABLES.values():
        for table in (found := tune.alternatives(entry, present, stage)):
            value = getattr(table, entry)
            assert value != getattr(present, entry)
            assert table._replace(**{entry: getattr(present, entry)}) == present
            if isinstance(value, Launch):
                assert value.rows >= 16 and value.columns >= 1 and value.stages >= 1 and value.programs_per_sm >= 1
                numbers = [value.rows, value.columns, value.warps]
                assert all(number & (number - 1) == 0 for number in numbers)
        assert len(set(found)) == len(found)
        assert found or stage and not isinstance(getattr(present, entry), Launch)


@pytest.mark.usefixtures("tables")
def test_tune_prints_the_fastest_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """With times that are made up: twice the warps are faster, half the columns give wrong results."""
    from fastmaf.bench.dev import tune

    present = TABLES[90].dot

    def seconds(op: Any, expected: Any) -> float:
        launch = TABLES[90].dot
        if launch.columns < present.columns:
            raise tune.WrongResultError("off by a relative 1.0e+00")
        others = abs(launch.stages - 3) + abs(launch.rows - present.rows) + abs(launch.columns - present.columns)
        return 1e-3 / min(launch.warps, 2 * present.warps) + 1e-6 * others + 1e-6 * (launch.warps > 2 * present.warps)

    compiled: list[Table] = []
    monkeypatch.setattr(tune, "seconds", seconds)
    monkeypatch.setattr(tune, "model", lambda blocks: fastmaf.MAF(12, 1, (8, 8), order="natural", seed=0))
    monkeypatch.setattr(tune, "compile_op", lambda options, key, work, table: compiled.append(table))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some Card")

    class Pool:
        map = staticmethod(map)

    options = type("Options", (), {"blocks": 1, "precision": "tf32x3"})
    with fastmaf.use_precision("tf32x3"):  # in full precision two warps are launched as four
        tune.tune(options, 90, (90, 8), "dot", Pool)
    *_, last = capsys.readouterr().out.splitlines()
    best = present._replace(warps=2 * present.warps, stages=3)
    assert last.startswith(
        f"90: dot={best},  # {0.5 / present.warps:.4f} ms: Some Card, torch {torch.__version__}, Triton "
    )
    assert len(compiled) >= 10 and TABLES[90].dot == present
