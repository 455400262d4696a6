"""What is measured: the bytes and operations of every case counted by hand, the cases, sides and sizes that were
promised, and how a plan is cut down to some sides and a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pytest

import fastmaf
from fastmaf.bench import cases
from fastmaf.bench.cases import BUILD, EVERY, FILES, FULL, MEMORY, QUICK, SAMPLE, SCORE, TRAIN, Case, epoch, planned
from fastmaf.bench.run import limit_of
from fastmaf.bench.sides import SIDES, Size

# D = 3, two hidden layers of two units, natural order. The units have degrees 1 and 2; what they see:
#   first layer: 1 + 2 inputs; second: 1 + 2 units; the outputs of dimensions 1, 2, 3: 0 + 1 + 2 units, and twice that,
#   as each has a shift and a log-scale. 3 + 3 + 6 = 12 weights a block.
SMALL = Size(3, (2, 2), 2)
WEIGHTS = 2 * 12
BYTES = 4 * WEIGHTS

# A machine on which bytes alone count (1 GB/s reads, 2 copies, 4 Adam, 8 writes, 16 reads files), and one that only
# multiplies.
BY_BYTES = {
    "read_gb_per_s": 1e-9,
    "copy_gb_per_s": 2e-9,
    "adam_gb_per_s": 4e-9,
    "write_file_gb_per_s": 8e-9,
    "read_file_gb_per_s": 16e-9,
    "sgemm_gflop_per_s": math.inf,
    "launch_us": 0.0,
}
BY_OPERATIONS = dict.fromkeys(BY_BYTES, math.inf) | {"sgemm_gflop_per_s": 1e-9, "launch_us": 0.0}


class Counted(NamedTuple):
    """A case, the bytes per second of its rate in ``BY_BYTES``, its bytes and its operations as counted by hand."""

    case: Case
    rate: float
    bytes: int
    operations: int


# Two operations for each weight and image: a product and a sum.
BY_HAND = [
    Counted(BUILD, 2, 2 * BYTES, 0),
    Counted(SCORE[0], 1, BYTES, 2 * WEIGHTS),
    Counted(SCORE[1], 1, BYTES, 2 * WEIGHTS * 8),
    Counted(SCORE[2], 1, BYTES, 2 * WEIGHTS * 64),
    Counted(SAMPLE[0], 1, BYTES, 2 * WEIGHTS),
    Counted(SAMPLE[1], 1, BYTES, 2 * WEIGHTS * 5),
    Counted(SAMPLE[2], 1, BYTES, 2 * WEIGHTS * 64),
    # forward: the weight. Adam: weight and two moments read and written. Forward, and both gradients.
    Counted(TRAIN[0], 4, (1 + 3 + 3) * BYTES, 3 * 2 * WEIGHTS * 8),
    Counted(TRAIN[1], 4, (1 + 3 + 3) * BYTES, 3 * 2 * WEIGHTS * 64),
    Counted(FILES[0], 8, BYTES, 0),
    Counted(FILES[1], 16, BYTES, 0),
    # 219 images in batches of 8: 28 steps. The last, of 3 images, moves as much as the others but multiplies less.
    Counted(epoch(219), 4, 28 * 7 * BYTES, 3 * 2 * WEIGHTS * 219),
]


def test_the_weights_of_the_small_flow_were_counted_rightly() -> None:
    assert fastmaf.MAF(*SMALL[:1], SMALL.blocks, SMALL.hidden, order="natural").visible_weights == WEIGHTS


@pytest.mark.parametrize("counted", BY_HAND, ids=lambda counted: counted.case.label())
def test_bytes_are_those_counted_by_hand(counted: Counted) -> None:
    limit, words = limit_of(counted.case, WEIGHTS, 4, BY_BYTES)
    assert limit == pytest.approx(counted.bytes / counted.rate)
    number, unit = words.split()
    assert unit == "MB" and float(number) == pytest.approx(counted.bytes / 1e6, rel=5e-3)


@pytest.mark.parametrize("counted", [one for one in BY_HAND if one.operations], ids=lambda one: one.case.label())
def test_operations_are_those_counted_by_hand(counted: Counted) -> None:
    limit, words = limit_of(counted.case, WEIGHTS, 4, BY_OPERATIONS)
    assert limit == pytest.approx(counted.operations)
    number, unit = words.split()
    assert unit == "GFLOP" and float(number) == pytest.approx(counted.operations / 1e9, rel=5e-3)


def test_memory_is_what_must_be_held() -> None:
    building, training, sampling = MEMORY
    assert limit_of(building, WEIGHTS, 4, BY_BYTES)[0] == pytest.approx(BYTES / 1e9)
    assert limit_of(training, WEIGHTS, 4, BY_BYTES)[0] == pytest.approx(3 * BYTES / 1e9)
    limit, words = limit_of(sampling, WEIGHTS, 4, BY_BYTES)
    assert limit == pytest.approx(BYTES / 1e9)
    assert words.endswith(" GB") and float(words.split()[0]) == pytest.approx(BYTES / 1e9, rel=5e-3)


def test_bfloat16_weights_are_half_the_bytes_and_all_the_operations() -> None:
    assert limit_of(SCORE[1], WEIGHTS, 2, BY_BYTES)[0] == pytest.approx(BYTES / 2)
    assert limit_of(SCORE[1], WEIGHTS, 2, BY_OPERATIONS)[0] == pytest.approx(2 * WEIGHTS * 8)


def test_the_limit_is_the_larger_of_bytes_operations_and_a_launch() -> None:
    machine = dict.fromkeys(BY_BYTES, 100.0) | {"sgemm_gflop_per_s": 1000.0, "launch_us": 5.0}
    weights = 1_000_000
    assert limit_of(SCORE[0], weights, 4, machine) == (pytest.approx(4e-5), "4 MB")
    assert limit_of(SCORE[2], weights, 4, machine) == (pytest.approx(1.28e-4), "0.128 GFLOP")
    assert limit_of(TRAIN[0], weights, 4, machine) == (pytest.approx(2.8e-4), "28 MB")
    assert limit_of(TRAIN[0], 1_000 * weights, 4, machine) == (pytest.approx(0.28), "28 GB")
    assert limit_of(SCORE[0], 1, 4, machine)[0] == 5e-6, "nothing takes less than the smallest call"


def test_the_cases_that_were_promised_are_in_both_plans() -> None:
    promised = {
        "build": {0},
        "train step": {8, 64},
        "log_prob": {1, 8, 64},
        "sample": {1, 5, 64},
        "save": {0},
        "load": {0},
    }
    for plan in (FULL, QUICK):
        found: dict[str, set[int]] = {}
        for case in plan.cases:
            found.setdefault(case.name, set()).add(case.batch)
        for name, batches in promised.items():
            # The quick one has one batch of what takes long.
            assert found[name] == batches if plan is FULL else found[name] <= batches, name
        assert {"build memory", "training memory", "sampling memory", "epoch"} <= set(found)
        assert len(plan.cases) == len({case.label() for case in plan.cases})


def test_the_published_flow_is_the_one_of_the_full_run() -> None:
    assert FULL.size == Size(12_288, (512, 512), 7)
    assert FULL.images[0] == 224, "28 steps, as its 219 images take, without a last batch of another shape"


def test_the_sides_that_were_promised_are_in_the_full_plan() -> None:
    promised = {"naive", "naive, compiled", "dense", "dense, compiled", "nflows", "zuko", "normflows", "flowjax"}
    assert promised | {"fastmaf", "fastmaf (reference)"} <= set(planned("full").sides)
    assert len(planned("quick").sides) >= 5


@pytest.mark.parametrize("plan", [FULL, QUICK], ids=lambda plan: plan.name)
def test_every_side_that_a_case_names_exists(plan: cases.Plan) -> None:
    for case in [*plan.cases, *(case for sweep in plan.sweeps for case in sweep.cases)]:
        assert case.sides and set(case.sides) <= set(SIDES), case.name
        assert len(set(case.sides)) == len(case.sides)
    assert set(plan.sides) <= set(SIDES)
    for sweep in plan.sweeps:
        assert set(sweep.sides) <= set(plan.sides)


def test_every_side_but_one_that_cannot_train_is_in_every_kind_of_case() -> None:
    for name in EVERY:
        kinds = {case.name for case in FULL.cases if name in case.sides}
        expected = {
            "log_prob",
            "sampling memory",
            "sample",
            "build",
            "save",
            "load",
            "train step",
            "training memory",
            "epoch",
        }
        if name == "fastmaf, bfloat16":
            expected -= {"train step", "training memory", "epoch"}
        expected |= {"build memory"}
        if "compiled" in name:
            expected = {"log_prob", "train step", "training memory"}
        if "kept" in name:
            expected = {"log_prob", "train step", "training memory", "sample"}
        assert kinds == expected, name


def swept(name: str) -> cases.Sweep:
    return next(sweep for sweep in FULL.sweeps if sweep.name == name)


def test_the_sweeps_cover_what_was_promised() -> None:
    def ends(numbers: Sequence[int | None]) -> tuple[int, int]:
        known = [number for number in numbers if number is not None]
        assert len(known) == len(numbers) and sorted(set(known)) == known
        return known[0], known[-1]

    assert ends([size.features for size, _ in swept("features").sizes]) == (768, 49_152)
    assert ends([size.hidden[0] for size, _ in swept("hidden_features").sizes]) == (128, 4_096)
    assert ends([size.blocks for size, _ in swept("blocks").sizes]) == (1, 20)
    assert ends([size.levels for size, _ in swept("levels").sizes]) == (16, 512)
    assert [threads for _, threads in swept("threads").sizes] == [1, 2]


def test_a_sweep_varies_one_thing() -> None:
    for plan in (FULL, QUICK):
        for sweep in plan.sweeps:
            parts: dict[str, set[object]] = {"threads": {threads for _, threads in sweep.sizes}}
            for place, column in enumerate(("features", "hidden_features", "blocks", "levels")):
                parts[column] = {size[place] for size, _ in sweep.sizes}
            assert {column for column, found in parts.items() if len(found) > 1} == {sweep.name}
            assert all(size.hidden[0] == size.hidden[1] for size, _ in sweep.sizes)
            # Four points for a slope; two are a ratio, which is what threads are about, and all that is quick.
            assert len(sweep.sizes) >= (2 if sweep.name == "threads" or plan is QUICK else 4)


def test_what_grows_with_the_size_is_compared_with_the_naive_model() -> None:
    """The claim to show is that sampling costs O(D·H), not O(D²·H); and what levels buy, which is fastmaf's alone."""
    for name in ("features", "hidden_features", "blocks"):
        sweep = swept(name)
        assert {"fastmaf", "naive"} <= set(sweep.sides)
        kinds = {case.name for case in sweep.cases}
        assert {"sample", "log_prob", "train step", "training memory", "sampling memory"} <= kinds
    assert {"sample"} <= {case.name for case in swept("levels").cases}


