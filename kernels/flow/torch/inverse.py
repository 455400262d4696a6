"""Level-scheduled inverse of flows in plain torch: the truth that the other backends are held against.

A step's outputs (m, u) give x = z exp(a) + m with a = log_scale(u), or (z - m) exp(-a): see ``AffineMap``. The steps
are in ``solve.py``.
"""

from __future__ import annotations

from torch import Tensor

from fastmaf.kernels.flow.args import FlowArgs, permuted
from fastmaf.kernels.flow.torch.network import Network
from fastmaf.kernels.flow.torch.solve import solve


def inverse(z: Tensor, args: FlowArgs) -> tuple[Tensor, Tensor]:
    """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dx/dz|."""
    ladj = z.new_zeros(z.shape[0])
    for b in range(len(args.schedules)):
        z, term = _inverse_of_block(permuted(z, args.permutations[b]), args, b)
        ladj = ladj + term
    return permuted(z, args.permutations[-1]), ladj


def _inverse_of_block(z: Tensor, args: FlowArgs, block: int) -> tuple[Tensor, Tensor]:
    if any(bias.dtype != z.dtype for bias in args.biases):
        raise TypeError(f"expected z of dtype {args.biases[0].dtype}, as the biases are; found {z.dtype}")
    affine_map = args.map(block)

    def invert(z: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = out.unbind(-1)
        a = affine_map.log_scale(raw)
        return affine_map.inverse(z, shift, a), -affine_map.sign * a

    layers, schedule = [args.hidden(i) for i in args.layers_of_blocks()[block]], args.schedules[block]
    return solve(z, Network(layers, schedule, [args.activation] * (len(layers) - 1)), invert)
