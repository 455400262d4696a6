"""Affine blocks with a context, whose layers add terms of each sample, by a backend's ops of whole blocks.

These ops give no gradients of the terms: they serve passes that record none, and the steps of an inverse.
"""

from __future__ import annotations

from torch import Tensor

from fastmaf.kernels import composite
from fastmaf.kernels.activations import OP_ACTIVATIONS
from fastmaf.kernels.affine_output.affine_map import AffineMap
from fastmaf.kernels.dispatch import implementation
from fastmaf.kernels.flow.args import Block, FlowArgs, flow_args
from fastmaf.kernels.flow.torch.network import Network
from fastmaf.kernels.op import is_recorded, records_gradients
from fastmaf.kernels.padding import keep_zero


def takes_terms(x: Tensor) -> bool:
    """Returns whether the backend for ``x`` has ops with terms, and no graph is recorded."""
    return not (composite.needed() or is_recorded(x)) and hasattr(implementation("flow", x), "TAKES_TERMS")


def forward_with_terms(x: Tensor, network: Network, affine_map: AffineMap) -> tuple[Tensor, Tensor] | None:
    """Returns ``z`` ``[N, D]`` and ``ladj`` ``[N]``; None where no op of the backend computes the block, or gradients
    are recorded.
    """
    if records_gradients([x, *network.tensors]) or not _is_computed(x, network):
        return None
    backend = implementation("flow", x)
    z, ladj, _ = backend.forward(x.contiguous(), _args(network, affine_map), False, terms=_terms(network))
    return z, ladj


def inverse_with_terms(z: Tensor, network: Network, affine_map: AffineMap) -> tuple[Tensor, Tensor] | None:
    """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]``, of which no gradients are recorded; None where no op of the
    backend computes the block.
    """
    if not _is_computed(z, network):
        return None
    backend = implementation("flow", z)
    result: tuple[Tensor, Tensor] = backend.inverse(z.contiguous(), _args(network, affine_map), terms=_terms(network))
    return result


def _is_computed(x: Tensor, network: Network) -> bool:
    activations = set(network.activations)
    return takes_terms(x) and not network.residual and len(activations) == 1 and activations <= set(OP_ACTIVATIONS)


def _args(network: Network, affine_map: AffineMap) -> FlowArgs:
    weights, biases, prefixes, panels, _, scales = zip(*network.layers, strict=True)
    block = Block(weights, biases, prefixes, panels, network.schedule, network.activations[0], affine_map, scales)
    args = flow_args([block], [None, None])
    keep_zero(args.weights, args.prefixes, args.panels)
    return args


def _terms(network: Network) -> list[Tensor]:
    return [term.contiguous() for term in network.terms]
