"""Flows by the C++ kernels of ``csrc/``, one team of threads throughout; the same functions as ``torch``, and some for
flows whose plan is known (``prepared.py``).
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmaf.kernels import native_args, native_library
from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.float8 import decode
from fastmaf.kernels.flow.args import FlowArgs, FlowBatch
from fastmaf.kernels.flow.native_plan import FlowPlan, flow_plan
from fastmaf.kernels.flow.saved import TILES, numel_of, relaid
from fastmaf.kernels.flow.torch import UPDATES_BIASES, inverse_backward
from fastmaf.kernels.huge_pages import empty_on_huge_pages
from fastmaf.kernels.native_args import ADAM, WRITE
from fastmaf.kernels.native_checks import check_batch, check_tensor

__all__ = ["UPDATES_BIASES", "adam_", "backward", "backward_of_all", "density", "forward"]
__all__ += ["inverse", "inverse_backward", "why_not"]
TAKES_TERMS = True  # forward and inverse, each sample's own

native_library.load()
_library, _check = native_library.library(), native_library.check
why_not = native_library.why_not


def density(x: Tensor, plan: FlowPlan, save: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns ``Σ_d z²`` and ``ladj``, both ``[N]``, for ``x`` that fits the plan; to ``save``, also ``z`` and what
    ``backward`` needs.
    """
    squares, ladj = x.new_empty(x.shape[0]), x.new_empty(x.shape[0])
    z, saved = (torch.empty_like(x), _saved(x, plan)) if save else (None, None)
    _forward(plan, x, z, ladj, saved, squares, ())
    return squares, ladj, z, saved


