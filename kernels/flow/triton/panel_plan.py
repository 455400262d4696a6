"""What the kernels of the inverse do in each launch: tables that follow from a block's schedule and panels.

The algorithm is described in ``schedule.py``. Here the units of a group lie in one panel of each hidden layer, so that
one program holds them in registers; a step that finishes more than that is a group of its own, "wide": after its
outputs, all rows of each layer in turn are products ``ahead``. Tables name layers by number, and columns of panels, so
that they stay valid wherever the weights lie.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmaf.kernels.flow.schedule import groups
from fastmaf.kernels.layout import PANEL
from fastmaf.kernels.tensor_cache import cached

Array: TypeAlias = NDArray[np.int64]

# int64 numbers of an item of the ahead kernel: layer, columns, place of the first of them among the values below,
# whether these are x, slot of the sums, place of the first sum, whether it belongs to a hidden layer of a group, first
# row. Then where each of its panels' first column lies, in columns, and how many it has.
ITEM = 8
# Of a group: its first and end step, first row of its sums of outputs, their slots. Then of each hidden layer: where its
# panel lies, in columns, its width, first column of the panel below, place of the panel's values, slots, first and end
# unit of the group within the panel, and one to fill 64 bytes.
GROUP, GROUP_LAYER = 4, 8
# Of a chunk of a step: first dimension, first and end that it finishes. Then the first and end unit within the panel of
# each hidden layer; then, of its outputs' panels, where the columns lie that the group finishes, and how many there are.
STEP = 3
# Of a layer, in a table of addresses: weight, bias, number of rows.
LAYER = 3
# Slots of partial sums: a group's outputs are read with all of theirs, step by step.
MOST_SLOTS, MOST_OUTPUT_SLOTS = 32, 4


class Ahead(NamedTuple):
    """A launch of the ahead kernel: its items."""

    first: int
    end: int


class Solve(NamedTuple):
    """A launch of the solve kernel: its group."""

    group: int


class Finish(NamedTuple):
    """The end of a hidden layer's units in a wide group: how many, where in the values, of how many slots."""

    units: int
    values: int
    slots: int


class Tiling(NamedTuple):
    """How work is cut: panels of an item of outputs, columns of a tile, programs to keep a card busy, dimensions of a
    chunk of a step.
    """

    panels: int
    columns: int
    programs: int
    dims: int


class Plan(NamedTuple):
    """The launches of a block's inverse, and the tables that they read.

    Attributes:
        launches: in order.
        items, groups, steps: int64 tables on the device.
        dims: of a chunk of a step.
        slots, output_slots: of partial sums, powers of two.
        rows: of the outputs' sums.
        units: hidden units of the block.
    """

    launches: list[Ahead | Solve | Finish]
    items: Tensor
    groups: Tensor
    steps: Tensor
    dims: int
    slots: int
    output_slots: int
    rows: int
    units: int


def plan(schedule: Tensor, panels: list[Tensor], rows: list[int], device: torch.device, tiling: Tiling) -> Plan:
    """Returns the plan of a block.

    Args:
        schedule: its ``level_schedule``.
        panels: of its layers, the output layer last; see ``PackedLayout``.
        rows: of its layers.
        device: of the tables.
        tiling: how products are cut.
    """
    return cached(schedule, ("panel plan", device, tiling), lambda: _Maker(schedule, panels, rows, tiling).plan(device))


