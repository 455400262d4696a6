"""Moments of ``FusedAdam`` that are split among processes, for models whose state does not fit into one.

All parameters, one after another, are cut into as many ranges of about equal size as there are processes; packed
weights are cut between panels, which are layers by themselves. Each process holds the moments of its range, takes the
step of Adam there, and sends the new weights to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmaf.kernels.adam.op import adam_step_
from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.factored_grad import FactoredGrad
from fastmaf.kernels.layout import PANEL, PackedLayout
from fastmaf.kernels.masked_linear.args import LinearBatch
from fastmaf.training.exchange import Exchange
from fastmaf.training.gradient_sink import Gradients

MOMENTS = ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """A part of a parameter that one process updates.

    Attributes:
        parameter: the parameter.
        owner: rank of the process in the group.
        start, end: of its numbers.
        panels: the first panel and the one after the last, of a packed weight.
    """

    parameter: Tensor
    owner: int
    start: int
    end: int
    panels: tuple[int, int] | None

    @property
    def values(self) -> Tensor:
        """The numbers of the parameter."""
        return self.parameter.detach().view(-1)[self.start : self.end]


class ShardedState:
    """Which process updates which part of the parameters, and how the processes exchange these.

    Args:
        exchange: with the other processes, which hold equal parameters.
        parameters: all of them, in the same order in all processes.
        layouts: of the packed weights.

    Attributes:
        pieces: of all processes, in order.

    Raises:
        ValueError: a parameter is not contiguous.
    """

    def __init__(
        self, exchange: Exchange, parameters: Iterable[Tensor], layouts: Mapping[Tensor, PackedLayout]
    ) -> None:
        self._exchange, self._rank = exchange, exchange.rank
        parameters = list(parameters)
        for parameter in parameters:
            if not parameter.is_contiguous():
                raise ValueError(
                    f"the state of contiguous parameters can be split; found one of shape {tuple(parameter.shape)} "
                    f"with strides {parameter.stride()}"
                )
        self.pieces = list(_cut(parameters, layouts, exchange.size))
        self._own = {piece.parameter: piece for piece in self.pieces if piece.owner == self._rank}
        self._parts: dict[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]] = {}  # of the layer of an own piece

    def numel(self, parameter: Tensor) -> int:
        """Returns of how many numbers of a parameter this process holds the moments."""
        own = self._own.get(parameter)
        return 0 if own is None else own.end - own.start

    @torch.no_grad()
    def step_(self, gradients: Gradients, begin: Callable[[Tensor], Update], scale: float) -> None:
        """Updates all parameters that have a gradient.

        Args:
            gradients: means over all processes, those in ``stored`` scaled already.
            begin: begins the update of a parameter, with the moments of this process's part.
            scale: of the gradients in ``factored``.
        """
        updates = {parameter: begin(parameter) for parameter in (*gradients.factored, *gradients.stored)}
        waiting = []
        for piece in self.pieces:
            update = updates.get(piece.parameter)
            if update is None:
                continue
            if piece.owner == self._rank:
                factors = gradients.factored.get(piece.parameter)
                if factors is not None:
                    self._part(piece, factors).scaled(scale).adam_(update)
                else:
                    grad = gradients.stored[piece.parameter].reshape(-1)[piece.start : piece.end]
                    adam_step_(piece.values, grad, update)
            waiting.append(self._exchange.send(piece.values, piece.owner))
        for wait in waiting:
            wait()

    def _part(self, piece: Piece, grad: FactoredGrad) -> FactoredGrad:
        """Returns the gradient of some panels, as that of a layer of their rows alone."""
        assert piece.panels is not None and isinstance(grad.batch, LinearBatch)
        first, last = piece.panels
        args, (g, x) = grad.args, grad.batch[:2]
        rows = slice(PANEL * first, min(PANEL * last, len(args.prefix)))
        known = self._parts.get(piece.parameter)  # kept, as kernels keep what they know of a layout by its tensors
        if known is None or known[0] is not args.prefix or known[1] is not args.panels:
            prefix, panels = args.prefix[rows].clone(), args.panels[first : last + 1] - args.panels[first]
            known = self._parts[piece.parameter] = args.prefix, args.panels, prefix, panels
        part = args._replace(weight=piece.values, bias=args.bias[rows], prefix=known[2], panels=known[3])
        g = g[:, rows].contiguous()
        return grad._replace(batch=LinearBatch(g, x, g), args=part)

    def own_state(self, state_dict: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Returns the ``state_dict`` of a whole state with the moments that this process holds."""
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        state = dict(state_dict["state"])
        for number, parameter in zip(saved, parameters, strict=False):  # torch checks how many there are
            if entry := state.get(number):
                own = self._own.get(parameter)
                part = slice(0) if own is None else slice(own.start, own.end)
                state[number] = {**entry, **{name: entry[name].reshape(-1)[part].clone() for name in MOMENTS}}
        return {**state_dict, "state": state}

    @torch.no_grad()
    def whole(self, state: Mapping[Tensor, Mapping[str, Any]], keep: bool = True) -> dict[Tensor, dict[str, Any]]:
        """Returns the whole state, its moments on the CPU; all processes must call it.

        Args:
            state: of this process.
            keep: whether this process needs it; if not, its memory is not taken, and the result has no moments.
        """
        found: dict[Tensor, dict[str, Any]] = {}
        for parameter, own in state.items():
            found[parameter] = {name: value for name, value in own.items() if name not in MOMENTS}
            for name in MOMENTS if own else ():
                if keep:
                    found[parameter][name] = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                for piece in self.pieces:
                    if piece.parameter is not parameter:
                        continue
                    mine = piece.owner == self._rank
                    part = own[name] if mine else parameter.new_empty(piece.end - piece.start)
                    self._exchange.send(part, piece.owner)()
                    if keep:
                        found[parameter][name].view(-1)[piece.start : piece.end] = part
        return found


def _cut(parameters: list[Tensor], layouts: Mapping[Tensor, PackedLayout], size: int) -> Iterable[Piece]:
    """Yields the pieces of all processes: ranges of the numbers of all parameters, one after another."""
    total, before = sum(parameter.numel() for parameter in parameters), 0
    for parameter in parameters:
        numel, layout = parameter.numel(), layouts.get(parameter)
        ends = PANEL * layout.panels if layout is not None else None
        cuts = [min(max(total * rank // size - before, 0), numel) for rank in range(size + 1)]
        if ends is not None:  # to the nearest panel
            places = [int((ends - cut).abs().argmin()) for cut in cuts]
            cuts = [int(ends[place]) for place in places]
        for owner in range(size):
            start, end = cuts[owner], cuts[owner + 1]
            if start < end:
                panels = None if ends is None else (places[owner], places[owner + 1])
                yield Piece(parameter, owner, start, end, panels)
        before += numel
