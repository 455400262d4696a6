"""What the kernels of the inverse do in each launch: tables that follow from a block's schedule and panels.

The algorithm is described in ``schedule.py``. Here the units of a group lie in one panel of each hidden layer, so that
one program holds them in registers. A step that finishes more than that is a group of its own, a wide one: after its
outputs, the rows of each layer in turn are products ahead. Tables name layers by number, and columns of panels, so that
they stay valid wherever the weights lie.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastmaf.kernels.flow.schedule import groups
from fastmaf.kernels.flow.triton.panel_items import Ahead, Items, Product, Tiling
from fastmaf.kernels.layout import PANEL
from fastmaf.kernels.tensor_cache import cached

# int64 numbers of a group: its first and end chunk, first row of its sums of outputs, their slots. Then of each hidden
# layer: where its panel lies, in columns, its width, first column of the panel below, place of the panel's values,
# slots, first and end unit of the group within the panel, and one to fill 64 bytes.
GROUP, GROUP_LAYER = 4, 8
# Of a chunk of a step: first dimension, first and end that it finishes. Then the first and end unit within the panel of
# each hidden layer that it finishes. Then, of its outputs' panels, where the columns of the group's own units lie, and
# how many there are.
CHUNK = 3
# Of a layer, in a table of addresses: weight, bias, number of rows, the bits of the weight's factor.
LAYER = 4


class Solve(NamedTuple):
    """A launch of the solve kernel: its group."""

    group: int


class Finish(NamedTuple):
    """The end of a hidden layer's units in a wide group: how many, where in the values, of how many slots."""

    units: int
    values: int
    slots: int


class Plan(NamedTuple):
    """The launches of a block's inverse, and the tables that they read.

    Attributes:
        launches: in order.
        items, groups, chunks: int64 tables on the device.
        dims: of a chunk of a step.
        slots, output_slots: of partial sums, powers of two.
        rows: of the sums that are not of a group's hidden layer.
        units: hidden units of the block.
    """

    launches: list[Ahead | Solve | Finish]
    items: Tensor
    groups: Tensor
    chunks: Tensor
    dims: int
    slots: int
    output_slots: int
    rows: int
    units: int


def plan(schedule: Tensor, panels: list[Tensor], units: list[int], device: torch.device, tiling: Tiling) -> Plan:
    """Returns the plan of a block.

    Args:
        schedule: its ``level_schedule``.
        panels: of its layers, the output layer last; see ``PackedLayout``.
        units: of its hidden layers.
        device: of the tables.
        tiling: how work is cut.
    """
    return cached(schedule, ("plan", device, tiling), lambda: _Maker(schedule, panels, units, tiling).plan(device))


