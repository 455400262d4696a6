"""Samples that depend on a seed and their number alone, and which draws record gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.noise import normal_rows, philox
from tests.core.helpers import build, generator
from tests.tolerances import F32, F64, assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_against_its_authors_vectors(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in philox((c0, c1, c2, c3), key)) == expected


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("features", [1, 2, 3, 13, 64, 1001])
def test_rows_depend_on_seed_and_number_alone(features: int, dtype: torch.dtype) -> None:
    like = torch.empty(0, dtype=dtype)
    whole = normal_rows(300, features, 7, 0, like)
    assert whole.dtype == dtype and whole.shape == (300, features)
    for first, count in ((0, 1), (0, 299), (17, 5), (256, 44), (299, 1), (40, 0)):
        assert torch.equal(normal_rows(count, features, 7, first, like), whole[first : first + count])
    assert not torch.isclose(whole, normal_rows(300, features, 8, 0, like)).any()
    assert not torch.isclose(whole[1:], whole[:-1]).any()


def test_blocks_of_work_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.empty(0, dtype=F64)
    whole = normal_rows(50, 9, 3, 5, like)
    monkeypatch.setattr("fastmaf.noise._MAX_BLOCKS", 8)
    assert torch.equal(normal_rows(50, 9, 3, 5, like), whole)


def test_large_seeds_and_rows_are_their_own() -> None:
    like = torch.empty(0, dtype=F64)
    seeds, starts = (0, 1, 1 << 32, (1 << 64) - 1), (0, 1, 1 << 32, (1 << 62) + 1)
    rows = torch.cat([normal_rows(1, 8, seed, start, like) for seed in seeds for start in starts])
    distances = torch.cdist(rows, rows) + 10 * torch.eye(len(rows), dtype=F64)
    assert torch.isfinite(rows).all() and distances.min() > 0.1


def test_the_noise_is_normal() -> None:
    """Moments, tails and correlations of 400,000 numbers, each within 5 standard errors."""
    x = normal_rows(100_000, 4, 11, 0, torch.empty(0, dtype=F64))
    n = x.numel()
    assert abs(float(x.mean())) < 5 / n**0.5
    assert abs(float(x.square().mean()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float((x**3).mean())) < 5 * (15 / n) ** 0.5
    assert abs(float((x**4).mean()) - 3) < 5 * (96 / n) ** 0.5
    for at in (-2.0, -0.5, 0.0, 1.0, 3.0):
        share = 0.5 * math.erfc(-at / 2**0.5)
        assert abs(float((x < at).double().mean()) - share) < 5 * (share * (1 - share) / n) ** 0.5
    correlations = torch.corrcoef(torch.cat((x[1:], x[:-1]), dim=1).T) - torch.eye(8, dtype=F64)
    assert float(correlations.abs().max()) < 5 / len(x) ** 0.5


DRAWS = ("sample", "rsample", "sample_and_log_prob", "rsample_and_log_prob")


def parts(drawn: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return drawn if isinstance(drawn, tuple) else (drawn,)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("draw", DRAWS)
def test_samples_of_a_seed_do_not_depend_on_the_batch(draw: str, dtype: torch.dtype, backend: str) -> None:
    flow = build(13, hidden_features=(17, 9), order="random", dtype=dtype)
    whole = parts(getattr(flow, draw)(8, seed=1))
    pieces = [parts(getattr(flow, draw)(n, seed=1, start=start)) for start, n in ((0, 3), (3, 5))]
    for actual, expected in zip((torch.cat(p) for p in zip(*pieces, strict=True)), whole, strict=True):
        assert_close("values", actual, expected)
    z = normal_rows(8, 13, 1, 0, torch.empty(0, dtype=dtype))
    assert torch.equal(
        whole[0], getattr(flow, draw)(8, seed=1)[0] if len(whole) > 1 else getattr(flow, draw)(8, seed=1)
    )
    assert_close("inverse", whole[0], flow.inverse(z)[0])
    if len(whole) > 1:
        assert_close("sample_log_prob", whole[1], flow.log_prob(whole[0]))


def test_a_seed_leaves_the_global_generator_alone() -> None:
    flow = build(5)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    flow.sample(4, seed=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("draw", DRAWS)
def test_arguments_that_do_not_fit(draw: str) -> None:
    call = getattr(build(5), draw)
    for options, message in (
        ({"start": 3}, "start = 3 without a seed"),
        ({"seed": 1, "generator": generator()}, "a generator or a seed"),
        ({"seed": -1}, r"seed must lie in .* found -1"),
        ({"seed": 1 << 64}, "seed must lie in"),
        ({"seed": 1, "start": -2}, r"start must lie in .* found -2"),
    ):
        with pytest.raises(ValueError, match=message):
            call(2, **options)
    with pytest.raises((ValueError, RuntimeError), match="-1"):
        call(-1, seed=0)
    assert parts(call(0, seed=0))[0].shape == (0, 5)


@pytest.mark.parametrize("trained", [True, False])
def test_which_draws_record_gradients(trained: bool, backend: str) -> None:
    flow = build(5).requires_grad_(trained)
    for draw in DRAWS:
        for result in parts(getattr(flow, draw)(3, seed=0)):
            assert result.requires_grad == (trained and draw.startswith("r")), draw
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert not flow.rsample(3).requires_grad
    assert_close("inverse", flow.rsample(3, generator=generator()), flow.sample(3, generator=generator()))


def test_flows_without_blocks_draw_too() -> None:
    flow = fastmaf.Flow(3, [fastmaf.Logit(3)])
    assert ((flow.sample(100, seed=0) >= 0) & (flow.sample(100, seed=0) <= 1.1)).all()
