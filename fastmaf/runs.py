"""Runs a flow's transforms: consecutive blocks and permutations in one op, all others one by one."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmaf import hooks
from fastmaf.kernels import Block, FlowArgs, flow_args, flow_forward, flow_inverse
from fastmaf.kernels.flow.args import inverse_permutation
from fastmaf.kernels.flow.saved import saved_numel as saved_numel_of
from fastmaf.nn import MADE
from fastmaf.transforms import AffineAutoregressive, Permutation, Transform

_kind, _version, _is_contiguous = attrgetter("dtype", "device"), attrgetter("_version"), Tensor.is_contiguous


class Run(NamedTuple):
    """Consecutive transforms that one op takes together.

    Attributes:
        transforms: in the order in which x passes through them.
        forward, inverse: the arguments of the op; None where there is no block.
        permutation: of all transforms together where there is no block.
        permutation_copies: of a cached run, pairs of a permutation and a copy of it from when ``inverse`` was made.
    """

    transforms: list[Transform]
    forward: FlowArgs | None
    inverse: FlowArgs | None
    permutation: Tensor | None
    permutation_copies: tuple[tuple[Tensor, Tensor], ...] = ()

    @classmethod
    def of(cls, transforms: list[Transform]) -> Run:
        """Returns the run of these blocks and permutations."""
        blocks: list[Block] = []
        permutations: list[Tensor | None] = [None]
        for transform in transforms:
            if isinstance(transform, AffineAutoregressive):
                blocks.append(transform.block())
                permutations.append(None)
            else:
                assert isinstance(transform, Permutation)
                before = permutations[-1]
                permutations[-1] = transform.permutation if before is None else before[transform.permutation]
        if not blocks:
            return cls(transforms, None, None, permutations[0])
        args = flow_args(blocks, permutations)
        return cls(transforms, args, args.inverted(), None)

    def with_permutation_copies(self) -> Run:
        """Returns the run for later calls, which compare its permutations."""
        permutations = [] if self.forward is None else self.forward.permutations
        return self._replace(permutation_copies=tuple((p, p.clone()) for p in permutations if p.numel()))

    def inverse_args(self) -> FlowArgs | None:
        """Returns ``inverse``, made anew if a permutation was written to through ``.data`` or NumPy, which no counter
        shows. On a GPU, which would have to be waited for, it is always made anew.
        """
        if all(p.device.type == "cpu" and torch.equal(p, copy) for p, copy in self.permutation_copies):
            return self.inverse
        assert self.forward is not None
        return self.forward.inverted()


class Runs:
    """The runs of a flow's transforms, made once and again where a part of them has changed.

    A copy, or a flow from another process, begins without any.
    """

    def __init__(self) -> None:
        self._known: tuple[_State, list[Transform | Run]] | None = None

    def __deepcopy__(self, memo: object) -> Runs:
        return Runs()

    def __reduce__(self) -> tuple[type[Runs], tuple[()]]:
        return Runs, ()

    def of(self, transforms: Sequence[Transform]) -> list[Transform | Run]:
        """Returns the runs, and the transforms between them that no op takes, in the order of ``transforms``."""
        if hooks.any_global():
            return list(transforms)
        if _in_a_mode():
            return _cut(transforms)
        known = self._known
        if known is not None and known[0].holds(transforms):
            return known[1]
        with torch.inference_mode(False):  # later calls may record gradients
            runs, state = _cut(transforms), _State.of(transforms)
            if state is not None:
                runs = [run.with_permutation_copies() if isinstance(run, Run) else run for run in runs]
        self._known = None if state is None else (state, runs)
        return runs

    def forward(self, transforms: Sequence[Transform], x: Tensor) -> tuple[Tensor, Tensor]:
        """Applies the transforms in turn; returns ``z`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dz/dx|."""
        ladj: Tensor | None = None
        for run in self.of(transforms):
            if isinstance(run, Transform):
                x, term = run(x)
            elif run.forward is None:
                x, term = x[:, run.permutation], x.new_zeros(x.shape[0])
            else:
                x, term = flow_forward(x, run.forward)
            ladj = term if ladj is None else ladj + term
        return x, x.new_zeros(x.shape[0]) if ladj is None else ladj

    def inverse(self, transforms: Sequence[Transform], z: Tensor) -> tuple[Tensor, Tensor]:
        """Inverts the transforms, the last one first; returns ``x`` ``[N, D]`` and ``ladj`` = log |det dx/dz|."""
        ladj: Tensor | None = None
        for run in reversed(self.of(transforms)):
            if isinstance(run, Transform):
                z, term = run.inverse(z)
            elif (args := run.inverse_args()) is None:
                assert run.permutation is not None
                z, term = z[:, inverse_permutation(run.permutation)], z.new_zeros(z.shape[0])
            else:
                for transform in run.transforms:
                    if isinstance(transform, AffineAutoregressive):
                        transform.check_invertible()
                z, term = flow_inverse(z, args)
            ladj = term if ladj is None else ladj + term
        return z, z.new_zeros(z.shape[0]) if ladj is None else ladj

    def saved_numel(self, transforms: Sequence[Transform], n: int) -> int:
        """Returns how many numbers a forward pass over a batch of ``n`` saves for the backward pass, its input and
        output aside.

        A transform of a class that is not fastmaf's own counts as a block: its input, log-scale and output are saved.
        """
        total = 0
        for run in self.of(transforms):
            if isinstance(run, Transform):
                hidden = sum(layer.out_features for made in mades_of(run) for layer in made.layers[:-1])
                total += n * (3 * run.features + hidden)
            elif run.forward is not None:
                total += saved_numel_of(run.forward, n)
        return total


class _State(NamedTuple):
    """The objects that the runs of some transforms depend on; a change shows in their identity.

    Attributes:
        transforms: the transforms.
        hooks: every dictionary of hooks of their modules; all empty.
        modules, types: the modules, and the classes that they are of.
        places, keys, values: entries of dictionaries, such as ``_parameters`` and a module's own attributes.
        parameters, kinds: the weights and biases, and the dtype and device of each.
        permutations, versions: the tensors of permutations, and how often autograd has counted a write to each.
    """

    transforms: tuple[Transform, ...]
    hooks: list[dict[Any, Any]]
    modules: list[nn.Module]
    types: list[type]
    places: list[dict[str, Any]]
    keys: list[str]
    values: list[Any]
    parameters: list[Tensor]
    kinds: list[tuple[Any, ...]]
    permutations: list[Tensor]
    versions: list[int]

    @classmethod
    def of(cls, transforms: Sequence[Transform]) -> _State | None:
        """Returns the present state; None where runs must be made anew for every call: a module must be called, or a
        parameter is computed.
        """
        places: list[tuple[dict[str, Any], str]] = []
        modules: list[nn.Module] = []
        parameters: list[Tensor] = []
        permutations: list[Tensor] = []
        for before, transform in zip((None, *transforms), transforms, strict=False):
            if type(transform) is Permutation:
                if type(before) is Permutation:  # a run holds their product, which no write to either changes
                    return None
                modules.append(transform)
                places.append((transform._buffers, "permutation"))
                permutations.append(transform.permutation)
            elif type(transform) is AffineAutoregressive:
                made, hidden = transform.made, transform.made.hidden
                if transform.calls_modules:
                    return None
                layers = made.layers
                modules += [transform, made, hidden, *layers]
                places += [(transform._modules, "made"), (made._modules, "hidden"), (made._modules, "output")]
                places += [(hidden._modules, name) for name in hidden._modules]
                places += [(vars(transform), name) for name in ("log_scale_bound", "soft_bound")]
                places += [(vars(made), name) for name in ("schedule", "activation", "strict")]
                for layer in layers:
                    places += [(layer._parameters, name) for name in ("weight", "bias")]
                    places += [(vars(layer), name) for name in ("layout", "_placed")]
                    parameters += [layer.weight, layer.bias]
        places += [(vars(module), "forward") for module in modules]
        if any(map(hooks.is_called, modules)) or not all(type(p) is nn.Parameter for p in parameters):
            return None
        if not all(map(_is_contiguous, parameters)) or any(p.is_inference() for p in permutations):
            return None
        return cls(
            tuple(transforms),
            [found for module in modules for found in hooks.of(module)],
            modules,
            list(map(type, modules)),
            [place for place, _ in places],
            [key for _, key in places],
            [place.get(key) for place, key in places],
            parameters,
            list(map(_kind, parameters)),
            permutations,
            list(map(_version, permutations)),
        )

    def holds(self, transforms: Sequence[Transform]) -> bool:
        """Returns whether nothing has changed since."""
        return (  # by maps and not in a loop: this is a tenth of a small flow's log_prob
            len(transforms) == len(self.transforms)
            and all(map(is_, transforms, self.transforms))
            and not any(self.hooks)
            and all(map(is_, map(type, self.modules), self.types))
            and all(map(is_, map(dict.get, self.places, self.keys), self.values))
            and list(map(_kind, self.parameters)) == self.kinds
            and all(map(_is_contiguous, self.parameters))
            and list(map(_version, self.permutations)) == self.versions
        )


def _in_a_mode() -> bool:
    """Returns whether tensors may belong to a graph, a functorch transform or a dispatch mode: none must be kept."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def mades_of(module: nn.Module) -> list[MADE]:
    """Returns the MADE networks of a module and of those below it."""
    return [part for part in module.modules() if isinstance(part, MADE)]


def _cut(transforms: Sequence[Transform]) -> list[Transform | Run]:
    """Cuts transforms into runs, and the transforms between them that no op takes."""
    groups: list[Transform | list[Transform]] = []
    group: list[Transform] | None = None
    activation = ""  # of the group's blocks; "" while it has none
    for transform in transforms:
        kind = _activation(transform)
        if kind is None:
            groups.append(transform)
            group = None
        elif group is not None and (kind == activation or "" in (kind, activation)):
            group.append(transform)
            activation = activation or kind
        else:
            groups.append(group := [transform])
            activation = kind
    return [Run.of(group) if isinstance(group, list) else group for group in groups]


def _activation(transform: Transform) -> str | None:
    """Returns the activation of a run that holds this transform, "" where any will do; None: no run can hold it."""
    if hooks.is_called(transform):
        return None
    if type(transform) is AffineAutoregressive:
        made = transform._modules["made"]
        return None if type(made) is not MADE or made.calls_modules else made.activation
    return "" if type(transform) is Permutation else None
