"""Normal noise whose rows depend only on a seed and their index.

torch's generators produce a sequence, so that the noise of a row depends on the batch that it is drawn in. The
counter-based generator used here computes each number from its position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmaf.validation import as_integer

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MAX_BLOCKS = 1 << 18  # blocks of four numbers processed at once, about 20 MB


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Returns four random 32-bit numbers for each counter, by Philox4x32-10.

    Args:
        counter: four int64 tensors of 32-bit numbers, the least significant word first.
        key: two 32-bit numbers.

    References:
        Salmon, Moraes, Dror and Shaw 2011, Parallel random numbers: as easy as 1, 2, 3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # 64-bit products: int64 wraps around, which keeps their bits.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def normal_noise(
    n: int, features: int, like: Tensor, generator: torch.Generator | None, seed: int | None, start: int
) -> Tensor:
    """Returns standard normal noise ``[n, features]``, of the dtype and device of ``like``.

    Args:
        n, features: its shape.
        like: a tensor.
        generator: the source of the noise without a seed; None uses torch's global generator.
        seed, start: as ``normal_rows``; None and 0 for noise of the generator.

    Raises:
        TypeError, ValueError: as ``normal_rows``, or there is a generator beside a seed, or a start without a seed.
    """
    if seed is None:
        if start:
            raise ValueError(f"start numbers the rows of a seed's noise; found start = {start} without a seed")
        return torch.randn(n, features, generator=generator, device=like.device, dtype=like.dtype)
    if generator is not None:
        raise ValueError("expected a generator or a seed as the source of the noise; found both")
    return normal_rows(n, features, seed, start, like)


def normal_rows(n: int, features: int, seed: int, start: int, like: Tensor) -> Tensor:
    """Returns rows ``start .. start + n - 1`` of the standard normal noise of a seed, ``[n, features]``.

    The random bits are equal on all devices. The normal numbers are computed from them in float64 and rounded to the
    dtype of ``like``, on its device.

    Raises:
        TypeError: ``seed`` or ``start`` is not an integer.
        ValueError: ``seed`` or ``start`` is out of range.

    References:
        Box and Muller 1958, A Note on the Generation of Random Normal Deviates.
    """
    seed, start = as_integer("seed", seed), as_integer("start", start)
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must lie in 0..2^64 - 1; found {seed}")
    if not 0 <= start < (1 << 63) - n:
        raise ValueError(f"start must lie in 0..2^63 - 1 - n; found {start} for n = {n}")
    blocks = -(-features // 4)
    result = like.new_empty(n, features)
    step = max(1, _MAX_BLOCKS // max(1, blocks))
    for first in range(0, n, step):
        count = min(step, n - first)
        rows = torch.arange(start + first, start + first + count, device=like.device)[:, None].expand(count, blocks)
        block = torch.arange(blocks, device=like.device).expand(count, blocks)
        counter = block, rows & _MASK, rows >> 32, torch.zeros_like(block)
        bits = torch.stack(philox(counter, (seed & _MASK, seed >> 32)), dim=2)
        uniform = (bits.double() + 0.5) / (1 << 32)
        radius, angle = (-2 * uniform[..., 0::2].log()).sqrt(), 2 * math.pi * uniform[..., 1::2]
        normal = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=3).flatten(1)
        result[first : first + count] = normal[:, :features]
    return result
