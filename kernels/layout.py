"""Packed panel storage: the only description of a MADE mask that a kernel needs.

With the units of every layer sorted by degree, unit ``j`` sees exactly the first ``prefix[j]`` units of the layer
before it, and ``prefix`` does not decrease. The visible weights form a staircase. They are kept in panels of 16 rows,
column-major inside, one after another in a single 1-D tensor:

    panel p holds rows 16 p .. 16 p + 16 and columns 0 .. width[p]; column k of it is the 16 numbers from
    16 (panels[p] + k) on                                   panels[p] = width[0] + ... + width[p - 1]

So a column of a panel is one cache line of float32, a product with a panel is a sum of columns, and nothing is ever
summed across a vector. A panel is as wide as its last row sees; in layers of many panels, a few neighbours share the
width of the last, so that whole runs of panels are one strided array ``[panels, width, 16]``.

Numbers of a panel beyond its row's prefix, and those of rows that the layer does not have, are padding. Padding is
always zero, so that no forward pass needs a mask: every gradient is zero there, and ``padding.py`` undoes the writes of
others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmaf.kernels.tensor_cache import cached, is_cached

# Rows of a panel: float32 numbers of a 64-byte cache line, and of the widest vector register.
PANEL = 16
# Neighbouring panels share a width where a layer has at least twice as many panels as this: the torch backend calls one
# operation per width. It costs at most this part of the dense weight.
WIDTHS = 64


class Run(NamedTuple):
    """Panels ``start..end``, all of ``width`` columns, in ``16 width (end - start)`` numbers from ``offset`` on."""

    start: int
    end: int
    width: int
    offset: int

    def of(self, packed: Tensor) -> Tensor:
        """Returns the panels as ``[end - start, width, 16]``, sharing the memory of ``packed``."""
        count = self.end - self.start
        return packed.narrow(0, self.offset, count * self.width * PANEL).view(count, self.width, PANEL)

    def rows(self, out_features: int) -> slice:
        """Returns the rows of the layer that the panels hold; the last panel may have fewer than 16."""
        return slice(PANEL * self.start, min(PANEL * self.end, out_features))


def runs_of(panels: Tensor) -> list[Run]:
    """Returns the runs of panels of equal width, top to bottom, of ``PackedLayout.panels``."""
    return cached(panels, "runs", lambda: _make_runs(panels))


def _make_runs(panels: Tensor) -> list[Run]:
    widths, counts = torch.unique_consecutive(panels.diff(), return_counts=True)
    runs, start, offset = [], 0, 0
    for width, count in zip(widths.tolist(), counts.tolist(), strict=True):
        runs.append(Run(start, start + count, width, offset))
        start, offset = start + count, offset + count * width * PANEL
    return runs


class PackedLayout:
    """Where each visible weight of one masked layer lies in its packed 1-D storage.

    Args:
        prefix: ``[out_features]`` integers, non-decreasing, in ``0..in_features``: how many inputs each output sees.
        in_features: width of the dense weight.

    Attributes:
        panels: int64 ``[P + 1]``, on the CPU wherever the weights are: the columns of all panels before each, and of
            all together. The form in which the ops receive a layout.
        numel: stored numbers, padding included.
        visible: weights that the mask lets through.
    """

    def __init__(self, prefix: Tensor, in_features: int) -> None:
        prefix = prefix.detach().to("cpu", torch.int64).contiguous()
        if prefix.dim() != 1 or prefix.numel() == 0:
            raise ValueError(
                f"prefix must be a non-empty 1-D tensor, one entry per output; found shape {tuple(prefix.shape)}"
            )
        if decreases(prefix):
            raise ValueError(
                "prefix must not decrease: sort the output units by degree first (a relabelling: the function is "
                "unchanged)"
            )
        if int(prefix[0]) < 0 or int(prefix[-1]) > in_features:
            raise ValueError(
                f"prefix must lie in 0..in_features={in_features}; found {int(prefix[0])}..{int(prefix[-1])}"
            )
        self.prefix = prefix
        self.in_features = in_features
        self.out_features = prefix.numel()
        self.visible = int(prefix.sum())
        count = -(-self.out_features // PANEL)
        share = max(1, count // WIDTHS)
        last_panel = (torch.arange(count, device="cpu") // share + 1) * share
        last_row = (last_panel * PANEL).clamp_(max=self.out_features) - 1
        self.panels = torch.zeros(count + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(prefix[last_row], 0, out=self.panels[1:])
        self.numel = int(self.panels[-1]) * PANEL

    @property
    def runs(self) -> list[Run]:
        """The runs of panels of equal width, top to bottom, covering every row."""
        return runs_of(self.panels)

    def check_storage(self, packed: Tensor) -> None:
        """Raises ValueError unless ``packed`` is a 1-D tensor of ``numel`` entries."""
        if packed.shape != (self.numel,):
            raise ValueError(
                f"packed weight must have shape ({self.numel},) for this layout; found {tuple(packed.shape)}"
            )

    def pack(self, dense: Tensor, out: Tensor | None = None) -> Tensor:
        """Packs a dense weight ``[out_features, in_features]``; what the mask hides is dropped, whatever it holds.

        Args:
            dense: the weight.
            out: a packed weight to write to and return, of any dtype and device; None: a new one.
        """
        if dense.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"dense weight must have shape {(self.out_features, self.in_features)}; found {tuple(dense.shape)}"
            )
        packed = dense.new_empty(self.numel) if out is None else out
        for run in self.runs:
            rows = dense[run.rows(self.out_features), : run.width]
            whole = len(rows) // PANEL
            panels = run.of(packed)
            panels[:whole] = rows[: whole * PANEL].view(whole, PANEL, run.width).mT
            if rest := len(rows) % PANEL:
                panels[whole, :, :rest] = rows[whole * PANEL :].t()
        return self.zero_padding_(packed)

    def unpack(self, packed: Tensor) -> Tensor:
        """Returns the dense weight ``[out_features, in_features]``, zero where the mask hides.

        For export and inspection only.
        """
        self.check_storage(packed)
        packed = packed.contiguous()
        dense = packed.new_zeros(self.out_features, self.in_features)
        for run in self.runs:
            rows = dense[run.rows(self.out_features), : run.width]
            rows.copy_(run.of(packed).mT.flatten(0, 1)[: len(rows)])
        return dense.masked_fill_(~self.mask().to(dense.device), 0)

    def mask(self) -> Tensor:
        """Returns the dense boolean mask ``[out_features, in_features]``. For export and inspection only."""
        return torch.arange(self.in_features, device="cpu") < self.prefix[:, None]

    def zero_padding_(self, packed: Tensor) -> Tensor:
        """Writes zero to the padding of ``packed``, in place, and returns it."""
        self.check_storage(packed)
        return packed.index_fill_(0, self._padding.to(packed.device), 0)

    def padding_is_zero(self, packed: Tensor) -> bool:
        """Returns whether every number of the padding is exactly zero."""
        self.check_storage(packed)
        return not bool(packed[self._padding.to(packed.device)].count_nonzero())

    @property
    def _padding(self) -> Tensor:
        return padding(self.prefix, self.panels)

    def __repr__(self) -> str:
        return (
            f"PackedLayout({self.out_features} x {self.in_features}, {len(self.panels) - 1} panels, "
            f"{self.numel} stored for {self.visible} visible)"
        )


def decreases(numbers: Tensor) -> bool:
    """Returns whether a number of a 1-D tensor of the CPU is smaller than the one before it."""
    values = numbers.numpy()  # whose operations run on this thread: torch would wait for others
    return bool((values[1:] < values[:-1]).any())


def padding(prefix: Tensor, panels: Tensor) -> Tensor:
    """Returns where the padding lies: int64 indices into the packed storage, on the device of ``prefix``."""
    return cached(panels, "padding", lambda: _find_padding(prefix.cpu(), panels).to(prefix.device), also=[prefix])


def padding_is_held(panels: Tensor) -> bool:
    """Returns whether the indices of a layout's padding lie in memory, found and kept by ``padding``."""
    return is_cached(panels, "padding")


def _find_padding(prefix: Tensor, panels: Tensor) -> Tensor:
    sees = torch.zeros((len(panels) - 1) * PANEL, dtype=torch.int64, device="cpu")
    sees[: len(prefix)] = prefix  # rows that the layer does not have see nothing
    starts, widths = panels[:-1].repeat_interleave(PANEL), panels.diff().repeat_interleave(PANEL)
    hidden = widths - sees  # of each row, its last columns
    row = torch.arange(len(sees), device="cpu").repeat_interleave(hidden)
    first = hidden.cumsum(0) - hidden
    column = torch.arange(len(row), device="cpu") - first[row] + sees[row]
    return ((starts[row] + column) * PANEL).add_(row % PANEL)


def zero_padding(packed: Tensor, prefix: Tensor, panels: Tensor) -> Tensor:
    """Writes zero to the padding of ``packed``, in place, and returns it; for ops, which receive a layout's panels."""
    return packed.index_fill_(0, padding(prefix, panels), 0)