def forward(
    x: Tensor, args: FlowArgs, save: bool, plan: FlowPlan | None = None, terms: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``z``, ``ladj`` and what ``backward`` needs; weights may be bfloat16 beside float32 ``x``.

    With a plan, which ``x`` must fit, the arguments are not looked at; here and in the functions below. ``terms``
    ``[N, units]``, of each layer or of none, are added to its sums; ``backward`` gives no gradients of them.
    """
    plan = plan or _plan("x", x, args)
    z, ladj = torch.empty_like(x), x.new_empty(x.shape[0])
    saved = _saved(x, plan) if save else None
    _forward(plan, x, z, ladj, saved, None, terms)
    return z, ladj, x.new_empty(0) if saved is None else saved


def _saved(x: Tensor, plan: FlowPlan) -> Tensor:
    # Memory that comes from the system anew in every step, in pages that are cleared one by one.
    return empty_on_huge_pages(numel_of(plan.saved, x.shape[0]), device=x.device, dtype=x.dtype)


def _forward(
    plan: FlowPlan,
    x: Tensor,
    z: Tensor | None,
    ladj: Tensor,
    saved: Tensor | None,
    squares: Tensor | None,
    terms: Sequence[Tensor],
) -> None:
    _check(
        _library.fastmaf_flow_forward(
            plan.pointer, _pointers(plan, x, terms), x.data_ptr(), x.shape[0], None if z is None else z.data_ptr(),
            ladj.data_ptr(), None if saved is None else saved.data_ptr(),
            None if squares is None else squares.data_ptr(), torch.get_num_threads(),
        )
    )  # fmt: skip


def _pointers(plan: FlowPlan, x: Tensor, terms: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p] | None:
    if not terms:
        return None
    for term, rows in zip(terms, plan.rows, strict=True):
        check_tensor("terms", term, x.dtype, (x.shape[0], rows))
    return (ctypes.c_void_p * len(terms))(*[term.data_ptr() for term in terms])


def inverse(
    z: Tensor, args: FlowArgs, plan: FlowPlan | None = None, terms: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dx/dz|; terms as in ``forward``."""
    plan = plan or _plan("z", z, args)
    plan.check_inverse(args)
    n = z.shape[0]
    x, ladj = torch.empty_like(z), z.new_empty(n)
    _check(
        _library.fastmaf_flow_inverse(
            plan.pointer, _pointers(plan, z, terms), z.data_ptr(), n, x.data_ptr(), ladj.data_ptr(),
            torch.get_num_threads(),
        )
    )  # fmt: skip
    return x, ladj


def backward_of_all(batch: FlowBatch, plan: FlowPlan) -> list[Tensor]:
    """Returns the gradients of the packed weights and of the biases, parts of one tensor, for a batch that fits the
    plan and is contiguous.
    """
    grads = batch.grad_z.new_empty(sum(plan.numels))
    start, size = grads.data_ptr(), grads.element_size()
    places = [start + size * end for end in itertools.accumulate(plan.numels, initial=0)]
    layers = len(plan.rows)
    targets = [number for place in places[:layers] for number in (WRITE, place, 0, 0, 0, 0)]
    _check(
        _library.fastmaf_flow_backward(
            plan.pointer, batch.grad_z.data_ptr(), batch.grad_ladj.data_ptr(), batch.saved.data_ptr(),
            batch.grad_z.shape[0], None, (ctypes.c_void_p * layers)(*places[layers:-1]),
            _structs(targets), torch.get_num_threads(),
        )
    )  # fmt: skip
    return list(grads.unsafe_split_with_sizes(plan.numels))


def backward(batch: FlowBatch, args: FlowArgs, need_grad_x: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Returns the gradients of ``x`` (``[0, D]`` when not needed), the packed weights and the biases."""
    dtype, device = batch.grad_z.dtype, batch.grad_z.device
    pairs = zip(args.weights, args.weight_scales, strict=True)
    args = args._replace(weights=[decode(weight, scale, dtype) for weight, scale in pairs])
    grads = [empty_on_huge_pages(weight.numel(), device=device, dtype=dtype) for weight in args.weights]
    targets = [number for grad in grads for number in (WRITE, grad.data_ptr(), 0, 0, 0, 0)]
    grad_x, grad_biases = _backward(batch, args, need_grad_x, _structs(targets))
    return grad_x, grads, grad_biases


def adam_(
    batch: FlowBatch,
    args: FlowArgs,
    need_grad_x: bool,
    updates: Sequence[Update],
    bias_updates: None,
    plan: FlowPlan | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Takes a step of Adam on every weight, in place; returns the gradients of ``x`` and of the biases."""
    dtype = batch.grad_z.dtype
    if wrong := [weight.dtype for weight in args.weights if weight.dtype != dtype]:
        raise ValueError(f"weights must be {dtype} like grad_z to take a step in place; found {wrong[0]}")
    addresses = [weight.data_ptr() for weight in args.weights]
    if len(set(addresses)) < len(addresses):
        names = [i for i, address in enumerate(addresses) if addresses.count(address) > 1 and args.weights[i].numel()]
        if names:
            raise ValueError(f"layers {names} share a weight, which takes one step and not several")
    numbers = {id(u.numbers): u.numbers for u in updates}  # most share theirs
    distinct = {key: (ctypes.c_double * 9)(*each.native_floats()) for key, each in numbers.items()}
    targets: list[int] = []
    for weight, update in zip(args.weights, updates, strict=True):
        native_args.check_moments(weight, update)
        moments = update.exp_avg.data_ptr(), update.exp_avg_sq.data_ptr()
        targets += ADAM, 0, weight.data_ptr(), *moments, ctypes.addressof(distinct[id(update.numbers)])
    return _backward(batch, args, need_grad_x, _structs(targets), plan)


def _plan(name: str, x: Tensor, args: FlowArgs) -> FlowPlan:
    _, features = check_batch(name, x)
    plan = flow_plan(args.decoded(x.dtype), x.dtype)
    if features != plan.features:
        raise ValueError(f"{name} must be [N, {plan.features}]; found {tuple(x.shape)}")
    return plan


def _structs(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """Returns the numbers of ``TargetStruct`` in a row, in less time than the structs are set one by one."""
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _backward(
    batch: FlowBatch,
    args: FlowArgs,
    need_grad_x: bool,
    targets: ctypes.Array[ctypes.c_int64],
    plan: FlowPlan | None = None,
) -> tuple[Tensor, list[Tensor]]:
    # Autograd hands on gradients of any strides, such as an expanded sum's.
    grad_z, grad_ladj, saved = batch.grad_z.contiguous(), batch.grad_ladj.contiguous(), batch.saved
    plan = plan or _plan("grad_z", grad_z, args)
    n = grad_z.shape[0]
    check_tensor("grad_ladj", grad_ladj, grad_z.dtype, (n,))
    check_tensor("saved", saved, grad_z.dtype, (numel_of(plan.saved, n),))
    saved = relaid(args, saved, n, TILES)
    grad_x = grad_z.new_empty(n if need_grad_x else 0, plan.features)
    grad_biases = [torch.empty_like(bias) for bias in args.biases]
    into = (ctypes.c_void_p * len(grad_biases))(*[grad.data_ptr() for grad in grad_biases])
    _check(
        _library.fastmaf_flow_backward(
            plan.pointer, grad_z.data_ptr(), grad_ladj.data_ptr(), saved.data_ptr(), n,
            grad_x.data_ptr() if need_grad_x else None, into, targets, torch.get_num_threads(),
        )
    )  # fmt: skip
    return grad_x, grad_biases
