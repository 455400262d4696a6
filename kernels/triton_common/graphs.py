"""Launches that are recorded as a CUDA graph and replayed: some hundred of them take longer to launch than to run."""

from __future__ import annotations

import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastmaf.kernels.tensor_cache import cached
from fastmaf.kernels.triton_common import launch_table

# Without torch's allocator, as under compute-sanitizer, memory cannot be allocated while a graph is recorded.
_NO_GRAPHS = bool(os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"))
MOST_GRAPHS = 4  # of one owner; each has memory of its own

Run: TypeAlias = Callable[..., tuple[Tensor, ...]]

# A graph has one memory for inputs and outputs, and one process may record one graph at a time.
_lock = threading.Lock()


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]
    held: list[Tensor]


def replayed(
    owner: Tensor, key: tuple[Any, ...], inputs: Sequence[Tensor], run: Run, held: list[Tensor]
) -> tuple[Tensor, ...]:
    """Returns ``run(*inputs)``, from the third call with a key on as the replay of a graph.

    The first call runs eagerly: it compiles the kernels and makes their tables, neither of which can be recorded. The
    second is recorded. Without a GPU, and where the caller records a graph of its own, ``run`` is called.

    Args:
        owner: the graphs live as long as this tensor, which is never written to.
        key: of everything that ``run`` depends on other than the inputs' values, addresses that it reads among them.
        inputs: contiguous tensors of one device.
        run: launches kernels, and nothing that waits for the device.
        held: tensors whose addresses the key has and which nothing else may keep alive.
    """
    device = inputs[0].device
    if device.type != "cuda" or launch_table.recorded_card is not None or _NO_GRAPHS:
        return run(*inputs)
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return run(*inputs)
    graphs: OrderedDict[Any, _Graph | None] = cached(owner, "graphs", OrderedDict)
    # Calls on several streams may overlap, and would share the graph's memory.
    key = (*key, *[(part.shape, part.dtype) for part in inputs], device, torch.cuda.current_stream(device).cuda_stream)
    with _lock:
        if key in graphs:
            graphs.move_to_end(key)
            graph = graphs[key]
            if graph is None:
                graph = graphs[key] = _record(inputs, run, held)
            for own, part in zip(graph.inputs, inputs, strict=True):
                own.copy_(part)
            graph.graph.replay()
            return tuple(output.clone() for output in graph.outputs)
    result = run(*inputs)
    with _lock:
        graphs.setdefault(key, None)
        while len(graphs) > MOST_GRAPHS:
            graphs.popitem(last=False)
    return result


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream that graphs of a device are recorded on.

    The default stream of ``torch.cuda.graph`` is one for the process, on the device that recorded first: a graph of
    another device, recorded there, would be empty.
    """
    return torch.cuda.Stream(device)


def _record(inputs: Sequence[Tensor], run: Run, held: list[Tensor]) -> _Graph:
    # Later calls may come from outside of inference mode, where its tensors cannot be written to.
    device = inputs[0].device
    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
        own = [part.clone() for part in inputs]
        run(*own)  # the alignment of the eager call's inputs may have been another, and with it the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=recording_stream(device), capture_error_mode="thread_local"):
            outputs = run(*own)
    return _Graph(graph, own, outputs, held)
