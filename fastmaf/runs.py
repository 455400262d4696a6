"""Runs a flow's transforms: consecutive blocks and permutations in one op, all others one by one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from fastmaf import hooks
from fastmaf.kernels import flow_args
from fastmaf.kernels.flow.prepared import PreparedFlow, memory_of
from fastmaf.kernels.flow.saved import saved_numel
from fastmaf.nn import MADE, MaskedLinear
from fastmaf.transforms import AffineAutoregressive, Inverted, LocalAutoregressive, Logit, Permutation, Transform
from fastmaf.transforms.base import given

# What the results of a transform depend on, besides parameters, buffers and modules.
ATTRIBUTES: dict[type, tuple[str, ...]] = {
    Inverted: (),
    LocalAutoregressive: ("log_scale_bound",),
    Logit: ("alpha",),
    AffineAutoregressive: ("log_scale_bound", "soft_bound", "affine_map"),
    MADE: ("schedule", "activation", "strict", "residual", "context_features", "dropout"),
    MaskedLinear: ("layout", "_placed", "weight_scale"),
}


def attributes(module: nn.Module) -> tuple[str, ...]:
    """Returns the attributes of a module that its results depend on, as far as its class is known."""
    mode = ("training",) if isinstance(module, MADE) and module.dropout else ()
    return (*ATTRIBUTES.get(type(module), ()), *mode)


class Run:
    """Consecutive blocks, with at most one permutation before each and after the last, that one op takes together.

    Args:
        transforms: in the order in which x passes through them.

    Attributes:
        forward: the op in the order of the transforms.
        inverted: whether the blocks are inverted: x is then mapped to z by the op that inverts blocks, and z to x by
            the one that applies them.
        blocks: the blocks.
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.inverted = any(type(transform) is Inverted for transform in transforms)
        self.blocks = [block for block in map(_block_of, transforms) if block is not None]
        permutations: list[Tensor | None] = [None]
        for transform in transforms:
            if isinstance(transform, Permutation):
                permutations[-1] = transform.permutation
            else:
                permutations.append(None)
        self.forward = PreparedFlow(flow_args([block.block() for block in self.blocks], permutations))
        self._permutations = [permutation for permutation in permutations if permutation is not None]
        self._inverse: tuple[PreparedFlow, list[bytes]] | None = None  # with the permutations that it inverts

    def to_z(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``z`` ``[N, D]`` and log |det dz/dx| ``[N]``."""
        if not self.inverted:
            return self.forward.forward(x)
        for block in self.blocks:
            block.check_invertible()
        return self.forward.inverse(x)

    def to_x(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``x`` ``[N, D]`` and log |det dx/dz| ``[N]``."""
        return self.inverse().forward(z) if self.inverted else self.inverse().inverse(z)

    def inverse(self) -> PreparedFlow:
        """Returns the op in the order of inversion.

        It is kept until a permutation is written to, which values alone show after a write through ``.data`` or
        NumPy. On a GPU, which would have to be waited for, it is always made anew.

        Raises:
            NotInvertibleError: the output mask of a block leaks.
        """
        known, in_a_mode = self._inverse, _in_a_mode()
        if (known is None or in_a_mode) and not self.inverted:
            for block in self.blocks:
                block.check_invertible()
        if in_a_mode or not all([permutation.is_cpu for permutation in self._permutations]):
            return PreparedFlow(self.forward.args.inverted())
        values = list(map(_bytes, self._permutations))
        if known is None or known[1] != values:
            with torch.inference_mode(False):  # later calls may record gradients
                known = self._inverse = PreparedFlow(self.forward.args.inverted()), values
        return known[0]


def _bytes(tensor: Tensor) -> bytes:
    """Returns the numbers of a tensor on the CPU, for less time than ``torch.equal`` compares them."""
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


class Runs:
    """The runs of a flow's transforms, made once and again where a part of them has changed.

    A copy, or a flow from another process, begins without any.
    """

    def __init__(self) -> None:
        self._known: tuple[Callable[[Sequence[Transform]], bool], list[Transform | Run]] | None = None

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
        return self._kept(transforms)

    def _kept(self, transforms: Sequence[Transform]) -> list[Transform | Run]:
        known = self._known
        if known is not None and known[0](transforms):
            return known[1]
        with torch.inference_mode(False):  # later calls may record gradients
            runs, unchanged = _cut(transforms), _watch(transforms)
        self._known = None if unchanged is None else (unchanged, runs)
        return runs

    def single(self, transforms: Sequence[Transform]) -> Run | None:
        """Returns the run of all transforms; None if there is no such one, or in a mode, or if it is inverted."""
        if hooks.any_global() or _in_a_mode():
            return None
        runs = self._kept(transforms)
        return runs[0] if len(runs) == 1 and isinstance(runs[0], Run) and not runs[0].inverted else None

    def log_density(self, transforms: Sequence[Transform], x: Tensor) -> Tensor | None:
        """Returns ``log_density`` of the run of all transforms; None where ``forward`` must be called for it."""
        run = self.single(transforms)
        return None if run is None else run.forward.log_density(x)

    def forward(
        self, transforms: Sequence[Transform], x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Applies the transforms in turn; returns ``z`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dz/dx|."""
        ladj: Tensor | None = None
        for run in self.of(transforms):
            x, term = run.to_z(x) if isinstance(run, Run) else run(x, *given(run, context))
            ladj = term if ladj is None else ladj + term
        return x, x.new_zeros(x.shape[0]) if ladj is None else ladj

    def inverse(
        self, transforms: Sequence[Transform], z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Inverts the transforms, the last one first; returns ``x`` ``[N, D]`` and ``ladj`` = log |det dx/dz|."""
        ladj: Tensor | None = None
        for run in reversed(self.of(transforms)):
            z, term = run.to_x(z) if isinstance(run, Run) else run.inverse(z, *given(run, context))
            ladj = term if ladj is None else ladj + term
        return z, z.new_zeros(z.shape[0]) if ladj is None else ladj

    def saved_numel(self, transforms: Sequence[Transform], n: int) -> int:
        """Returns how many numbers a forward pass over a batch of ``n`` saves for the backward pass, its input and
        output aside.

        A transform that no op takes, and an inverted block, count as a block: its input, log-scale and output are
        saved. Where the layers of its network run one by one, hidden units are saved before and after the activation,
        and with a context two more terms of the map. Permutations save nothing.
        """
        total = 0
        for run in self.of(transforms):
            if isinstance(run, Run) and not run.inverted:
                total += saved_numel(run.forward.args, n)
                continue
            for part in run.blocks if isinstance(run, Run) else [run]:
                if type(part) is not Permutation:
                    mades = [module for module in part.modules() if isinstance(module, MADE)]
                    hidden = sum(sum(made.hidden_features) * (2 if made.composed else 1) for made in mades)
                    total += n * ((5 if part.context_features else 3) * part.features + hidden)
        return total


def _watch(transforms: Sequence[Transform]) -> Callable[[Sequence[Transform]], bool] | None:
    """Returns a function that compares transforms with the present ones, part by part.

    None where runs must be made anew for every call: a module must be called, or a parameter is computed.
    """
    composed = [part for part in transforms if _is_composed(part)]
    fused = [
        part
        for part in transforms
        if part not in composed and (type(part) is Permutation or _block_of(part) is not None)
    ]
    modules = [module for transform in fused for module in transform.modules()]
    parameters: list[Any] = [parameter for module in modules for parameter in module._parameters.values()]
    if any(_kind(transform) is None for transform in fused):
        return None
    if not all(type(p) is nn.Parameter and p.is_contiguous() for p in parameters):
        return None
    hooks_of_modules = [registered for module in modules for registered in hooks.of(module)]
    types = list(map(type, modules))
    entries: list[tuple[dict[str, Any], str]] = []
    for module in modules:
        for part in (module._parameters, module._buffers, module._modules):
            entries += [(part, key) for key in part]
        entries += [(vars(module), key) for key in (*attributes(module), "forward")]
    for block in map(_block_of, composed):  # they stay so unless one of these changes
        assert block is not None
        entries.append((block._modules, "made"))
        entries += [(vars(block.made), key) for key in (*ATTRIBUTES[MADE], "training")]
    places, keys = [place for place, _ in entries], [key for _, key in entries]
    values = list(map(dict.get, places, keys))
    tensors = [
        *parameters,
        *(buffer for module in modules for buffer in module._buffers.values() if buffer is not None),
    ]
    memory = memory_of(tensors)

    def unchanged(now: Sequence[Transform]) -> bool:
        return (  # by maps and not in a loop: this is a tenth of a small flow's log_prob
            len(now) == len(transforms)
            and all(map(is_, now, transforms))
            and not any(hooks_of_modules)
            and all(map(is_, map(type, modules), types))
            and all(map(is_, map(dict.get, places, keys), values))
            and memory_of(tensors) == memory
        )

    return unchanged


def _in_a_mode() -> bool:
    """Returns whether tensors may belong to a graph, a functorch transform or a dispatch mode: none must be kept."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _cut(transforms: Sequence[Transform]) -> list[Transform | Run]:
    """Cuts transforms into runs, and the transforms between them that no op takes."""
    groups: list[list[Transform]] = []
    common: str | None = None  # the kind of the last group's blocks, "" while it has none; None: nothing can join it
    for i, transform in enumerate(transforms):  # torch 2.7 takes every zip with an argument `strict` for a strict one
        before = transforms[i - 1] if i else None
        kind = _kind(transform)
        two_permutations = type(before) is Permutation and type(transform) is Permutation
        if kind is None or common is None or two_permutations or (kind and common and kind != common):
            groups.append([])
            common = kind
        groups[-1].append(transform)
        common = common or kind
    result: list[Transform | Run] = []
    for group in groups:
        result += [Run(group)] if any(map(_kind, group)) else group
    return result


def _kind(transform: Transform) -> str | None:
    """Returns what all blocks of a run have in common: their activation, and whether they are inverted.

    "" where any run can hold this transform; None where none can.
    """
    if hooks.is_called(transform):
        return None
    block = _block_of(transform)
    if block is None:
        return "" if type(transform) is Permutation else None
    if block.calls_modules or block.made.composed or hooks.is_called(block):
        return None
    activation = block.made.activations[0]
    return activation if block is transform else f"inverted {activation}"


def _block_of(transform: Transform) -> AffineAutoregressive | None:
    """Returns an affine block, or the one within an inverted one; None for other transforms."""
    block = transform._modules["transform"] if type(transform) is Inverted else transform
    return block if type(block) is AffineAutoregressive else None


def _is_composed(transform: Transform) -> bool:
    """Returns whether a block runs as the ops of its layers, one by one, whatever else changes."""
    block = _block_of(transform)
    return block is not None and type(block.made) is MADE and block.made.composed
