"""Processes that train one model together hold the same one: a check before the first step, and batch statistics."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from fastmaf.training.exchange import Exchange, ProcessesDifferError, digest
from fastmaf.transforms.batch_norm import BatchNorm


def check_agreement(flow: nn.Module, exchange: Exchange) -> None:
    """Checks that all processes hold a flow of the same structure, parameters and buffers, orders and degrees included.

    Digests are compared, 32 bytes for each tensor. All processes must call it.

    Raises:
        ProcessesDifferError: in every process, if one holds another flow than the group's first.
        ProcessFailedError: a process has failed before.
    """
    exchange.total()  # of a process that failed before it, nothing can be compared
    named = list(chain(flow.named_parameters(), flow.named_buffers()))
    forms = (f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in named)
    found = exchange.first_difference([digest("\n".join([str(flow), *forms]).encode())])
    if found is not None:
        raise ProcessesDifferError(
            f"the flow of process {found[0]} differs from that of process 0 in its classes, its settings, or the "
            "names, shapes or dtypes of its tensors: build it with the same arguments in all processes"
        )
    found = exchange.first_difference([_digest(tensor) for _, tensor in named])
    if found is not None:
        raise ProcessesDifferError(
            f"{named[found[1]][0]} of process {found[0]} differs from that of process 0: build the flow with the same "
            "seed, and fit or load it from the same data, in all processes"
        )


def average_statistics(flow: nn.Module, exchange: Exchange) -> None:
    """Sets the running statistics of each ``BatchNorm`` in training to their means over all processes."""
    norms = [module for module in flow.modules() if isinstance(module, BatchNorm) and module.training]
    exchange.average([buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)])


def _digest(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().flatten().contiguous()
    return digest(flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data)
