"""Networks of other libraries as a MADE of the same function.

A MADE of this library is a plain chain of masked layers with ReLUs. Whatever is piecewise linear can be written as one,
exactly, since h = relu(h) − relu(−h)::

    leaky_relu(h)                    =  [I, −slope I] · relu([I; −I] h)
    h + W₂ relu(W₁ relu(h) + b₁)     =  [W₂, I, −I] · relu([W₁, 0; I, 0; 0, I] · relu([I; −I] h) + …)

so residual blocks become hidden layers of more units. Networks of other activations keep their layers, one by one: see
``Network.layer``. A unit's degree is the largest degree that it can see.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmaf.convert.affine import Affine, Term, is_natural
from fastmaf.convert.errors import NotConvertibleError
from fastmaf.nn import MADE


class Network:
    """Builds the layers of a network one after the other.

    Args:
        degrees: of the inputs, int64 ``[inputs]``; zero for those that every unit may see.
        like: a tensor of the dtype and device of the weights.
        residual: whether every second ``layer`` is added to the one two layers before it.
    """

    def __init__(self, degrees: Tensor, like: Tensor, *, residual: bool = False) -> None:
        self.inputs = self._degrees = degrees.to("cpu", torch.int64)
        self._like = like.detach()
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._hidden: list[Tensor] = []
        self._residual = residual
        self._activations: list[str] = []  # of each ``layer``
        self._contexts: list[Tensor | None] = []

    def units(self, start: int, count: int) -> Affine:
        """Returns units of the present layer."""
        return Affine([Term(1.0, start, count)], self._like.new_zeros(count), self._degrees[start : start + count])

    def last(self) -> Affine:
        """Returns all units of the present layer."""
        return self.units(0, len(self._degrees))

    def linear(self, h: Affine, weight: Tensor, bias: Tensor, mask: Tensor | None = None) -> Affine:
        """Returns W h + b with a masked weight, of multiples of units: see ``plain``."""
        assert h.is_plain
        weight = weight.detach()
        if mask is not None:
            weight = (weight * mask).to(weight.dtype)
        terms = [Term(weight * float(term.factor), term.start, term.units) for term in h.terms]
        return Affine(terms, weight @ h.bias + bias.detach(), _visible(mask, h.degrees, len(weight)))

    def relu(self, of: Sequence[Affine], keep: Sequence[Affine] = ()) -> tuple[list[Affine], list[Affine]]:
        """Adds a hidden layer; returns the ReLU of each of ``of`` and each of ``keep`` as functions of its units."""
        parts: list[Affine] = []
        sizes: list[int] = []

        def unit(h: Affine) -> Term:
            parts.append(h)
            sizes.append(len(h.bias))
            return Term(1.0, sum(sizes[:-1]), len(h.bias))

        results = [(unit(h), h) for h in of]
        kept = []
        for h in keep:
            same = [term for term, other in results if other is h]
            if h.is_plain and self._hidden:  # units of a hidden layer are their own ReLU
                terms = []
                for factor, start, count in h.terms:
                    term = unit(self.units(start, count))
                    terms.append(term._replace(factor=factor))
                kept.append(Affine(terms, h.bias, h.degrees))
            else:
                positive = same[0] if same else unit(h)
                terms = [positive, unit(h.negated())._replace(factor=-1.0)]
                kept.append(Affine(terms, torch.zeros_like(h.bias), h.degrees))
        rows = self._like.new_zeros(sum(sizes), len(self._degrees))
        for part, of_part in zip(parts, rows.split(sizes), strict=True):
            part.write_to(of_part, torch.arange(len(part.bias)))
        self._layers.append((rows, torch.cat([part.bias for part in parts])))
        self._degrees = torch.cat([part.degrees for part in parts])
        self._hidden.append(self._degrees)
        return [Affine([term], torch.zeros_like(h.bias), h.degrees) for term, h in results], kept

    def layer(self, weight: Tensor, bias: Tensor, mask: Tensor, activation: str, context: Tensor | None = None) -> None:
        """Adds a hidden layer with an activation of a MADE, and maybe the weight ``[units, C]`` of a context.

        Raises:
            NotConvertibleError: layers that are added to each other can see different inputs.
        """
        degrees = _visible(mask, self._degrees, len(weight))
        if self._residual and self._layers and len(self._layers) % 2 == 0:
            degrees = torch.maximum(degrees, self._hidden[-2])
            if not torch.equal(degrees, self._hidden[0]):
                raise NotConvertibleError("a residual block can see inputs that the layer it is added to cannot")
        self._layers.append(((weight.detach() * mask).to(weight.dtype), bias.detach()))
        self._degrees = degrees
        self._hidden.append(degrees)
        self._activations.append(activation)
        self._contexts.append(context)

    def plain(self, h: Affine) -> Affine:
        """Returns h as multiples of units, in a new layer if needed, which leaves no other function."""
        return h if h.is_plain else self.relu([], keep=[h])[1][0]

    def activation(self, slope: float, h: Affine, keep: Sequence[Affine] = ()) -> tuple[Affine, list[Affine]]:
        """Returns leaky_relu(h), with slope 0 the ReLU, and the functions to ``keep``."""
        if slope == 0:
            [value], kept = self.relu([h], keep)
            return value, kept
        if slope == 1:
            _, [h, *rest] = self.relu([], [h, *keep])
            return h, rest
        [positive, negative], kept = self.relu([h, h.negated()], keep)
        scaled = Affine([term._replace(factor=-slope) for term in negative.terms], negative.bias, negative.degrees)
        return positive + scaled, kept

    def made(self, outputs: Sequence[Affine], passed: int = 0) -> MADE:
        """Returns the network with these outputs, one of each for every input after the first ``passed``.

        Inputs are sorted by degree, the first ``passed`` in front: their outputs are zero.

        Raises:
            NotConvertibleError: an output can see its own input, or one that follows.
        """
        if not self._hidden:
            _, outputs = self.relu([], keep=outputs)
        units, order, count = len(self._degrees), self.order(passed), len(outputs)
        own = order[passed:] - passed  # the dimension of x at each place
        rows = self._like.new_zeros(count * len(order), units)
        bias = self._like.new_zeros(count * len(order))
        for i, part in enumerate(outputs):
            part.write_to(rows[count * passed + i :: count], own)
            bias[count * passed + i :: count] = part.bias[own]
        sorted_inputs = self.inputs[order]

        def place(degrees: Tensor) -> Tensor:
            """Returns how many inputs, in their new order, are of such a degree or a smaller one."""
            return torch.searchsorted(sorted_inputs, degrees.contiguous(), right=True).clamp_(min=passed)

        seen = torch.stack([place(part.degrees)[own] for part in outputs])
        if bool((seen > torch.arange(passed, len(order))).any()):
            raise NotConvertibleError("the network is not autoregressive: an output can see its own input")
        degrees = [place(one) for one in self._hidden]
        contexts = next((one.shape[1] for one in self._contexts if one is not None), 0)
        orders = [order, *[one.argsort(stable=True) for one in degrees]]
        made = MADE(
            len(order),
            [len(one) for one in degrees],
            degrees=[one.sort().values for one in degrees],
            outputs_per_feature=count,
            activation=self._activations or "relu",
            residual=self._residual,
            context_features=contexts,
            init="empty",
            dtype=self._like.dtype,
            device=self._like.device,
        )
        layers = [*self._layers, (rows, bias)]
        for k, (layer, (weight, b)) in enumerate(zip(made.layers, layers, strict=True)):
            if k < len(degrees):
                weight, b = _taken(weight, orders[k + 1], 0), b[orders[k + 1].to(b.device)]
            layer.load_dense_(_taken(weight, orders[k], 1), b)
        for k, of_layer in enumerate(made.context_layers.parameters() if contexts else ()):
            added = self._contexts[k] if k < len(self._contexts) else None
            of_layer.data.copy_(torch.zeros_like(of_layer) if added is None else _taken(added, orders[k + 1], 0))
        return made

    def order(self, passed: int = 0) -> Tensor:
        """Returns the inputs in the order of their degrees, the first ``passed`` in front."""
        rest = self.inputs[passed:].argsort(stable=True) + passed
        return torch.cat([torch.arange(passed), rest])


def _taken(weight: Tensor, order: Tensor, dim: int) -> Tensor:
    return weight if is_natural(order) else weight.index_select(dim, order.to(weight.device))


def _visible(mask: Tensor | None, degrees: Tensor, size: int) -> Tensor:
    """Returns the largest degree that each row of a mask lets through, 0 if none."""
    if mask is None:
        return degrees.max().expand(size) if len(degrees) else torch.zeros(size, dtype=torch.int64)
    numbers = degrees.to(torch.int32)  # half of the memory of int64
    rows = [torch.where(part, numbers, 0).amax(1).long() for part in mask.cpu().bool().split(4096)]
    return torch.cat(rows)
