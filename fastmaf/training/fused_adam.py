"""Adam that does not store the gradients of packed weights: ``fastmaf.optim.FusedAdam``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from fastmaf.kernels.factored_grad import GradientSink
from fastmaf.kernels.layout import PackedLayout
from fastmaf.training.adam_updates import BeginUpdate, EagerUpdates, StepCounts, check_moments
from fastmaf.training.cpu_step import is_usual, step_on_cpu_
from fastmaf.training.exchange import Exchange
from fastmaf.training.gradient_sink import Gradients, backward, has_hooks, single_uses
from fastmaf.training.guards import NonFiniteLossError, check_loss, check_processes, clip_scale
from fastmaf.training.sharded_state import ShardedState

Groups: TypeAlias = dict[Tensor, dict[str, Any]]


class FusedAdam(torch.optim.Adam):
    """``torch.optim.Adam`` whose ``minimize`` updates packed weights without storing their gradients.

    With g_t the gradient (plus ``weight_decay`` times the parameter, unless ``decoupled_weight_decay``):

        m_t = beta1 m_{t-1} + (1 - beta1) g_t,    v_t = beta2 v_{t-1} + (1 - beta2) g_t²
        p_t = p_{t-1} - lr m̂_t / (sqrt(v̂_t) + eps),    m̂_t = m_t / (1 - beta1^t),    v̂_t = v_t / (1 - beta2^t)

    ``loss.backward()`` and ``step()`` behave as with ``torch.optim.Adam``: gradients are stored in ``grad``, where
    hooks, ``torch.nn.utils.clip_grad_norm_``, ``GradScaler`` and ``DistributedDataParallel`` find them.
    ``minimize(loss)`` replaces both and gives the same numbers to rounding: it updates each layer during the backward
    pass, from the factors of the weight's gradient (an outer product over the batch). This saves the memory of one
    number per weight, and writing and reading it.

    The state has the names and shapes of that of ``torch.optim.Adam``; either optimiser can load the other's
    ``state_dict``. Moments of packed weights lie where the weights do: those that a version of fastmaf with another
    packing saved are of no use, and ``load_state_dict`` refuses them where their size tells. A ``torch.optim.Adam``
    fails at its next step instead.

    Several processes train one model with ``process_group``: parameters are set to those of its first process, and
    ``minimize`` applies the mean of the processes' gradients. Of a packed weight they exchange the factors of the
    gradient where these are fewer bytes than the gradient, during the backward pass. Every process must call
    ``minimize`` equally often, with losses of the same form; batches may differ in size, and an empty one has
    gradients of zero. ``step`` exchanges nothing: for it, there is ``DistributedDataParallel``. Nor are buffers
    exchanged: build random orders and degrees with one ``seed`` in all processes, which ``TrainingStep`` checks. A
    ``BatchNorm`` normalises the batch of each process; its running statistics are those of the process, or with
    ``TrainingStep`` their means.

    Args:
        params: parameters or groups, as for any torch optimiser.
        process_group: of ``torch.distributed``, such as ``torch.distributed.group.WORLD``; None for a single process.
        **options: as for ``torch.optim.Adam``: ``lr``, ``betas``, ``eps``, ``weight_decay`` and so on. ``step`` uses
            torch's fused kernels where they exist, unless ``foreach``, ``fused``, ``capturable`` or ``differentiable``
            is set.

    Raises:
        ValueError: an argument is out of range.

    References:
        Kingma and Ba 2015, Adam: A Method for Stochastic Optimization, algorithm 1. Xie et al. 2015, Distributed
        Machine Learning via Sufficient Factor Broadcasting.

    Example:
        >>> flow = fastmaf.MAF(6, 2, (16,), order="natural", seed=0)
        >>> optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-3)
        >>> optimizer.minimize(-flow.log_prob(torch.zeros(4, 6)).mean())
        True
    """

    exchange: Exchange | None = None  # with the other processes
    _sharded: ShardedState | None = None  # which part of the state this process holds

    def __init__(self, params: Any, *args: Any, process_group: Any = None, **options: Any) -> None:
        super().__init__(params, *args, **options)
        if process_group is not None and torch.distributed.get_world_size(process_group) > 1:
            self.exchange = Exchange(process_group, self._groups())

    @cached_property
    def _counts(self) -> StepCounts:
        return StepCounts()

    def shard(self, layouts: Mapping[Tensor, PackedLayout]) -> None:
        """Splits the moments among the processes; ``TrainingStep(shard_optimizer=True)`` calls it.

        Each then holds those of a range of the weights, updates these, and sends them to the others. ``state_dict`` and
        ``whole_state`` gather the whole state, for which all processes must call them; ``load_state_dict`` takes the
        whole of it, of any number of processes. With a single process nothing is split.

        Args:
            layouts: of the packed weights, which are split between panels.

        Raises:
            ValueError: a group has ``amsgrad`` or ``differentiable``, or a parameter is not contiguous.
            RuntimeError: a step was taken, or a state loaded, before.
        """
        if self.exchange is None or self._sharded is not None:
            return
        if any(group["amsgrad"] or group["differentiable"] for group in self.param_groups):
            raise ValueError("the state of an optimizer with amsgrad or differentiable cannot be split")
        if self.state:
            raise RuntimeError("the state of an optimizer is split before its first step: found one that has a state")
        self._sharded = ShardedState(self.exchange, self._groups(), layouts)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters; see ``torch.optim.Optimizer``."""
        if self._sharded is not None:
            raise RuntimeError("the state is split among processes: give the optimizer all parameters at first")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        chosen = group["fused"] is not None or group["foreach"] is not None
        if not (chosen or group["capturable"] or group["differentiable"]):
            group["fused"] = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in group["params"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of this optimiser or of a ``torch.optim.Adam``.

        Raises:
            ValueError: the state is of other parameters: their number or the shapes of moments differ.
        """
        parameters = list(self._groups())
        check_moments(state_dict, parameters)
        if self._sharded is not None:
            state_dict = self._sharded.own_state(state_dict, parameters)
        super().load_state_dict(state_dict)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state; where it is split among processes the whole of it, for which all of them must call it."""
        found = super().state_dict()
        if self._sharded is not None:
            numbers = {parameter: i for i, parameter in enumerate(self._groups())}
            found["state"] = {numbers[parameter]: state for parameter, state in self.whole_state().items()}
        return found

    def whole_state(self, keep: bool = True) -> Mapping[Tensor, Mapping[str, Any]]:
        """Returns the state by parameter, gathered where it is split; without its moments then unless ``keep``."""
        return self.state if self._sharded is None else self._sharded.whole(self.state, keep)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Removes all gradients, or sets them to zero; see ``torch.optim.Optimizer``."""
        if not set_to_none:
            return super().zero_grad(set_to_none)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _init_group(self, group: dict[str, Any], params_with_grad: list[Tensor], *lists: Any) -> bool:
        """Marks the parameters of a fused step as modified: unlike torch's other kernels, the fused ones do not.

        The fused kernels ignore strides as well, so a group with strided memory stops using them. On the CPU the step
        of a group is taken here where all is as usual, and nothing is left for torch: its own preparations take longer
        than the arithmetic of small parameters.
        """
        if self._sharded is not None and any(parameter.grad is not None for parameter in group["params"]):
            raise RuntimeError("step() of an optimizer whose state is split among processes: use minimize()")
        scaled = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
        if not scaled and is_usual(group) and step_on_cpu_(group, self.state):
            return False
        has_complex: bool = super()._init_group(group, params_with_grad, *lists)
        if not all(tensor.is_contiguous() for tensor in (*params_with_grad, *lists[0])):
            group["fused"] = False
        if group["fused"] and params_with_grad:
            torch.autograd.graph.increment_version(params_with_grad)
        return has_complex

    def minimize(self, loss: Tensor, max_grad_norm: float | None = None, *, check_finite: bool = True) -> bool:
        """Computes gradients and updates all parameters: ``loss.backward()``, ``step()`` and ``zero_grad()`` in one.

        Each layer is updated during the backward pass, directly after its weights were used for the gradient of its
        input. With ``max_grad_norm`` the gradients are kept in factored form until their norm is known.

        Gradients are stored in ``grad`` after all, and the step is that of ``torch.optim.Adam``, for parameters that
        ``loss`` does not use exactly once, that have hooks, that are not contiguous, whose dtype is neither float32
        nor float64, or whose group has ``amsgrad`` or ``differentiable``; and for all parameters if the optimiser has
        step hooks. Hooks are called once.

        An error before the backward pass changes nothing. After an error during the backward pass, such as running out
        of memory, the layers that it has passed are updated and the others are not.

        Args:
            loss: scalar.
            max_grad_norm: the gradients of all parameters of this optimiser are scaled down to this common L2 norm;
                None for no limit. With ``math.inf`` nothing is scaled, but the norm is checked.
            check_finite: whether to check that the loss is finite, which waits for a GPU.

        Returns:
            Whether the step was taken. With ``max_grad_norm``, nothing changes where the norm is not finite.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
            ValueError: ``loss`` is not a scalar that requires grad, or ``max_grad_norm`` is not positive.
            RuntimeError: parameters have a ``grad`` already; ``loss`` was scaled by ``torch.amp.GradScaler``; several
                processes train together, over which gradients would have to be averaged; or another ``minimize`` of
                the same weights is running.
        """
        groups = self._groups()
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, or None for no limit; found {max_grad_norm}")
        if any([parameter.grad is not None for parameter in groups]):
            raise RuntimeError(
                "gradients of an earlier backward pass are waiting in grad: call step(), or zero_grad() with "
                "set_to_none=True, before minimize()"
            )
        if self.exchange is None:
            check_processes()
        check_loss(loss, finite=check_finite and self.exchange is None)
        if check_finite and self.exchange is not None:
            self._check_finite_in_all(loss, self.exchange)
        part = None if self._sharded is None else self._sharded.numel
        updates = EagerUpdates(self.state, self._counts, part)
        try:
            if max_grad_norm is None and self.exchange is None:
                self._update_in_backward(loss, updates.begin, groups)
                if any(parameter.grad is not None for parameter in updates.counters):
                    raise RuntimeError(
                        "a weight that was updated got another gradient, from a part of the graph that autograd does "
                        "not show: use loss.backward() and step() for this loss"
                    )
            elif not self._update_at_once(loss, updates.begin, max_grad_norm, groups):
                return False
            self.step()
        finally:
            updates.count()  # also what was updated before an error
            for parameter in groups:
                parameter.grad = None
        return True

    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scales all gradients in ``grad`` down to a common L2 norm, as ``torch.nn.utils.clip_grad_norm_``.

        For use between ``loss.backward()`` and ``step()``; ``minimize`` has ``max_grad_norm``.

        Returns:
            The norm before.
        """
        return float(torch.nn.utils.clip_grad_norm_(self._groups(), max_norm))

    def has_step_hooks(self) -> bool:
        """Returns whether hooks are registered that run before or after a step, for this optimiser or for all."""
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
        )

    def _groups(self) -> Groups:
        """Returns all parameters, each with its group."""
        return {parameter: group for group in self.param_groups for parameter in group["params"]}

    def _factorable(self, loss: Tensor, groups: Groups) -> list[tuple[Tensor, object]]:
        """Returns the parameters whose gradients need not be stored, each with the node of the graph that uses it."""
        if self.has_step_hooks():
            return []
        return [
            (parameter, node)
            for parameter, node in single_uses(loss)
            if (group := groups.get(parameter)) is not None
            and parameter.dtype in (torch.float32, torch.float64)
            and parameter.is_contiguous()
            and not (group["amsgrad"] or group["differentiable"] or has_hooks(parameter))
        ]

    def _update_in_backward(self, loss: Tensor, begin: BeginUpdate, groups: Groups) -> None:
        """Runs the backward pass, which updates factorable parameters; the other gradients are left in ``grad``."""
        uses = self._factorable(loss, groups)
        backward(loss, [(p, GradientSink(node, partial(begin, p, groups[p]))) for p, node in uses])

    def _gradients(self, loss: Tensor, groups: Groups) -> Gradients:
        """Runs the backward pass; returns the gradients of all parameters."""
        if self.exchange is not None:
            return self.exchange.gradients(loss, self._factorable(loss, groups), groups)
        sinks = [(parameter, GradientSink(node)) for parameter, node in self._factorable(loss, groups)]
        backward(loss, sinks)
        return Gradients.collect(sinks, groups)

    def _apply_factored(self, gradients: Gradients, begin: BeginUpdate, groups: Groups, scale: float = 1.0) -> None:
        """Updates the parameters whose gradients are factored, with ``scale`` times the gradient."""
        for weight, factors in gradients.factored.items():
            factors.scaled(scale).adam_(begin(weight, groups[weight]))

    @torch.no_grad()
    def _update_at_once(self, loss: Tensor, begin: BeginUpdate, max_norm: float | None, groups: Groups) -> bool:
        """Applies the gradients, clipped, or leaves them in ``grad`` for ``step``; False if the norm is not finite."""
        gradients, scale = self._gradients(loss, groups), 1.0
        if max_norm is not None:
            norm = math.sqrt(float(gradients.squared_norm()))
            if not math.isfinite(norm):
                return False
            scale = clip_scale(norm, max_norm)
        if scale != 1.0 and gradients.stored:
            torch._foreach_mul_(list(gradients.stored.values()), scale)
        if self._sharded is None:
            self._apply_factored(gradients, begin, groups, scale)
            return True
        self._sharded.step_(gradients, lambda parameter: begin(parameter, groups[parameter]), scale)
        for parameter in gradients.stored:
            parameter.grad = None  # applied
        return True

    def _check_finite_in_all(self, loss: Tensor, exchange: Exchange) -> None:
        """Raises NonFiniteLossError in every process if the loss of one is not finite."""
        if (wrong := int(exchange.total(not math.isfinite(float(loss)))[0])) > 0:
            raise NonFiniteLossError(
                f"the losses of {wrong} of {exchange.size} processes are not finite: nothing was updated"
            )
