"""The bench: all sides are one function and do the same work, a wrong side is not timed, and every row is written."""

from __future__ import annotations

import copy
import csv
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from bench import machine, memory
from bench import run as bench
from bench.sides import (
    MaskedOnce,
    Side,
    bfloat16_side,
    blocks_of,
    fast_side,
    masked_gradients_side,
    masked_once_side,
    naive_side,
    reference_side,
    torch_adam_side,
)
from fastmaf.reference import NaiveMAF

D = 20


def build(dtype: torch.dtype = torch.float64) -> tuple[fastmaf.MAF, NaiveMAF, Tensor]:
    flow = fastmaf.MAF(D, 2, (12, 9), order="natural", seed=0, dtype=dtype)
    return flow, flow.to_naive(), torch.rand(5, D, dtype=dtype, generator=torch.Generator().manual_seed(0))


def sides_of(flow: fastmaf.MAF, naive: NaiveMAF) -> list[Side]:
    return [fast_side(flow), naive_side(naive), masked_once_side(naive)]


def test_masked_once_is_the_naive_model() -> None:
    _, naive, x = build()
    masked = MaskedOnce(naive)
    torch.testing.assert_close(masked.log_prob(x), naive.log_prob(x), rtol=1e-13, atol=0)
    assert all(bool((w[m == 0] == 0).all()) for w, m in zip(masked.weights, masked.masks, strict=True))


def test_all_sides_take_the_same_training_steps() -> None:
    """Three steps of each, and they are still one function: none of them is timed for less work than the others."""
    flow, naive, x = build()
    copies = [torch_adam_side(copy.deepcopy(flow)), reference_side(copy.deepcopy(flow))]
    sides = [*sides_of(flow, naive), *copies, masked_gradients_side(naive)]
    start = flow.log_prob(x).detach()
    for i in range(3):
        batch = torch.rand(8, D, dtype=x.dtype, generator=torch.Generator().manual_seed(i))
        for side in sides:
            side.train_step(batch)
    first, *others = (side.log_prob(x).detach() for side in sides)
    assert float((first - start).abs().min()) > 1e-3, "they moved"
    for side, other in zip(sides[1:], others, strict=True):
        torch.testing.assert_close(other, first, rtol=1e-9, atol=0, msg=f"{side.name} has become another function")


def test_masks_are_put_back_after_each_step() -> None:
    _, naive, x = build()
    masked = MaskedOnce(naive)
    with torch.no_grad():
        for weight in masked.weights:
            weight += 1.0
    masked.mask_again()
    assert all(bool((w[m == 0] == 0).all()) for w, m in zip(masked.weights, masked.masks, strict=True))


def test_the_numbers_each_side_holds() -> None:
    flow, naive, _ = build()
    fast, slow, masked = sides_of(flow, naive)
    dense = 2 * (D * 12 + 12 * 9 + 9 * 2 * D)
    assert fast.parameter_numbers == flow.stored_weights
    assert slow.parameter_numbers == masked.parameter_numbers == 2 * dense


def test_sides_that_agree_pass() -> None:
    flow, naive, x = build(torch.float32)
    bench.check(flow, sides_of(flow, naive), naive, x)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_side_with_a_wrong_log_prob_is_refused(wrong: int) -> None:
    flow, naive, x = build(torch.float32)
    sides = sides_of(flow, naive)
    right, name = sides[wrong].log_prob, sides[wrong].name
    sides[wrong].log_prob = lambda x: right(x) * 1.001
    with pytest.raises(bench.WrongResultError, match=f"log_prob of '{name}' is off by a relative 1"):
        bench.check(flow, sides, naive, x)
    sides[wrong].log_prob = lambda x: right(x) * torch.nan
    with pytest.raises(bench.WrongResultError, match="relative nan"):
        bench.check(flow, sides, naive, x)


def test_a_wrong_inverse_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, naive, x = build(torch.float32)
    inverse = flow.inverse

    def off(z: Tensor) -> tuple[Tensor, Tensor]:
        back, ladj = inverse(z)
        return back + 0.01, ladj

    monkeypatch.setattr(flow, "inverse", off)
    with pytest.raises(bench.WrongResultError, match=r"inverse\(forward\(x\)\) is off by"):
        bench.check(flow, sides_of(flow, naive), naive, x)