class _Maker:
    def __init__(self, schedule: Tensor, panels: list[Tensor], rows: list[int], tiling: Tiling) -> None:
        self._done = np.vstack([np.zeros_like(schedule[:1].numpy()), schedule.numpy()]).astype(np.int64)
        self._panels = [one.cpu().numpy() for one in panels]
        self._hidden = len(panels) - 1
        self._values = np.concatenate([[0], np.cumsum(rows[:-1])])
        self._tiling = tiling
        self._items: list[Array] = []
        self._groups: list[list[int]] = []
        self._steps: list[list[int]] = []
        self._launches: list[Ahead | Solve | Finish] = []
        chunks = self._done[1:, 0] - self._done[:-1, 0] // 8 * 8
        self._dims = max(8, min(tiling.dims, 1 << int(max(chunks.max(), 1) - 1).bit_length()))
        self._slots = self._output_slots = 1
        self._rows = PANEL

    def plan(self, device: torch.device) -> Plan:
        for first, end in groups(torch.from_numpy(self._done[1:]), every_layer=True):
            if any(len(self._own_panels(k, first, end)) > 1 for k in range(self._hidden)):
                self._wide(first)
            else:
                self._group(first, end)
        count = ITEM + 2 * self._tiling.panels
        items = np.concatenate([np.zeros((0, count), np.int64), *self._items])
        tables = (torch.from_numpy(np.array(table, dtype=np.int64)).to(device) for table in (items, self._groups, self._steps))
        slots = (1 << (number - 1).bit_length() for number in (self._slots, self._output_slots))
        return Plan(self._launches, *tables, self._dims, *slots, self._rows, int(self._values[-1]))

    def _own_panels(self, layer: int, first: int, end: int) -> range:
        """Returns the panels of a hidden layer whose units the steps finish."""
        begin, stop = int(self._done[first, 1 + layer]), int(self._done[end, 1 + layer])
        return range(begin // PANEL, -(-stop // PANEL) if stop > begin else begin // PANEL)

    def _output_panels(self, first: int, end: int) -> range:
        begin, stop = 2 * int(self._done[first, 0]), 2 * int(self._done[end, 0])
        return range(begin // PANEL, -(-stop // PANEL) if stop > begin else begin // PANEL)

    def _group(self, first: int, end: int) -> None:
        panels = [self._own_panels(k, first, end) for k in range(self._hidden)]
        jobs = [(k, panels[k], int(self._done[first, k]), True) for k in range(self._hidden)]
        outputs = self._output_panels(first, end)
        *slots, output_slots = self._ahead([*jobs, (self._hidden, outputs, int(self._done[first, -1]), False)])
        own = [int(self._done[first, 1 + k]) // PANEL * PANEL for k in range(self._hidden)]
        layers: list[int] = []
        for k in range(self._hidden):
            begin, width = (int(self._panels[k][panels[k].start]), self._width(k, panels[k].start)) if panels[k] else (0, 0)
            units = (int(self._done[at, 1 + k]) - own[k] for at in (first, end))
            below = own[k - 1] if k else 0
            layers += [begin, width, below, int(self._values[k]) + own[k], slots[k], *units, 0]
        self._solve(first, end, outputs, output_slots, layers, own)

    def _wide(self, step: int) -> None:
        """A step that finishes units of several panels of a layer."""
        outputs = self._output_panels(step, step + 1)
        [output_slots] = self._ahead([(self._hidden, outputs, int(self._done[step, -1]), False)])
        self._solve(step, step + 1, outputs, output_slots, [0] * (GROUP_LAYER * self._hidden), None)
        for k in range(self._hidden):
            panels = self._own_panels(k, step, step + 1)
            if panels:
                [slots] = self._ahead([(k, panels, int(self._done[step + 1, k]), False)])
                # Units of the first panel that were finished before are finished again, to the same values.
                units = int(self._done[step + 1, 1 + k]) - panels.start * PANEL
                self._launches.append(Finish(units, int(self._values[k]) + panels.start * PANEL, slots))

    def _width(self, layer: int, panel: int) -> int:
        return int(self._panels[layer][panel + 1] - self._panels[layer][panel])

    def _ahead(self, jobs: list[tuple[int, range, int, bool]]) -> list[int]:
        """Adds a launch of products: of each job's layer, its panels with so many columns, into the sums of a group's
        hidden layer or not. Returns the slots of each.
        """
        columns = self._tiling.columns
        total = sum(len(panels) * -(-end // columns) for _, panels, end, _ in jobs)
        least = max(1, -(-total // self._tiling.programs))
        begin = sum(map(len, self._items))
        counts = []
        for layer, panels, end, of_group in jobs:
            most = MOST_SLOTS if of_group else MOST_OUTPUT_SLOTS
            segment = max(least, -(-end // (columns * most))) * columns
            starts = np.arange(0, max(end, 1), segment)
            step = 1 if of_group else self._tiling.panels
            if panels:
                place = layer * PANEL if of_group else 0
                self._items.append(self._job(layer, panels, step, starts, end, segment, place, of_group))
                if not of_group:
                    self._rows = max(self._rows, -(-len(panels) // step) * step * PANEL)
                    self._output_slots = max(self._output_slots, len(starts))
                else:
                    self._slots = max(self._slots, len(starts))
            counts.append(len(starts) if panels else 0)
        if (stop := sum(map(len, self._items))) > begin:
            self._launches.append(Ahead(begin, stop))
        return counts

    def _job(
        self, layer: int, panels: range, step: int, starts: Array, end: int, segment: int, place: int, of_group: bool
    ) -> Array:
        firsts = np.arange(panels.start, panels.stop, step)
        firsts, starts = (one.ravel() for one in np.meshgrid(firsts, starts, indexing="ij"))
        below = self._values[layer - 1] if layer else 0
        count = self._tiling.panels
        table = np.zeros((len(firsts), ITEM + 2 * count), np.int64)
        for i in range(min(step, len(panels))):
            at = np.minimum(firsts + i, panels.stop - 1)
            widths = np.minimum(self._panels[layer][at + 1] - self._panels[layer][at], end)
            table[:, ITEM + i] = self._panels[layer][at] + starts
            table[:, ITEM + count + i] = np.where(firsts + i < panels.stop, np.clip(widths - starts, 0, segment), 0)
        table[:, 0], table[:, 1] = layer, table[:, ITEM + count :].max(1)
        table[:, 2], table[:, 3] = below + starts, layer == 0
        table[:, 4], table[:, 5] = starts // segment, place + (firsts - panels.start) * PANEL
        table[:, 6], table[:, 7] = of_group, firsts * PANEL
        # The longest first, as the hardware starts programs in order.
        return table[np.argsort(-table[:, 1], kind="stable")]

    def _solve(
        self, first: int, end: int, outputs: range, slots: int, layers: list[int], own: list[int] | None
    ) -> None:
        begin = len(self._steps)
        for step in range(first, end):
            self._add_chunks(step, own)
        self._launches.append(Solve(len(self._groups)))
        self._groups.append([begin, len(self._steps), outputs.start * PANEL, slots, *layers])

    def _add_chunks(self, step: int, own: list[int] | None) -> None:
        """Adds a step's dimensions, some at a time; the last of them finish its units."""
        d0, d1 = int(self._done[step, 0]), int(self._done[step + 1, 0])
        starts = range(d0 // 8 * 8, max(d1, d0 // 8 * 8 + 1), self._dims)
        for start in starts:
            units = [0] * (2 * self._hidden)
            if own is not None and start == starts[-1]:
                units = [int(self._done[at, 1 + k]) - own[k] for k in range(self._hidden) for at in (step, step + 1)]
            column = own[-1] if own is not None else 0
            output = self._panels[-1]
            panels = range(start // 8, start // 8 + self._dims // 8)
            known = [q for q in panels if q + 1 < len(output)]
            places = [int(output[q]) + column for q in known]
            widths = [max(0, self._width(self._hidden, q) - column) if own is not None else 0 for q in known]
            rest = [0] * (len(panels) - len(known))
            dims = [start, max(d0, start), max(d0, start, min(d1, start + self._dims))]
            self._steps.append([*dims, *units, *places, *rest, *widths, *rest])
