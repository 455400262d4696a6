"""CUDA graphs: recording, caching by shape, and ``ReplayedLogProb``.

A GPU kernel takes a few microseconds to launch from Python, and often less to run, so that launching takes most of the
time of a small batch. A graph of some hundred kernels is recorded once per shape and then replayed as one launch; the
results are the same numbers.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fastmaf.flows import Flow
from fastmaf.kernels.triton_common.graphs import recording_stream
from fastmaf.nn import zero_padding_
from fastmaf.training.graph_keys import FlowKeys, Key
from fastmaf.validation import check_density, validates

_MAX_GRAPHS = 4  # each has memory of its own; an epoch has two batch sizes

T = TypeVar("T")
_version = attrgetter("_version")


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
    # Other threads, such as one that pins batches, may allocate memory meanwhile.
    graphed = torch.cuda.graph(graph, pool=pool, stream=recording_stream(device), capture_error_mode="thread_local")
    with torch.cuda.device(device), graphed:
        run()
    return graph


class GraphCache(Generic[T]):
    """Graphs of the most recent keys, recorded on the second call with a key; the first runs eagerly.

    The eager run compiles the kernels and builds the tables that they read; neither can be recorded.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Key, T | None] = OrderedDict()

    def recorded(self, key: Key) -> T | None:
        """Returns the graph of a key, if there is one; it counts as used by ``get`` alone."""
        return self._graphs.get(key)

    def get(self, key: Key, make: Callable[[], T]) -> T | None:
        """Returns the graph of a key, which ``make`` records if needed; None before ``ran_eagerly`` of that key."""
        if key not in self._graphs:
            return None
        self._graphs.move_to_end(key)
        if (graph := self._graphs[key]) is None:
            graph = self._graphs[key] = make()
        return graph

    def ran_eagerly(self, key: Key) -> None:
        """Notes that the key was run eagerly."""
        self._graphs.setdefault(key, None)
        while len(self._graphs) > _MAX_GRAPHS:
            self._graphs.popitem(last=False)


class ReplayedPadding:
    """Keeps the padding of a flow's weights zero, which ops do on every call, but a replay does not.

    Args:
        flow: the model, whose weights are in the same memory at each call: a graph has no other.
    """

    def __init__(self, flow: Flow) -> None:
        self._layers = flow._layers()
        named = [named for layer in self._layers for named in layer.named_parameters(recurse=False)]
        self._weights = [parameter for name, parameter in named if name.startswith("weight")]
        self._have_versions = not any(weight.is_inference() for weight in self._weights)
        self._versions: list[int] | None = None

    def zero_(self) -> None:
        """Sets the padding to zero where weights may have been written to since."""
        if self._versions is None or list(map(_version, self._weights)) != self._versions:
            zero_padding_(self._layers)
            self.is_zero()

    def is_zero(self) -> None:
        """Notes that what was written to the weights since ``zero_`` has left the padding zero."""
        if self._have_versions:
            self._versions = list(map(_version, self._weights))


class _GraphedLogProb:
    def __init__(self, flow: Flow, x: Tensor) -> None:
        self._flow, self._x = flow, x.clone()
        self._padding = ReplayedPadding(flow)
        self._run()  # the eager run's x may have had another alignment, hence other kernels
        self._graph = record(self._run, x.device)

    def _run(self) -> None:
        self._result = self._flow.log_prob(self._x)

    def __call__(self, x: Tensor) -> Tensor:
        self._padding.zero_()
        self._x.copy_(x)
        self._graph.replay()
        return self._result.clone()


class ReplayedLogProb:
    """``flow.log_prob`` without gradients, replayed as a CUDA graph from the second batch of a shape on.

    Where graphs cannot be recorded, as on the CPU or with hooks on a module, it calls ``flow.log_prob``. Weights may be
    updated in place between calls. Whatever else a custom transform reads, other than parameters and buffers, keeps the
    value that it had when the graph was recorded. A replay writes to the memory of its graph: threads that score at the
    same time, or on several streams, need an object each.

    Args:
        flow: the model, without a context.

    Raises:
        ValueError: the flow has a context.

    Example:
        >>> flow = fastmaf.MAF(6, 2, (16,), order="natural", seed=0)
        >>> log_prob = fastmaf.ReplayedLogProb(flow)
        >>> log_prob(torch.zeros(4, 6)).shape
        torch.Size([4])
    """

    def __init__(self, flow: Flow) -> None:
        if flow.context_features:
            raise ValueError("densities of a flow with a context are not replayed as CUDA graphs: call flow.log_prob")
        self._flow = flow
        self._keys = FlowKeys(flow)
        self._cache: GraphCache[_GraphedLogProb] = GraphCache()

    @property
    def flow(self) -> Flow:
        """The model."""
        return self._flow

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Returns the log-density ``[N]`` of ``x`` ``[N, D]`` in nats.

        Raises:
            ValueError: see ``Flow.log_prob``.
            FloatingPointError: see ``Flow.log_prob``.
        """
        if (key := self._keys.of(x)) is None:
            return self.flow.log_prob(x)
        if (graphed := self._cache.get(key, lambda: self._record(x))) is None:
            result = self.flow.log_prob(x)
            self._cache.ran_eagerly(key)
            return result
        result = graphed(x)
        if validates(self.flow.validate_args, x):
            check_density(self.flow, "log_prob", result, x)
        return result

    def _record(self, x: Tensor) -> _GraphedLogProb:
        # Later calls may come from outside of inference mode. Leaving it switches gradients on, and a result with an
        # autograd graph would keep the parameters' nodes on another stream: no training step could be recorded then.
        with torch.inference_mode(False), torch.no_grad():
            return _GraphedLogProb(self.flow, x)
