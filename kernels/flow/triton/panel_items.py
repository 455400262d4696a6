"""The products of an inverse that are taken ahead of a group's steps, cut into items for the programs of a launch."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastmaf.kernels.layout import PANEL

Array: TypeAlias = NDArray[np.int64]

# int64 numbers of an item: layer, columns, place of the first of them among the values below, whether these are x, slot
# of the sums, place of the first sum, whether it is a sum of a group's hidden layer, first row. Then where each of its
# panels' first column lies, in columns, and how many it has.
ITEM = 8
# Slots of partial sums. Those of a group's outputs are added up step by step, all at once.
MOST_SLOTS, MOST_OUTPUT_SLOTS = 32, 4


class Tiling(NamedTuple):
    """How work is cut: panels of an item of outputs, columns of a tile, programs to keep a card busy, dimensions of a
    chunk of a step.
    """

    panels: int
    columns: int
    programs: int
    dims: int


class Product(NamedTuple):
    """The product of panels of a layer with the first ``columns`` values below it.

    Attributes:
        layer: its number.
        panels: of 16 rows.
        columns: that are finished; a panel may have fewer.
        of_group: whether it is the one panel of a hidden layer that a group holds in registers.
    """

    layer: int
    panels: range
    columns: int
    of_group: bool


class Ahead(NamedTuple):
    """A launch of the ahead kernel: its items."""

    first: int
    end: int


class Items:
    """The items of a block's launches.

    Args:
        panels: columns before each panel of each layer; see ``PackedLayout``.
        values: where the values of each layer begin among those of all hidden layers.
        tiling: how work is cut.

    Attributes:
        slots, output_slots: the most slots of partial sums so far.
        rows: the most rows of sums that are not of a group's hidden layer.
    """

    def __init__(self, panels: list[Array], values: Array, tiling: Tiling) -> None:
        self.slots, self.output_slots, self.rows = 1, 1, PANEL
        self._panels, self._values, self._tiling = panels, values, tiling
        self._parts = [np.zeros((0, ITEM + 2 * tiling.panels), np.int64)]
        self._count = 0

    def table(self) -> Array:
        """Returns all items."""
        return np.concatenate(self._parts)

    def launch(self, products: list[Product]) -> tuple[Ahead | None, list[int]]:
        """Adds a launch; returns it, or None if there is nothing to do, and the slots of each product's sums."""
        columns, first = self._tiling.columns, self._count
        total = sum(len(one.panels) * -(-one.columns // columns) for one in products)
        tiles = max(1, -(-total // self._tiling.programs))
        slots = []
        for one in products:
            most = MOST_SLOTS if one.of_group else MOST_OUTPUT_SLOTS
            segment = max(tiles, -(-one.columns // (columns * most))) * columns
            starts = np.arange(0, max(one.columns, 1), segment)
            slots.append(len(starts) if one.panels else 0)
            if one.panels:
                self._add(one, starts, segment)
        return Ahead(first, self._count) if self._count > first else None, slots

    def _add(self, product: Product, starts: Array, segment: int) -> None:
        count = self._tiling.panels
        step = 1 if product.of_group else count
        if product.of_group:
            self.slots = max(self.slots, len(starts))
        else:
            self.output_slots = max(self.output_slots, len(starts))
            self.rows = max(self.rows, -(-len(product.panels) // step) * step * PANEL)
        panels, layer = self._panels[product.layer], product.layer
        firsts = np.arange(product.panels.start, product.panels.stop, step)
        firsts, starts = (one.ravel() for one in np.meshgrid(firsts, starts, indexing="ij"))
        table = np.zeros((len(firsts), ITEM + 2 * count), np.int64)
        for i in range(step):
            at = np.minimum(firsts + i, product.panels.stop - 1)
            stored = np.minimum(panels[at + 1] - panels[at], product.columns) - starts
            table[:, ITEM + i] = panels[at] + starts
            table[:, ITEM + count + i] = np.where(firsts + i < product.panels.stop, stored.clip(0, segment), 0)
        table[:, 0], table[:, 1] = layer, table[:, ITEM + count :].max(1)
        table[:, 2], table[:, 3] = starts + (self._values[layer - 1] if layer else 0), layer == 0
        table[:, 4] = starts // segment
        table[:, 5] = (firsts - product.panels.start) * PANEL + (layer * PANEL if product.of_group else 0)
        table[:, 6], table[:, 7] = product.of_group, firsts * PANEL
        # The hardware starts programs in order: the longest first leave the least waiting at the end.
        self._parts.append(table[np.argsort(-table[:, 1], kind="stable")])
        self._count += len(table)
