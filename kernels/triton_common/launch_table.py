"""How the Triton kernels are launched: one table per architecture family, and the precision of their matrix products.

The numbers were chosen from what the compiler reports (registers, spills, shared memory, instructions per weight) and
from the memory system of each family; ``bench/dev/tune.py`` times the alternatives on a card and prints a table to
replace one of these.
"""

from __future__ import annotations

import os
from typing import Literal, NamedTuple, TypeAlias, get_args

Precision: TypeAlias = Literal["auto", "ieee", "tf32x3", "tf32", "bf16"]


class Launch(NamedTuple):
    """Launch parameters of one kernel.

    Attributes:
        rows, columns: of the weights that a program takes at a time. Only ``dot`` takes more than a panel of 16 rows.
        warps: of a program; 32 threads each.
        stages: depth of the software pipeline over a loop of matrix products. Without these, into how many tiles the
            columns are divided: a thread loads 16 bytes of each, all before it needs the first.
        programs_per_sm: how many programs per multiprocessor the work is cut into, where it can be cut. Without matrix
            products, so many fit on one, and share its registers.
    """

    rows: int
    columns: int
    warps: int = 4
    stages: int = 1
    programs_per_sm: int = 4


class Table(NamedTuple):
    """Launch parameters of all kernels on one family of cards.

    Attributes:
        lanes: ``product`` of one sample: a stream of weights, a few per thread, summed across threads at the end.
        few: the same of up to ``MOST_LANES`` samples, which share each load of the weights.
        whole: the same where a program takes all columns of a panel, as there are few.
        dot: ``product`` of more samples, by matrix products.
        backward: gradients of a tile of weights, with or without Adam, and of inputs, without matrix products.
        backward_many: the same by matrix products: gradients of inputs from more than ``MOST_LANES`` samples, of
            weights from more than ``most_samples``.
        most_samples: that one program takes; more are shared out, and read the weights again.
        solve: the own steps of a group of the inverse: columns are dimensions that are taken at a time, warps those of
            a sample; up to ``programs_per_sm`` samples have a program of their own.
    """

    lanes: Launch
    few: Launch
    whole: Launch
    dot: Launch
    backward: Launch
    backward_many: Launch
    most_samples: int
    solve: Launch


# The smallest side that a matrix product may have in every version of Triton.
FEW = 16
# More samples than this are multiplied by matrix products, which take no fewer than ``FEW``; so in both directions.
MOST_LANES = 8
# Samples of one matrix product for a gradient of weights: TF32 units cut their sums off after every few terms.
MOST_SUMMED = 32
# So many rounds of ``whole`` take less time than it takes to launch a second kernel, which would add up partial sums.
MOST_ROUNDS = 2

# 6 SMs and no asynchronous copies, so the loads of many resident programs hide the latency; 48 KB shared.
_PASCAL = Table(
    # One warp: no barriers, and its threads are summed in three steps. Loads in flight: 4 to 8 KB a warp.
    lanes=Launch(16, 128, warps=1, stages=16, programs_per_sm=16),
    few=Launch(16, 64, warps=1, stages=8, programs_per_sm=12),  # with 16, the sums of 8 samples spill
    whole=Launch(16, 64, warps=1, stages=8, programs_per_sm=12),
    dot=Launch(64, 32, programs_per_sm=8),  # 64 rows share each load of the samples; 4 programs fit an SM
    backward=Launch(16, 64, programs_per_sm=3),  # 12 KB in flight a program; with a fourth, registers spill
    backward_many=Launch(16, 32, programs_per_sm=4),  # the sums of 64 samples fill the registers; 64 columns spill
    most_samples=64,  # with 128 the backward pass spills
    # A chain of small steps: one warp needs no barriers. The weights of 32 dimensions, twice, take 96 of its registers.
    solve=Launch(16, 32, warps=1, programs_per_sm=8),
)
# Half as many threads a multiprocessor.
_TURING = _PASCAL._replace(dot=Launch(64, 32, programs_per_sm=4))
# With Ada; asynchronous copies into shared memory of the next tiles of a matrix product.
_AMPERE = _PASCAL._replace(
    whole=Launch(16, 512, warps=8, stages=8, programs_per_sm=1),  # a layer of 512 units has 32 programs
    # Two warps: with four, Hopper takes units whose right operand must be transposed, against shared memory's banks.
    dot=Launch(64, 16, warps=2, stages=4, programs_per_sm=4),  # three tiles of 8 KB on their way
    backward=Launch(16, 64, programs_per_sm=4),  # 48 KB in flight on a multiprocessor
    solve=Launch(16, 32, warps=1, programs_per_sm=4),  # of 1,024 samples, several share each load of the weights
)
TABLES = {61: _PASCAL, 75: _TURING, 80: _AMPERE, 90: _AMPERE}

