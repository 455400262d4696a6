"""CUDA graphs of a training step and of a flow's log-density: some hundred small kernels, launched as one.

A kernel of a GPU takes a few microseconds to launch from Python and often less to run, so that at small batches
launching is most of the time. A graph is recorded once per shape and then replayed; its results are the same numbers.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from fastmaf.captured import NotCapturableError
from fastmaf.flows import Flow
from fastmaf.kernels import backends, launch_table
from fastmaf.kernels.adam import compile_adam
from fastmaf.nn import zero_padding_
from fastmaf.optim import FusedAdam, clip_scale
from fastmaf.validation import check_density, validates

# Graphs that are kept, each with memory of its own: an epoch has two batch sizes.
_MOST = 4

Key: TypeAlias = tuple[object, ...]
T = TypeVar("T")


def record(run: Callable[[], None], device: torch.device, pool: Any = None) -> torch.cuda.CUDAGraph:
    """Records what ``run`` launches on a device, for replays; ``pool`` is that of a graph to share memory with.

    What it launches must have been compiled and loaded before.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, stream=_stream(device)):
        run()
    return graph


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream on which graphs of a device are recorded: torch's own is that of the device it was made on."""
    return torch.cuda.Stream(device)


def can_replay(flow: Flow) -> bool:
    """Says whether graphs of the flow can be recorded: it is on a GPU, where the Triton kernels serve it."""
    like = flow._like()
    if like.device.type != "cuda":
        return False
    return (backends.chosen() or backends.default_backend("chain", like)) == "triton"


def _key(flow: Flow, x: Tensor) -> Key:
    """Returns all that a graph depends on beside the numbers: a weight that moved would be read where it was."""
    addresses = tuple(parameter.data_ptr() for parameter in flow.parameters())
    return x.shape, x.dtype, x.device, addresses, backends.chosen(), launch_table.chosen_precision()


class _Recent(Generic[T]):
    """What was made for each of the last few keys, after it had been met once without.

    The first time makes what the kernels look up, and compiles them: neither can be recorded.
    """

    def __init__(self) -> None:
        self._made: OrderedDict[Key, T | None] = OrderedDict()

    def get(self, key: Key, make: Callable[[], T]) -> T | None:
        """Returns what was or is now made for the key; None if ``met`` has not been called for it."""
        if key not in self._made:
            return None
        self._made.move_to_end(key)
        made = self._made[key]
        if made is None:
            made = self._made[key] = make()
        return made

    def met(self, key: Key) -> None:
        """Notes that the key was met."""
        self._made.setdefault(key, None)
        while len(self._made) > _MOST:
            self._made.popitem(last=False)


class _GraphedLogProb:
    def __init__(self, flow: Flow, x: Tensor) -> None:
        self._flow, self._x = flow, x.clone()
        self._layers = flow._layers()
        self._run()  # where x was aligned otherwise, other kernels ran
        self._graph = record(self._run, x.device)

    def _run(self) -> None:
        self._result = self._flow.log_prob(self._x)

    def __call__(self, x: Tensor) -> Tensor:
        zero_padding_(self._layers)  # a replay runs none of the ops' own checks
        self._x.copy_(x)
        self._graph.replay()
        return self._result.clone()


class ReplayedLogProb:
    """``flow.log_prob`` without gradients, replayed as a CUDA graph from the second batch of a shape on.

    Where graphs cannot be recorded, as on the CPU, it calls ``flow.log_prob``. Weights may be updated in place.

    Args:
        flow: the model.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._recent: _Recent[_GraphedLogProb] = _Recent()

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Returns the log-density of ``x`` ``[N, D]``, ``[N]`` nats."""
        if not can_replay(self.flow):
            return self.flow.log_prob(x)
        key = _key(self.flow, x)
        with torch.inference_mode(False):  # later calls may come from outside of it
            graphed = self._recent.get(key, lambda: _GraphedLogProb(self.flow, x))
        if graphed is not None:
            result = graphed(x)
            if validates(self.flow.validate_args, x):
                check_density(self.flow, "log_prob", result, x)
            return result
        result = self.flow.log_prob(x)
        self._recent.met(key)
        return result


