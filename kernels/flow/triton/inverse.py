"""A flow's level-scheduled inverse by one Triton kernel.

One program takes a tile of samples through all blocks in one launch: it waits for nobody, so it needs no more than the
barriers of its own threads. Steps are taken in groups:

    for each group: sum what all rows of the group take from units finished before it, streaming their weights;
        for each step in it: outputs += what the group's own units add;  x = z exp(a) + m;
                             units of each layer in turn += what the group's own x and units add

so that a step's critical path touches a few columns, whose other rows are still in the cache. Values live in scratch
memory, partial sums beside them. Blocks of rows begin where they may be loaded several at a time, at a multiple of
their size or of a panel's 16 rows, and leave out what is not theirs.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmaf.kernels.affine_output import triton_map
from fastmaf.kernels.affine_output.affine_map import SHIFT_FIRST
from fastmaf.kernels.flow.args import FlowArgs, permuted
from fastmaf.kernels.triton_common import device as common
from fastmaf.kernels.triton_common import work_lists
from fastmaf.kernels.triton_common.launch_table import Table

# Steps taken together: more of them stream longer at a time, and look at more columns in each step.
GROUP = 16
# Samples in one launch: their scratch memory is some four times their size. A multiple of 4, so that each launch's x
# starts at a multiple of 16 bytes.
MOST_SAMPLES = 512
# int64 numbers of a block in the kernel's table, then of each of its layers.
_OF_BLOCK = tl.constexpr(3)
_OF_LAYER = tl.constexpr(5)
_KINDS = tl.constexpr(5)


@triton.jit
def _sums(
    values_ptr, sample, sample_ok, stride, layer, r, r_end, c_begin, c_end, W_TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What rows r of a layer, up to r_end, take from columns c_begin..c_end of the values below:
    ``[BLOCK_N, BLOCK_R]``.
    """
    w_ptr = tl.load(layer).to(tl.pointer_type(W_TYPE))
    if ALIGNED:
        w_ptr = tl.multiple_of(w_ptr, 16)
    panels_ptr = tl.load(layer + 2).to(tl.pointer_type(tl.int64))
    base, width = common.panels_of(panels_ptr, r, r_end, BLOCK_R)
    return common.product(
        values_ptr, sample, sample_ok, stride, w_ptr, base, width, c_begin, c_end,
        BLOCK_N, BLOCK_R, BLOCK_C, True, "ieee",
    ) * tl.load(layer + 4).to(tl.int32).to(tl.float32, bitcast=True)  # fmt: skip


