"""Keys of CUDA graphs: everything that a graph depends on other than the numbers that it reads.

A key is asked for at every call, and a flow has hundreds of parts. What follows from the flow, or from the optimiser,
is therefore kept as one ``State``, and made anew where an object, an address, a flag or a version differs from what it
was made of. All are compared in ``map``, without a loop in Python.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from operator import is_
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastmaf import hooks
from fastmaf.flows import Flow
from fastmaf.kernels import composite, dispatch
from fastmaf.kernels.triton_common import launch_table
from fastmaf.runs import ATTRIBUTES, attributes
from fastmaf.training.fused_adam import FusedAdam
from fastmaf.training.gradient_sink import has_hooks
from fastmaf.transforms import Transform

Key: TypeAlias = tuple[Hashable, ...]
_version, _requires_grad, _hooks, _later_hooks = map(
    operator.attrgetter, ("_version", "requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")
)


class State:
    """Numbers and objects as a part of a key, equal to another one of equal numbers and the same objects.

    Tensors are given by ``id`` and address, so that a key keeps no memory.
    """

    def __init__(self, numbers: Iterable[Hashable], objects: Iterable[object] = ()) -> None:
        self._numbers, self._objects = tuple(numbers), tuple(objects)
        self._hash = hash((self._numbers, *map(id, self._objects)))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, State)
            and self._numbers == other._numbers
            and len(self._objects) == len(other._objects)
            and all(map(is_, self._objects, other._objects))
        )


Watched: TypeAlias = tuple[State | None, Callable[[], bool]]


class KeptState:
    """A state, made anew where it has changed; a copy begins without any.

    Args:
        watch: returns the state and a function that tells whether it is still the same.
        of: its arguments, which are copied with the object.
    """

    def __init__(self, watch: Callable[..., Watched], *of: Any) -> None:
        self._watch, self._of = watch, of
        self._known: Watched = None, _never

    def __reduce__(self) -> tuple[type[KeptState], tuple[Any, ...]]:
        return KeptState, (self._watch, *self._of)

    @property
    def last(self) -> State | None:
        """What ``get`` returned last, None before that."""
        return self._known[0]

    def get(self) -> State | None:
        """Returns the present state, None where no graph can be recorded."""
        if not self._known[1]():
            self._known = self._watch(*self._of)
        return self._known[0]


def _never() -> bool:
    return False


class _Entries:
    """The values of some keys of dictionaries, and the sizes of those that are listed as a whole."""

    def __init__(self, entries: Sequence[tuple[dict[Any, Any], Any]], whole: Sequence[dict[Any, Any]]) -> None:
        self._places, self._keys = [place for place, _ in entries], [key for _, key in entries]
        self._whole, self._sizes = whole, list(map(len, whole))
        self.values: list[Any] = list(map(dict.get, self._places, self._keys))

    def are_same(self) -> bool:
        return list(map(len, self._whole)) == self._sizes and all(
            map(is_, map(dict.get, self._places, self._keys), self.values)
        )


def can_replay(flow: Flow) -> bool:
    """Returns whether the flow runs on a GPU, with the Triton kernels, and outside of transforms of ``torch.func`` and
    forward mode, which a replay does not see.
    """
    like = flow._like()
    if like.device.type != "cuda" or composite.needed():
        return False
    return (dispatch.chosen() or dispatch.default_backend("flow", like)) == "triton"


def watch_flow(flow: Flow, trains: bool) -> Watched:
    """Returns the state of a flow; see ``FlowKeys``."""
    if not can_replay(flow):
        return None, _never
    modules: list[nn.Module] = [flow]
    for module in modules:  # grows in the loop, which is faster than nn.Module.modules
        modules += [child for child in module._modules.values() if child is not None]
    hooks_of_modules = [registered for module in modules for registered in hooks.of(module)]
    if any(hooks_of_modules) or any(isinstance(module, Transform) and module.needs_eager for module in modules):
        return None, _never
    parts = [part for module in modules for part in (module._modules, module._parameters, module._buffers)]
    # New tensors have an effect where the classes of the modules are not known.
    others = [
        part for module in modules if type(module) not in ATTRIBUTES for part in (module._parameters, module._buffers)
    ]
    entries = _Entries([(part, key) for part in parts for key in part], [*(m._modules for m in modules), *others])
    # By the sizes of ``vars``, a method that is set on an instance is noticed.
    flags = _Entries([(vars(module), name) for module in modules for name in _flags(module)], list(map(vars, modules)))
    tensors = [value for value in entries.values if isinstance(value, Tensor)]
    addresses, chosen = list(map(Tensor.data_ptr, tensors)), dispatch.chosen()
    # Parameters are read by kernels alone. What follows from buffers, such as the log-determinant of a whitening, may
    # have been computed on the host, so a write to a buffer needs a new graph.
    buffers = [t for t in tensors if not isinstance(t, nn.Parameter) and not t.is_inference()]
    versions = list(map(_version, buffers))
    gradients = _Gradients([t for t in tensors if trains and isinstance(t, nn.Parameter)])

    def unchanged() -> bool:
        return (
            dispatch.chosen() is chosen
            and not any(hooks_of_modules)
            and entries.are_same()
            and flags.are_same()
            and list(map(Tensor.data_ptr, tensors)) == addresses
            and list(map(_version, buffers)) == versions
            and gradients.are_same()
        )

    numbers = [*map(id, entries.values), *addresses, *versions, *gradients.formed]
    return State(numbers, [chosen, *map(type, modules), *flags.values]), unchanged


def _flags(module: nn.Module) -> Sequence[str]:
    """Returns the attributes of a module that its results depend on."""
    is_known = type(module) in ATTRIBUTES or isinstance(module, nn.ModuleList)
    known = attributes(module) if is_known else ("training",)
    return *known, *(name for name in ("forward", "log_prob") if name in vars(module))


def watch_optimizer(optimizer: FusedAdam, flow: Flow) -> Watched:
    """Returns the state of an optimiser of a flow: how parameters are updated, and where its tensors are."""
    groups, states, state = list(optimizer.param_groups), list(optimizer.state.values()), optimizer.state
    parameters = [parameter for group in groups for parameter in group["params"]]
    sizes = [len(group["params"]) for group in groups]
    moments = [(of_one, name) for of_one in states for name in ("exp_avg", "exp_avg_sq", "step")]
    modes = [(group, name) for group in groups for name in ("amsgrad", "differentiable")]
    entries, flags = _Entries(moments, states), _Entries(modes, [])
    # Not of the counters: replays look at their versions.
    tensors = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq") if name in state]
    addresses = list(map(Tensor.data_ptr, tensors))
    of_flow = set(map(id, flow.parameters()))  # which ``watch_flow`` watches
    gradients = _Gradients([parameter for parameter in parameters if id(parameter) not in of_flow])

    def unchanged() -> bool:
        return (
            optimizer.state is state
            and len(optimizer.param_groups) == len(groups)
            and all(map(is_, optimizer.param_groups, groups))
            and [len(group["params"]) for group in groups] == sizes
            and all(map(is_, itertools.chain(*[group["params"] for group in groups]), parameters))
            and len(state) == len(states)
            and all(map(is_, state.values(), states))
            and entries.are_same()
            and flags.are_same()
            and list(map(Tensor.data_ptr, tensors)) == addresses
            and gradients.are_same()
        )

    numbers = [*sizes, *map(id, (*groups, *parameters, *entries.values)), *addresses, *gradients.formed]
    return State(numbers, flags.values), unchanged


class _Gradients:
    """Which of some parameters get gradients, without hooks on them, which a replay does not call."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._requires_grad = list(map(_requires_grad, parameters))
        self._hooked = any(map(has_hooks, parameters))
        self.formed = [parameter.requires_grad and not has_hooks(parameter) for parameter in parameters]

    def are_same(self) -> bool:
        return (
            not self._hooked
            and list(map(_requires_grad, self._parameters)) == self._requires_grad
            and not any(map(_hooks, self._parameters))
            and not any(map(_later_hooks, self._parameters))
        )


class FlowKeys:
    """The keys of graphs of a flow's ``log_prob``, and of its gradients if ``trains``.

    A replay calls no hooks of modules, and reads a tensor at the address at which it was recorded.
    """

    def __init__(self, flow: Flow, *, trains: bool = False) -> None:
        self._state = KeptState(watch_flow, flow, trains)

    def of(self, x: Tensor) -> Key | None:
        """Returns the key of a graph for batches like ``x``; None where none can be recorded."""
        if composite.needed() or hooks.any_global() or (state := self._state.get()) is None:
            return None
        device = x.device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        modes = autocast, torch.get_float32_matmul_precision(), launch_table.chosen_precision()
        return x.shape, x.dtype, device, state, *modes
