"""The benches of the GPU, as far as they go without one: what is predicted, refused, and counted as work."""

from __future__ import annotations

import math

import pytest
import torch

import fastmaf
from fastmaf.kernels import backends

MISSING = next((why for op in backends.OPS if (why := backends.missing(op, "triton")) is not None), None)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def flow() -> fastmaf.MAF:
    return fastmaf.MAF(12_288, 1, (512, 512), order="natural", init="empty")


def test_the_model_of_pascal_counts_every_byte_once() -> None:
    """A step streams the weights seven times: forward, then weight and moments read and written."""
    from bench import pascal, resources

    own, card = flow(), pascal.GTX_1050_TI
    launches = resources.recorded(card.arch, lambda: pascal._train(own, 8))
    least = 7 * 4 * own.stored_weights / card.bytes_per_s
    launching = len(launches) * card.launch_s
    assert least < pascal.seconds(launches, card) - launching < 1.3 * least
    faster = card._replace(bytes_per_s=2 * card.bytes_per_s)
    assert pascal.seconds(launches, faster) < 0.7 * pascal.seconds(launches, card)


def test_the_model_of_pascal_counts_the_steps_of_a_sample() -> None:
    from bench import pascal

    card = pascal.GTX_1050_TI._replace(bytes_per_s=math.inf, sm_bytes_per_s=math.inf)
    one = pascal.sample_seconds(flow(), 1, card)
    made = flow()._mades()[0]
    assert one == pytest.approx(len(made.schedule) * 3 * card.step_s)
    assert pascal.sample_seconds(flow(), 6 * 16, card) == pytest.approx(one), "six tiles of 16, one a multiprocessor"
    assert pascal.sample_seconds(flow(), 6 * 16 + 1, card) == pytest.approx(2 * one)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["gpu", "tune"])
def test_without_a_gpu_they_say_so(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib

    module = importlib.import_module(f"bench.{name}")
    monkeypatch.setattr("sys.argv", [f"bench.{name}"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2 and "no NVIDIA GPU is here" in capsys.readouterr().err


def test_the_bound_is_the_larger_of_bytes_and_operations() -> None:
    from bench.gpu import Bound

    bound = Bound(1_000_000, {"copy_gb_per_s": 100.0, "sgemm_gflop_per_s": 1000.0})
    assert bound(1, 1, 1) == ("4 MB", pytest.approx(4e-5))
    assert bound(64, 1, 1) == ("0.1 GFLOP", pytest.approx(1.28e-4))
    assert bound(8, 7, 3) == ("28 MB", pytest.approx(2.8e-4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_every_row_of_a_small_run_has_its_bound() -> None:
    from bench import gpu

    rows, about = gpu.run(192, 2, 32, 3)
    assert about["card"] == torch.cuda.get_device_name()
    cases = {"log_prob": gpu.SCORE, "sample": gpu.SAMPLE, "train step": gpu.TRAIN}
    found = {(row["case"], row["batch"]) for row in rows if row["side"] == "fastmaf" and "must_move" in row}
    assert found == {(case, str(batch)) for case, batches in cases.items() for batch in batches}
    assert all(row["must_move"].endswith(("MB", "GFLOP")) for row in rows if "must_move" in row)
    sides = {row["side"] for row in rows if row["case"] == "train step"}
    assert sides >= {"fastmaf", "fastmaf, no graphs", "naive", "masked once", "naive, compiled"}
