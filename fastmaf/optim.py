"""Adam that never stores the gradient of a packed weight: ``fastmaf.optim.FusedAdam``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastmaf.captured import CapturedUpdates, NotCapturableError
from fastmaf.kernels import empty_on_huge_pages
from fastmaf.kernels.adam import adam_step_
from fastmaf.kernels.factors import AdamNumbers, Factors, Update, give_to, joined

_TWICE = "minimize() met a weight that takes part in the loss twice: use loss.backward() and step() instead"


class _Taker:
    """Takes the gradient of one weight: keeps its factors until the step, or applies them at once."""

    def __init__(self) -> None:
        self.kept: list[Factors] = []
        self.begin: Callable[[], Update] | None = None

    @property
    def updates_at_once(self) -> bool:
        return self.begin is not None

    def begin_update(self) -> Update:
        assert self.begin is not None
        return self.begin()

    def take(self, factors: Factors, need_inputs: bool) -> tuple[Tensor, ...]:
        if self.begin is not None:
            return factors.adam_(self.begin(), need_inputs=need_inputs)
        self.kept.append(factors)
        return factors.grad_inputs(need_inputs)


class FusedAdam(torch.optim.Adam):
    """``torch.optim.Adam`` for the packed weights of fastmaf's layers, with the same numbers to rounding.

    A backward pass leaves no gradient in ``weight.grad``: the optimiser keeps the small matrices that it is the product
    of, and ``step`` forms it tile by tile and updates weight and moments there and then. Per step that saves writing
    and reading one number per weight, and its memory. ``minimize`` saves reading the weights once more.

    Everything else (biases, other modules' parameters, a gradient that arrives in ``grad`` all the same) is updated as
    ``torch.optim.Adam`` does. The state has its names and shapes, so that either can go on from the other's
    ``state_dict``. Gradients add up over several backward passes, as usual.

    Args:
        params: parameters or groups, as for any torch optimiser.
        lr, betas, eps, weight_decay, maximize, decoupled_weight_decay: as for ``torch.optim.Adam``;
            ``decoupled_weight_decay`` makes it AdamW.

    References:
        Kingma and Ba 2015, Adam: A Method for Stochastic Optimization, algorithm 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
    ) -> None:
        self._takers: dict[Tensor, _Taker] = {}
        self._capturing: CapturedUpdates | None = None
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            maximize=maximize,
            decoupled_weight_decay=decoupled_weight_decay,
            foreach=False,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters; see ``torch.optim.Optimizer``."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # torch's own fused step for the rest, where it exists.
        group["fused"] = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in group["params"])
        for parameter in group["params"]:
            self._takers[parameter] = _Taker()
            give_to(parameter, self._takers[parameter])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients, those kept as factors too."""
        super().zero_grad(set_to_none)
        for taker in self._takers.values():
            taker.kept.clear()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Takes one step, as ``torch.optim.Adam.step``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if self._takers[parameter].kept:
                    factors = self._taken(parameter)
                    if parameter.grad is None:
                        factors.adam_(self._begin(parameter, group))
                    else:  # another part of the graph, such as a compiled one, has left a gradient
                        parameter.grad += factors.grad_weight()
                # Torch's own step refuses to be captured: the kernel that reads its scalars on the device takes it.
                if self._capturing is not None and parameter.grad is not None:
                    if parameter.dtype != torch.float32 or not parameter.is_contiguous():
                        raise NotCapturableError("a parameter with a gradient in grad is not contiguous float32")
                    adam_step_(parameter, parameter.grad, self._begin(parameter, group))
                    parameter.grad = None
        if self._capturing is None:
            self._step_stored()
        return loss

    def _step_stored(self) -> None:
        """Lets torch take the step of every parameter that has a gradient in ``grad``."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter)
                if parameter.grad is not None and state and group["fused"]:
                    state["step"] = state["step"].to(parameter.device)  # where torch's fused step counts
        super().step()

    def minimize(self, loss: Tensor) -> None:
        """Does what ``loss.backward()``, ``step()`` and ``zero_grad()`` do, in one pass over each weight.

        Each layer is updated during the backward pass, right after the gradient of its input has been formed from the
        same weights. A weight must take part in ``loss`` once: a second use is refused, but what came before it in the
        backward pass has been updated by then.

        Args:
            loss: a scalar.

        Raises:
            RuntimeError: gradients of an earlier backward pass wait for ``step`` (nothing was changed), or a weight is
                used twice.
        """
        if any(taker.kept or p.grad is not None for p, taker in self._takers.items()):
            raise RuntimeError(
                "gradients of an earlier backward pass are waiting for step(): call step() or zero_grad() before "
                "minimize()"
            )
        updated: set[Tensor] = set()
        try:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self._takers[parameter].begin = self._beginner(parameter, group, updated)
            loss.backward()
        finally:
            for taker in self._takers.values():
                taker.begin = None
        if any(parameter.grad is not None for parameter in updated):
            self.zero_grad()
            raise RuntimeError(_TWICE)
        if self._capturing is not None:
            # torch's own step refuses to be captured, even where it has nothing to do.
            if any(parameter.grad is not None for parameter in self._takers):
                self.zero_grad()
                raise NotCapturableError("a parameter that is not of the flow's blocks got a gradient")
            return
        with torch.no_grad():
            self._step_stored()
        self.zero_grad()

    def updates_to_capture(self) -> CapturedUpdates:
        """Returns an empty record for ``capturing``."""
        return CapturedUpdates(self.param_groups[0]["params"][0].device, len(self._takers))

    @contextmanager
    def capturing(self, updates: CapturedUpdates) -> Iterator[None]:
        """Within the block, ``minimize`` and ``step`` count nothing and use the scalars that ``advance`` sends before a
        replay.

        For CUDA graphs of them. Every parameter must have taken a step before, so that its state is there.

        Raises:
            NotCapturableError: where a parameter's state is missing, or its gradient reaches it in ``grad``: in
                ``minimize`` always, in ``step`` if it is not contiguous float32.
        """
        self._capturing = updates
        try:
            yield
        finally:
            self._capturing = None

    @torch.no_grad()
    def advance(self, updates: CapturedUpdates, scale: float = 1.0) -> None:
        """Counts a step of the parameters that a captured step updates, and sends its scalars to the device.

        ``scale`` multiplies all gradients.
        """
        known: dict[tuple[int, int], list[float]] = {}  # most parameters share a group and a step
        scalars = []
        for parameter, group in updates.parameters.items():
            step = self._count(parameter)
            key = id(group), step
            if key not in known:
                known[key] = _numbers(step, group).kernel_scalars(scale)
            scalars.append(known[key])
        updates.set(scalars)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scales all gradients so that their common L2 norm is at most ``max_norm``; returns the norm before.

        ``torch.nn.utils.clip_grad_norm_`` does not see gradients that are kept as factors.

        Args:
            max_norm: limit on the norm; ``math.inf`` only measures. Where the norm is not finite nothing is scaled.
        """
        norm = math.sqrt(float(self.squared_grad_norm()))
        scale = clip_scale(norm, max_norm)
        if scale != 1.0:
            if stored := [p.grad for p in self._takers if p.grad is not None]:
                torch._foreach_mul_(stored, scale)
            for taker in self._takers.values():
                taker.kept = [factors.scaled(scale) for factors in taker.kept]
        return norm

    @torch.no_grad()
    def squared_grad_norm(self) -> Tensor | float:
        """Returns the square of all gradients' common L2 norm; on a GPU a tensor, so that nothing waits for it here."""
        for taker in self._takers.values():
            if taker.kept:
                taker.kept = [joined(taker.kept)]
        squares = [factors.squared_norm() for taker in self._takers.values() for factors in taker.kept]
        if stored := [p.grad for p in self._takers if p.grad is not None]:
            squares.append(torch.nn.utils.get_total_norm(stored).double().square())
        return sum(squares)

    def _taken(self, parameter: Tensor) -> Factors:
        """Returns what was kept of a parameter's gradient, and keeps it no longer."""
        taker = self._takers[parameter]
        factors = joined(taker.kept)
        taker.kept = []
        return factors

    def _beginner(self, parameter: Tensor, group: dict[str, Any], updated: set[Tensor]) -> Callable[[], Update]:
        def begin() -> Update:
            if parameter in updated:
                raise RuntimeError(_TWICE)
            updated.add(parameter)
            return self._begin(parameter, group)

        return begin

    @torch.no_grad()
    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> Update:
        """Counts a step of a parameter and returns what it is to be updated with."""
        state = self.state[parameter]
        if self._capturing is not None:
            if not state:
                raise NotCapturableError("a parameter has no optimiser state yet: it makes that in its first step")
            moments = state["exp_avg"], state["exp_avg_sq"]
            scalars = self._capturing.add(parameter, group, moments)
            return Update(*moments, _numbers(1, group), scalars)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for name in ("exp_avg", "exp_avg_sq"):
                memory = empty_on_huge_pages(parameter.numel(), device=parameter.device, dtype=parameter.dtype)
                state[name] = memory.zero_().view(parameter.shape)
        numbers = _numbers(self._count(parameter), group)
        torch.autograd.graph.increment_version(parameter)  # autograd refuses graphs that still need the old values
        return Update(state["exp_avg"], state["exp_avg_sq"], numbers)

    def _count(self, parameter: Tensor) -> int:
        """Counts a step of a parameter and returns its number. Counting on a GPU would wait for it each time."""
        state = self.state[parameter]
        state["step"] = state["step"].cpu()
        state["step"] += 1
        return int(state["step"])


def clip_scale(norm: float, max_norm: float) -> float:
    """Returns what gradients of this norm are scaled with to be within ``max_norm``: 1 if they are, or not finite."""
    return max_norm / norm if math.isfinite(norm) and norm > max_norm else 1.0


def _numbers(step: int, group: dict[str, Any]) -> AdamNumbers:
    beta1, beta2 = group["betas"]
    return AdamNumbers(
        step,
        float(group["lr"]),
        beta1,
        beta2,
        group["eps"],
        group["weight_decay"],
        bool(group.get("decoupled_weight_decay", False)),
        bool(group["maximize"]),
    )
