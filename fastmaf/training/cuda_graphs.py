"""CUDA graphs: recording, caching by shape, and ``ReplayedLogProb``.

A GPU kernel takes a few microseconds to launch from Python, and often less to run, so that launching takes most of the
time of a small batch. A graph of some hundred kernels is recorded once per shape and then replayed as one launch; the
results are the same numbers.
"""

from __future__ import annotations

import functools
import gc
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from fastmaf import hooks
from fastmaf.flows import Flow
from fastmaf.kernels import composite, dispatch
from fastmaf.kernels.triton_common import launch_table
from fastmaf.nn import zero_padding_
from fastmaf.training.gradient_sink import has_hooks
from fastmaf.validation import check_density, validates

_MAX_GRAPHS = 4  # each has memory of its own; an epoch has two batch sizes

Key: TypeAlias = tuple[object, ...]
T = TypeVar("T")


def record(run: Callable[[], None], device: torch.device, pool: Any = None) -> torch.cuda.CUDAGraph:
    """Records the kernels that ``run`` launches; all of them must have been compiled and loaded before.

    Args:
        run: launches the kernels.
        device: the GPU.
        pool: the memory pool of a graph to share memory with.
    """
    # Autograd keeps one node per leaf that accumulates its gradient, on the stream of the pass that created it. If
    # garbage of an earlier pass still held it, the recorded pass would wait for a stream that is not recorded.
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, stream=_stream(device)):
        run()
    return graph


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream that graphs of a device are recorded on: torch's default one belongs to its first device."""
    return torch.cuda.Stream(device)


def can_replay(flow: Flow) -> bool:
    """Returns whether the flow runs on a GPU, with the Triton kernels, and outside of transforms of ``torch.func`` and
    forward mode, which a replay does not see.
    """
    like = flow._like()
    if like.device.type != "cuda" or composite.needed():
        return False
    return (dispatch.chosen() or dispatch.default_backend("flow", like)) == "triton"


def graph_key(flow: Flow, x: Tensor) -> Key | None:
    """Returns everything that a graph depends on other than the numbers that it reads; None where none can be recorded.

    A replay calls no hooks of modules, and reads a tensor at the address at which it was recorded. Values derived from
    buffers, such as the log-determinant of a fitted whitening, may have been computed on the host, so a write to a
    buffer needs a new graph as well.
    """
    if not can_replay(flow):
        return None
    state: list[object] = []
    modules: list[nn.Module] = [flow]
    for module in modules:  # grows in the loop, which is faster than nn.Module.modules
        if any(hooks.of(module)):
            return None
        modules += [child for child in module._modules.values() if child is not None]
        for parameter in module._parameters.values():
            if parameter is not None:
                state += parameter.data_ptr(), parameter.requires_grad and not has_hooks(parameter)
        for buffer in module._buffers.values():
            if buffer is not None:
                state += buffer.data_ptr(), 0 if buffer.is_inference() else buffer._version
    autocast = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type)
    modes = flow.training, autocast, torch.get_float32_matmul_precision()
    return x.shape, x.dtype, x.device, *state, modes, dispatch.chosen(), launch_table.chosen_precision()


class GraphCache(Generic[T]):
    """Graphs of the most recent keys, recorded on the second call with a key; the first runs eagerly.

    The eager run compiles the kernels and builds the tables that they read; neither can be recorded.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Key, T | None] = OrderedDict()

    def get(self, key: Key, make: Callable[[], T]) -> T | None:
        """Returns the graph of a key, which ``make`` records if needed; None before ``ran_eagerly`` of that key."""
        if key not in self._graphs:
            return None
        self._graphs.move_to_end(key)
        if self._graphs[key] is None:
            self._graphs[key] = make()
        return self._graphs[key]

    def ran_eagerly(self, key: Key) -> None:
        """Notes that the key was run eagerly."""
        self._graphs.setdefault(key, None)
        while len(self._graphs) > _MAX_GRAPHS:
            self._graphs.popitem(last=False)


class _GraphedLogProb:
    def __init__(self, flow: Flow, x: Tensor) -> None:
        self._flow, self._x = flow, x.clone()
        self._layers = flow._layers()
        self._run()  # the eager run's x may have had another alignment, hence other kernels
        self._graph = record(self._run, x.device)

    def _run(self) -> None:
        self._result = self._flow.log_prob(self._x)

    def __call__(self, x: Tensor) -> Tensor:
        zero_padding_(self._layers)  # which ops do on every call, but a replay does not
        self._x.copy_(x)
        self._graph.replay()
        return self._result.clone()


class ReplayedLogProb:
    """``flow.log_prob`` without gradients, replayed as a CUDA graph from the second batch of a shape on.

    Where graphs cannot be recorded, as on the CPU or with hooks on a module, it calls ``flow.log_prob``. Weights may be
    updated in place between calls. Whatever else a custom transform reads, other than parameters and buffers, keeps the
    value that it had when the graph was recorded.

    Args:
        flow: the model.

    Example:
        >>> flow = fastmaf.MAF(6, 2, (16,), order="natural", seed=0)
        >>> log_prob = fastmaf.ReplayedLogProb(flow)
        >>> log_prob(torch.zeros(4, 6)).shape
        torch.Size([4])
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._cache: GraphCache[_GraphedLogProb] = GraphCache()

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Returns the log-density ``[N]`` of ``x`` ``[N, D]`` in nats.

        Raises:
            ValueError: see ``Flow.log_prob``.
            FloatingPointError: see ``Flow.log_prob``.
        """
        if (key := graph_key(self.flow, x)) is None:
            return self.flow.log_prob(x)
        # Later calls may come from outside of inference mode. Leaving it switches gradients on, and a result with an
        # autograd graph would keep the parameters' nodes on another stream: no training step could be recorded then.
        with torch.inference_mode(False), torch.no_grad():
            graphed = self._cache.get(key, lambda: _GraphedLogProb(self.flow, x))
        if graphed is None:
            result = self.flow.log_prob(x)
            self._cache.ran_eagerly(key)
            return result
        result = graphed(x)
        if validates(self.flow.validate_args, x):
            check_density(self.flow, "log_prob", result, x)
        return result
