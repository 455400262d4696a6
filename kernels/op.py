"""How an op is called: as an operator of torch where a graph is recorded, else straight on its backend.

A call of a ``torch.library`` custom op costs some 60 µs of Python, more than a small flow takes. Eager calls therefore
go to the backend by a plain ``torch.autograd.Function``, or by a function call where no gradient is recorded. The
custom op, of the same functions, is what ``torch.compile``, ``torch.export``, traces, fake tensors and dispatch modes
see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Op:
    """An op, with a derivative in reverse mode if it has an autograd formula.

    Args:
        name, schema: of the custom op, ``fastmaf::name``.
        run: its kernel, a function of Python.
        fake: the same for tensors without numbers.
        setup_context, backward: its autograd formula, as ``torch.library.register_autograd`` takes them. The formula
            returns the gradients of the differentiable arguments, which come first, and None for the others.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        run: Callable[..., Any],
        fake: Callable[..., Any],
        setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
        backward: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        self.run, self.setup_context, self.backward = run, setup_context, backward
        self._graph = torch.library.custom_op(f"fastmaf::{name}", run, mutates_args=(), schema=schema)
        self._graph.register_fake(fake)
        if backward is not None:
            self._graph.register_autograd(backward, setup_context=setup_context)

    def __call__(self, *inputs: Any, tensors: Sequence[Tensor] = ()) -> Any:
        """Calls the op; ``tensors`` are the differentiable ones among its inputs, flat, in their order."""
        if is_recorded(inputs[0]):
            return self._graph(*inputs)
        if records_gradients(tensors):
            return _Eager.apply(self, inputs, *tensors)
        return self.run(*inputs)


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
        assert op.setup_context is not None
        op.setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        result: list[Any] = [None, None]
        for grad in ctx.op.backward(ctx, *grads):
            result += grad if isinstance(grad, (list, tuple)) else [grad]
        return tuple(result[: len(ctx.needs_input_grad)])
