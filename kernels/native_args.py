"""The arguments of the native library as the structs of ``csrc/api.h``, checked before a pointer is handed over."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.affine_output.affine_map import AffineMap
from fastmaf.kernels.affine_output.args import AffineArgs
from fastmaf.kernels.layout import PANEL
from fastmaf.kernels.masked_linear.args import LinearArgs
from fastmaf.kernels.native_checks import check_layout, check_tensor

_INT, _DOUBLE, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
# The library's numbers of dtypes; a weight of the last goes with activations of the first.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
NONE, WRITE, ADAM, NORM = range(4)


class MapStruct(ctypes.Structure):
    """``AffineMap`` of api.h."""

    _fields_ = [("form", _INT), ("scale", _INT), ("limit", _DOUBLE), ("epsilon", _DOUBLE)]

    @classmethod
    def of(cls, affine_map: AffineMap) -> MapStruct:
        """Returns a map, checked."""
        affine_map.check()
        return cls(int(affine_map.form), int(affine_map.scale), affine_map.limit, affine_map.epsilon)


class LayerStruct(ctypes.Structure):
    """``Layer`` of api.h."""

    _fields_ = [
        *((name, _POINTER) for name in ("weight", "bias", "prefix", "panels")),
        ("rows", _INT),
        ("columns", _INT),
    ]


class BlockStruct(ctypes.Structure):
    """``Block`` of api.h."""

    _fields_ = [
        ("first_layer", _INT),
        ("layer_count", _INT),
        ("schedule", _POINTER),
        ("steps", _INT),
        ("permutation", _POINTER),
        ("map", MapStruct),
    ]


class FlowStruct(ctypes.Structure):
    """``Flow`` of api.h."""

    _fields_ = [
        *((name, _INT) for name in ("size", "version", "dtype", "weight_dtype", "features", "relu")),
        ("layer_count", _INT),
        ("block_count", _INT),
        ("layers", ctypes.POINTER(LayerStruct)),
        ("blocks", ctypes.POINTER(BlockStruct)),
        ("permutation", _POINTER),
    ]


class TargetStruct(ctypes.Structure):
    """``Target`` of api.h."""

    _fields_ = [("mode", _INT), *((n, _POINTER) for n in ("grad", "weight", "exp_avg", "exp_avg_sq", "adam"))]


class SourceStruct(ctypes.Structure):
    """``Source`` of api.h."""

    _fields_ = [
        *((name, _POINTER) for name in ("grad_y", "relu_of", "grad_z", "grad_ladj", "grad_log_scale", "x", "z")),
        ("log_scale", _POINTER),
        ("grad_x", _POINTER),
        ("map", MapStruct),
        ("scale", _DOUBLE),
    ]


def weight_dtype(weight: Tensor, dtype: torch.dtype) -> int:
    """Returns the library's number of a weight's dtype beside activations of ``dtype``."""
    if weight.dtype != dtype and (weight.dtype, dtype) != (torch.bfloat16, torch.float32):
        raise ValueError(
            f"weights must be {dtype} like the activations, or bfloat16 beside float32; found {weight.dtype}"
        )
    return DTYPES[weight.dtype]


def layer(args: LinearArgs | AffineArgs, columns: int, dtype: torch.dtype) -> LayerStruct:
    """Returns a layer that reads ``columns`` inputs of ``dtype``.

    Raises:
        ValueError: the tensors do not fit one another: a kernel trusts them.
    """
    weight, bias, prefix, panels = args[:4]
    rows = prefix.shape[0] if prefix.dim() == 1 else 0
    check_layout(prefix, panels, columns)
    check_tensor("weight", weight, weight.dtype, (PANEL * int(panels[-1]),))
    weight_dtype(weight, dtype)
    check_tensor("bias", bias, dtype, (rows,))
    return LayerStruct(weight.data_ptr(), bias.data_ptr(), prefix.data_ptr(), panels.data_ptr(), rows, columns)


def check_moments(weight: Tensor, update: Update) -> None:
    """Raises ValueError unless the moments of a weight can be read and written like it."""
    for name in ("exp_avg", "exp_avg_sq"):
        check_tensor(name, getattr(update, name), weight.dtype, weight.shape)


def adam_target(weight: Tensor, update: Update) -> TargetStruct:
    """Returns the target of a step of Adam on a weight; the caller sets ``adam``.

    Raises:
        ValueError: a moment does not fit the weight.
    """
    check_moments(weight, update)
    return TargetStruct(ADAM, None, weight.data_ptr(), update.exp_avg.data_ptr(), update.exp_avg_sq.data_ptr(), None)
