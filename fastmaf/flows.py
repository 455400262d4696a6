"""Flows: a sequence of invertible transforms over a standard normal base, and the masked autoregressive flow (MAF)."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmaf import hooks
from fastmaf.degrees import DegreeKind, OrderKind, hidden_degrees, orders, warn_if_disconnected
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.nn import MADE, Init, MaskedLinear, zero_padding_
from fastmaf.noise import normal_rows
from fastmaf.runs import Runs, mades_of
from fastmaf.transforms import AffineAutoregressive, Permutation, Transform
from fastmaf.transforms.whitening import GaussianWhitening
from fastmaf.validation import check_density, check_finite, check_samples, validates

if TYPE_CHECKING:
    from fastmaf.naive import NaiveMAF

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Flow(nn.Module):
    """A normalizing flow: invertible transforms that carry data x to z ~ N(0, I).

    Blocks in a row run as one op. Where hooks are registered on modules, or parameters are parametrised, pruned, or
    belong to modules of other classes, the modules are called instead: slower, above all ``inverse``, which then takes
    one call of a block's network per level.

    As with all of torch, a process that is forked after an op has run on several threads hangs at its first op that
    does so: start processes with the method ``"spawn"`` or ``"forkserver"``, fork before the first op, or call
    ``torch.set_num_threads(1)`` before it.

    Nothing here follows ambient ``torch.autocast``, neither forward nor backward: in half precision a density would be
    off by nats. Within an autocast region, bfloat16 and float16 inputs are converted to the flow's dtype.

    Args:
        features: D.
        transforms: in the order in which x passes through them.
        validate_args: look at values, as ``torch.distributions`` does; also an attribute. ``log_prob``,
            ``nll_per_dim``, ``forward`` and ``inverse`` then raise ValueError where their argument is not finite,
            ``log_prob`` and ``nll_per_dim`` FloatingPointError where their result is NaN all the same, and sampling
            FloatingPointError where a sample or its density is not finite. Without it such numbers are returned: each
            in its own row, for rows do not mix. None: on the CPU only, since a GPU would have to be waited for. Never
            within ``torch.compile``, a trace, a CUDA graph or a functorch transform.
    """

    validate_args: bool | None = None  # of flows that were pickled without it, too
    _runs = Runs()  # the same; any other flow has its own

    def __init__(self, features: int, transforms: Iterable[Transform], *, validate_args: bool | None = None) -> None:
        super().__init__()
        self.features = features
        self.validate_args = validate_args
        self._runs = Runs()
        self.transforms = nn.ModuleList(transforms)
        for i, transform in enumerate(self.transforms):
            if not isinstance(transform, Transform):
                raise TypeError(f"transform {i} must be a fastmaf.Transform; found {type(transform).__name__}")
            if transform.features != features:
                raise ValueError(
                    f"transform {i} ({type(transform).__name__}) has {transform.features} features, the flow {features}"
                )

    def _transforms(self) -> list[Transform]:
        return [transform for transform in self.transforms if isinstance(transform, Transform)]

    def _check(self, name: str, x: Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ValueError(f"{name} must have shape [N, {self.features}]; found {list(x.shape)}")
        own = self._like()
        if x.dtype != own.dtype or x.device != own.device:
            raise ValueError(
                f"{name} must be {own.dtype} on {own.device}, like the flow; found {x.dtype} on {x.device}"
            )

    @outside_autocast
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps data to the base.

        Args:
            x: ``[N, D]``, of the flow's dtype and device.

        Returns:
            ``z`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dz/dx| in nats.
        """
        self._check("x", x)
        if validates(self.validate_args, x):
            check_finite("x", x)
        return self._runs.forward(self._transforms(), x)

    @outside_autocast
    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Maps the base to data, exactly.

        Args:
            z: ``[N, D]``.

        Returns:
            ``x`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dx/dz| in nats.

        Raises:
            NotInvertibleError: a block has the leaky output mask of the published notebook.
        """
        self._check("z", z)
        if validates(self.validate_args, z):
            check_finite("z", z)
        return self._runs.inverse(self._transforms(), z)

    @outside_autocast
    def log_prob(self, x: Tensor) -> Tensor:
        """Returns the log-density of ``x`` ``[N, D]``, ``[N]`` nats.

        It is −inf outside of the domain of a transform (``Logit``), and where ½z² overflows.

        Raises:
            ValueError: ``x`` does not fit the flow, or, with ``validate_args``, is not finite.
            FloatingPointError: with ``validate_args``, the result is NaN; the message names the transform or parameter.
        """
        called = type(self).forward is not Flow.forward or hooks.is_called(self) or hooks.any_global()
        self._check("x", x)
        z, ladj = self(x) if called else self._runs.forward(self._transforms(), x)
        result = ladj + self._base_log_prob(z)
        if validates(self.validate_args, x):
            check_density(self, "log_prob", result, x)
        return result

    def _base_log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * z.square().sum(dim=1) - self.features * _HALF_LOG_2PI

    @outside_autocast
    def nll_per_dim(self, x: Tensor) -> Tensor:
        """Returns each dimension's share of the negative log-likelihood, ``[N, D]`` nats; the rows sum to
        ``-log_prob(x)``.

        A dimension's term is ½z² + ½log 2π + Σ over blocks of its log-scale, at the place of that dimension in ``x``.
        """
        self._check("x", x)
        z, terms = x, torch.zeros_like(x)
        for transform in self._transforms():
            called = transform(z)[0] if hooks.is_called(transform) or hooks.any_global() else None
            z, terms = transform.forward_per_dim(z, terms)
            z = z if called is None else called
        result = terms + 0.5 * z.square() + _HALF_LOG_2PI
        if validates(self.validate_args, x):
            check_density(self, "nll_per_dim", result, x)
        return result

    @torch.no_grad()
    def sample(
        self, n: int, *, generator: torch.Generator | None = None, seed: int | None = None, start: int = 0
    ) -> Tensor:
        """Draws ``n`` samples ``[n, D]``, without gradients; ``rsample`` records them.

        Args:
            n: how many.
            generator: makes a call repeatable; it must live on the flow's device. Which noise a row gets depends on
                ``n``.
            seed: makes every row repeatable: its noise depends on nothing but ``seed`` and its number, so that
                ``sample(8, seed=1)`` has the noise of ``sample(3, seed=1)`` and ``sample(5, seed=1, start=3)``, bit for
                bit on one machine, and to float64's rounding before it is cast on all devices. The samples then agree
                to the rounding of the flow's dtype, which grows with the flow's scales (1e-6 of a sample's size is
                usual in float32): batches of other sizes are summed in another order.
            start: the number of the first row; with ``seed`` only.

        Raises:
            ValueError: arguments do not fit.
            FloatingPointError: with ``validate_args``, a sample is not finite; the message names the transform.
            NotInvertibleError: a block has the leaky output mask of the published notebook.
        """
        return self.rsample(n, generator=generator, seed=seed, start=start)

    @torch.no_grad()
    def sample_and_log_prob(
        self, n: int, *, generator: torch.Generator | None = None, seed: int | None = None, start: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Draws ``n`` samples ``[n, D]`` and their log-densities ``[n]``, at the price of the samples alone and without
        gradients; see ``sample``.
        """
        return self.rsample_and_log_prob(n, generator=generator, seed=seed, start=start)

    def rsample(
        self, n: int, *, generator: torch.Generator | None = None, seed: int | None = None, start: int = 0
    ) -> Tensor:
        """Draws ``n`` samples ``[n, D]`` that are differentiable with respect to the flow's parameters; see ``sample``
        for the arguments.
        """
        z = self._base_sample(n, generator, seed, start)
        x, _ = self.inverse(z)
        if validates(self.validate_args, x):
            check_samples(self, z, x)
        return x

    def rsample_and_log_prob(
        self, n: int, *, generator: torch.Generator | None = None, seed: int | None = None, start: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Draws ``n`` samples ``[n, D]`` and their log-densities ``[n]``, both differentiable with respect to the
        flow's parameters; see ``sample`` for the arguments.
        """
        z = self._base_sample(n, generator, seed, start)
        x, ladj = self.inverse(z)
        log_prob = self._base_log_prob(z) - ladj
        if validates(self.validate_args, x):
            check_samples(self, z, x, log_prob)
        return x, log_prob

    def _base_sample(self, n: int, generator: torch.Generator | None, seed: int | None, start: int) -> Tensor:
        own = self._like()
        if seed is None:
            if start:
                raise ValueError(f"start numbers the rows of a seed's noise; found start = {start} without a seed")
            return torch.randn(n, self.features, generator=generator, device=own.device, dtype=own.dtype)
        if generator is not None:
            raise ValueError("noise comes from a generator or from a seed: give one of them")
        return normal_rows(n, self.features, seed, start, own)

    def _like(self) -> Tensor:
        """Returns a tensor of the flow's dtype and device. Weights stored in fewer bits than the rest do not count."""
        first = None
        for tensor in itertools.chain(_parameters(self), self.buffers()):
            if not tensor.is_floating_point():
                continue
            if tensor.dtype != torch.bfloat16:
                return tensor
            first = tensor if first is None else first
        return torch.empty(0) if first is None else first

    def save(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, str] | None = None,
        extras: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes the flow to one safetensors file, configuration included; see ``fastmaf.io.checkpoint.save``."""
        from fastmaf.io.checkpoint import save

        save(self, path, metadata, extras)

    def to_inference(self, dtype: torch.dtype = torch.bfloat16) -> Flow:
        """Returns a copy for scoring and sampling whose weights are stored in ``dtype``.

        With bfloat16 the weights take half the memory. Activations, biases and every sum stay in the flow's dtype
        (float32). The copy is an exact flow of its own: ``inverse`` inverts its ``forward``; but its densities differ
        from the original's by the rounding of the weights, a relative 2⁻⁹ each. Its parameters take no gradients.

        Args:
            dtype: ``torch.bfloat16``, or the flow's own dtype for a plain frozen copy.

        Raises:
            ValueError: ``dtype`` is neither.
        """
        own = self._like().dtype
        if dtype not in (own, torch.bfloat16) or (dtype == torch.bfloat16 and own != torch.float32):
            raise ValueError(
                f"weights for inference are stored as torch.bfloat16 beside float32, or in the flow's dtype {own}; "
                f"found {dtype}"
            )
        layers = self._layers()
        # Known to deepcopy beforehand, so that the weights are never copied in full.
        rounded: dict[int, Any] = {
            id(layer.weight): nn.Parameter(layer.weight.detach().to(dtype, copy=True), requires_grad=False)
            for layer in layers
        }
        result = copy.deepcopy(self, rounded)
        return result.requires_grad_(False).eval()

    def to_naive(self) -> NaiveMAF:
        """Returns the same function as a dense, mask-times-weight model that inverts with D passes: the baseline of
        tests and benches.
        """
        from fastmaf.naive import NaiveMAF

        return NaiveMAF.from_transforms(self.features, self._transforms())

    @property
    def visible_weights(self) -> int:
        """Weights that the masks let through."""
        return sum(layer.layout.visible for layer in self._layers())

    @property
    def stored_weights(self) -> int:
        """Numbers that hold them: visible weights and padding."""
        return sum(layer.layout.numel for layer in self._layers())

    def zero_padding_(self) -> None:
        """Makes the padding of all packed weights zero, where it may have been written to.

        Every op does so itself before it reads them, and ``state_dict`` before it returns them. It is for whoever reads
        ``weight`` otherwise, such as a CUDA graph, after writing to parameters.
        """
        zero_padding_(self._layers())

    def _layers(self) -> list[MaskedLinear]:
        return [layer for made in self._mades() for layer in made.layers]

    def _saved_numel(self, n: int) -> int:
        return self._runs.saved_numel(self._transforms(), n)

    def _mades(self) -> list[MADE]:
        return mades_of(self)


def _parameters(module: nn.Module) -> Iterator[Tensor]:
    """Yields what ``module.parameters()`` does, shared ones again: the first of them at a tenth of the price."""
    modules = [module]
    while modules:
        one = modules.pop()
        for parameter in one._parameters.values():
            if parameter is not None:
                yield parameter
        modules += [child for child in reversed(one._modules.values()) if child is not None]


class MAF(Flow):
    """A masked autoregressive flow (Papamakarios et al. 2017): blocks of affine autoregressive transforms, each with
    its order.

    Where a block's order is not that of the block before it, a ``Permutation`` stands between them, and a last one
    brings z back into the order of x, so that ``z[:, d]`` belongs to ``x[:, d]``.

    Args:
        features: D.
        blocks: affine autoregressive blocks.
        hidden_features: units of each hidden layer of each block's MADE.
        degrees: of the hidden units: ``"spread"``, ``"random"``, ``"cyclic"``, one tensor per hidden layer for all
            blocks, or one such list per block.
        order: ``"natural"``, ``"alternate"`` (reversed in every second block), ``"random"``, or one permutation per
            block.
        log_scale_bound: log-scales stay within ± this many nats; None leaves them free.
        levels: at most this many distinct hidden degrees, hence at most ``levels + 1`` dependent steps per block when
            sampling.
        seed: makes degrees, orders and parameters repeatable; None draws from torch's global generator.
        soft_bound: bound the log-scales by a tanh instead of by a clamp.
        init: ``"linear"``, or ``"identity"``: output layers start at zero, so that z = x before training.
        strict: False takes the published notebook's leaky output mask: scores only, for comparison.
        whitening: put a ``GaussianWhitening`` of this rank in front, as ``transforms[0]``; it is the identity until its
            ``fit_`` is called. None: blocks alone.
        device, dtype: of the parameters. On ``"meta"`` nothing is allocated: for ``memory_estimate`` of a flow that may
            be too large for this machine.
        validate_args: see ``Flow``.

    Raises:
        ValueError: an argument does not fit; the message says what was expected and found.

    Warns:
        ConnectivityWarning: the degrees leave inputs unread or outputs unconditioned.
    """

    def __init__(
        self,
        features: int,
        blocks: int = 7,
        hidden_features: Sequence[int] = (512, 512),
        *,
        degrees: DegreeKind | Sequence[Tensor] | Sequence[Sequence[Tensor]] = "spread",
        order: OrderKind | Sequence[Tensor] = "alternate",
        log_scale_bound: float | None = 5.0,
        levels: int | None = None,
        seed: int | None = None,
        soft_bound: bool = False,
        init: Init = "linear",
        strict: bool = True,
        whitening: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1; found {blocks}")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        order_of_block = orders(order, features, blocks, generator=generator)
        # Degrees before weights, so that a seed gives the same ones whatever the weights' dtype and start are; and all
        # on the CPU, so that it gives one model on every device.
        drawn = [
            hidden_degrees(
                _degrees_of_block(degrees, i, blocks), features, hidden_features, levels=levels, generator=generator
            )
            for i in range(blocks)
        ]
        warn_if_disconnected(features, drawn)
        where = torch.device(torch.get_default_device() if device is None else device)
        built_on = "meta" if where.type == "meta" else "cpu"
        make: dict[str, Any] = {
            "strict": strict,
            "init": init,
            "generator": generator,
            "device": built_on,
            "dtype": dtype,
        }
        made_blocks = [MADE(features, hidden_features, degrees=d, **make) for d in drawn]
        affine = [
            AffineAutoregressive(made, log_scale_bound=log_scale_bound, soft_bound=soft_bound) for made in made_blocks
        ]
        first = [] if whitening is None else [GaussianWhitening(features, whitening, device=built_on, dtype=dtype)]
        transforms = [*first, *interleave_permutations(affine, order_of_block)]
        super().__init__(features, transforms, validate_args=validate_args)
        self.to(where)

    @classmethod
    def from_transforms(cls, features: int, transforms: Iterable[Transform]) -> MAF:
        """Builds a MAF from transforms that exist already."""
        flow = cls.__new__(cls)
        Flow.__init__(flow, features, transforms)
        return flow


def _degrees_of_block(degrees: Any, block: int, blocks: int) -> DegreeKind | Sequence[Tensor]:
    if isinstance(degrees, str) or not len(degrees) or isinstance(degrees[0], Tensor):
        return degrees  # type: ignore[return-value]  # a kind, or tensors per hidden layer for all blocks
    if len(degrees) != blocks:
        raise ValueError(f"degrees given per block need one entry per block: expected {blocks}, found {len(degrees)}")
    found: Sequence[Tensor] = degrees[block]
    return found


def interleave_permutations(blocks: Sequence[Transform], order_of_block: Sequence[Tensor]) -> list[Transform]:
    """Puts a Permutation wherever the frame changes: before a block whose order differs, and after the last to end in
    x's frame.

    Args:
        blocks: transforms that take dimensions in the order in which they stand.
        order_of_block: for each, the dimensions in the order in which it is to take them.
    """
    natural = torch.arange(order_of_block[0].numel(), device="cpu")
    frame = natural  # frame[k]: the dimension that stands at place k
    result: list[Transform] = []
    for block, order in zip((*blocks, None), (*order_of_block, natural), strict=True):
        if not torch.equal(frame, order):
            result.append(Permutation(frame.argsort()[order]))
            frame = order
        if block is not None:
            result.append(block)
    return result