def test_an_unknown_side_is_an_error_that_names_it_and_the_possible_ones() -> None:
    with pytest.raises(ValueError, match="no side 'nflow' in this run") as refused:
        planned("quick", sides=["naive", "nflow"])
    possible = str(refused.value).partition("expected some of: ")[2]
    assert "nflows" in possible and "zuko" in possible and "dense, compiled" in possible
    assert "no graphs" not in possible, "which is for GPUs"


def test_a_side_of_another_device_is_not_in_the_run() -> None:
    with pytest.raises(ValueError, match="no side 'fastmaf, no graphs'"):
        planned("full", "cpu", ["fastmaf, no graphs"])
    with pytest.raises(ValueError, match="no side 'flowjax'"):
        planned("full", "cuda", ["flowjax"])
    assert "fastmaf, no graphs" in planned("full", "cuda").sides
    assert "flowjax" not in planned("full", "cuda").sides


@pytest.mark.parametrize("name", ["quick", "full"])
def test_asked_for_some_sides_a_plan_has_no_others_beside_fastmaf(name: str) -> None:
    plan = planned(name, sides=["dense", "zuko"])
    assert plan.sides == ("fastmaf", "dense", "zuko")
    for sweep in plan.sweeps:
        assert set(sweep.sides) <= set(plan.sides), f"the sweep of {sweep.name} measures sides that were not asked for"
    assert planned(name, sides=["fastmaf"]).sides == ("fastmaf",)


