"""Output layer fused with its element-wise map by the C++ kernels of ``csrc/``; the same functions as ``torch.py``.

The ``[N, 2D]`` product exists for up to 128 rows at a time, in cache, where there are more rows than columns.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastmaf.kernels import native_args, native_library
from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.affine_output.args import AffineArgs, AffineBatch
from fastmaf.kernels.huge_pages import empty_on_huge_pages
from fastmaf.kernels.masked_linear import native as linear
from fastmaf.kernels.native_args import NONE, WRITE, MapStruct, SourceStruct, TargetStruct
from fastmaf.kernels.native_checks import check_batch, check_tensor

native_library.load()
why_not = native_library.why_not


def forward(h: Tensor, x: Tensor, args: AffineArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``z`` ``[N, D]``, ``ladj`` ``[N]`` and ``log_scale`` ``[N, D]``; the weight may be bfloat16."""
    n, columns = check_batch("h", h)
    layer = native_args.layer(args, columns, h.dtype)
    _check_pairs(layer.rows)
    check_tensor("x", x, h.dtype, (n, layer.rows // 2))
    z, log_scale, ladj = torch.empty_like(x), torch.empty_like(x), x.new_empty(n)
    affine_map = MapStruct.of(args.affine_map)
    native_library.check(
        native_library.library().fastmaf_affine(
            native_args.weight_dtype(args.weight, h.dtype), ctypes.addressof(layer), ctypes.addressof(affine_map),
            h.data_ptr(), x.data_ptr(), n, z.data_ptr(), ladj.data_ptr(), log_scale.data_ptr(), torch.get_num_threads(),
        )
    )  # fmt: skip
    return z, ladj, log_scale


def backward(batch: AffineBatch, args: AffineArgs, need_inputs: bool, need_weight: bool) -> tuple[Tensor, ...]:
    """Returns the gradients of ``h``, the packed weight, the bias and ``x``; those not needed may be empty."""
    source, grad_x = _source(batch, args, True, 1.0)
    grad_weight = empty_on_huge_pages(
        args.weight.numel() if need_weight else 0, device=batch.h.device, dtype=batch.h.dtype
    )
    target = TargetStruct(WRITE if need_weight else NONE, grad_weight.data_ptr())
    grad_h, grad_bias = linear.run(source, batch.h, args, need_inputs, target)
    return grad_h, grad_weight, grad_bias, grad_x


def adam_(batch: AffineBatch, args: AffineArgs, need_inputs: bool, update: Update) -> tuple[Tensor, ...]:
    """Takes a step of Adam on the weight, in place; returns the gradients of ``h``, the bias and ``x``."""
    source, grad_x = _source(batch, args, need_inputs, update.scale)
    return *linear.step(source, batch.h, args, need_inputs, update), grad_x


def squared_norm(batch: AffineBatch, args: AffineArgs) -> float:
    """Returns the sum of the squares of the weight's gradient."""
    return linear.norm(_source(batch, args, False, 1.0)[0], batch.h, args)


def _check_pairs(rows: int) -> None:
    if rows % 2:
        raise ValueError(f"rows of an output layer come in pairs of shift and log-scale; found {rows}")


def _source(batch: AffineBatch, args: AffineArgs, need_x: bool, scale: float) -> tuple[SourceStruct, Tensor]:
    """Returns the source of the backward pass, and the gradient of ``x`` that it will write (empty if not needed)."""
    _check_pairs(args.bias.shape[0])
    n, features = len(batch.h), args.bias.shape[0] // 2
    grads = [grad.contiguous() for grad in batch[:3]]  # autograd hands on gradients of any strides
    for name, tensor in zip(
        ("grad_z", "grad_log_scale", "z", "log_scale", "x"),
        (*grads[::2], batch.z, batch.log_scale, batch.x),
        strict=True,
    ):
        check_tensor(name, tensor, batch.h.dtype, (n, features))
    check_tensor("grad_ladj", grads[1], batch.h.dtype, (n,))
    grad_x = batch.z.new_empty(batch.z.shape if need_x else 0)
    source = SourceStruct(
        grad_z=grads[0].data_ptr(), grad_ladj=grads[1].data_ptr(), grad_log_scale=grads[2].data_ptr(),
        x=batch.x.data_ptr(), z=batch.z.data_ptr(), log_scale=batch.log_scale.data_ptr(),
        grad_x=grad_x.data_ptr() or None, map=MapStruct.of(args.affine_map), scale=scale,
    )  # fmt: skip
    source.tensors = grads, batch  # keeps what has been copied
    return source, grad_x