def test_a_naive_inverse_of_another_model_is_refused() -> None:
    flow, naive, x = build(torch.float32)
    sides = sides_of(flow, naive)[:1]
    with torch.no_grad():
        blocks_of(naive)[-1].biases[-1].add_(0.1)
    with pytest.raises(bench.WrongResultError, match="naive inverse's first 16 dimensions"):
        bench.check(flow, sides, naive, x)


def test_wrong_samples_are_refused() -> None:
    flow, naive, x = build(torch.float32)
    sides = [fast_side(flow), bfloat16_side(flow)]
    bench.check(flow, sides, naive, x)
    right = sides[1].sample
    assert right is not None
    sides[1].sample = lambda n: right(n) * 1.1
    with pytest.raises(bench.WrongResultError, match="samples of 'bfloat16'"):
        bench.check(flow, sides, naive, x)


def test_nothing_is_timed_when_the_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*_: Any) -> None:
        raise AssertionError("timed all the same")

    def wrong(naive: NaiveMAF) -> Side:
        side = naive_side(naive)
        right = side.log_prob
        side.log_prob = lambda x: right(x) + 100
        return side

    monkeypatch.setattr(machine, "limits", lambda: dict.fromkeys(LIMITS, 1.0))
    monkeypatch.setattr(bench, "naive_side", wrong)
    monkeypatch.setattr(bench, "interleaved", timed)
    with pytest.raises(bench.WrongResultError, match="'naive'"):
        bench.run(48, 2, (16, 16), 2, False)


LIMITS = ("read_gb_per_s", "copy_gb_per_s", "adam_gb_per_s", "sgemm_gflop_per_s")


def test_a_small_run_writes_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "cpu.csv"
    settings = ["--features", "48", "--blocks", "2", "--hidden", "16", "16", "--repeats", "2", "--no-memory"]
    monkeypatch.setattr(sys, "argv", ["bench.run", *settings, "--csv", str(path)])
    bench.main()
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    ours = ["fastmaf", "reference", "bfloat16"]
    dense = ["naive", "masked once"]
    expected = [("log_prob", n, side) for n in ("1", "8", "64") for side in (*ours, *dense)]
    expected += [("sample", n, side) for n in ("1", "5", "64") for side in (*ours, *(["naive"] if n == "1" else []))]
    training = ["fastmaf", "torch Adam", "reference", *dense, "masked gradients"]
    expected += [("train step", "8", side) for side in training]
    assert [(row["case"], row["batch"], row["side"]) for row in rows] == expected
    about = ("date", "commit", "processor", "threads", "torch", "features", "blocks", "hidden_features", *LIMITS)
    for row in rows:
        assert {*bench.COLUMNS, *about} <= set(row)
        assert all(row[name] for name in (*bench.COLUMNS[:-1], *about)), row
        assert 0 < float(row["p20_s"]) <= float(row["median_s"]) <= float(row["p80_s"])
        assert (row["features"], row["hidden_features"]) == ("48", "16x16")
        if row["side"] == "fastmaf":
            assert float(row["times_faster"]) == 1.0
    extrapolated = rows[expected.index(("sample", "1", "naive"))]
    assert extrapolated["note"] == "extrapolated: 25 of 96 passes"
    printed = capsys.readouterr().out
    assert printed.count("masked once") == 4
    assert f"written to {path}" in printed


def test_the_peak_memory_of_a_process_of_its_own() -> None:
    peak = memory.peak_gb("masked once", features=48, blocks=1, hidden=(8,), batch=2, steps=1)
    if peak is None:
        pytest.skip("this operating system does not say")
    # Whatever this process holds (the benches' buffers alone are 0.5 GB) must not hide what that one takes.
    assert 0.001 < peak < 1


def test_memory_rows_are_printed_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peak_gb", lambda side, **_: None if side == "naive" else 1.234)
    rows = bench.memory_rows(48, 2, (16,))
    assert [row["side"] for row in rows] == ["fastmaf", "masked once"]
    assert "1.23 GB above importing torch" in bench.table(rows)
    bench.write(rows, {"torch": "x"}, tmp_path / "a.csv")
    with open(tmp_path / "a.csv", newline="") as file:
        assert [row["note"] for row in csv.DictReader(file)] == ["1.23 GB above importing torch"] * 2


def test_calls_are_timed_in_turn_after_a_warm_up() -> None:
    order: list[str] = []
    calls: dict[str, Callable[[], object]] = {name: partial(order.append, name) for name in "ab"}
    times = bench.interleaved(calls, {"a": 3, "b": 1})
    assert order == ["a", "b", "a", "b", "a", "a"]
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 1}
