"""A flow's inverse by Triton kernels: a blocked triangular solve, block by block and group by group.

    ahead     partial sums of all rows of a group over everything that is finished, by programs on all multiprocessors
    solve     the group's own steps, by one program for a tile of samples

The algorithm is described in ``schedule.py``, the kernels' tables in ``panel_plan.py``. A sample of the published run's
model takes some 460 launches, so that they are recorded as a CUDA graph.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastmaf.kernels.affine_output import triton_map
from fastmaf.kernels.affine_output.affine_map import SHIFT_FIRST
from fastmaf.kernels.flow.args import FlowArgs, permuted
from fastmaf.kernels.flow.triton.panel_ahead import _panel_ahead_kernel
from fastmaf.kernels.flow.triton.panel_items import Ahead, Tiling
from fastmaf.kernels.flow.triton.panel_plan import Finish, plan
from fastmaf.kernels.flow.triton.panel_solve import _finish_units_kernel, _panel_solve_kernel
from fastmaf.kernels.layout import PANEL
from fastmaf.kernels.masked_linear.triton import shape_of
from fastmaf.kernels.triton_common import device as common
from fastmaf.kernels.triton_common import work_lists
from fastmaf.kernels.triton_common.graphs import replayed

# Samples that are taken through the launches together: the partial sums of each take 30 KB at the published run's size.
MOST_SAMPLES = 1024
MOST_PANELS = 2  # of an item of the ahead kernel, whose registers hold the sums of each
MOST_PER_PROGRAM = 4  # of the solve kernel, whose registers hold the sums of each


def inverse(z: Tensor, args: FlowArgs) -> tuple[Tensor, Tensor]:
    """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dx/dz|.

    Raises:
        ValueError: weights are of several dtypes, or biases are not float32.
    """
    n, features = z.shape
    _check_dtypes(args)
    # Not by their addresses: they may be made anew for every call.
    places = torch.stack([p if p.numel() else _identity(features, z.device) for p in args.permutations[:-1]])
    x, ladj = torch.empty_like(z), z.new_empty(n)
    # Whatever the launches read at an address, or were compiled for.
    addresses = [part.data_ptr() for part in (*args.parameters, *args.panels, *args.schedules)]
    numbers = *args.maps, *args.weight_scales
    key = (*addresses, *numbers, args.activation, args.weights[0].dtype, common.target(z))
    for start in range(0, n, MOST_SAMPLES):
        part = slice(start, start + MOST_SAMPLES)
        held = [*args.panels, *args.schedules[1:]]
        of_part = replayed(args.schedules[0], key, (z[part], places), lambda z, places: _inverse(z, places, args), held)
        for whole, result in zip((x, ladj), of_part, strict=True):
            whole[part] = result
    return permuted(x, args.permutations[-1]), ladj


def _inverse(z: Tensor, places: Tensor, args: FlowArgs) -> tuple[Tensor, Tensor]:
    """Takes a tile of samples through all blocks; z of dimension d of a block is at ``places[block, d]``."""
    ladj = torch.zeros(z.shape[0], dtype=torch.float64, device=z.device)
    for block in range(len(args.schedules)):
        z = _inverse_block(torch.index_select(z, 1, places[block]), ladj, args, block)
    return z, ladj.float()


def _inverse_block(z: Tensor, ladj: Tensor, args: FlowArgs, block: int) -> Tensor:
    """Returns x of a block; adds to ``ladj``."""
    n, features = z.shape
    layers = args.layers_of_blocks()[block]
    weights, biases, panels = ([part[i] for i in layers] for part in (args.weights, args.biases, args.panels))
    table, sms, _ = common.target(z)
    shape = shape_of(z, n, weights[0].dtype)
    tiling = Tiling(min(shape.rows // PANEL, MOST_PANELS), shape.columns, shape.programs, table.solve.columns)
    made = plan(args.schedules[block], panels, [len(bias) for bias in biases[:-1]], z.device, tiling)
    scales = [work_lists.bits_of(args.weight_scales[i]) for i in layers]
    entries = [(w.data_ptr(), b.data_ptr(), len(b), s) for w, b, s in zip(weights, biases, scales, strict=True)]
    addresses = work_lists.numbers(args.schedules[block], entries, z.device)

    hidden, affine_map = len(layers) - 1, args.map(block)
    x, values = torch.empty_like(z), z.new_empty(n, made.units)
    sums, outputs = z.new_empty(made.slots, n, PANEL * hidden), z.new_empty(made.output_slots, n, made.rows)
    types = {
        "W_TYPE": common.WEIGHT_TYPES[weights[0].dtype],
        "ALIGNED": not any(weight.data_ptr() % 16 for weight in weights),
    }
    relu = args.activation == "relu"
    options = {name: value for name, value in shape.options.items() if name != "BLOCK_J"}
    options.setdefault("maxnreg", common.all_registers(options["num_warps"]))
    samples = common.power_of_two(common.cdiv(n, sms * table.solve.programs_per_sm), 1, MOST_PER_PROGRAM)
    warps = samples * table.solve.warps
    modes: dict[str, Any] = {"SHIFT_FIRST": affine_map.form == SHIFT_FIRST, "KIND": triton_map.kind_of(affine_map)}
    for launch in made.launches:
        if isinstance(launch, Ahead):
            common.launch(
                _panel_ahead_kernel,
                (launch.end - launch.first) * common.cdiv(n, shape.samples),
                x, values, sums, outputs, addresses, made.items[launch.first :], n, features, made.units,
                PANEL * hidden, made.rows,
                PANELS=tiling.panels, PREFETCH=shape.prefetch, **types, **options,
            )  # fmt: skip
        elif isinstance(launch, Finish):
            common.launch(
                _finish_units_kernel,
                n * common.cdiv(launch.units, 256),
                outputs, values[:, launch.values :], n, launch.units, launch.slots, made.units, made.rows,
                BLOCK=256, RELU=relu,
            )  # fmt: skip
        else:
            common.launch(
                _panel_solve_kernel,
                common.cdiv(n, samples),
                z, x, values, ladj, sums, outputs, addresses, made.groups[launch.group], made.chunks, affine_map.limit,
                affine_map.epsilon, n, features, made.units, made.rows,
                BLOCK_N=samples, BLOCK_D=made.dims, LAYERS=hidden, SLOTS=made.slots, OUTPUT_SLOTS=made.output_slots,
                **types, RELU=relu, **modes, num_warps=warps, maxnreg=common.all_registers(warps),
            )  # fmt: skip
    return x


def _check_dtypes(args: FlowArgs) -> None:
    # Kernels load the addresses of parameters, so that Triton does not know the dtypes.
    weights, biases = ({tensor.dtype for tensor in part} for part in (args.weights, args.biases))
    if len(weights) > 1:
        raise ValueError(f"the weights of a flow must be of one dtype; found {[w.dtype for w in args.weights]}")
    if biases != {torch.float32}:
        raise ValueError(f"biases must be {torch.float32}; found {[b.dtype for b in args.biases]}")


@functools.cache
def _identity(features: int, device: torch.device) -> Tensor:
    return torch.arange(features, device=device)
