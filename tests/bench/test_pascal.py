"""The model of a Pascal card counts bytes and dependent steps, and what needs a GPU says so where there is none."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

import fastmaf
from fastmaf.kernels import dispatch

MISSING = next((why for op in dispatch.OPS if (why := dispatch.missing(op, "triton")) is not None), None)
needs_triton = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def flow() -> fastmaf.MAF:
    return fastmaf.MAF(12_288, 1, (512, 512), order="natural", init="empty", validate_args=False)


@needs_triton
def test_the_model_of_pascal_counts_every_byte_once() -> None:
    """A step streams the weights seven times: forward, then weight and moments read and written."""
    from fastmaf.bench import pascal, resources

    own, card = flow(), pascal.GTX_1050_TI
    launches = resources.recorded(card.arch, lambda: pascal._train(own, 8))
    least = 7 * 4 * own.stored_weights / card.bytes_per_s
    launching = len(launches) * card.launch_s
    assert least < pascal.seconds(launches, card) - launching < 1.3 * least
    faster = card._replace(bytes_per_s=2 * card.bytes_per_s)
    assert pascal.seconds(launches, faster) < 0.7 * pascal.seconds(launches, card)


@needs_triton
def test_the_model_of_pascal_counts_the_steps_of_a_sample() -> None:
    from fastmaf.bench import pascal

    card = pascal.GTX_1050_TI._replace(bytes_per_s=math.inf, sm_bytes_per_s=math.inf)
    one = pascal.sample_seconds(flow(), 1, card)
    made = flow()._mades()[0]
    assert one == pytest.approx(len(made.schedule) * 3 * card.step_s)
    assert pascal.sample_seconds(flow(), 6 * 16, card) == pytest.approx(one), "six tiles of 16, one a multiprocessor"
    assert pascal.sample_seconds(flow(), 6 * 16 + 1, card) == pytest.approx(2 * one)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_tune_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tune = importlib.import_module("fastmaf.bench.tune")
    monkeypatch.setattr("sys.argv", ["fastmaf.bench.tune"])
    with pytest.raises(SystemExit) as ended:
        tune.main()
    assert ended.value.code == 2 and "no NVIDIA GPU is here" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_small_run_on_a_gpu_has_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmaf.bench import cases
    from fastmaf.bench.run import run
    from tests.bench.plans import every_case, plan_of

    sides = ("fastmaf", "fastmaf, no graphs", "fastmaf (reference)", "naive", "dense")
    monkeypatch.setattr(cases, "QUICK", plan_of(sides, every_case(), seconds=0.01))
    plan = cases.planned("quick", "cuda")
    result = run(plan, device="cuda")
    assert (result.left_out, result.wrong) == ([], [])
    assert len(result.rows) == plan.parts and result.about["card"] == torch.cuda.get_device_name()
    assert all(row["limit"] and float(row["median"]) > 0 for row in result.rows)
