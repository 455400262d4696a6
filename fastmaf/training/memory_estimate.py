"""The memory that a flow takes to train or to score, computed from the shapes of its layers without running anything.

A training step holds the parameters, the optimiser's state, the gradients and the activations saved for the backward
pass. Its peak lies in one of a few moments, each with transient tensors of its own. They follow from the code of the
backends; tests compare them with the allocators' counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from fastmaf.constants import constants
from fastmaf.flows import Flow
from fastmaf.kernels import dispatch
from fastmaf.kernels.float8 import BYTE
from fastmaf.kernels.layout import padding_is_held
from fastmaf.kernels.storage import has_library
from fastmaf.training.fused_adam import FusedAdam
from fastmaf.training.optimizer_memory import Optimizer, state_per_number, step_bytes, stores_no_gradients
from fastmaf.training.workspace import runs_on, workspace_bytes
from fastmaf.transforms import Permutation

Update: TypeAlias = Literal["minimize", "step", "clip"]

_HUGE_PAGE = 2 << 20  # see empty_on_huge_pages


class MemoryParts(NamedTuple):
    """The bytes in memory at the peak of a training step or of a scoring pass; ``sum`` gives the total.

    Attributes:
        weights: parameters, buffers, the indices of the padding of packed weights, and what the native kernels make of
            float8 weights.
        optimizer: the optimiser's state.
        gradients: the gradients that are stored at that moment.
        activations: the batch ``[N, D]``, z, and the activations saved for the backward pass.
        transient: temporary tensors of the ops, and the work buffers that backends keep for their next call.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    transient: int


def memory_estimate(
    flow: Flow,
    batch: int,
    optimizer: Optimizer | None = FusedAdam,
    *,
    update: Update = "minimize",
    device: torch.device | str | None = None,
) -> int:
    """Returns the bytes at the peak of a training step on the mean NLL of a batch, or of scoring a batch.

        bytes = weights + optimizer + gradients + activations + transient       (see ``MemoryParts``)

    It counts tensors and backends' work buffers: on a GPU what ``torch.cuda.max_memory_allocated`` shows; on the CPU
    what is allocated, other than by Python, torch and libraries. The work buffers of the BLAS library, which the torch
    backend uses, are not counted (see ``allocate_work_buffers``). Nothing is run, and only shapes of the flow are read:
    it may be on ``device="meta"``, where it takes no memory.

    Args:
        flow: any flow, also one of ``to_inference()``. Parameters that require no gradient are not trained. A custom
            transform counts as if it saved three tensors ``[N, D]``, and so does a normalisation. Not counted are what
            another base than the standard normal one allocates, and the backward pass through an inverse, as that of
            the density of an ``IAF``.
        batch: N, at least 1.
        optimizer: a torch optimiser or its class; None for ``log_prob`` under ``torch.no_grad()``.
        update: how ``FusedAdam`` is used: ``"minimize"``, as by ``TrainingStep`` (which stores the gradients of a flow
            of at most 65,536 weights); ``"clip"``, with ``max_grad_norm``, as by ``TrainingStep`` under
            ``Guards(max_grad_norm=...)``, which may need less; or ``"step"``, after a backward pass that stores
            gradients, as any torch optimiser.
        device: the device to run on, if not the flow's own; the CPU for a flow on ``"meta"``.

    Returns:
        Bytes. ``memory_parts`` takes the same arguments and returns the terms.

    Raises:
        ValueError: ``batch`` is less than 1, or ``update`` is unknown.
        TypeError: the size of the optimiser's state cannot be determined.

    Example:
        >>> flow = fastmaf.MAF(12288, 7, (512, 512), device="meta")
        >>> 0.8e9 < fastmaf.memory_estimate(flow, 8) < 1.3e9
        True
    """
    return sum(memory_parts(flow, batch, optimizer, update=update, device=device))


def memory_parts(
    flow: Flow,
    batch: int,
    optimizer: Optimizer | None = FusedAdam,
    *,
    update: Update = "minimize",
    device: torch.device | str | None = None,
) -> MemoryParts:
    """Returns the terms of ``memory_estimate``, which documents the arguments."""
    if batch < 1:
        raise ValueError(f"batch must be at least 1; found {batch}")
    if update not in get_args(Update):
        raise ValueError(f"update must be one of {', '.join(map(repr, get_args(Update)))}; found {update!r}")
    case = _Case(flow, batch, optimizer, update, device)
    fixed = sum(map(_bytes, (*flow.buffers(), *constants(flow))))
    held = sum(map(case.size, flow.parameters())) + fixed + _padding(case) + _decoded(case)
    layer_by_layer = case.factored and update == "clip"
    training = optimizer is not None
    buffers = workspace_bytes(flow, batch, case.device, case.backend, training=training, layer_by_layer=layer_by_layer)
    if optimizer is None:
        return MemoryParts(held, 0, 0, case.plane, _scoring(case) + buffers)
    size = case.size if case.factored else _bytes
    state = int(state_per_number(optimizer) * sum(map(size, case.trained)))
    moments = (
        MemoryParts(held, state, grads, activations, transient + buffers)
        for grads, activations, transient in _moments(case, optimizer)
    )
    return max(moments, key=sum)


