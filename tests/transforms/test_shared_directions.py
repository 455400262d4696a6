"""Directions of rows without some of them, against those of the other rows alone in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmaf.transforms.shared_directions import SharedDirections

_ROWS, _FEATURES, _RANK, _LEFT_OUT = 300, 500, 20, 30


def _rows(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Returns rows of slowly falling variance, and their shares of the mean."""
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    mixing = torch.randn(_ROWS, _ROWS, **options) * torch.arange(1, _ROWS + 1) ** -0.7  # type: ignore[call-overload]
    values = 30 * mixing @ torch.randn(_ROWS, _FEATURES, **options) / _ROWS**0.5  # type: ignore[call-overload]
    return values.to(dtype), torch.rand(_ROWS, generator=generator).to(dtype)


def _left_out(first: int = 0) -> Tensor:
    mask = torch.zeros(_ROWS, dtype=torch.bool)
    mask[first : first + _LEFT_OUT] = True
    return mask


def _exact(rows: Tensor, share: Tensor, left_out: Tensor, shift: Tensor) -> Tensor:
    others = (rows - share[:, None] * shift)[~left_out].double()
    return torch.linalg.svd(others, full_matrices=False)[2][:_RANK].T


def _unexplained(rows: Tensor, directions: Tensor) -> float:
    rows, directions = rows.double(), torch.linalg.qr(directions.double())[0]
    return float((rows - rows @ directions @ directions.T).square().sum())


def _shared(rows: Tensor, share: Tensor) -> SharedDirections:
    shared = SharedDirections.of(rows, share, rows @ rows.T, _RANK, _LEFT_OUT)
    assert shared is not None
    return shared


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("first", [0, 120])
def test_residuals_are_those_of_exact_directions(dtype: torch.dtype, first: int) -> None:
    rows, share = _rows(dtype)
    left_out = _left_out(first)
    shift = 0.05 * rows[~left_out].mean(dim=0)
    found = _shared(rows, share).without(left_out, shift, _RANK)
    assert found.shape == (_FEATURES, _RANK)
    exact = _exact(rows, share, left_out, shift)
    others = rows - share[:, None] * shift
    for some in (left_out, ~left_out):
        assert _unexplained(others[some], found) == pytest.approx(_unexplained(others[some], exact), rel=2e-3)
    error = (found.T @ found - torch.eye(_RANK).to(found)).abs().max()
    assert float(error) < (1e-8 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("strong", [3, 15, _RANK])
def test_strong_directions_leave_no_rounding_errors(strong: int) -> None:
    """What directions in float32 leave of a sample is its noise, a thousandth of what it has along some equal ones."""
    generator = torch.Generator().manual_seed(1)
    options = {"generator": generator, "dtype": torch.float64}
    signal = (
        1000 * torch.randn(_ROWS, strong, **options) @ torch.linalg.qr(torch.randn(_FEATURES, strong, **options))[0].T
    )  # type: ignore[call-overload]
    rows = signal + torch.randn(_ROWS, _FEATURES, **options)  # type: ignore[call-overload]
    share, left_out = torch.zeros(_ROWS), _left_out()
    shift = torch.zeros(_FEATURES)
    found = _shared(rows.float(), share).without(left_out, shift, _RANK).double()
    exact = _exact(rows, share.double(), left_out, shift.double())
    held = rows[left_out]
    residuals = [held - held @ directions @ directions.T for directions in (found, exact)]
    assert float(residuals[0].square().sum()) == pytest.approx(float(residuals[1].square().sum()), rel=0.01)


def test_the_directions_of_all_rows_lean_towards_those_left_out() -> None:
    """The negative control: without the rows left out in the span, their residuals are too small."""
    rows, share = _rows()
    left_out, shift = _left_out(), torch.zeros(_FEATURES, dtype=torch.float64)
    exact = _unexplained(rows[left_out], _exact(rows, share, left_out, shift))
    shared = _shared(rows, share)
    coordinates = shared.coordinates[~left_out]
    turn = torch.linalg.eigh(coordinates.T @ coordinates)[1].flip(1)[:, :_RANK]
    assert _unexplained(rows[left_out], shared.basis @ turn) < 0.99 * exact


def test_rows_of_a_lower_rank_give_fewer_directions() -> None:
    rows, share = _rows()
    rows = torch.cat([rows[:10]] * (_ROWS // 10))
    found = _shared(rows, share).without(_left_out(), torch.zeros(_FEATURES, dtype=torch.float64), _RANK)
    assert found.shape == (_FEATURES, 10)
    assert _unexplained(rows, found) < 1e-9 * float(rows.square().sum())


def test_none_where_the_small_problem_is_not_smaller() -> None:
    rows, share = _rows()
    gram = rows @ rows.T
    assert SharedDirections.of(rows, share, None, _RANK, _LEFT_OUT) is None
    assert SharedDirections.of(rows, share, gram, 0, _LEFT_OUT) is None
    assert SharedDirections.of(rows, share, gram, _RANK, _ROWS // 2) is None
