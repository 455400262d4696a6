"""A step of Adam as device functions."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmaf.kernels.triton_common.device import fast_reciprocal, fast_root


@triton.jit
def scalars(ptr):
    """Loads ``AdamNumbers.kernel_scalars``: once for a program, as within a loop they would be loaded each time."""
    factor, l2, decay = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2)
    rest1, beta2, rest2 = tl.load(ptr + 3), tl.load(ptr + 4), tl.load(ptr + 5)
    step_size, root, eps = tl.load(ptr + 6), tl.load(ptr + 7), tl.load(ptr + 8)
    return factor, l2, decay, rest1, beta2, rest2, step_size, 1.0 / root, eps


@triton.jit
def step(w, m, v, g, factor, l2, decay, rest1, beta2, rest2, step_size, per_root, eps):
    """One step of Adam on the weights w with moments m and v and gradient g: the three after it.

    Square root and quotient are the fast ones: three units in the last place of a step, which is far smaller than the
    weight. The exact ones would be half of the instructions of a backward pass. The fast root is zero below the normal
    numbers, so that it starts there.
    """
    g = g * factor + l2 * w
    m += (g - m) * rest1
    v = v * beta2 + rest2 * g * g
    denominator = fast_root(tl.maximum(v, 1.2e-38)) * per_root + eps
    return w * decay - step_size * (m * fast_reciprocal(denominator)), m, v
