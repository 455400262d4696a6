"""A step of Adam on all parameters of a group, by torch's fused kernel and without torch's preparations for it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext

from fastmaf.training.adam_updates import ONE

_dtype, _grad, _is_cpu, _is_sparse = map(operator.attrgetter, ("dtype", "grad", "is_cpu", "is_sparse"))
_moments = operator.itemgetter("step", "exp_avg", "exp_avg_sq")


def is_usual(group: Mapping[str, Any]) -> bool:
    """Returns whether a group has only options that the kernel takes as they are, and no step is being compiled."""
    numbers = (group["lr"], group["weight_decay"], group["eps"], *group["betas"])
    return bool(
        group["fused"]
        and not (group["amsgrad"] or group["differentiable"] or group["capturable"])
        # torch.compile calls _init_group of the optimiser itself while it traces a step; in torch 2.7,
        # is_compiling() is False there. A step taken then would be taken again by the compiled code.
        and not torch.compiler.is_compiling()
        and TracingContext.try_get() is None
        and not any(isinstance(number, Tensor) for number in numbers)
    )


@torch.no_grad()
def step_on_cpu_(group: Mapping[str, Any], state: Mapping[Tensor, Mapping[str, Tensor]]) -> bool:
    """Updates the parameters of a group that have a gradient, and their state, as ``torch.optim.Adam`` does.

    Returns:
        Whether the step was taken: not where a parameter has no state yet, and not where tensors are strided, on
        another device or of several dtypes.
    """
    # By maps and not in loops: a small flow is trained in many steps.
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    grads = list(map(_grad, parameters))
    states: list[Any] = list(map(state.get, parameters))
    if not parameters or not all(states):
        return False
    steps, exp_avgs, exp_avg_sqs = map(list, zip(*map(_moments, states), strict=True))
    tensors = (*parameters, *grads, *exp_avgs, *exp_avg_sqs)
    alike = len(set(map(_dtype, tensors))) == 1 and {torch.float32} == set(map(_dtype, steps))
    if not (alike and all(map(_is_cpu, (*tensors, *steps))) and not any(map(_is_sparse, grads))):
        return False
    if not all(map(Tensor.is_contiguous, tensors)):
        return False
    beta1, beta2 = group["betas"]
    torch.autograd.graph.increment_version(parameters)
    torch._foreach_add_(steps, [ONE] * len(steps))  # a number would be converted once for each
    update_ = torch._fused_adamw_ if group.get("decoupled_weight_decay", False) else torch._fused_adam_
    update_(
        parameters,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=group["maximize"],
    )
    return True
