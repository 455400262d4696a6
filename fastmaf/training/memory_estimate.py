"""How much memory a flow takes to train or to score, computed from the shapes of its layers: nothing is run.

A training step holds the parameters, the optimiser's state, the gradients and what the forward pass keeps for the
backward pass; its peak lies in one of a few moments, each of which holds something of its own beside these. What those
are follows from the code of the backends, and tests hold it against the allocators' own counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from fastmaf.constants import constants
from fastmaf.flows import Flow
from fastmaf.kernels import dispatch
from fastmaf.kernels.layout import padding_is_held
from fastmaf.nn import MaskedLinear
from fastmaf.training.fused_adam import FusedAdam
from fastmaf.training.optimiser_memory import Optimiser, forms_no_gradients, state_per_number, step_bytes
from fastmaf.training.workspace import workspace_bytes
from fastmaf.transforms import Permutation

Update: TypeAlias = Literal["minimize", "step", "clip"]

_HUGE_PAGE = 2 << 20  # see empty_on_huge_pages


class MemoryParts(NamedTuple):
    """What lies in memory at the peak of a training step or of a scoring pass, in bytes; ``sum`` gives the whole.

    Attributes:
        weights: parameters, buffers, and where the padding of packed weights lies.
        optimiser: the optimiser's state.
        gradients: of the parameters, as far as they are stored at that moment.
        activations: the batch ``[N, D]``, z, and what is kept for the backward pass.
        transient: what one op or another needs while it runs, and what it keeps for its next call.
    """

    weights: int
    optimiser: int
    gradients: int
    activations: int
    transient: int


def memory_estimate(
    flow: Flow,
    batch: int,
    optimiser: Optimiser | None = FusedAdam,
    *,
    update: Update = "minimize",
    device: torch.device | str | None = None,
) -> int:
    """Returns the bytes at the peak of a training step on the mean NLL of a batch, or of scoring a batch.

    It counts tensors and kernels' buffers, so what ``torch.cuda.max_memory_allocated`` shows; on the CPU what is
    allocated, aside from Python, torch and libraries: the work buffers that the torch backend's BLAS library allocates
    on first use depend on the library, the CPU and the number of threads, and are not counted (see
    ``allocate_work_buffers``). Nothing is run, and of the flow only shapes are read: one built on ``device="meta"``
    takes no memory itself.

    Args:
        flow: any flow, also one of ``to_inference()``. Parameters that require no gradient are not trained. A transform
            of a class that fastmaf does not know counts as if it kept three tensors ``[N, D]``.
        batch: N, at least 1.
        optimiser: a torch optimiser or its class; None for ``log_prob`` under ``torch.no_grad()``.
        update: how ``FusedAdam`` is used: ``"minimize"``, as ``TrainingStep`` does; ``"clip"``, with its
            ``max_grad_norm``, as ``TrainingStep`` does under ``Guards(max_grad_norm=...)``; or ``"step"``, after a
            backward pass that stores gradients, as any torch optimiser.
        device: where the flow is to run, if not where it is; a flow on ``"meta"`` is meant for the CPU.

    Returns:
        Bytes. For ``sum``'s terms see ``memory_parts``, which takes the same arguments.

    Raises:
        ValueError: ``batch`` is less than 1, or ``update`` is unknown.
        TypeError: the optimiser's state cannot be found out.
    """
    return sum(memory_parts(flow, batch, optimiser, update=update, device=device))


def memory_parts(
    flow: Flow,
    batch: int,
    optimiser: Optimiser | None = FusedAdam,
    *,
    update: Update = "minimize",
    device: torch.device | str | None = None,
) -> MemoryParts:
    """Returns what ``memory_estimate`` adds up."""
    if batch < 1:
        raise ValueError(f"batch must be at least 1; found {batch}")
    if update not in get_args(Update):
        raise ValueError(f"update must be one of {', '.join(map(repr, get_args(Update)))}; found {update!r}")
    where, backend = runs_on(flow, device)
    case = _Case(flow, batch, optimiser, update, where, backend)
    fixed = sum(map(_bytes, (*flow.buffers(), *constants(flow))))
    held = sum(map(case.size, flow.parameters())) + fixed + _padding(case)
    training = optimiser is not None
    layer_by_layer = case.factored and update == "clip"
    buffers = workspace_bytes(flow, batch, where, case.backend, training=training, layer_by_layer=layer_by_layer)
    if optimiser is None:
        return MemoryParts(held, 0, 0, case.plane, _scoring(case) + buffers)
    size = case.size if case.factored else _bytes
    state = int(state_per_number(optimiser) * sum(map(size, case.trained)))
    moments = (
        MemoryParts(held, state, grads, activations, transient + buffers)
        for grads, activations, transient in _moments(case, optimiser)
    )
    return max(moments, key=sum)


@dataclass(frozen=True)
class _Case:
    """What an estimate is made for, and the sizes that it is made of."""

    flow: Flow
    batch: int
    optimiser: Optimiser | None
    update: Update
    device: torch.device
    backend: str

    @cached_property
    def factored(self) -> bool:
        """Whether the gradients of packed weights are not stored."""
        return self.optimiser is not None and self.update != "step" and forms_no_gradients(self.optimiser)

    @cached_property
    def plane(self) -> int:
        """The bytes of a tensor ``[N, D]``."""
        return self.batch * self.flow.features * self.item

    @property
    def item(self) -> int:
        return self.flow._like().element_size()

    @cached_property
    def blocks(self) -> int:
        return len(self.flow._mades())

    @cached_property
    def layers(self) -> list[MaskedLinear]:
        return [layer for made in self.flow._mades() for layer in made.layers]

    @cached_property
    def hidden(self) -> int:
        """The bytes of the hidden units of all blocks."""
        units = sum(sum(made.hidden_features) for made in self.flow._mades())
        return self.batch * units * self.item

    @cached_property
    def packed(self) -> set[int]:
        """The identities of the packed weights."""
        return {id(layer.weight) for layer in self.layers if layer.weight.dtype == layer.bias.dtype}

    def size(self, parameter: Tensor) -> int:
        """The bytes of a parameter, or of what is allocated like it: see ``empty_on_huge_pages``."""
        size = _bytes(parameter)
        on_huge_pages = id(parameter) in self.packed and self.device.type == "cpu" and size >= 4 * _HUGE_PAGE
        if not on_huge_pages or dispatch.missing("flow", "native") is not None:
            return size
        return -(-size // _HUGE_PAGE) * _HUGE_PAGE

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.flow.parameters() if p.requires_grad]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def runs_on(flow: Flow, device: torch.device | str | None) -> tuple[torch.device, str]:
    """Returns the device that a flow is to run on, ``device`` if given, and the name of its backend there."""
    like = flow._like()
    where = torch.device(("cpu" if like.is_meta else like.device) if device is None else device)
    if (chosen := dispatch.chosen()) is not None:
        return where, chosen
    if where.type == "cuda" and not torch.cuda.is_available():  # a plan for another machine
        return where, "triton"
    return where, dispatch.default_backend("affine_output", torch.empty(0, device=where, dtype=like.dtype))


def _padding(case: _Case) -> int:
    """The int64 indices of the padding of weights. Each weight's are found once: on the CPU when it is drawn or loaded,
    elsewhere when it is first used, or when the torch backend makes its gradient.
    """
    on_cpu = case.device.type == "cpu"
    # On a GPU padding is zeroed by its indices, whenever a weight has been written to.
    by_index = case.device.type == "cuda" or (case.optimiser is not None and case.backend == "torch")
    needed = by_index or (on_cpu and case.flow._like().is_meta)
    layouts = [layer.layout for layer in case.layers]
    return sum(8 * (of.numel - of.visible) for of in layouts if needed or (on_cpu and padding_is_held(of.table)))


def _scoring(case: _Case) -> int:
    """The transient bytes of a pass that keeps nothing."""
    plane = case.plane
    if case.backend != "torch":
        return 2 * plane  # z and its square
    # The product [N, 2D], log-scale, z and what they are made of; x and log-scale of the block before; x reordered. A
    # weight stored in fewer bits is widened for the product.
    planes = (6 if case.blocks == 1 else 8) + any(isinstance(t, Permutation) for t in case.flow.transforms)
    widened = [layer.layout.numel * case.item for layer in case.layers if layer.weight.dtype != layer.bias.dtype]
    return max(planes * plane, 4 * plane + max(widened, default=0))


def _moments(case: _Case, optimiser: Optimiser) -> Iterator[tuple[int, int, int]]:
    """Yields the moments in which the peak of a training step can lie: the bytes of stored gradients, of activations
    and of transients.
    """
    plane, reference, one = case.plane, case.backend == "torch", case.blocks == 1
    largest = max((_bytes(p) for p in case.trained if id(p) in case.packed), default=0)
    stored = [p for p in case.trained if not (case.factored and id(p) in case.packed)]
    grads = sum(_bytes(p) if reference else case.size(p) for p in stored)
    kept = case.flow._saved_numel(case.batch) * case.item + plane  # and the batch itself

    # Going back through ½z²: z, and three tensors like it.
    yield 0, kept, 4 * plane
    if case.factored and case.update == "clip":
        # Until the step, each layer's gradient from above waits with all that is kept, and a block's zeros beside it.
        kept += (2 * case.blocks - 1) * plane + case.hidden
        backward = (8 if reference else 3) if one else (10 if reference else 5)
        yield grads, kept, backward * plane
        # The reference forms a whole weight's gradient, and measures its norm in float64.
        yield grads, kept, max(6 * plane, 5 * plane + largest) if reference else 0
        yield grads, kept, 16 * (largest // case.item) if reference else 0
    elif not reference:
        yield grads, kept, 2 * plane  # z and its gradient
    else:
        above = 1 if one else 4  # z, and what came from the block above
        if case.factored:
            yield grads, kept, max(9 * plane, 8 * plane + largest) + above * plane
        else:
            first = sum(_bytes(layer.weight) for layer in case.flow._mades()[0].layers[:-1]) if case.blocks else 0
            yield grads - first, kept, (8 + above) * plane
            yield grads, kept, 6 * plane
    yield grads, plane, step_bytes(optimiser, [_bytes(p) for p in stored], case.device)
