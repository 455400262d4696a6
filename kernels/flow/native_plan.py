"""A flow as the native library receives it: the structs of all its layers, checked once and kept from call to call."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaf.kernels.affine_output.affine_map import AffineMap
from fastmaf.kernels.flow.args import FlowArgs
from fastmaf.kernels.native_args import DTYPES, BlockStruct, FlowStruct, LayerStruct, MapStruct, layer, weight_dtype
from fastmaf.kernels.native_checks import check_tensor, states
from fastmaf.kernels.native_library import VERSION
from fastmaf.kernels.tensor_cache import cached

_data_ptr, _numel, _dim, _is_contiguous = Tensor.data_ptr, Tensor.numel, Tensor.dim, Tensor.is_contiguous
_dtype, _shape = map(operator.attrgetter, ("dtype", "shape"))


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
        lengths = {len(part) for part in args[:4]}
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
    if not permutation.numel():
        return None
    check_tensor("permutation", permutation, torch.int64, (features,))
    return permutation.data_ptr()


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


def _key(args: FlowArgs) -> tuple[Any, ...]:
    """Returns what the pointers of a plan depend on, by maps and not in a loop: a small flow is called often."""
    parameters = [*args.weights, *args.biases]
    constants = [*args.prefixes, *args.panels, *args.schedules, *args.permutations]
    return (
        list(map(_data_ptr, parameters)), list(map(_numel, parameters)), list(map(_dtype, parameters)),
        sum(map(_dim, parameters)), all(map(_is_contiguous, parameters)), list(map(id, constants)),
        *states(constants), list(map(_shape, args.schedules)), args.activation, args.maps,
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