# Below Ampere there are no matrix units for these.
_NEEDS = {"ieee": 61, "tf32x3": 80, "tf32": 80, "bf16": 80}

_precision: Precision = "ieee"

# Bytes that the programs of a multiprocessor prefetch before they use them: in all, a third of the second-level cache
# of Hopper, and as much as its memory brings in some six microseconds.
PREFETCHED = 128 << 10
_MOST_PREFETCHED = 32 << 10  # by one instruction


def prefetched(programs_per_sm: int, size: int) -> int:
    """Returns how many pieces of ``size`` bytes each of a multiprocessor's programs prefetches at a time."""
    return max(1, min(PREFETCHED // programs_per_sm, _MOST_PREFETCHED) // size)


# Compute capabilities on which kernels start before those ahead of them have ended; see ``overlap``. Older cards cannot
# do so, and of newer ones nothing is known.
EARLY = range(90, 100)


def family(capability: int) -> int:
    """Returns the table's key for a compute capability such as 61 or 89.

    Raises:
        ValueError: the capability is below 6.1.
    """
    found = [key for key in TABLES if key <= capability]
    if not found:
        raise ValueError(f"the Triton kernels need compute capability 6.1 or newer; found {capability / 10:.1f}")
    return max(found)


class use_precision:
    """Chooses how the Triton kernels multiply float32 matrices, from now on or for the length of a ``with`` block.

    Sums are float32 in all of them, and so is everything but the matrix products; up to eight samples are always
    multiplied in full float32::

        ``"ieee"``    plain float32 multiply-adds, without matrix units: the default
        ``"auto"``    ``"tf32x3"`` on compute capability 8.0 and newer, ``"ieee"`` on older cards
        ``"tf32x3"``  three products of TF32 matrix units per product: both operands are split into two TF32 numbers of
                      11 bits, which leaves out 2 of the 24 bits of float32 and the product of the two lower parts
        ``"tf32"``    one product of TF32 matrix units
        ``"bf16"``    operands rounded to bfloat16

    A hidden unit whose sum is almost zero may be above it in one precision and below in another, with gradients of its
    sample to match: so, it seems, gradients of weights were moved by 1e-3 with 1,024 samples on an H200.

    Norm-wise errors against float64, measured on an H100 with trained weights of 12,288 dimensions and 64 samples, and
    what ``"tf32x3"`` and ``"auto"`` therefore cost:

        ============  ============  ==============  ====================
        precision     z             gradient of x   gradients of weights
        ============  ============  ==============  ====================
        plain torch   7.7e-8        1.4e-7          3.0e-7
        ``"ieee"``    8.0e-8        1.4e-7          3.4e-7
        ``"tf32x3"``  8.0e-8        1.4e-7          3.9e-7
        ``"tf32"``    7.3e-5        7.0e-4          1.4e-2
        ``"bf16"``    1.4e-4        2.7e-3          5.5e-2
        ============  ============  ==============  ====================

    Args:
        name: one of these. The last three need compute capability 8.0 or newer: older cards refuse them when a kernel
            is launched.

    Raises:
        ValueError: there is no precision of that name.

    Example:
        >>> with fastmaf.use_precision("tf32x3"):  # has an effect on a GPU only
        ...     log_prob = fastmaf.MAF(features=3, blocks=2, hidden_features=16).log_prob(torch.randn(5, 3))
    """

    def __init__(self, name: Precision) -> None:
        global _precision
        if name not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(map(repr, get_args(Precision)))}; found {name!r}")
        self._before = _precision
        _precision = name

    def __enter__(self) -> use_precision:
        return self

    def __exit__(self, *_: object) -> None:
        global _precision
        _precision = self._before


def chosen_precision() -> Precision:
    """Returns the precision set by ``use_precision``."""
    return _precision


def precision(capability: int) -> Precision:
    """Returns the precision of matrix products on a card of a compute capability, never ``"auto"``.

    Raises:
        ValueError: the card does not have the precision chosen by ``use_precision``.
    """
    if _precision == "auto":
        return "tf32x3" if capability >= _NEEDS["tf32x3"] else "ieee"
    if capability < _NEEDS[_precision]:
        raise ValueError(
            f"precision {_precision!r} needs compute capability {_NEEDS[_precision] / 10:.1f} or newer; this card has "
            f"{capability / 10:.1f}: fastmaf.use_precision('auto') runs everywhere"
        )
    return _precision


# Compute capability and multiprocessors of the card that launches are recorded for; see ``device.recording``.
recorded_card: tuple[int, int] | None = None


def take_cpu_tensors() -> bool:
    """Returns whether the Triton kernels accept CPU tensors: interpreted (``TRITON_INTERPRET=1``), or recorded."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    return interpreted or recorded_card is not None
