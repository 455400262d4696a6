"""Training steps of ``FusedAdam`` as CUDA graphs."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from fastmaf.flows import Flow
from fastmaf.kernels.adam.op import compile_adam
from fastmaf.training.captured_updates import CapturedUpdates, NotCapturableError
from fastmaf.training.cuda_graphs import GraphCache, ReplayedPadding, record
from fastmaf.training.fused_adam import FusedAdam
from fastmaf.training.graph_keys import FlowKeys, KeptState, Key, watch_optimizer
from fastmaf.training.guards import clip_scale
from fastmaf.validation import not_validating


class GraphedStep:
    """A training step on the mean NLL of a batch as CUDA graphs: the forward pass, and ``FusedAdam.minimize``.

    They are two graphs, so that the loss can be checked before anything is changed. With ``max_norm`` the second is
    two again: the norm of the gradients is checked before the step.

    Args:
        flow: the model; every parameter has taken a step.
        optimizer: over its parameters.
        x: ``[N, D]``, a batch of the shape to be replayed.
        max_norm: the gradients are scaled down to this common norm; None for no limit.

    Raises:
        NotCapturableError: see ``CapturedUpdates``.
    """

    _loss: Tensor

    def __init__(self, flow: Flow, optimizer: FusedAdam, x: Tensor, max_norm: float | None = None) -> None:
        self._flow, self._optimizer, self._x, self._max_norm = flow, optimizer, x.clone(), max_norm
        self._padding = ReplayedPadding(flow)
        with torch.no_grad(), not_validating():
            flow.log_prob(x)  # clears padding, which would be captured otherwise
        _zero_padding_of_moments_(flow, optimizer)
        self._updates = CapturedUpdates(optimizer)
        if max_norm is not None:
            compile_adam(x.device)
        self._forward = record(self._run_forward, x.device)
        pool = self._forward.pool()
        self._backward = None if max_norm is None else record(self._run_backward, x.device, pool)
        self._step = record(self._run_step, x.device, pool)
        self._loss = self._loss.detach()  # no other backward pass follows
        self._parameters = list(self._updates.rows)

    def _run_forward(self) -> None:
        self._loss = -self._flow.log_prob(self._x).mean()

    def _run_backward(self) -> None:
        self._gradients = self._updates.gradients(self._loss)
        self._squared_norm = self._gradients.squared_norm()

    def _run_step(self) -> None:
        if self._backward is None:
            self._updates.minimize(self._loss)
        else:
            self._updates.step(self._gradients)

    @property
    def loss(self) -> Tensor:
        """The mean NLL in nats of the batch of the last ``forward``."""
        return self._loss

    def forward(self, x: Tensor) -> None:
        """Starts the computation of ``loss`` of ``x``."""
        self._padding.zero_()
        self._x.copy_(x)
        self._forward.replay()

    def prepare(self) -> None:
        """Prepares ``minimize`` while the GPU works."""
        self._updates.prepare()

    def minimize(self) -> bool:
        """Takes a step on the loss of the last ``forward``, whose value must have been read, after ``prepare``.

        Returns:
            Whether the step was taken: not where the norm of the gradients is to be limited and is not finite.
        """
        scale = 1.0
        if self._backward is not None and self._max_norm is not None:
            self._backward.replay()
            norm = math.sqrt(float(self._squared_norm))
            if not math.isfinite(norm):
                return False
            scale = clip_scale(norm, self._max_norm)
        self._updates.send(scale)
        self._step.replay()
        self._updates.replayed()
        torch.autograd.graph.increment_version(self._parameters)  # autograd does not see the replay
        self._padding.is_zero()
        return True


@torch.no_grad()
def _zero_padding_of_moments_(flow: Flow, optimizer: FusedAdam) -> None:
    """Sets the padding of the moments of packed weights to zero: then steps leave that of the weights zero."""
    for layer in flow._layers():
        for parameter in layer._parameters.values():
            state = optimizer.state.get(parameter) if parameter is not None else None
            if state and parameter is not None and parameter.shape == (layer.layout.numel,):
                for name in ("exp_avg", "exp_avg_sq"):
                    layer.layout.zero_padding_(state[name])


class GraphedSteps:
    """The graphs of training steps by batch shape; see ``GraphedStep``."""

    def __init__(self, flow: Flow, optimizer: FusedAdam, max_norm: float | None = None) -> None:
        self._flow, self._optimizer, self._max_norm = flow, optimizer, max_norm
        self._keys = FlowKeys(flow, trains=True)
        self._state = KeptState(watch_optimizer, optimizer, flow)
        self._cache: GraphCache[GraphedStep] = GraphCache()
        self._refused = False

    def forward(self, x: Tensor) -> GraphedStep | None:
        """Starts the forward pass of a step on ``x``, and prepares the rest while the GPU works.

        Returns:
            The graphs for batches like ``x``, or None where the step has to be taken eagerly.

        Warns:
            UserWarning: once, where such steps cannot be captured.
        """
        if (key := self._key(x)) is None:
            return None
        # The forward pass needs the flow as it was recorded. Whether the optimiser is, is found out while it runs.
        if (early := self._cache.recorded((*key, self._state.last))) is not None:
            early.forward(x)
        if (graphed := self._get((*key, self._state.get()), x)) is None:
            return None
        if graphed is not early:
            graphed.forward(x)
        graphed.prepare()
        return graphed

    def ran_eagerly(self, x: Tensor) -> None:
        """Notes that a step on a batch like ``x`` was taken eagerly, so that the next one can be captured."""
        if (key := self._key(x)) is not None:
            self._cache.ran_eagerly((*key, self._state.get()))

    def _key(self, x: Tensor) -> Key | None:
        """Returns the key of the flow; None where nothing can be replayed: a replay calls no hooks."""
        return None if self._refused or self._optimizer.has_step_hooks() else self._keys.of(x)

    def _get(self, key: Key, x: Tensor) -> GraphedStep | None:
        """Returns the graphs of a key: of the flow, and of how parameters are updated and where the moments are."""
        try:
            return self._cache.get(key, lambda: GraphedStep(self._flow, self._optimizer, x, self._max_norm))
        except NotCapturableError as error:
            self._refused = True
            warnings.warn(f"training steps are not replayed as CUDA graphs: {error}", stacklevel=4)
            return None