def test_a_gpu_has_no_threads_to_vary() -> None:
    assert "threads" not in {sweep.name for sweep in planned("full", "cuda").sweeps}
    assert "threads" in {sweep.name for sweep in planned("full", "cpu").sweeps}


def test_no_more_threads_are_asked_for_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, [1]), (2, [1, 2]), (64, [1, 2])):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        plan = planned("full")
        found = {sweep.name: [threads for _, threads in sweep.sizes] for sweep in plan.sweeps}
        assert found["threads"] == expected
        assert found["features"] == [None] * 4, "whatever the cores"


def test_parts_count_every_side_of_every_case_once() -> None:
    one, two = Case("log_prob", 1, ("fastmaf", "naive"), 1), Case("sample", 1, ("fastmaf",), 1)
    size = Size(3, (2,), 1)
    sweep = cases.Sweep("blocks", ((size, None), (size, None), (size, None)), ("fastmaf", "dense"), (one, two))
    plan = cases.Plan("tiny", size, ("fastmaf", "naive", "dense"), (one, two), (1, 4), 1, 0.1, (sweep,))
    assert plan.parts == 3 + 3 * 2
    assert plan._replace(sides=("dense",), sweeps=()).parts == 0


def test_labels() -> None:
    assert (SCORE[0].label(), BUILD.label(), epoch(24).label()) == ("log_prob 1", "build", "epoch 24")
