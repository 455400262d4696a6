"""The kernels without single parts of their design, for `bench/gpu_first.sh`: right, other ones, and compiled."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import fastmaf
from fastmaf.kernels import dispatch
from tests.kernels.triton_common.compiling import TRITONS, output

MISSING = next((why for op in dispatch.OPS if (why := dispatch.missing(op, "triton")) is not None), None)
pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.slow,  # the interpreter and the compiler
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here")
SIZE = ["--features", "12", "--hidden", "18", "--blocks", "2", "--device", "cpu", "--repeats", "1"]


@needs_interpreter
def test_results_are_the_same_without_each_part(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from fastmaf.bench.dev import parts

    monkeypatch.setattr(sys, "argv", ["parts", *SIZE, "--batches", "1", "8"])
    assert parts.main() == 0
    lines = [line.partition(" ms")[0].rsplit(maxsplit=1)[0] for line in capsys.readouterr().out.splitlines()]
    overlap = [f"overlap: {case}:" for case in ("log_prob 1", "log_prob 8", "train step 8", "sample 1")]
    assert lines == ["panels: sample 1:", "lanes: log_prob 8:", "moments: train step 8:", *overlap]


@needs_interpreter
def test_wrong_results_are_reported(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from fastmaf.bench.dev import parts

    correct = parts.level_inverse.inverse_block
    monkeypatch.setattr(parts.level_inverse, "inverse_block", lambda *args: correct(*args) * 1.001)
    monkeypatch.setattr(sys, "argv", ["parts", *SIZE, "--batches", "1"])
    assert parts.main() == 1
    assert capsys.readouterr().out.startswith("WRONG panels: sample 1: ")


@needs_interpreter
@pytest.mark.parametrize(
    "n, features, hidden, levels", [(1, 13, (17, 40), None), (3, 33, (5, 16), 4), (9, 2, (1, 1), None)]
)
def test_the_inverse_step_by_step(n: int, features: int, hidden: tuple[int, int], levels: int | None) -> None:
    from fastmaf.bench.dev import parts

    flow = fastmaf.MAF(features, 3, hidden, levels=levels, order="random", seed=1, validate_args=False)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    flow.zero_padding_()
    z = torch.randn(n, features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with fastmaf.use_backend("triton"), parts.PARTS["panels"].without():
            found = flow.inverse(z)
        expected = flow.double().inverse(z.double())
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version, arch", [("", 90), ("3.6.0", 90), ("3.3.1", 61)])
def test_other_kernels_are_launched_and_compile_without_spills(version: str, arch: int) -> None:
    assert version in TRITONS
    reports = output(__name__.replace("test_parts", "compiled_parts"), str(arch), version=version)
    expected = {
        "panels": "_level_inverse_kernel",
        "lanes": "_masked_linear_fwd_kernel",
        "moments": "_masked_linear_bwd_kernel",
        "overlap": "_panel_solve_kernel",
    }
    assert [one["part"] for one in reports] == list(expected)
    for one in reports:
        if one["part"] == "overlap" and arch < 90:  # nothing overlaps there
            assert not one["kernels"], one
        else:
            assert expected[one["part"]] in one["kernels"] and one["spills"] == 0, one
