"""Masked linear layer by the C++ kernels of ``csrc/`` (forward.h, backward.h); the same functions as ``torch.py``.

Up to some ten samples a pass is bound by streaming the weight once; from about 32 on by multiply-adds.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastmaf.kernels import native_args, native_library
from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.affine_output.args import AffineArgs
from fastmaf.kernels.huge_pages import empty_on_huge_pages
from fastmaf.kernels.masked_linear.args import LinearArgs, LinearBatch
from fastmaf.kernels.native_args import NONE, NORM, WRITE, SourceStruct, TargetStruct
from fastmaf.kernels.native_checks import check_batch, check_tensor

native_library.load()
why_not = native_library.why_not


def forward(x: Tensor, args: LinearArgs) -> Tensor:
    """Returns ``y`` ``[N, out]``; the weight may be bfloat16 beside float32 ``x``."""
    n, columns = check_batch("x", x)
    layer = native_args.layer(args, columns, x.dtype)
    y = x.new_empty(n, layer.rows)
    native_library.check(
        native_library.library().fastmaf_linear(
            native_args.weight_dtype(args.weight, x.dtype), ctypes.addressof(layer), x.data_ptr(), n,
            args.activation == "relu", y.data_ptr(), torch.get_num_threads(),
        )
    )  # fmt: skip
    return y


def backward(batch: LinearBatch, args: LinearArgs, need_inputs: bool, need_weight: bool) -> tuple[Tensor, ...]:
    """Returns the gradients of ``x``, the packed weight and the bias; the first two empty when not needed."""
    source = _source(batch, args, 1.0)
    grad_weight = empty_on_huge_pages(
        args.weight.numel() if need_weight else 0, device=batch.x.device, dtype=batch.x.dtype
    )
    target = TargetStruct(WRITE if need_weight else NONE, grad_weight.data_ptr())
    grad_x, grad_bias = run(source, batch.x, args, need_inputs, target)
    return grad_x, grad_weight, grad_bias


def adam_(batch: LinearBatch, args: LinearArgs, need_inputs: bool, update: Update) -> tuple[Tensor, ...]:
    """Takes a step of Adam on the weight, in place; returns the gradients of ``x`` and the bias."""
    return step(_source(batch, args, update.scale), batch.x, args, need_inputs, update)


def squared_norm(batch: LinearBatch, args: LinearArgs) -> float:
    """Returns the sum of the squares of the weight's gradient."""
    return norm(_source(batch, args, 1.0), batch.x, args)


def _source(batch: LinearBatch, args: LinearArgs, scale: float) -> SourceStruct:
    shape = len(batch.x), args.bias.shape[0]
    grad_y, y = batch.grad_y.contiguous(), batch.y  # autograd hands on gradients of any strides
    check_tensor("grad_y", grad_y, batch.x.dtype, shape)
    source = SourceStruct(grad_y=grad_y.data_ptr(), scale=scale)
    if args.activation == "relu":
        check_tensor("y", y, batch.x.dtype, shape)
        source.relu_of = y.data_ptr()
    source.tensors = grad_y, y  # keeps what has been copied
    return source


def run(
    source: SourceStruct, x: Tensor, args: LinearArgs | AffineArgs, need_inputs: bool, target: TargetStruct
) -> tuple[Tensor, Tensor]:
    """Runs a layer's backward pass; returns the gradients of ``x`` (empty when not needed) and of the bias."""
    n, columns = check_batch("h" if isinstance(args, AffineArgs) else "x", x)
    weight = args.weight.to(x.dtype)
    layer = native_args.layer(args._replace(weight=weight), columns, x.dtype)
    grad_x = x.new_empty(x.shape if need_inputs else 0)
    # A scale is for the weight alone: the others' gradients are not formed then.
    grad_bias = x.new_empty(layer.rows if source.scale == 1 else 0)
    if source.scale != 1 and need_inputs:
        raise ValueError(f"a scale is for steps that need no gradients of inputs; found {source.scale}")
    native_library.check(
        native_library.library().fastmaf_layer_backward(
            native_args.DTYPES[x.dtype], ctypes.addressof(layer), ctypes.addressof(source), x.data_ptr(), n,
            grad_x.data_ptr() or None, grad_bias.data_ptr() or None, ctypes.addressof(target), torch.get_num_threads(),
        )
    )  # fmt: skip
    return grad_x, grad_bias


def step(
    source: SourceStruct, x: Tensor, args: LinearArgs | AffineArgs, need_inputs: bool, update: Update
) -> tuple[Tensor, Tensor]:
    """Takes a step of Adam on the weight, in place; returns as ``run`` does."""
    check_tensor("weight", args.weight, x.dtype, args.weight.shape)
    target = native_args.adam_target(args.weight, update)
    numbers = (ctypes.c_double * 9)(*update.numbers.native_floats())
    target.adam = ctypes.addressof(numbers)
    return run(source, x, args, need_inputs, target)


def norm(source: SourceStruct, x: Tensor, args: LinearArgs | AffineArgs) -> float:
    """Returns the sum of the squares of the weight's gradient."""
    total = ctypes.c_double(0)
    run(source, x, args, False, TargetStruct(NORM, ctypes.addressof(total)))
    return total.value
