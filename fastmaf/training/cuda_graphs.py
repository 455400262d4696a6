"""CUDA graphs of a training step and of a flow's log-density: some hundred small kernels, launched as one.

A kernel of a GPU takes a few microseconds to launch from Python and often less to run, so that at small batches
launching is most of the time. A graph is recorded once per shape and then replayed; its results are the same numbers.
"""

from __future__ import annotations

import functools
import gc
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from fastmaf.flows import Flow
from fastmaf.kernels import composite, dispatch
from fastmaf.kernels.adam.op import compile_adam
from fastmaf.kernels.triton_common import launch_table
from fastmaf.nn import zero_padding_
from fastmaf.training.captured import NotCapturableError
from fastmaf.training.fused_adam import FusedAdam, clip_scale
from fastmaf.validation import check_density, validates

# Graphs that are kept, each with memory of its own: an epoch has two batch sizes.
_MOST = 4

Key: TypeAlias = tuple[object, ...]
T = TypeVar("T")


def record(run: Callable[[], None], device: torch.device, pool: Any = None) -> torch.cuda.CUDAGraph:
    """Records what ``run`` launches on a device, for replays; ``pool`` is that of a graph to share memory with.

    What it launches must have been compiled and loaded before.
    """
    # Autograd keeps one node per leaf that accumulates its gradient, on the stream of the pass that made it. If an
    # earlier pass that is garbage still held it, the recorded pass would wait for a stream that is not recorded.
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, stream=_stream(device)):
        run()
    return graph


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream on which graphs of a device are recorded: torch's own is that of the device it was made on."""
    return torch.cuda.Stream(device)


def can_replay(flow: Flow) -> bool:
    """Says whether graphs of the flow can be recorded: it is on a GPU, where the Triton kernels serve it.

    Not within transforms of ``torch.func`` and forward mode, which a replay does not see.
    """
    like = flow._like()
    if like.device.type != "cuda" or composite.needed():
        return False
    return (dispatch.chosen() or dispatch.default_backend("flow", like)) == "triton"


class _State(NamedTuple):
    """What a flow's modules hold at the moment.

    Attributes:
        parameters: all of them.
        places: their addresses, and the addresses and versions of the buffers.
        hooked: a module has hooks, which a replay would not call.
    """

    parameters: list[Tensor]
    places: list[int]
    hooked: bool


def _state(module: nn.Module) -> _State:
    """Returns the state of a module and of those below it, faster than ``nn.Module.named_parameters`` finds them."""
    parameters: list[Tensor] = [p for p in module._parameters.values() if p is not None]
    places = [parameter.data_ptr() for parameter in parameters]
    for buffer in module._buffers.values():
        if buffer is not None:
            places += buffer.data_ptr(), 0 if buffer.is_inference() else buffer._version
    hooked = bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
    for child in module._modules.values():
        if child is not None:
            below = _state(child)
            parameters += below.parameters
            places += below.places
            hooked |= below.hooked
    return _State(parameters, places, hooked)


def _key(flow: Flow, x: Tensor, state: _State) -> Key:
    """Returns all that a graph depends on beside the numbers that it reads.

    A tensor that moved would be read where it was. What follows from buffers, such as the log-determinant of a fitted
    whitening, may have been worked out on the host, so a buffer that was written to needs another graph as well.
    """
    autocast = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type)
    modes = flow.training, autocast, torch.get_float32_matmul_precision()
    return x.shape, x.dtype, x.device, *state.places, modes, dispatch.chosen(), launch_table.chosen_precision()


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

    Where graphs cannot be recorded, as on the CPU or with hooks on a module, it calls ``flow.log_prob``. Weights may be
    updated in place; a buffer that is written to needs another graph. What a transform of your own reads from anything
    but parameters and buffers is read when the graph is recorded.

    Args:
        flow: the model.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._recent: _Recent[_GraphedLogProb] = _Recent()

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Returns the log-density of ``x`` ``[N, D]``, ``[N]`` nats."""
        if not can_replay(self.flow) or (state := _state(self.flow)).hooked:
            return self.flow.log_prob(x)
        key = _key(self.flow, x, state)
        # Later calls may come from outside of inference mode. Leaving that switches gradients on, and a result with an
        # autograd graph would keep the parameters' nodes on another stream: no training step could be recorded then.
        with torch.inference_mode(False), torch.no_grad():
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
        NotCapturableError: see ``FusedAdam.capture_minimize`` and ``FusedAdam.capture_step``.
    """

    _loss: Tensor

    def __init__(self, flow: Flow, optimizer: FusedAdam, x: Tensor, *, clips: bool = False) -> None:
        self._flow, self._optimizer, self._x = flow, optimizer, x.clone()
        self._layers = flow._layers()
        self._updates = optimizer.captured_updates()
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
        self._optimizer.capture_minimize(self._loss, self._updates)

    def _run_backward(self) -> None:
        self._gradients = self._optimizer.capture_gradients(self._loss)
        self._squared_norm = self._gradients.squared_norm()

    def _run_step(self) -> None:
        self._optimizer.capture_step(self._gradients, self._updates)

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
        torch.autograd.graph.increment_version(list(self._updates.parameters))  # autograd does not see the replay
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
        key = self._key(x)
        if key is None:
            return None

        def make() -> GraphedStep:
            return GraphedStep(self._flow, self._optimizer, x, clips=self._clips)

        try:
            return self._recent.get(key, make)
        except NotCapturableError as error:
            self._refused = True
            warnings.warn(f"training steps are not replayed as CUDA graphs: {error}", stacklevel=3)
            return None

    def stepped(self, x: Tensor) -> None:
        """Notes that a step on a batch like ``x`` was taken without."""
        key = self._key(x)
        if key is not None:
            self._recent.met(key)

    def _key(self, x: Tensor) -> Key | None:
        """Adds to a flow's key what a step depends on: what is trained and how, and where the moments lie.

        None where nothing can be replayed: a replay calls no hooks.
        """
        if self._refused or not can_replay(self._flow) or self._optimizer.has_step_hooks():
            return None
        state = _state(self._flow)
        if state.hooked:
            return None
        moments: list[int] = []
        for parameter in state.parameters:
            known = self._optimizer.state.get(parameter)
            if known:
                moments += known["exp_avg"].data_ptr(), known["exp_avg_sq"].data_ptr()
        return *_key(self._flow, x, state), *self._optimizer.modes(state.parameters), *moments