class _Maker:
    def __init__(self, schedule: Tensor, panels: list[Tensor], units: list[int], tiling: Tiling) -> None:
        # How many dimensions, then units of each hidden layer, are finished before each step.
        self._schedule = schedule
        self._done: list[list[int]] = [[0] * schedule.shape[1], *schedule.tolist()]
        self._panels: list[list[int]] = [one.tolist() for one in panels]
        self._values = list(accumulate(units, initial=0))
        self._items = Items(panels, self._values, tiling)
        self._groups: list[list[int]] = []
        self._chunks: list[list[int]] = []
        self._launches: list[Ahead | Solve | Finish] = []
        most = max(end[0] - begin[0] // 8 * 8 for begin, end in pairwise(self._done))
        self._dims = max(8, min(tiling.dims, 1 << max(0, most - 1).bit_length()))

    def plan(self, device: torch.device) -> Plan:
        for first, end in groups(self._schedule, every_layer=True):
            if any(len(self._panels_of(k, first, end)) > 1 for k in self._hidden):
                self._wide(first)
            else:
                self._group(first, end)
        tables = (torch.tensor(table, dtype=torch.int64, device="cpu") for table in (self._groups, self._chunks))
        items, group_table, chunks = (table.to(device) for table in (self._items.table(), *tables))
        slots = tuple(1 << (most - 1).bit_length() for most in (self._items.slots, self._items.output_slots))
        rows = self._items.rows + 2 * self._dims  # a chunk reads all of its rows, those beyond the group's last too
        sizes = (self._dims, *slots, rows, self._values[-1])
        return Plan(self._launches, items, group_table, chunks, *sizes)

    @property
    def _hidden(self) -> range:
        return range(len(self._panels) - 1)

    def _finished(self, layer: int, step: int) -> int:
        """Returns how many rows of a layer are finished before a step."""
        return self._done[step][1 + layer] if layer in self._hidden else 2 * self._done[step][0]

    def _panels_of(self, layer: int, first: int, end: int) -> range:
        """Returns the panels of a layer that have rows of the steps."""
        begin, stop = self._finished(layer, first), self._finished(layer, end)
        return range(begin // PANEL, -(-stop // PANEL) if stop > begin else begin // PANEL)

    def _ahead(self, products: list[Product]) -> list[int]:
        launch, slots = self._items.launch(products)
        if launch is not None:
            self._launches.append(launch)
        return slots

    def _outputs(self, first: int, end: int) -> Product:
        return Product(len(self._hidden), self._panels_of(len(self._hidden), first, end), self._done[first][-1], False)

    def _group(self, first: int, end: int) -> None:
        panels = [self._panels_of(k, first, end) for k in self._hidden]
        hidden = [Product(k, panels[k], self._done[first][k], True) for k in self._hidden]
        outputs = self._outputs(first, end)
        *slots, output_slots = self._ahead([*hidden, outputs])
        unit = [panels[k].start * PANEL for k in self._hidden]
        layers: list[int] = []
        for k in self._hidden:
            place, width = self._panel(k, panels[k].start) if panels[k] else (0, 0)
            own = (self._finished(k, step) - unit[k] for step in (first, end))
            layers += [place, width, unit[k - 1] if k else 0, self._values[k] + unit[k], slots[k], *own, 0]
        self._solve(first, end, outputs, output_slots, layers, unit)

    def _wide(self, step: int) -> None:
        outputs = self._outputs(step, step + 1)
        [output_slots] = self._ahead([outputs])
        self._solve(step, step + 1, outputs, output_slots, [0] * (GROUP_LAYER * len(self._hidden)), None)
        for k in self._hidden:
            panels = self._panels_of(k, step, step + 1)
            if panels:
                [slots] = self._ahead([Product(k, panels, self._done[step + 1][k], False)])
                # The units of the first panel that were finished before are computed again, to the same values.
                unit = panels.start * PANEL
                units = self._finished(k, step + 1) - unit
                self._launches.append(Finish(units, self._values[k] + unit, slots))

    def _solve(
        self, first: int, end: int, outputs: Product, slots: int, layers: list[int], unit: list[int] | None
    ) -> None:
        begin = len(self._chunks)
        for step in range(first, end):
            self._add_chunks(step, unit)
        self._launches.append(Solve(len(self._groups)))
        self._groups.append([begin, len(self._chunks), outputs.panels.start * PANEL, slots, *layers])

    def _add_chunks(self, step: int, unit: list[int] | None) -> None:
        """Adds a step's dimensions, some at a time; the last of them finish its units, which count from ``unit``."""
        begin, end = self._done[step][0], self._done[step + 1][0]
        starts = range(begin // 8 * 8, max(end, begin // 8 * 8 + 1), self._dims)
        for start in starts:
            units = [0] * (2 * len(self._hidden))
            if unit is not None and start == starts[-1]:
                units = [self._finished(k, s) - unit[k] for k in self._hidden for s in (step, step + 1)]
            first = max(begin, start)
            dims = [start, first, max(first, min(end, start + self._dims))]
            count = len(self._panels[-1]) - 1
            panels = [self._panel(-1, q) if q < count else (0, 0) for q in range(start // 8, (start + self._dims) // 8)]
            column = unit[-1] if unit is not None else 0
            places = [place + column for place, _ in panels]
            own = [max(0, width - column) if unit is not None else 0 for _, width in panels]
            self._chunks.append([*dims, *units, *places, *own])

    def _panel(self, layer: int, panel: int) -> tuple[int, int]:
        """Returns where a panel lies, in columns, and its width."""
        begin, end = self._panels[layer][panel : panel + 2]
        return begin, end - begin
