"""The element-wise map: its formulas, their derivatives, and raw outputs far from any that a fit would give."""

from __future__ import annotations

import math

import pytest
import torch

from fastmaf.kernels import AffineMap
from fastmaf.kernels.affine_output.affine_map import (
    CLAMP,
    SCALE_FIRST,
    SHIFT_FIRST,
    SIGMOID,
    SOFT_CLIP,
    SOFTPLUS,
    TANH,
)
from tests.core.helpers import normal
from tests.tolerances import F32, F64, assert_close

SCALES = {
    "clamp": AffineMap(SHIFT_FIRST, CLAMP, 3.0),
    "free": AffineMap(),
    "tanh": AffineMap(SHIFT_FIRST, TANH, 3.0),
    "softplus": AffineMap(SCALE_FIRST, SOFTPLUS, epsilon=1e-3),
    "softplus, no epsilon": AffineMap(SCALE_FIRST, SOFTPLUS),
    "sigmoid": AffineMap(SCALE_FIRST, SIGMOID, 2.0, 1e-3),
    "sigmoid, no epsilon": AffineMap(SCALE_FIRST, SIGMOID, 2.0),
    "soft clip": AffineMap(SHIFT_FIRST, SOFT_CLIP, 3.0),
}
# Of each map, log-scales at u = -1e4 and 1e4.
FAR = {
    "clamp": (-3.0, 3.0),
    "free": (-1e4, 1e4),
    "tanh": (-3.0, 3.0),
    "softplus": (math.log(1e-3), math.log(1e4 + 1e-3)),
    "softplus, no epsilon": (-1e4, math.log(1e4)),
    "sigmoid": (math.log(1e-3), math.log(1.001)),
    "sigmoid, no epsilon": (2 - 1e4, 0.0),
    "soft clip": (-3 / (1 + 3e-4), 3 / (1 + 3e-4)),
}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_far_raw_outputs(name: str, dtype: torch.dtype) -> None:
    u = torch.tensor([-1e4, 1e4, 0.0, 1e-40, -1e-40, torch.finfo(dtype).tiny], dtype=dtype, requires_grad=True)
    a = SCALES[name].log_scale(u)
    assert_close("values", a[:2].detach(), torch.tensor(FAR[name], dtype=F64))
    assert torch.isfinite(a).all()
    (slope,) = torch.autograd.grad(a.sum(), u, create_graph=True)
    assert torch.isfinite(slope).all() and (slope >= 0).all()
    known = SCALES[name].slope(a.detach())
    assert torch.isfinite(known).all()
    # Where an epsilon or a limit is all that is left of the scale, its rounding is all that is left of the slope.
    assert (known - slope.detach()).abs().max() <= 16 * torch.finfo(dtype).eps
    if slope.requires_grad:
        assert torch.isfinite(torch.autograd.grad(slope.sum(), u)[0]).all()


@pytest.mark.parametrize("name", SCALES)
def test_what_is_not_a_number_stays_so(name: str) -> None:
    u = torch.tensor([math.nan, 1.0])
    a = SCALES[name].log_scale(u)
    assert a.isnan().tolist() == [True, False]
    x, shift = torch.ones(2), torch.zeros(2)
    for function in (SCALES[name].forward, SCALES[name].inverse):
        assert function(x, shift, a).isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", SCALES)
def test_the_slope_is_the_derivative(name: str) -> None:
    u = torch.cat((torch.linspace(-30, 30, 1001, dtype=F64), 3 * normal(1000))).requires_grad_()
    a = SCALES[name].log_scale(u)
    (expected,) = torch.autograd.grad(a.sum(), u)
    assert_close("gradients", SCALES[name].slope(a.detach()), expected)
    assert torch.autograd.gradcheck(SCALES[name].log_scale, normal(20).requires_grad_())
    assert torch.autograd.gradgradcheck(SCALES[name].log_scale, normal(20).requires_grad_())


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("center", [-8.0, -2.0, 0.0, 2.0, 8.0])
def test_float32_slopes_err_by_a_few_units_of_rounding(name: str, center: float) -> None:
    """Beside the largest slope of the map, which is about one: a sum of gradients is as exact as its largest terms."""
    u = center + normal(1000)
    expected = SCALES[name].slope(SCALES[name].log_scale(u))
    single = SCALES[name].slope(SCALES[name].log_scale(u.to(F32)))
    assert float((single.double() - expected).abs().max()) <= 16 * torch.finfo(F32).eps


def test_softplus_without_an_epsilon_passes_smoothly_into_its_argument() -> None:
    u = torch.linspace(-41, -39, 201, dtype=F64)
    expected = u - torch.exp(u) / 2
    assert_close("values", SCALES["softplus, no epsilon"].log_scale(u), expected)
    assert_close("values", SCALES["softplus, no epsilon"].log_scale(-u), torch.log(-u))


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("form", [SHIFT_FIRST, SCALE_FIRST])
def test_forms(name: str, form: int) -> None:
    affine_map = SCALES[name]._replace(form=form)
    x, m, a = normal(50), normal(50, seed=1), affine_map.log_scale(normal(50, seed=2)).requires_grad_()
    z = affine_map.forward(x, m, a)
    assert_close("values", z.detach(), ((x - m) / a.exp() if form == SHIFT_FIRST else x * a.exp() + m).detach())
    assert_close("round_trip", affine_map.inverse(z, m, a).detach(), x)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(affine_map.forward(x, m, a).sum(), x)
    assert_close("values", slope.log(), (affine_map.sign * a).detach())


@pytest.mark.parametrize("numbers, words", [
    ((2, CLAMP, 1.0, 0.0), "form of 0 or 1"),
    ((0, 5, 1.0, 0.0), "scale of 0 to 4"),
    ((0, CLAMP, 0.0, 0.0), "positive; found 0.0"),
    ((0, TANH, math.nan, 0.0), "positive; found nan"),
    ((0, SOFT_CLIP, -1.0, 0.0), "positive; found -1.0"),
    ((0, SIGMOID, math.inf, 0.0), "finite limit.*found inf"),
    ((0, SIGMOID, math.nan, 0.0), "finite limit.*found nan"),
    ((0, SOFTPLUS, 0.0, -1e-3), "epsilon.*found -0.001"),
    ((0, SOFTPLUS, 0.0, math.inf), "epsilon.*found inf"),
    ((0, SOFTPLUS, 0.0, math.nan), "epsilon.*found nan"),
])  # fmt: skip
def test_what_is_no_map_is_refused(numbers: tuple[float, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AffineMap(*numbers).check()
