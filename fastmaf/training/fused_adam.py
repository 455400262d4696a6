"""Adam that need not store the gradients of packed weights: ``fastmaf.optim.FusedAdam``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from fastmaf.kernels import empty_on_huge_pages
from fastmaf.kernels.adam.op import adam_step_
from fastmaf.kernels.adam.update import AdamNumbers, Update
from fastmaf.training.captured import CapturedUpdates, NotCapturableError
from fastmaf.training.gradient_sinks import Applies, Gradients, Keeps, backward, single_uses
from fastmaf.training.loss_checks import check_loss, check_processes
from fastmaf.training.step_counts import StepCounts


class FusedAdam(torch.optim.Adam):
    """``torch.optim.Adam`` with ``minimize``, which forms no gradients of packed weights; the same numbers to rounding.

    ``loss.backward()`` and ``step()`` behave as with ``torch.optim.Adam``: gradients are stored in ``grad``, where
    other optimisers, hooks, ``torch.nn.utils.clip_grad_norm_``, ``GradScaler`` and ``DistributedDataParallel`` find
    them. ``minimize(loss)`` takes the place of both: it updates each layer during the backward pass, from the small
    matrices that the weight's gradient is the product of. Per step that saves writing and reading one number per
    weight, and its memory.

    The state has the names and shapes of Adam's, so that either can go on from the other's ``state_dict``.

    Args:
        params: parameters or groups, as for any torch optimiser.
        lr, betas, eps, weight_decay, amsgrad, foreach, maximize, capturable, differentiable, fused,
            decoupled_weight_decay: as for ``torch.optim.Adam``, but that ``step`` uses torch's fused kernels where they
            exist and none of ``foreach``, ``fused``, ``capturable`` and ``differentiable`` is given.

    References:
        Kingma and Ba 2015, Adam: A Method for Stochastic Optimization, algorithm 1.

    Example:
        >>> flow = fastmaf.MAF(6, 2, (16,), order="natural", seed=0)
        >>> optimizer = FusedAdam(flow.parameters(), lr=1e-3)
        >>> optimizer.minimize(-flow.log_prob(torch.zeros(4, 6)).mean())
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        self._counts = StepCounts()
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickled or copied optimiser, or a loaded ``state_dict``."""
        self._counts = StepCounts()
        super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters; see ``torch.optim.Optimizer``."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        chosen = group["fused"] is not None or group["foreach"] is not None
        if not (chosen or group["capturable"] or group["differentiable"]):
            group["fused"] = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in group["params"])

    def _init_group(self, group: dict[str, Any], params_with_grad: list[Tensor], *lists: Any) -> bool:
        """Tells autograd which parameters a step writes to: torch's fused kernels, unlike its others, do not.

        Nor do they look at strides: from the first step with strided memory on, a group does without them.
        """
        has_complex: bool = super()._init_group(group, params_with_grad, *lists)
        if not all(tensor.is_contiguous() for tensor in (*params_with_grad, *lists[0])):
            group["fused"] = False
        if group["fused"] and params_with_grad:
            torch.autograd.graph.increment_version(params_with_grad)
        return has_complex

    def minimize(self, loss: Tensor, max_grad_norm: float | None = None, *, check_finite: bool = True) -> bool:
        """Does what ``loss.backward()``, ``step()`` and ``zero_grad()`` do, in one pass over each packed weight.

        Each layer is updated during the backward pass, right after the gradient of its input has been formed from the
        same weights. With ``max_grad_norm`` the gradients are kept in factored form until their norm is known.

        Gradients are stored in ``grad`` after all, and the step is that of ``torch.optim.Adam``, for parameters that do
        not take part in ``loss`` exactly once, that have hooks, that are not contiguous, whose dtype is neither float32
        nor float64, or whose group has ``amsgrad`` or ``differentiable``; for all parameters where step hooks are
        registered. Hooks are called once.

        An error that is raised before the backward pass leaves everything as it was. One that is raised by the backward
        pass itself, such as a lack of memory, leaves the layers that it has reached updated.

        Args:
            loss: a scalar.
            max_grad_norm: the gradients of all parameters of this optimiser are scaled down to this common L2 norm;
                None leaves them. With ``math.inf`` nothing is scaled, but a norm that is not finite is noticed.
            check_finite: False where the loss is known to be finite; the check waits for a GPU.

        Returns:
            Whether the step was taken. With ``max_grad_norm`` nothing changes where the norm is not finite.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
            ValueError: ``loss`` is not a scalar that requires grad, or ``max_grad_norm`` is not positive.
            RuntimeError: gradients are waiting in ``grad``; ``loss`` was scaled by ``torch.amp.GradScaler``; several
                processes train together, whose gradients would not be averaged; or another ``minimize`` of the same
                weights is running.
        """
        groups = self._groups()
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, or None for no limit; found {max_grad_norm}")
        if any([parameter.grad is not None for parameter in groups]):
            raise RuntimeError(
                "gradients of an earlier backward pass are waiting in grad: call step(), or zero_grad() with "
                "set_to_none=True, before minimize()"
            )
        check_processes()
        check_loss(loss, finite=check_finite)
        updates = _Updates(self.state, self._counts)
        uses = {} if self.has_step_hooks() else self._factorable(loss, groups)
        try:
            if max_grad_norm is None:
                backward(loss, {p: Applies(node, updates, p, groups[p]) for p, node in uses.items()})
                if any(parameter.grad is not None for parameter in updates.begun):
                    raise RuntimeError(
                        "a weight that was updated got another gradient, from a part of the graph that autograd does "
                        "not show: use loss.backward() and step() for this loss"
                    )
            elif not self._clipped(loss, {p: Keeps(node) for p, node in uses.items()}, groups, updates, max_grad_norm):
                return False
            updates.count()
            self.step()
        finally:
            updates.count()  # also what was updated before an error
            for parameter in groups:
                parameter.grad = None
        return True

    def clip_grad_norm_(self, max_norm: float) -> float:
        """Calls ``torch.nn.utils.clip_grad_norm_`` on all parameters of the optimiser; returns the norm before.

        For gradients in ``grad``, between ``loss.backward()`` and ``step()``; ``minimize`` has ``max_grad_norm``.
        """
        return float(torch.nn.utils.clip_grad_norm_(self._groups(), max_norm))

    def has_step_hooks(self) -> bool:
        """Says whether hooks are to be called before or after a step, by this optimiser or by all."""
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
        )

    def modes(self, parameters: Iterable[Tensor]) -> tuple[bool, ...]:
        """Returns what a captured step of these parameters depends on beside numbers."""
        of_groups = (group[name] for group in self.param_groups for name in ("amsgrad", "differentiable"))
        return *of_groups, *(p.requires_grad and not _has_hooks(p) for p in parameters)

    def captured_updates(self) -> CapturedUpdates:
        """Returns an empty record for a step that is to be captured in a CUDA graph."""
        groups = self._groups()
        return CapturedUpdates(next(iter(groups)).device, len(groups), self.state)

    def capture_minimize(self, loss: Tensor, updates: CapturedUpdates) -> None:
        """Does what ``minimize`` does, for a CUDA graph: nothing is counted, and scalars are read on the device.

        Raises:
            NotCapturableError: a parameter has no state yet, or its gradient must be stored.
        """
        groups = self._groups()
        uses = self._factorable(loss, groups)
        backward(loss, {p: Applies(node, updates, p, groups[p]) for p, node in uses.items()})
        if any(parameter.grad is not None for parameter in groups):
            self.zero_grad()
            raise NotCapturableError("a parameter that is not of the flow's blocks, or that has hooks, got a gradient")

    def capture_gradients(self, loss: Tensor) -> Gradients:
        """Returns the gradients of a loss, for ``capture_step``; nothing is left in ``grad``.

        Raises:
            NotCapturableError: a parameter has hooks, which a replay would not call, or a group has ``amsgrad``.
        """
        groups = self._groups()
        sinks = {parameter: Keeps(node) for parameter, node in self._factorable(loss, groups).items()}
        backward(loss, sinks)
        gradients = Gradients.collect(sinks, groups)
        self.zero_grad()
        if any(_has_hooks(p) or groups[p]["amsgrad"] or groups[p]["differentiable"] for p in gradients.stored):
            raise NotCapturableError("a parameter has hooks, or its group amsgrad or differentiable")
        return gradients

    @torch.no_grad()
    def capture_step(self, gradients: Gradients, updates: CapturedUpdates) -> None:
        """Takes a step with gradients of ``capture_gradients``, for a CUDA graph.

        Raises:
            NotCapturableError: a parameter has no state yet, or is stored otherwise than the kernel needs it.
        """
        groups = self._groups()
        for weight, factors in gradients.factored.items():
            factors.adam_(updates.begin(weight, groups[weight]))
        for parameter, grad in gradients.stored.items():
            # torch's own step refuses to be captured: the kernel that reads its scalars on the device takes it.
            if parameter.dtype != torch.float32 or not parameter.is_contiguous():
                raise NotCapturableError("a parameter with a gradient in grad is not contiguous float32")
            adam_step_(parameter, grad, updates.begin(parameter, groups[parameter]))

    @torch.no_grad()
    def advance(self, updates: CapturedUpdates, scale: float = 1.0) -> None:
        """Counts a step of the parameters that a captured step updates, and sends its scalars to the device.

        ``scale`` multiplies all gradients.
        """
        counters = {parameter: self.state[parameter]["step"] for parameter in updates.parameters}
        known: dict[tuple[int, int], list[float]] = {}  # most parameters share a group and a step
        scalars = []
        for parameter, group in updates.parameters.items():
            key = id(group), self._counts.of(parameter, counters[parameter]) + 1
            if key not in known:
                known[key] = AdamNumbers.of(key[1], group).kernel_scalars(scale)
            scalars.append(known[key])
        self._counts.add_one(counters)
        updates.set(scalars)

    def _groups(self) -> dict[Tensor, dict[str, Any]]:
        """Returns all parameters, each with its group."""
        return {parameter: group for group in self.param_groups for parameter in group["params"]}

    def _factorable(self, loss: Tensor, groups: dict[Tensor, dict[str, Any]]) -> dict[Tensor, object]:
        """Returns the parameters whose gradients need not be stored, each with the node of the graph that uses it."""
        return {
            parameter: node
            for parameter, node in single_uses(loss).items()
            if (group := groups.get(parameter)) is not None
            and parameter.dtype in (torch.float32, torch.float64)
            and parameter.is_contiguous()
            and not (group["amsgrad"] or group["differentiable"] or _has_hooks(parameter))
        }

    def _clipped(
        self,
        loss: Tensor,
        sinks: dict[Tensor, Keeps],
        groups: dict[Tensor, dict[str, Any]],
        updates: _Updates,
        max_norm: float,
    ) -> bool:
        """Goes back through a loss, and applies or leaves in ``grad`` the clipped gradients if their norm is finite."""
        backward(loss, sinks)
        gradients = Gradients.collect(sinks, groups)
        norm = math.sqrt(float(gradients.squared_norm()))
        if not math.isfinite(norm):
            return False
        scale = clip_scale(norm, max_norm)
        with torch.no_grad():
            if scale != 1.0 and gradients.stored:
                torch._foreach_mul_(list(gradients.stored.values()), scale)
            for weight, factors in gradients.factored.items():
                factors.scaled(scale).adam_(updates.begin(weight, groups[weight]))
        return True


class _Updates:
    """Steps of Adam on single parameters, which are begun one by one and counted together."""

    def __init__(self, state: dict[Tensor, dict[str, Any]], counts: StepCounts) -> None:
        self.begun: dict[Tensor, Tensor] = {}  # with their counters
        self._state, self._counts, self._counted = state, counts, False
        self._numbers: dict[tuple[int, int], AdamNumbers] = {}  # most parameters share a group and a step

    def begin(self, parameter: Tensor, group: dict[str, Any]) -> Update:
        """Begins the one update of a parameter of this group and returns its moments and scalars."""
        state = self._state[parameter]
        if not state:
            state.update(_fresh_state(parameter, group))
        self.begun[parameter] = state["step"]
        key = id(group), self._counts.of(parameter, state["step"]) + 1
        if key not in self._numbers:
            self._numbers[key] = AdamNumbers.of(key[1], group)
        torch.autograd.graph.increment_version(parameter)  # autograd refuses graphs that still need the old values
        return Update(state["exp_avg"], state["exp_avg_sq"], self._numbers[key])

    def count(self) -> None:
        """Counts the steps that were begun; once."""
        if not self._counted:
            self._counted = True
            with torch.no_grad():
                self._counts.add_one(self.begun)


def _fresh_state(parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the state that ``torch.optim.Adam`` begins with."""
    on_device = group["fused"] or group["capturable"]
    dtype = torch.float32 if on_device or torch.get_default_dtype() != torch.float64 else torch.float64
    state = {"step": torch.zeros((), dtype=dtype, device=parameter.device if on_device else "cpu")}
    for name in ("exp_avg", "exp_avg_sq"):
        memory = empty_on_huge_pages(parameter.numel(), device=parameter.device, dtype=parameter.dtype)
        state[name] = memory.zero_().view(parameter.shape)
    return state


def _has_hooks(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def clip_scale(norm: float, max_norm: float) -> float:
    """Returns what gradients of this norm are scaled with to be within ``max_norm``: 1 if they are, or not finite."""
    return max_norm / norm if math.isfinite(norm) and norm > max_norm else 1.0
