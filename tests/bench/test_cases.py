"""The bytes and operations of every case, counted by hand, and the libraries and sizes of the plans."""

from __future__ import annotations

import math

import pytest

import fastmaf
from fastmaf.bench.cases import (
    BUILD,
    EAGER,
    FILES,
    FULL,
    MEMORY,
    QUICK,
    Case,
    Group,
    Plan,
    epoch,
    log_prob,
    planned,
    sample,
    train_step,
)
from fastmaf.bench.libraries import LIBRARIES, PEERS, Size

# D = 3, two hidden layers of two units, natural order. The units have degrees 1 and 2 and see 1 + 2 inputs in the first
# layer, 1 + 2 units in the second; the outputs of the three dimensions see 0 + 1 + 2 units, for shift and log-scale
# each. 3 + 3 + 6 = 12 weights a block.
SMALL = Size(3, (2, 2), 2)
WEIGHTS = 2 * 12
BYTES = 4 * WEIGHTS
RATES = {"read": 1e-9, "copy": 2e-9, "adam": 4e-9, "write_file": 8e-9, "read_file": 16e-9}
# A machine limited by its memory, and one limited by arithmetic.
BY_BYTES = {f"{name}_gb_per_s": rate for name, rate in RATES.items()} | {
    "sgemm_gflop_per_s": math.inf,
    "launch_us": 0.0,
    "cache_mb": 0.0,
}
BY_OPERATIONS = dict.fromkeys(BY_BYTES, math.inf) | {"sgemm_gflop_per_s": 1e-9, "launch_us": 0.0}

# The bytes per second of the case's rate in RATES, its bytes and its operations: two for each weight and sample.
BY_HAND = [
    (BUILD, 2, 2 * BYTES, 0),
    (log_prob(1), 1, BYTES, 2 * WEIGHTS),
    (log_prob(64), 1, BYTES, 2 * WEIGHTS * 64),
    (sample(5), 1, BYTES, 2 * WEIGHTS * 5),
    # forward: the weight. Adam: weight and two moments read and written. Products: forward, and both gradients.
    (train_step(8), 4, (1 + 3 + 3) * BYTES, 3 * 2 * WEIGHTS * 8),
    (FILES[0], 8, BYTES, 0),
    (FILES[1], 16, BYTES, 0),
    # 219 images in batches of 8: 28 steps. The last, of 3 images, moves as much as the others but multiplies less.
    (epoch(219), 4, 28 * 7 * BYTES, 3 * 2 * WEIGHTS * 219),
]


def test_the_weights_of_the_small_flow() -> None:
    assert fastmaf.MAF(*SMALL[:1], SMALL.blocks, SMALL.hidden, order="natural").visible_weights == WEIGHTS


@pytest.mark.parametrize(
    ("case", "rate", "moved", "operations"), BY_HAND, ids=lambda value: getattr(value, "label", "")
)
def test_bytes_and_operations_are_those_counted_by_hand(case: Case, rate: float, moved: int, operations: int) -> None:
    limit, words = case.limit(WEIGHTS, 4, BY_BYTES)
    assert limit == pytest.approx(moved / rate)
    assert words.endswith(" MB") and float(words.split()[0]) == pytest.approx(moved / 1e6, rel=5e-3)
    if operations:
        limit, words = case.limit(WEIGHTS, 4, BY_OPERATIONS)
        assert limit == pytest.approx(operations)
        assert words.endswith(" GFLOP") and float(words.split()[0]) == pytest.approx(operations / 1e9, rel=5e-3)


def test_memory_is_what_must_be_held() -> None:
    limits = [case.limit(WEIGHTS, 4, BY_BYTES) for case in MEMORY]
    assert [limit for limit, _ in limits] == [pytest.approx(n * BYTES / 1e9) for n in (1, 3, 1)]
    assert all(words.endswith(" GB") for _, words in limits)


def test_bfloat16_weights_are_half_the_bytes_and_all_the_operations() -> None:
    assert log_prob(8).limit(WEIGHTS, 2, BY_BYTES)[0] == pytest.approx(BYTES / 2)
    assert log_prob(8).limit(WEIGHTS, 2, BY_OPERATIONS)[0] == pytest.approx(2 * WEIGHTS * 8)


def test_the_limit_is_the_largest_of_bytes_operations_and_a_call() -> None:
    rates = dict.fromkeys(BY_BYTES, 100.0) | {"sgemm_gflop_per_s": 1000.0, "launch_us": 5.0}
    weights = 1_000_000
    assert log_prob(1).limit(weights, 4, rates) == (pytest.approx(4e-5), "4 MB")
    assert log_prob(64).limit(weights, 4, rates) == (pytest.approx(1.28e-4), "0.128 GFLOP")
    assert train_step(8).limit(1_000 * weights, 4, rates) == (pytest.approx(0.28), "28 GB")
    assert log_prob(1).limit(1, 4, rates)[0] == 5e-6