@triton.jit
def _flow_inverse_kernel(
    z_ptr, x_ptr, ladj_ptr, blocks_ptr, maps_ptr, permutations_ptr, values_ptr, ahead_ptr, other_x_ptr, n, features,
    blocks, stride_block, stride_values,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr, W_TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    RELU: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """values: hidden units [n, stride_values], layer after layer; ahead: partial sums of these, then of the 2D outputs.

    Of a block in blocks_ptr: schedule, steps, hidden layers; of its layers: weight, bias, panels, number of rows, the
    bits of the weight's factor. Bit k of KINDS: whether a block has log-scales of kind k.
    """
    sample = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    sample_ok = sample < n
    stride_ahead = stride_values + 2 * features
    ladj = tl.zeros([BLOCK_N], tl.float64)
    for b in range(blocks):
        block = blocks_ptr + b * stride_block
        schedule = tl.load(block).to(tl.pointer_type(tl.int32))
        steps = tl.load(block + 1).to(tl.int32)
        hidden = tl.load(block + 2).to(tl.int32)
        permutation = permutations_ptr + b * features
        sign, kind = tl.load(maps_ptr + 4 * b), tl.load(maps_ptr + 4 * b + 1)
        limit, epsilon = tl.load(maps_ptr + 4 * b + 2), tl.load(maps_ptr + 4 * b + 3)
        output = block + _OF_BLOCK + _OF_LAYER * hidden
        # The blocks' results alternate between two buffers; the last one's is x.
        even = (blocks - 1 - b) % 2 == 0
        to = tl.where(even, x_ptr.to(tl.int64), other_x_ptr.to(tl.int64)).to(tl.pointer_type(tl.float32))
        from_ = tl.where(even, other_x_ptr.to(tl.int64), x_ptr.to(tl.int64))
        from_ = tl.where(b == 0, z_ptr.to(tl.int64), from_).to(tl.pointer_type(tl.float32))
        to = tl.multiple_of(to, 16)
        for first in range(0, steps, GROUP):
            last = tl.minimum(first + GROUP, steps)
            before = schedule + (first - 1) * (hidden + 1)
            after = schedule + (last - 1) * (hidden + 1)
            # Hidden layers, over what is finished below them.
            below_at = to
            below_stride = features
            value_at = 0
            for k in range(hidden):
                layer = block + _OF_BLOCK + _OF_LAYER * k
                bias_ptr = tl.load(layer + 1).to(tl.pointer_type(tl.float32))
                begin = tl.load(before + 1 + k, mask=first > 0, other=0)
                end = tl.load(after + 1 + k)
                c_end = tl.load(before + k, mask=first > 0, other=0)
                for start in range(begin // 16 * 16, end, BLOCK_R):
                    r = start + tl.arange(0, BLOCK_R)
                    ok = (r >= begin) & (r < end)
                    sums = _sums(
                        below_at, sample, sample_ok, below_stride, layer, r, end, 0, c_end, W_TYPE, ALIGNED, BLOCK_N,
                        BLOCK_R, BLOCK_C,
                    )  # fmt: skip
                    sums += tl.load(bias_ptr + r, mask=ok, other=0.0)[None, :]
                    at = ahead_ptr + sample[:, None] * stride_ahead + value_at + r[None, :]
                    tl.store(at, sums, mask=sample_ok[:, None] & ok[None, :])
                below_at = values_ptr + value_at
                below_stride = stride_values
                value_at += tl.load(layer + 3).to(tl.int32)
            # Outputs, over the finished units of the last hidden layer.
            bias_ptr = tl.load(output + 1).to(tl.pointer_type(tl.float32))
            begin = 2 * tl.load(before, mask=first > 0, other=0)
            end = 2 * tl.load(after)
            h_begin = tl.load(before + hidden, mask=first > 0, other=0)
            for start in range(begin // 16 * 16, end, BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                ok = (r >= begin) & (r < end)
                sums = _sums(
                    below_at, sample, sample_ok, below_stride, output, r, end, 0, h_begin, W_TYPE, ALIGNED, BLOCK_N,
                    BLOCK_R, BLOCK_C,
                )  # fmt: skip
                sums += tl.load(bias_ptr + r, mask=ok, other=0.0)[None, :]
                at = ahead_ptr + sample[:, None] * stride_ahead + stride_values + r[None, :]
                tl.store(at, sums, mask=sample_ok[:, None] & ok[None, :])
            tl.debug_barrier()
            for s in range(first, last):
                now = schedule + s * (hidden + 1)
                past = now - (hidden + 1)
                d_begin = tl.load(past, mask=s > 0, other=0)
                d_end = tl.load(now)
                h_end = tl.load(past + hidden, mask=s > 0, other=0)
                for start in range(d_begin // 8 * 8, d_end, BLOCK_D):
                    d = start + tl.arange(0, BLOCK_D)
                    d_ok = (d >= d_begin) & (d < d_end)
                    ok = sample_ok[:, None] & d_ok[None, :]
                    place = tl.load(permutation + d, mask=d_ok, other=0)
                    z = tl.load(from_ + sample[:, None] * features + place[None, :], mask=ok, other=0.0)
                    # Both rows of each dimension, side by side.
                    r = 2 * start + tl.arange(0, 2 * BLOCK_D)
                    at = ahead_ptr + sample[:, None] * stride_ahead + stride_values + r[None, :]
                    row_ok = (r >= 2 * d_begin) & (r < 2 * d_end)
                    rows = tl.load(at, mask=sample_ok[:, None] & row_ok[None, :], other=0.0) + _sums(
                        below_at, sample, sample_ok, below_stride, output, r, 2 * d_end, h_begin, h_end, W_TYPE,
                        ALIGNED, BLOCK_N, 2 * BLOCK_D, BLOCK_P,
                    )  # fmt: skip
                    shift, u = tl.split(tl.reshape(rows, [BLOCK_N, BLOCK_D, 2]))
                    a = u
                    for one in tl.static_range(_KINDS):
                        if KINDS >> one & 1:
                            a = tl.where(kind == one, triton_map.log_scale(u, limit, epsilon, one), a)
                    a = sign * a
                    scale = triton_map.exponential(a)
                    x = tl.where(sign > 0, z * scale + shift, (z - shift) * scale)
                    tl.store(to + sample[:, None] * features + d[None, :], x, mask=ok)
                    ladj += tl.sum(tl.where(ok, a, 0.0).to(tl.float64), 1)
                tl.debug_barrier()
                below_at = to
                below_stride = features
                value_at = 0
                for k in range(hidden):
                    layer = block + _OF_BLOCK + _OF_LAYER * k
                    begin = tl.load(past + 1 + k, mask=s > 0, other=0)
                    end = tl.load(now + 1 + k)
                    c_begin = tl.load(before + k, mask=first > 0, other=0)
                    c_end = tl.load(now + k)
                    for start in range(begin // BLOCK_U * BLOCK_U, end, BLOCK_U):
                        r = start + tl.arange(0, BLOCK_U)
                        row_ok = (r >= begin) & (r < end)
                        ok = sample_ok[:, None] & row_ok[None, :]
                        at = sample[:, None] * stride_ahead + value_at + r[None, :]
                        h = tl.load(ahead_ptr + at, mask=ok, other=0.0) + _sums(
                            below_at, sample, sample_ok, below_stride, layer, r, end, c_begin, c_end, W_TYPE, ALIGNED,
                            BLOCK_N, BLOCK_U, BLOCK_W,
                        )  # fmt: skip
                        if RELU:
                            h = tl.where(h < 0, 0.0, h)
                        tl.store(values_ptr + sample[:, None] * stride_values + value_at + r[None, :], h, mask=ok)
                    tl.debug_barrier()
                    below_at = values_ptr + value_at
                    below_stride = stride_values
                    value_at += tl.load(layer + 3).to(tl.int32)
    tl.store(ladj_ptr + sample, ladj.to(tl.float32), mask=sample_ok)


def _blocks(table: Table, sms: int, n: int, features: int, widest: int, steps: int) -> dict[str, int]:
    """Returns the kernel's blocks for a batch of ``n`` and for blocks of so many steps and units at most."""
    samples = common.power_of_two(common.cdiv(n, sms), 1, 16)
    numbers = table.inverse_numbers // samples
    dims = common.power_of_two(common.cdiv(features, steps), 8, 64)
    rows = min(2 * dims, max(16, numbers // 16))
    units = common.power_of_two(common.cdiv(widest, steps), 1, 16)
    return {
        "BLOCK_N": samples,
        "BLOCK_D": rows // 2,
        "BLOCK_U": units,
        "BLOCK_R": 16,
        "BLOCK_C": max(16, numbers // 16),
        "BLOCK_P": common.power_of_two(GROUP * units, 16, max(16, numbers // rows)),
        "BLOCK_W": common.power_of_two(GROUP * dims, 16, max(16, numbers // units)),
    }


def inverse(z: Tensor, args: FlowArgs) -> tuple[Tensor, Tensor]:
    """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dx/dz|."""
    n, features = z.shape
    weights, biases, schedules = args.weights, args.biases, args.schedules
    blocks_layers = args.layers_of_blocks()
    table = []
    for schedule, layers in zip(schedules, blocks_layers, strict=True):
        block = [work_lists.on_device(schedule, z.device).data_ptr(), len(schedule), len(layers) - 1]
        for i in layers:
            panels = work_lists.on_device(args.panels[i], z.device)
            block += [weights[i].data_ptr(), biases[i].data_ptr(), panels.data_ptr(), len(biases[i])]
            block.append(work_lists.bits_of(args.weight_scales[i]))
        table.append(block)
    stride = max(len(block) for block in table)
    blocks = work_lists.numbers(schedules[0], [block + [0] * (stride - len(block)) for block in table], z.device)
    affine_maps = [args.map(block) for block in range(len(table))]
    kinds = [triton_map.kind_of(one) for one in affine_maps]
    rows = [
        (1.0 if one.form == SHIFT_FIRST else -1.0, float(kind), one.limit, one.epsilon)
        for one, kind in zip(affine_maps, kinds, strict=True)
    ]
    maps = work_lists.numbers(schedules[0], rows, z.device)
    # Not by their addresses: they may be made anew for every call.
    places = torch.stack([p if p.numel() else _identity(features, z.device) for p in args.permutations[:-1]])

    launches, sms, _ = common.target(z)
    hidden = [[biases[i].shape[0] for i in layers[:-1]] for layers in blocks_layers]
    widest, per_block = max(map(max, hidden)), max(map(sum, hidden))
    steps = max(len(schedule) for schedule in schedules)
    aligned = not any(weight.data_ptr() % 16 for weight in weights)
    x, ladj = torch.empty_like(z), z.new_empty(n)
    for start in range(0, n, MOST_SAMPLES):
        part = slice(start, start + MOST_SAMPLES)
        count = len(z[part])
        sizes = _blocks(launches, sms, count, features, widest, steps)
        values = z.new_empty(count, per_block)
        ahead = z.new_empty(count, per_block + 2 * features)
        common.launch(
            _flow_inverse_kernel,
            common.cdiv(count, sizes["BLOCK_N"]),
            z[part], x[part], ladj[part], blocks, maps, places, values, ahead, torch.empty_like(z[part]), count,
            features, len(table), stride, per_block,
            GROUP=GROUP, **sizes, W_TYPE=common.WEIGHT_TYPES[weights[0].dtype],
            ALIGNED=aligned, RELU=args.activation == "relu", KINDS=sum(1 << kind for kind in set(kinds)),
            num_warps=launches.inverse_warps, maxnreg=common.all_registers(launches.inverse_warps),
        )  # fmt: skip
    return permuted(x, args.permutations[-1]), ladj


@functools.cache
def _identity(features: int, device: torch.device) -> Tensor:
    return torch.arange(features, device=device)