class _Case:
    """The sizes that an estimate is computed from.

    Attributes:
        factored: whether the gradients of packed weights are not stored.
        item: the bytes of a number.
        plane: the bytes of a tensor ``[N, D]``.
        hidden: the bytes of the hidden units of all blocks.
        packed: the ids of the packed weights.
    """

    def __init__(
        self, flow: Flow, batch: int, optimizer: Optimizer | None, update: Update, device: torch.device | str | None
    ) -> None:
        self.flow, self.batch, self.optimizer, self.update = flow, batch, optimizer, update
        self.device, self.backend = runs_on(flow, device)
        self.factored = optimizer is not None and update != "step" and stores_no_gradients(optimizer)
        self.mades, self.layers = flow._mades(), flow._layers()
        self.item = flow._like().element_size()
        self.plane = batch * flow.features * self.item
        self.hidden = batch * sum(sum(made.hidden_features) for made in self.mades) * self.item
        self.packed = {id(layer.weight) for layer in self.layers if layer.weight.dtype == layer.bias.dtype}
        self.trained = [p for p in flow.parameters() if p.requires_grad]

    def size(self, parameter: Tensor) -> int:
        """Returns the bytes allocated for a parameter, its gradient or a moment; see ``empty_on_huge_pages``."""
        size = _bytes(parameter)
        on_huge_pages = id(parameter) in self.packed and self.device.type == "cpu" and size >= 4 * _HUGE_PAGE
        if not on_huge_pages or dispatch.missing("flow", "native") is not None:
            return size
        return -(-size // _HUGE_PAGE) * _HUGE_PAGE


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _padding(case: _Case) -> int:
    """Returns the bytes of the int64 indices of the weights' padding.

    They are computed once per weight: when the torch backend computes its gradient, and, on a GPU, without the native
    library or for float8 weights, when it is first used after a write.
    """
    on_cpu = case.device.type == "cpu"
    needed = not (on_cpu and has_library()) or (case.optimizer is not None and case.backend == "torch")
    needed |= case.backend == "torch" and any(layer.weight.dtype == BYTE for layer in case.layers)
    layouts = [layer.layout for layer in case.layers]
    return sum(8 * (of.numel - of.visible) for of in layouts if needed or (on_cpu and padding_is_held(of.panels)))


def _decoded(case: _Case) -> int:
    """Returns the bytes of the weights that are kept beside float8 ones for the native kernels."""
    if case.backend != "native":
        return 0
    item = 2 if case.item == 4 else case.item
    return sum(item * layer.layout.numel for layer in case.layers if layer.weight.dtype == BYTE)


def _scoring(case: _Case) -> int:
    """Returns the transient bytes of a forward pass without gradients."""
    plane = case.plane
    if case.backend != "torch":
        return 0 if case.device.type == "cpu" and case.flow._is_one_op() else 2 * plane  # z and its square
    # The product [N, 2D], log-scale, z and their terms; x and log-scale of the previous block; the permuted x. A weight
    # stored in fewer bits is converted for the product.
    planes = (6 if len(case.mades) == 1 else 8) + any(isinstance(t, Permutation) for t in case.flow.transforms)
    widened = [layer.layout.numel * case.item for layer in case.layers if layer.weight.dtype != layer.bias.dtype]
    return max(planes * plane, 4 * plane + max(widened, default=0))


def _moments(case: _Case, optimizer: Optimizer) -> Iterator[tuple[int, int, int]]:
    """Yields the bytes of stored gradients, activations and transients at each possible peak of a step."""
    plane, on_torch, one_block = case.plane, case.backend == "torch", len(case.mades) == 1
    largest = max((_bytes(p) for p in case.trained if id(p) in case.packed), default=0)
    stored = [p for p in case.trained if not (case.factored and id(p) in case.packed)]
    grads = sum(_bytes(p) if on_torch else case.size(p) for p in stored)
    saved = case.flow._saved_numel(case.batch) * case.item + plane  # activations and the batch

    # The backward pass of ½z²: z and its gradient, or three tensors like z where it is torch's.
    one_op = not on_torch and case.device.type == "cpu" and case.flow._is_one_op()
    yield 0, saved, (2 if one_op else 4) * plane
    if case.factored and case.update == "clip":
        # Until the step, the factors hold each layer's output gradient and the saved activations.
        if case.backend == "native":  # the layers' own ops take the activations by sample
            saved += case.flow._saved_numel(case.batch) * case.item
        saved += (2 * len(case.mades) - 1) * plane + case.hidden
        backward = (8 if on_torch else 3) if one_block else (10 if on_torch else 5)
        yield grads, saved, backward * plane
        # The torch backend forms the gradient of one whole weight, and its norm in float64.
        yield grads, saved, max(6 * plane, 5 * plane + largest) if on_torch else 0
        yield grads, saved, 16 * (largest // case.item) if on_torch else 0
    elif not on_torch:
        yield grads, saved, 2 * plane  # z and its gradient
    else:
        above = 1 if one_block else 4  # z, and the gradients of the block above
        if case.factored:
            yield grads, saved, max(9 * plane, 8 * plane + largest) + above * plane
        else:
            first = sum(_bytes(layer.weight) for made in case.mades[:1] for layer in made.layers[:-1])
            yield grads - first, saved, (8 + above) * plane
            yield grads, saved, 6 * plane
    yield grads, plane, step_bytes(optimizer, [_bytes(p) for p in stored], case.device)
