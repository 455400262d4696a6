"""How an op is called: as an operator of torch where a graph is recorded, else straight on its backend.

A call of a ``torch.library`` custom op costs some 60 µs of Python, more than a small flow takes. Eager calls therefore
go to the backend by a plain ``torch.autograd.Function``, or by a function call where no gradient is recorded. The
custom op, of the same functions, is what ``torch.compile``, ``torch.export``, traces, fake tensors and dispatch modes
see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Op(NamedTuple):
    """An op with a derivative in reverse mode.

    Attributes:
        graph: the custom op.
        run: its kernel, a function of Python.
        setup_context, backward: its autograd formula, as ``torch.library.register_autograd`` takes them. The formula
            returns the gradients of the differentiable arguments, which come first, and None for the others.
    """

    graph: Any
    run: Callable[..., Any]
    setup_context: Callable[[Any, tuple[Any, ...], Any], None]
    backward: Callable[..., tuple[Any, ...]]


def define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers a custom op ``fastmaf::name`` without a derivative."""
    op = torch.library.custom_op(f"fastmaf::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    return op


def differentiable(
    graph: Any,
    run: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Any, ...]],
) -> Op:
    """Registers the autograd formula of a custom op and returns it as an op for ``call``."""
    graph.register_autograd(backward, setup_context=setup_context)
    return Op(graph, run, setup_context, backward)


def call(op: Op, inputs: tuple[Any, ...], tensors: Sequence[Tensor]) -> Any:
    """Calls an op.

    Args:
        op: the op.
        inputs: its arguments.
        tensors: the differentiable ones among them, flat, in their order.
    """
    if is_recorded(inputs[0]):
        return op.graph(*inputs)
    if records_gradients(tensors):
        return _Eager.apply(op, inputs, *tensors)
    return op.run(*inputs)


def records_gradients(tensors: Sequence[Tensor]) -> bool:
    """Returns whether autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])


def is_recorded(x: Tensor) -> bool:
    """Returns whether a graph of ops is being recorded, or ``x`` has no numbers."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or x.is_meta
        or torch._C._get_tracing_state() is not None
    )


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Op, inputs: tuple[Any, ...], *tensors: Tensor) -> Any:
        ctx.op = op
        output = op.run(*inputs)
        op.setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        result: list[Any] = [None, None]
        for grad in ctx.op.backward(ctx, *grads)[: ctx.differentiable]:
            result += grad if isinstance(grad, (list, tuple)) else [grad]
        return tuple(result)