def test_bytes_that_fit_in_the_cache_are_noted() -> None:
    rates = dict.fromkeys(BY_BYTES, 100.0) | {"sgemm_gflop_per_s": 1000.0, "launch_us": 5.0, "cache_mb": 300.0}
    weights = 67_000_000
    assert log_prob(1).fits_in_cache(weights, 4, rates) == "268 MB fit in the cache of 300 MB"
    assert log_prob(1).fits_in_cache(weights, 2, rates) == "134 MB fit in the cache of 300 MB"
    assert log_prob(1).fits_in_cache(2 * weights, 4, rates) == ""
    assert train_step(8).fits_in_cache(weights, 4, rates) == "", "the weights and two moments"
    assert train_step(8).fits_in_cache(weights // 3, 4, rates) == "268 MB fit in the cache of 300 MB"
    assert log_prob(1000).fits_in_cache(weights, 4, rates) == "", "operations decide"
    assert log_prob(1).fits_in_cache(1, 4, rates) == "", "the time of a call decides"
    assert [case.fits_in_cache(weights, 4, rates) for case in (*FILES, MEMORY[0])] == ["", "", ""]
    assert log_prob(1).fits_in_cache(weights, 4, rates | {"cache_mb": 0.0}) == "", "unknown"


@pytest.mark.parametrize("plan", [FULL, QUICK], ids=lambda plan: plan.name)
def test_a_plan_names_known_libraries_and_each_case_once(plan: Plan) -> None:
    cases = plan.groups[0].cases
    assert len({case.label for case in cases}) == len(cases)
    for group in plan.groups:
        assert set(group.libraries) <= set(LIBRARIES)
        for case in group.cases:
            assert case.libraries and set(case.libraries) <= set(LIBRARIES), case.name
    for case in cases:
        trains = case.name in ("train step", "training memory", "epoch")
        assert trains <= ("fastmaf, bfloat16" not in case.libraries), "it cannot be trained"
    kinds = {case.name for case in cases}
    assert kinds == {case.name for case in (BUILD, *MEMORY, *FILES)} | {"log_prob", "sample", "train step", "epoch"}


def test_the_full_plan_is_the_published_flow_with_all_libraries() -> None:
    _, size, threads, libraries, cases = FULL.groups[0]
    assert size == Size(12_288, (512, 512), 7) and threads is None
    assert set(libraries) == set(LIBRARIES)
    for case in cases:
        assert set(case.libraries) >= {name for name in EAGER if name != "fastmaf, bfloat16"}


@pytest.mark.parametrize("name", ["quick", "full"])
def test_small_flows_show_the_overhead_of_python(name: str) -> None:
    small = [group for group in planned(name).groups if group.sweep == "small"]
    assert [group.size for group in small] == [Size(2, (64, 64), 3), Size(6, (64, 64), 5), Size(64, (64, 64), 5)]
    expected = {(name, batch) for name in ("log_prob", "train step", "sample") for batch in (1, 256)}
    for group in small:
        assert {(case.name, case.batch) for case in group.cases} == expected
        assert set(group.libraries) >= {"fastmaf", "naive", *(PEERS if name == "full" else ())}
        assert all(set(group.libraries) <= set(case.libraries) for case in group.cases)


def test_the_cases_of_the_published_flow() -> None:
    cases = {case.label: set(case.libraries) for case in FULL.groups[0].cases}
    assert {"log_prob 1000", "sample 5", "sample 64", "train step 8", "train step 64", "build", "save", "load"} <= set(
        cases
    )
    assert all(libraries >= set(PEERS) for libraries in cases.values())
    assert set(PEERS) == {"nflows", "zuko", "normflows", "flowjax"}


@pytest.mark.parametrize("sweep", ["features", "hidden_features", "blocks", "levels", "threads"])
def test_a_sweep_varies_one_thing(sweep: str) -> None:
    groups = [group for group in FULL.groups if group.sweep == sweep]
    values = {(*group.size, group.threads) for group in groups}
    columns = ("features", "hidden_features", "blocks", "levels", "threads")
    varied = [name for name, column in zip(columns, zip(*values, strict=True), strict=True) if len(set(column)) > 1]
    assert varied == [sweep]


def test_an_unknown_library_is_an_error_that_names_the_possible_ones() -> None:
    with pytest.raises(
        ValueError, match="no library 'nflow' in this run; expected some of: .*'naive', .*'nflows', 'zuko'"
    ):
        planned("quick", libraries=["naive", "nflow"])
    with pytest.raises(ValueError, match="no library 'fastmaf, no graphs'"):
        planned("full", "cpu", ["fastmaf, no graphs"])
    with pytest.raises(ValueError, match="no library 'flowjax'"):
        planned("full", "cuda", ["flowjax"])


@pytest.mark.parametrize("name", ["quick", "full"])
def test_only_the_named_libraries_are_compared_with_fastmaf(name: str) -> None:
    groups = planned(name, libraries=["dense", "zuko"]).groups
    assert groups[0].libraries == ("fastmaf", "dense", "zuko")
    assert all(set(group.libraries) <= set(groups[0].libraries) for group in groups)
    assert planned(name, libraries=["fastmaf"]).groups[0].libraries == ("fastmaf",)


def test_threads_are_varied_on_the_cpu_only() -> None:
    assert "threads" in {group.sweep for group in planned("full", "cpu").groups}
    assert "threads" not in {group.sweep for group in planned("full", "cuda").groups}


def test_the_total_counts_every_result() -> None:
    cases = (Case("log_prob", 1, ("fastmaf", "naive"), 1), Case("sample", 1, ("fastmaf",), 1))
    group = Group("", SMALL, None, ("fastmaf", "naive", "dense"), cases)
    assert QUICK._replace(groups=(group,)).total == 3
    assert QUICK._replace(groups=(group, group._replace(libraries=("fastmaf", "dense")))).total == 3 + 2
