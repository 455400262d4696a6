"""The arguments of the native library as the structs of ``csrc/api.h``, checked before a pointer is handed over."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.affine_output.affine_map import AffineMap
from fastmaf.kernels.affine_output.args import AffineArgs
from fastmaf.kernels.flow.args import FlowArgs
from fastmaf.kernels.layout import PANEL
from fastmaf.kernels.masked_linear.args import LinearArgs
from fastmaf.kernels.native_library import VERSION
from fastmaf.kernels.tensor_cache import cached

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


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Raises ValueError unless a tensor can be read through its pointer."""
    if not tensor.is_cpu:
        raise ValueError(f"{name} must be on the CPU for the native kernels; found {tensor.device}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}; found {tensor.dtype}")
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}; found {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; found strides {tensor.stride()}")


def check_batch(name: str, tensor: Tensor) -> tuple[int, int]:
    """Returns the shape of a tensor ``[N, units]`` of activations, checked."""
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be [N, units]; found shape {tuple(tensor.shape)}")
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64; found {tensor.dtype}")
    check_tensor(name, tensor, tensor.dtype, tensor.shape)
    return tensor.shape[0], tensor.shape[1]


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


def check_layout(prefix: Tensor, panels: Tensor, columns: int) -> None:
    """Raises ValueError unless ``prefix`` and ``panels`` are the layout of a layer with so many columns."""
    key = columns, *_states([prefix, panels])
    known: list[Any] = cached(panels, "layout", lambda: [None], also=[prefix])
    if known[0] == key:
        return
    rows = prefix.numel()
    check_tensor("prefix", prefix, torch.int64, (rows,))
    check_tensor("panels", panels, torch.int64, (-(-rows // PANEL) + 1,))
    last = prefix[PANEL - 1 :: PANEL]
    last = torch.cat((last, prefix[-1:])) if rows % PANEL else last
    sound = rows > 0 and int(panels[0]) == 0 and int(prefix[0]) >= 0 and int(prefix[-1]) <= columns
    sound = sound and not bool((prefix.diff() < 0).any()) and not bool((panels.diff() < last).any())
    if not sound or bool((panels.diff() > columns).any()):
        raise ValueError(
            f"prefix and panels must be the layout of a layer of {rows} rows and {columns} columns, as PackedLayout "
            "makes them; found others: they belong to another weight"
        )
    known[0] = key


def _pointer(tensor: Tensor) -> int | None:
    return tensor.data_ptr() if tensor.numel() else None


class FlowPlan:
    """A flow as the library receives it, kept from call to call while its tensors stay where they are.

    Attributes:
        struct: the flow; valid while the tensors of ``args`` live.
        rows, columns: of each layer.
        saved: numbers that a forward pass saves for each sample.
        numels: of the weights, then of the biases.
        inverse: whether the schedules have been checked.
    """

    def __init__(self, args: FlowArgs, dtype: torch.dtype) -> None:
        self._layers = (LayerStruct * len(args.weights))()
        self._blocks = (BlockStruct * len(args.schedules))()
        self._key = _key(args)
        # Their memory stays, should they be given other: the pointers are then those of what they were.
        self._constants = [t.detach() for part in args[2:6] for t in part]
        self.dtype = dtype
        self.inverse = False
        self.rows: list[int] = []
        for schedule in args.schedules:
            check_tensor("schedule", schedule, torch.int32, schedule.shape)
            if schedule.dim() != 2 or schedule.shape[1] < 2:
                raise ValueError(
                    f"a schedule must be [steps, 1 + hidden layers], with at least one hidden layer; found "
                    f"{tuple(schedule.shape)}"
                )
        layers = args.layers_of_blocks()
        lengths = {len(part) for part in (*args[:4], args.weight_scales)}
        counts = len(args.permutations) - 1, len(args.maps) / len(AffineMap._fields)
        if not layers or lengths != {layers[-1].stop} or set(counts) != {len(layers)}:
            raise ValueError(
                "a flow needs a schedule, a map and a permutation per block, one permutation more, and as many "
                f"weights, biases, prefixes and panels as its schedules have columns; found {len(layers)} schedules, "
                f"{len(args.maps)} numbers of maps, {len(args.permutations)} permutations, and "
                f"{', '.join(str(len(part)) for part in args[:4])} of the others"
            )
        features = args.biases[-1].numel() // 2
        for b, of_block in enumerate(layers):
            columns, schedule, permutation = features, args.schedules[b], args.permutations[b]
            for i in of_block:
                self._layers[i] = layer(args.hidden(i), columns, dtype)
                columns = self._layers[i].rows
                self.rows.append(columns)
            if columns != 2 * features:
                raise ValueError(f"the last layer of block {b} must have {2 * features} rows; found {columns}")
            self._blocks[b] = BlockStruct(
                of_block.start, len(of_block), schedule.data_ptr(), len(schedule), _order(permutation, features),
                MapStruct.of(args.map(b)),
            )  # fmt: skip
        weight = {weight_dtype(weight, dtype) for weight in args.weights}
        if len(weight) != 1:
            raise ValueError(f"the weights of a flow must be of one dtype; found {[w.dtype for w in args.weights]}")
        self.features = features
        self.struct = FlowStruct(
            ctypes.sizeof(FlowStruct), VERSION, DTYPES[dtype], weight.pop(), features, args.activation == "relu",
            len(self._layers), len(self._blocks), self._layers, self._blocks, _order(args.permutations[-1], features),
        )  # fmt: skip
        self.pointer = ctypes.addressof(self.struct)
        self.numels = [parameter.numel() for parameter in args.parameters]
        saves_x = [b == 0 or self._blocks[b].permutation is not None for b in range(len(layers))]
        hidden = sum(self.rows) - 2 * features * len(layers)
        self.saved = hidden + features * (2 * len(layers) + sum(saves_x))
        self._targets: dict[Any, Any] = {}

    def fits(self, args: FlowArgs, dtype: torch.dtype) -> bool:
        """Returns whether the plan is one of these arguments."""
        return self.dtype == dtype and self._key == _key(args)

    def check_inverse(self, args: FlowArgs) -> None:
        """Raises ValueError unless each step of an inverse can be computed from what the steps before it finished."""
        if self.inverse:
            return
        for b, (schedule, layers) in enumerate(zip(args.schedules, args.layers_of_blocks(), strict=True)):
            _check_schedule(schedule, [args.prefixes[i] for i in layers], self.features, b)
        self.inverse = True


def _order(permutation: Tensor, features: int) -> int | None:
    if permutation.numel():
        check_tensor("permutation", permutation, torch.int64, (features,))
    return _pointer(permutation)


def _check_schedule(schedule: Tensor, prefixes: Sequence[Tensor], features: int, block: int) -> None:
    after = schedule.long()
    before = torch.cat((torch.zeros_like(after[:1]), after[:-1]))
    limits = torch.tensor([features, *(len(prefix) for prefix in prefixes[:-1])], device="cpu")
    if not len(after) or bool((after < before).any()) or bool((after > limits).any()) or int(after[-1, 0]) != features:
        raise ValueError(
            f"the schedule of block {block} must not decrease, and must end at dimension {features}; found "
            f"{schedule.tolist()[:3]} ..."
        )
    for k, prefix in enumerate(prefixes):
        output = k == len(prefixes) - 1
        rows = 2 * after[:, 0] if output else after[:, k + 1]
        known = before[:, -1] if output else after[:, k]
        needs = torch.where(rows > 0, prefix[(rows - 1).clamp_(min=0)], 0)
        if bool((needs > known).any()):
            raise ValueError(
                f"the schedule of block {block} finishes rows of layer {k} before what they read: it belongs to other "
                "degrees"
            )


_data_ptr, _numel, _dim, _is_contiguous = Tensor.data_ptr, Tensor.numel, Tensor.dim, Tensor.is_contiguous
_version, _dtype, _shape = map(operator.attrgetter, ("_version", "dtype", "shape"))


def _states(constants: Sequence[Tensor]) -> tuple[Any, ...]:
    """Returns what shows a change of tensors that are the same objects as before; equal to nothing where none can."""
    try:
        versions = list(map(_version, constants))
    except RuntimeError:  # inference tensors have none
        versions = [object()]
    memory = list(map(_data_ptr, constants)), list(map(_numel, constants)), list(map(_dtype, constants))
    return versions, *memory, all(map(_is_contiguous, constants))


def _key(args: FlowArgs) -> tuple[Any, ...]:
    """Returns what the pointers of a plan depend on, by maps and not in a loop: a small flow is called often."""
    parameters = [*args.weights, *args.biases]
    constants = [*args.prefixes, *args.panels, *args.schedules, *args.permutations]
    return (
        list(map(_data_ptr, parameters)), list(map(_numel, parameters)), list(map(_dtype, parameters)),
        sum(map(_dim, parameters)), all(map(_is_contiguous, parameters)), list(map(id, constants)),
        *_states(constants), list(map(_shape, args.schedules)), args.activation, args.maps,
    )  # fmt: skip


def flow_plan(args: FlowArgs, dtype: torch.dtype) -> FlowPlan:
    """Returns the plan of a flow, the former one where nothing has changed.

    Raises:
        ValueError: the arguments do not fit one another.
    """
    if not args.panels:
        raise ValueError("a flow needs at least one layer; found none")
    # The constants are compared by identity: the plan keeps them, so that none can be another one's successor.
    known: list[Any] = cached(args.panels[0], ("native", len(args.panels)), lambda: [None, None])
    plan: FlowPlan | None = known[0]  # read once: other threads may put the plan of another flow there
    if plan is None or not plan.fits(args, dtype):
        plan = FlowPlan(args, dtype)
        known[:] = plan, [*args.prefixes, *args.panels[1:], *args.schedules, *args.permutations]
    return plan


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
