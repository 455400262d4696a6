"""The element-wise affine map (``affine_map.py``) as device functions, and the functions that it is made of."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from fastmaf.kernels.affine_output.affine_map import CLAMP, SOFT_CLIP, TANH, AffineMap

_CLAMP, _TANH, _SOFTPLUS, _SIGMOID = (tl.constexpr(kind) for kind in range(4))


def kind_of(affine_map: AffineMap) -> int:
    """Returns the map of log-scales to be compiled: without a limit, CLAMP leaves them alone."""
    free = affine_map.scale in (TANH, SOFT_CLIP) and math.isinf(affine_map.limit)
    return CLAMP if free else int(affine_map.scale)


@triton.jit
def exponential(x):
    """Exponential, to about one unit in the last place: exp2 of x log2(e) alone would lose |x| of them."""
    x = tl.where(x > 120.0, 120.0, tl.where(x < -120.0, -120.0, x))  # beyond float32 on either side; NaN stays
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = tl.fma(n, tl.full(x.shape, -0.693359375, tl.float32), x)  # ln 2 in two parts, the first exact in 9 bits
    r = tl.fma(n, tl.full(x.shape, 2.12194440054690583e-4, tl.float32), r)
    half = tl.floor(n * 0.5)  # 2^n itself may be too large where the result is not
    return tl.exp2(r * 1.4426950408889634) * tl.exp2(half) * tl.exp2(n - half)


@triton.jit
def hyperbolic_tangent(x):
    """Hyperbolic tangent: 1 - 2 / (e^2x + 1), and its continued fraction near zero, where that cancels."""
    size = tl.abs(x)
    far = 1.0 - tl.div_rn(tl.full(x.shape, 2.0, tl.float32), exponential(2.0 * tl.where(size > 10.0, 10.0, size)) + 1.0)
    # x / (1 + s / (3 + s / (5 + s / (7 + s / 9)))), s = x²: below 0.6 within 1e-9.
    s = x * x
    top = x * (945.0 + s * (105.0 + s))
    near = tl.div_rn(top, 945.0 + s * (420.0 + 15.0 * s))
    found = tl.where(size < 0.6, near, tl.where(x < 0, -far, far))
    return tl.where(x == x, found, x)


@triton.jit
def log1p(t):
    """The logarithm of 1 + t, for t from -0.3 to 1: 2 artanh(t / (2 + t)), whose series ends within 1e-8."""
    s = tl.div_rn(t, 2.0 + t)
    q = s * s
    series = 1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))
    return 2.0 * s + 2.0 * s * q * (1 / 3 + q * (1 / 5 + q * series))


@triton.jit
def logarithm(y):
    """Logarithm of a number that is not negative, to about one unit in the last place."""
    small = y < 1.1754944e-38  # has lost digits, and its exponent
    scaled = tl.where(small, y * 1.8446744e19, y)
    bits = scaled.to(tl.int32, bitcast=True) - 0x3F3504F3  # of the square root of 1/2
    n = bits >> 23
    m = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    n = tl.where(small, n - 64, n).to(tl.float32)
    found = n * 0.693359375 + (n * -2.12194440054690583e-4 + log1p(m - 1.0))  # ln 2 as in exponential
    found = tl.where(y == 0, -float("inf"), found)
    return tl.where(y < float("inf"), found, y)


@triton.jit
def log_scale(u, limit, epsilon, KIND: tl.constexpr):
    """The log-scale for the network's raw output; NaN stays NaN."""
    if KIND == _CLAMP:
        return tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
    elif KIND == _TANH:
        return limit * hyperbolic_tangent(tl.div_rn(u, tl.zeros_like(u) + limit))
    elif KIND == _SOFTPLUS:
        softplus = tl.where(u > 0, u, 0.0) + log1p(exponential(-tl.abs(u)))
        return logarithm(tl.where(u == u, softplus, u) + epsilon)
    elif KIND == _SIGMOID:
        return logarithm(tl.div_rn(tl.zeros_like(u) + 1.0, 1.0 + exponential(-(u + limit))) + epsilon)
    else:
        return tl.div_rn(u, 1.0 + tl.div_rn(tl.abs(u), tl.zeros_like(u) + limit))


@triton.jit
def log_scale_slope(a, limit, epsilon, KIND: tl.constexpr):
    """The slope da/du as a function of the log-scale a."""
    if KIND == _CLAMP:
        return tl.where(tl.abs(a) < limit, 1.0, 0.0)
    elif KIND == _TANH:
        share = tl.div_rn(a, tl.zeros_like(a) + limit)
        return 1.0 - share * share
    elif KIND == _SOFTPLUS:
        s = exponential(a)
        half = hyperbolic_tangent(0.5 * (s - epsilon))
        return tl.div_rn(tl.div_rn(2.0 * half, 1.0 + half), s)  # 1 - exp(-t) = 2 tanh(t / 2) / (1 + tanh(t / 2))
    elif KIND == _SIGMOID:
        s = exponential(a)
        probability = s - epsilon
        return tl.div_rn(probability * (1.0 - probability), s)
    else:
        share = 1.0 - tl.div_rn(tl.abs(a), tl.zeros_like(a) + limit)
        return share * share