class GraphedStep:
    """A training step on the mean NLL of a batch as CUDA graphs: the forward pass, and ``FusedAdam.minimize``.

    Not one graph, so that the loss can be looked at before anything is changed. With ``clips`` the second is two: the
    gradients' norm is looked at before the step.

    Args:
        flow: the model, every parameter of which has taken a step.
        optimizer: over its parameters.
        x: ``[N, D]``, a batch of the shape to be replayed.
        clips: gradients are to be clipped.

    Raises:
        NotCapturableError: see ``FusedAdam.capturing``.
    """

    _loss: Tensor

    def __init__(self, flow: Flow, optimizer: FusedAdam, x: Tensor, *, clips: bool = False) -> None:
        self._flow, self._optimizer, self._x = flow, optimizer, x.clone()
        self._layers = flow._layers()
        self._updates = optimizer.updates_to_capture()
        if clips:
            compile_adam(x.device)
        self._forward = record(self._run_forward, x.device)
        pool = self._forward.pool()
        self._backward = record(self._run_backward, x.device, pool) if clips else None
        self._step = record(self._run_step if clips else self._run_minimize, x.device, pool)
        self._loss = self._loss.detach()  # nothing goes back through it any more

    def _run_forward(self) -> None:
        self._loss = -self._flow.log_prob(self._x).mean()

    def _run_minimize(self) -> None:
        with self._optimizer.capturing(self._updates):
            self._optimizer.minimize(self._loss)

    def _run_backward(self) -> None:
        self._loss.backward()
        self._squared_norm = self._optimizer.squared_grad_norm()

    def _run_step(self) -> None:
        with self._optimizer.capturing(self._updates):
            self._optimizer.step()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the mean NLL of ``x``, in nats."""
        zero_padding_(self._layers)  # a replay runs none of the ops' own checks
        self._x.copy_(x)
        self._forward.replay()
        return self._loss.detach()

    def minimize(self, max_norm: float = math.inf) -> bool:
        """Takes a step on the loss of the last ``forward``, which must have been read.

        Args:
            max_norm: limit on the norm of all gradients, for a step that clips.

        Returns:
            Whether it was taken: not where that norm is not finite.
        """
        scale = 1.0
        if self._backward is not None:
            self._backward.replay()
            norm = math.sqrt(float(self._squared_norm))
            if not math.isfinite(norm):
                return False
            scale = clip_scale(norm, max_norm)
        self._optimizer.advance(self._updates, scale)
        self._step.replay()
        return True


class GraphedSteps:
    """The graphs of training steps by the shape of their batch; see ``GraphedStep``."""

    def __init__(self, flow: Flow, optimizer: FusedAdam, *, clips: bool = False) -> None:
        self._flow, self._optimizer, self._clips = flow, optimizer, clips
        self._recent: _Recent[GraphedStep] = _Recent()
        self._refused = False

    def of(self, x: Tensor) -> GraphedStep | None:
        """Returns the graphs for batches like ``x``, or None where a step has to be taken without.

        Warns:
            UserWarning: once, where such steps cannot be recorded.
        """
        if self._refused or not can_replay(self._flow):
            return None

        def make() -> GraphedStep:
            return GraphedStep(self._flow, self._optimizer, x, clips=self._clips)

        try:
            return self._recent.get(self._key(x), make)
        except NotCapturableError as error:
            self._refused = True
            self._optimizer.zero_grad()  # what was recorded has no values
            warnings.warn(f"training steps are not replayed as CUDA graphs: {error}", stacklevel=3)
            return None

    def _key(self, x: Tensor) -> Key:
        """Adds to a flow's key what a step depends on: which parameters are trained, and where their moments lie."""
        states = [self._optimizer.state.get(parameter, {}) for parameter in self._flow.parameters()]
        moments = tuple(t.data_ptr() for state in states for name, t in state.items() if name != "step")
        return *_key(self._flow, x), tuple(p.requires_grad for p in self._flow.parameters()), moments

    def stepped(self, x: Tensor) -> None:
        """Notes that a step on a batch like ``x`` was taken without."""
        if not self._refused and can_replay(self._flow):
            self._recent.met(self._key(x))
