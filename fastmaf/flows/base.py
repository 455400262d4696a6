"""Normalizing flows: sequences of transforms over a base distribution."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import torch
from torch import Generator, Tensor, nn

from fastmaf import hooks
from fastmaf.bases import Base, StandardNormal, base_config
from fastmaf.flows.completion import complete
from fastmaf.flows.distribution import FlowDistribution
from fastmaf.io.model_card import ModelCard
from fastmaf.io.write_flow import write_flow
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.kernels.float8 import FLOAT8
from fastmaf.naive import NaiveMAF
from fastmaf.nn import MADE, MaskedLinear, zero_padding_
from fastmaf.noise import normal_rows
from fastmaf.runs import Runs
from fastmaf.sharing import check_parts
from fastmaf.transforms import Transform, transform_config
from fastmaf.transforms.base import given
from fastmaf.validation import (
    as_sizes,
    as_tensor,
    batch_of,
    check_context,
    check_density,
    check_finite,
    check_samples,
    validates,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Shape: TypeAlias = int | Sequence[int]


class Flow(nn.Module):
    """A normalizing flow: invertible transforms f = f_k ∘ … ∘ f_1 from data x to z, of a base distribution q::

        log p(x) = log q(f(x)) + log |det df/dx|

    ``log_prob``, ``nll_per_dim``, ``forward`` and ``inverse`` accept tensors ``[..., D]`` of the dtype and device of
    the flow, and NumPy arrays and nested lists, which are converted to these. Each vector of D numbers is called a row;
    rows are numbered in row-major order. The transforms themselves operate on ``[N, D]``. Densities and
    log-determinants are in nats.

    A flow with transforms that take a context c is a conditional density p(x | c). Its methods then need a ``context``
    ``[..., C]``, whose batch shape is broadcast with that of x or z; transforms without a context ignore it.

    Consecutive affine autoregressive blocks run as one op. Blocks with hooks, pruned or parametrised weights or modules
    of other classes are called as modules instead, which is slower: ``inverse`` then calls the network of a block once
    per level.

    Ambient ``torch.autocast`` has no effect, forward or backward, since half precision would change densities by nats.
    Within an autocast region, bfloat16 and float16 inputs are converted to the dtype of the flow.

    As with every PyTorch model, a process that is forked after an op ran on several threads hangs at its next such op.
    Start processes with the method ``"spawn"`` or ``"forkserver"``, fork before the first op, or call
    ``torch.set_num_threads(1)`` first.

    Args:
        features: D.
        transforms: the transforms, in the order in which they are applied to x.
        base: q, such as a ``fastmaf.StudentT``, of the dtype and device of the transforms; None for the standard normal
            distribution, with which alone blocks and base run as one op.
        validate_args: whether values are checked, as in ``torch.distributions``; also an attribute. If so, methods
            raise ValueError for arguments that are not finite, and FloatingPointError for densities that are NaN and
            for samples that are not finite. Otherwise such numbers are returned; they affect only their own row. None
            checks on the CPU only, since checking on a GPU would wait for it. Values are never checked within
            ``torch.compile``, a trace, a CUDA graph or a functorch transform.

    Raises:
        TypeError: a transform is not a ``fastmaf.Transform``, or the base not a ``fastmaf.Base``.
        ValueError: the transforms, the base and the flow have different numbers of features, or another dtype, or
            transforms take contexts of different sizes.

    References:
        Papamakarios, Nalisnick, Rezende, Mohamed and Lakshminarayanan 2021, Normalizing Flows for Probabilistic
        Modeling and Inference.

    Example:
        >>> made = fastmaf.MADE(features=3, hidden_features=16)
        >>> flow = fastmaf.Flow(3, [fastmaf.Logit(3), fastmaf.AffineAutoregressive(made)])
        >>> flow.log_prob(torch.rand(5, 3)).shape
        torch.Size([5])
        >>> flow.sample((2, 4)).shape
        torch.Size([2, 4, 3])

        A conditional flow:

        >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16, context_features=2)
        >>> context = torch.randn(5, 2)
        >>> flow.log_prob(torch.randn(5, 3), context).shape
        torch.Size([5])
        >>> flow.sample(10, context).shape
        torch.Size([10, 5, 3])
    """

    validate_args: bool | None = None  # also of flows that were pickled without the attribute
    _class_in_files = "Flow"

    def __init__(
        self,
        features: int,
        transforms: Iterable[Transform],
        base: Base | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
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
        self.base = StandardNormal(features) if base is None else base
        if not isinstance(self.base, Base):
            raise TypeError(f"base must be a fastmaf.Base; found {type(base).__name__}")
        if self.base.features != features:
            raise ValueError(f"base ({type(base).__name__}) has {self.base.features} features, the flow {features}")
        dtype = self._like().dtype
        for name, tensor in self.base.state_dict().items():
            if tensor.is_floating_point() and tensor.dtype != dtype:
                raise ValueError(f"base ({type(base).__name__}): {name} is {tensor.dtype}, the transforms {dtype}")
        sizes = {transform.context_features for transform in self._transforms()} - {0}
        if len(sizes) > 1:
            raise ValueError(f"transforms take contexts of different sizes: found context_features {sorted(sizes)}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Flows that were pickled without these.
        self.__dict__.setdefault("_runs", Runs())
        if "base" not in self._modules:
            self.base = StandardNormal(self.features)

    def _transforms(self) -> list[Transform]:
        # Not through nn.Module.__getattr__, which is slow.
        transforms = self._modules["transforms"]
        assert transforms is not None
        return [transform for transform in transforms._modules.values() if isinstance(transform, Transform)]

    @property
    def context_features(self) -> int:
        """C, the size of the context; 0 for a flow without one."""
        return max([0, *[transform.context_features for transform in self._transforms()]])

    def _check(self, name: str, x: Tensor, *, finite: bool = False) -> None:
        if x.shape[-1:] != (self.features,):
            raise ValueError(f"{name} must have shape [..., {self.features}]; found {list(x.shape)}")
        self._check_like(name, x)
        if finite and validates(self.validate_args, x):
            check_finite(name, x)

    def _check_like(self, name: str, x: Tensor) -> None:
        like = self._like()
        if x.dtype != like.dtype or x.device != like.device:
            raise ValueError(
                f"{name} must be {like.dtype} on {like.device}, like the flow; found {x.dtype} on {x.device}"
            )

    def _as_context(self, context: Tensor | ArrayLike | None) -> Tensor | None:
        """Returns a context ``[..., C]`` as a tensor, after checks; that one is missing is found by ``given``."""
        if context is None:
            return None
        context = as_tensor("context", context, self._like())
        check_context(context, self.context_features)
        self._check_like("context", context)
        if validates(self.validate_args, context):
            check_finite("context", context.reshape(-1, context.shape[-1]))
        return context

    def _are_rows(self, x: Tensor | ArrayLike, context: Tensor | ArrayLike | None) -> TypeGuard[Tensor]:
        """Returns whether ``x`` is ``[N, D]``, and ``context`` ``[N, C]`` or none."""
        if not isinstance(x, Tensor) or x.dim() != 2:
            return False
        return context is None or (isinstance(context, Tensor) and context.dim() == 2 and len(context) == len(x))

    def _by_rows(
        self, method: Callable[[Flow, Tensor, Tensor | None], Any], name: str, x: Tensor | ArrayLike, context: Any
    ) -> Any:
        """Calls a method of ``[N, D]`` and ``[N, C]`` with rows, and restores the batch shape in its results."""
        x = as_tensor(name, x, self._like())
        self._check(name, x)
        context, batch = self._as_context(context), x.shape[:-1]
        if context is not None:
            batch = batch_of(name, x, context)
            x = x.expand(*batch, self.features)
            context = context.expand(*batch, context.shape[-1]).reshape(-1, context.shape[-1])
        results = method(self, x.reshape(-1, self.features), context)
        if isinstance(results, Tensor):
            return results.reshape(batch + results.shape[1:])
        return tuple(result.reshape(batch + result.shape[1:]) for result in results)

    @outside_autocast
    def forward(self, x: Tensor | ArrayLike, context: Tensor | ArrayLike | None = None) -> tuple[Tensor, Tensor]:
        """Maps data to the base: z = f(x).

        Args:
            x: ``[..., D]``.
            context: ``[..., C]``, of a batch shape that broadcasts with that of ``x``; None for a flow without one.

        Returns:
            ``z`` ``[..., D]`` and ``ladj`` ``[...]``, ``log |det dz/dx|`` in nats.

        Raises:
            ValueError: the shape, dtype or device of ``x`` or ``context`` does not fit the flow, a context is missing
                or unexpected, or, with ``validate_args``, one of them is not finite.
            TypeError: ``x`` or ``context`` is neither a tensor nor an array of numbers.

        Example:
            >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16)
            >>> z, ladj = flow(torch.randn(5, 3))
            >>> z.shape, ladj.shape
            (torch.Size([5, 3]), torch.Size([5]))
        """
        if not self._are_rows(x, context):
            return self._by_rows(Flow.forward, "x", x, context)
        self._check("x", x, finite=True)
        return self._runs.forward(self._transforms(), x, self._as_context(context))

    @outside_autocast
    def inverse(self, z: Tensor | ArrayLike, context: Tensor | ArrayLike | None = None) -> tuple[Tensor, Tensor]:
        """Maps the base to data: x = f⁻¹(z), exactly.

        Dropout is ignored: in training mode it inverts the flow in evaluation mode.

        Args:
            z: ``[..., D]``.
            context: as ``forward``.

        Returns:
            ``x`` ``[..., D]`` and ``ladj`` ``[...]``, ``log |det dx/dz|`` in nats.

        Raises:
            ValueError, TypeError: as ``forward``.
            NotInvertibleError: as ``sample``.

        Example:
            >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16)
            >>> x, ladj = flow.inverse(torch.randn(5, 3))
            >>> torch.allclose(flow(x)[1], -ladj, atol=1e-4)
            True
        """
        if not self._are_rows(z, context):
            return self._by_rows(Flow.inverse, "z", z, context)
        self._check("z", z, finite=True)
        return self._runs.inverse(self._transforms(), z, self._as_context(context))

    @outside_autocast
    def log_prob(self, x: Tensor | ArrayLike, context: Tensor | ArrayLike | None = None) -> Tensor:
        """Returns the log-density of data, in nats: of a flow with a context, log p(x | context).

        It is −inf outside of the domain of a transform (``Logit``), and where ½z² of a normal base overflows.

        Args:
            x: ``[..., D]``.
            context: as ``forward``.

        Returns:
            ``[...]``, the batch shape of ``x``, or that of ``x`` and ``context`` together.

        Raises:
            ValueError, TypeError: as ``forward``.
            FloatingPointError: with ``validate_args``, a density is NaN. The message names the transform or parameter
                that causes it.

        Example:
            >>> flow = fastmaf.MAF(features=2, blocks=2, hidden_features=16)
            >>> flow.log_prob([[0.0, 1.0], [0.5, -0.5]]).shape
            torch.Size([2])
            >>> loss = -flow.log_prob(torch.randn(64, 2)).mean()
            >>> loss.backward()
        """
        if not self._are_rows(x, context):
            return self._by_rows(Flow.log_prob, "x", x, context)
        called = type(self).forward is not Flow.forward or hooks.is_called(self) or hooks.any_global()
        standard = not called and self._fuses_base and context is None
        result = self._runs.log_density(self._transforms(), x) if standard else None
        given_context: Tensor | None = None
        if result is None:
            self._check("x", x)
            given_context = self._as_context(context)
            if called:
                z, ladj = self(x) if given_context is None else self(x, given_context)
            else:
                z, ladj = self._runs.forward(self._transforms(), x, given_context)
            result = ladj + self._base_log_prob(z)
        if validates(self.validate_args, x):
            check_density(self, "log_prob", result, x, given_context)
        return result

    @property
    def has_standard_base(self) -> bool:
        """Whether z is standard normal: the base is a ``StandardNormal``, and no subclass has replaced its density."""
        return type(self._modules["base"]) is StandardNormal and type(self)._base_log_prob is Flow._base_log_prob

    @property
    def _fuses_base(self) -> bool:
        """Whether the op of a run of all transforms may compute the density of the base, too."""
        return self.has_standard_base and not hooks.is_called(self.base)

    def _base_log_prob(self, z: Tensor) -> Tensor:
        result: Tensor = self.base(z)
        return result

    @outside_autocast
    def nll_per_dim(self, x: Tensor | ArrayLike, context: Tensor | ArrayLike | None = None) -> Tensor:
        """Returns the contribution of each dimension to the negative log-likelihood, in nats::

            nll_per_dim(x)[d] = ½ z[d]² + ½ log 2π + Σ over blocks log_scale[d],    Σ_d nll_per_dim(x)[d] = −log_prob(x)

        The log-scales of each block are assigned to the dimensions of x that they belong to. Of another base than the
        standard normal one, −log q(z[d]) stands in place of the first two terms.

        Args:
            x: ``[..., D]``.
            context: as ``forward``.

        Returns:
            ``[..., D]``, with the batch shape of ``log_prob``.

        Raises:
            ValueError, TypeError, FloatingPointError: as ``log_prob``.
            NotImplementedError: a transform of a user's class lacks ``forward_per_dim``, or the dimensions of the base
                are not independent.

        Example:
            >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16)
            >>> x = torch.randn(5, 3)
            >>> torch.allclose(flow.nll_per_dim(x).sum(dim=-1), -flow.log_prob(x), atol=1e-4)
            True
        """
        if not self._are_rows(x, context):
            return self._by_rows(Flow.nll_per_dim, "x", x, context)
        self._check("x", x)
        context = self._as_context(context)
        z, terms = x, torch.zeros_like(x)
        for transform in self._transforms():
            of = given(transform, context)
            called = transform(z, *of)[0] if hooks.is_called(transform) or hooks.any_global() else None
            z, terms = transform.forward_per_dim(z, terms, *of)
            z = z if called is None else called
        result = self.base.nll_per_dim(z, terms)
        if validates(self.validate_args, x):
            check_density(self, "nll_per_dim", result, x, context)
        return result

    @torch.no_grad()
    def sample(
        self,
        shape: Shape = (),
        context: Tensor | ArrayLike | None = None,
        *,
        generator: Generator | None = None,
        seed: int | None = None,
        start: int = 0,
    ) -> Tensor:
        """Draws samples without recording gradients; ``rsample`` records them.

        Args:
            shape: the batch shape: ``()`` draws one sample ``[D]``, an integer n draws ``[n, D]``, and a shape draws
                ``[*shape, D]``.
            context: ``[*batch, C]``, for which the samples are ``[*shape, *batch, D]``: as many as ``shape`` says for
                each context, as those of a ``torch.distributions.Distribution`` of batch shape ``batch``. None for a
                flow without a context.
            generator: the source of the noise, on the device of the flow. A row's noise depends on the number of rows.
            seed: makes each row repeatable, since its noise depends only on ``seed`` and the number of the row:
                ``sample(8, seed=1)`` has the noise of ``sample(3, seed=1)`` and ``sample(5, seed=1, start=3)``. The
                noise is bitwise equal on one machine, and on all devices to the rounding of float64. The samples agree
                to the rounding of the dtype (usually to 1e-6 of their size in float32), since batches of different
                sizes are summed in different orders.
            start: the number of the first row; requires ``seed``.

        Returns:
            ``[*shape, D]``, or ``[*shape, *batch, D]`` with a context.

        Raises:
            TypeError: ``shape`` is neither an integer nor a sequence of integers.
            ValueError: ``shape`` has a negative entry, ``generator``, ``seed`` and ``start`` contradict each other, or
                a context is missing, unexpected or of another size, dtype or device.
            FloatingPointError: with ``validate_args``, a sample is not finite. The message names the transform.
            NotInvertibleError: a block has the leaky output mask of the published notebook, or a ``BatchNorm`` is in
                training mode.

        Example:
            >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16)
            >>> flow.sample().shape, flow.sample(5).shape, flow.sample((5, 2)).shape
            (torch.Size([3]), torch.Size([5, 3]), torch.Size([5, 2, 3]))
            >>> torch.allclose(flow.sample(8, seed=1)[3:], flow.sample(5, seed=1, start=3), atol=1e-4)
            True
        """
        return self.rsample(shape, context, generator=generator, seed=seed, start=start)

    @torch.no_grad()
    def sample_and_log_prob(
        self,
        shape: Shape = (),
        context: Tensor | ArrayLike | None = None,
        *,
        generator: Generator | None = None,
        seed: int | None = None,
        start: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Draws samples and computes their log-densities in one pass, without recording gradients.

        Args:
            shape, context, generator, seed, start: as ``sample``.

        Returns:
            The samples, as ``sample``, and their log-densities in nats, of their batch shape.

        Raises:
            TypeError, ValueError, FloatingPointError, NotInvertibleError: as ``sample``.

        Example:
            >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16)
            >>> x, log_prob = flow.sample_and_log_prob(100)
            >>> entropy = -log_prob.mean()
        """
        return self.rsample_and_log_prob(shape, context, generator=generator, seed=seed, start=start)

    def rsample(
        self,
        shape: Shape = (),
        context: Tensor | ArrayLike | None = None,
        *,
        generator: Generator | None = None,
        seed: int | None = None,
        start: int = 0,
    ) -> Tensor:
        """Draws samples that are differentiable with respect to the parameters of the flow.

        Args:
            shape, context, generator, seed, start: as ``sample``.

        Returns:
            ``[*shape, D]``.

        Raises:
            TypeError, ValueError, FloatingPointError, NotInvertibleError: as ``sample``.
            NotImplementedError: samples of the base (``GaussianMixture``) are not differentiable.

        Example:
            >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16)
            >>> flow.rsample(5).square().mean().backward()
        """
        batch, rows = self._batch_of_samples(shape, context)
        batch, z = self._base_sample(batch, generator, seed, start)
        x, _ = self._inverse_of_noise(z, rows)
        if validates(self.validate_args, x):
            check_samples(self, z, x, context=rows)
        return x if len(batch) == 1 else x.reshape(*batch, self.features)

    def rsample_and_log_prob(
        self,
        shape: Shape = (),
        context: Tensor | ArrayLike | None = None,
        *,
        generator: Generator | None = None,
        seed: int | None = None,
        start: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Draws samples and computes their log-densities, both differentiable with respect to the parameters.

        Args:
            shape, context, generator, seed, start: as ``sample``.

        Returns:
            The samples, as ``sample``, and their log-densities in nats, of their batch shape.

        Raises:
            TypeError, ValueError, FloatingPointError, NotInvertibleError, NotImplementedError: as ``rsample``.

        Example:
            >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16)
            >>> x, log_prob = flow.rsample_and_log_prob(64)
            >>> target = torch.distributions.Normal(1.0, 2.0)
            >>> kl = (log_prob - target.log_prob(x).sum(dim=-1)).mean()
            >>> kl.backward()
        """
        batch, rows = self._batch_of_samples(shape, context)
        batch, z = self._base_sample(batch, generator, seed, start)
        x, ladj = self._inverse_of_noise(z, rows)
        log_prob = self._base_log_prob(z) - ladj
        if validates(self.validate_args, x):
            check_samples(self, z, x, log_prob, context=rows)
        return (x, log_prob) if len(batch) == 1 else (x.reshape(*batch, self.features), log_prob.reshape(batch))

    def distribution(
        self, context: Tensor | ArrayLike | None = None, *, validate_args: bool | None = None
    ) -> FlowDistribution:
        """Returns the flow as a ``torch.distributions.Distribution``.

        Args:
            context: ``[*batch, C]``, what the flow is conditioned on, which makes ``batch`` the batch shape; None for a
                flow without a context.
            validate_args: as of ``torch.distributions``.

        Raises:
            TypeError: the context is neither a tensor nor an array of numbers.

        Example:
            >>> flow = fastmaf.MAF(features=2, blocks=2, hidden_features=16)
            >>> prior = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1.0), 1)
            >>> guide = flow.distribution()
            >>> z = guide.rsample((64,))
            >>> (guide.log_prob(z) - prior.log_prob(z)).mean().backward()
        """
        return FlowDistribution(self, context, validate_args=validate_args)

    @torch.no_grad()
    @outside_autocast
    def complete(
        self,
        x: Tensor | ArrayLike,
        known: Tensor | ArrayLike,
        shape: Shape = (),
        context: Tensor | ArrayLike | None = None,
        *,
        generator: Generator | None = None,
        seed: int | None = None,
        start: int = 0,
    ) -> Tensor:
        """Draws the unknown dimensions of x given the known ones, exactly, without recording gradients.

        The known dimensions must come first in the order of every block. In a ``MAF`` of ``order="natural"`` these are
        the first k dimensions, or, with an order of one's own for all blocks, the first k of that order. Blocks whose
        orders differ, such as those of ``order="alternate"``, need a set with which all orders begin. Dimensions
        between two consecutive degrees of the last hidden layer do not depend on one another (see ``levels``) and count
        as of any order. Permutations, element-wise transforms and splines keep the property, ``GaussianWhitening`` and
        ``LocalAutoregressive`` do not.

        The log-density of a completion given the known dimensions is the part of ``log_prob`` of the others,
        ``-flow.nll_per_dim(x)[..., ~known].sum(-1)``.

        Args:
            x: ``[*batch, D]``; what stands in unknown dimensions is ignored and may be NaN.
            known: bool ``[D]``, which dimensions are known.
            shape: the number of completions of each row, or their shape.
            context: of each row, for a flow with one; its batch shape and that of ``x`` broadcast.
            generator, seed, start: as ``sample``; the noise is that of ``sample((*shape, *batch))``, of which that of
                the known dimensions is not used.

        Returns:
            ``[*shape, *batch, D]``, in which the known dimensions are equal to those of ``x``.

        Raises:
            ValueError: the order of a block, or a transform of another class, makes known dimensions depend on others;
                the base is not standard normal; ``known`` is no mask of D; or as ``forward`` and ``sample``.
            TypeError, FloatingPointError, NotInvertibleError: as ``sample``.

        Example:
            >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16, order="natural")
            >>> x = flow.complete([0.5, -1.0, float("nan")], [True, True, False], shape=4)
            >>> x[:, :2].unique(dim=0)
            tensor([[ 0.5000, -1.0000]])
            >>> log_prob = -flow.nll_per_dim(x)[:, 2:].sum(-1)  # of x[2] given x[0] and x[1]
        """
        return complete(self, x, known, shape, context, generator, seed, start)

    def _batch_of_samples(self, shape: Shape, context: Any) -> tuple[tuple[int, ...], Tensor | None]:
        """Returns the batch shape of samples, and the context ``[N, C]`` of each."""
        batch, context = as_sizes("shape", shape), self._as_context(context)
        if context is None:
            return batch, None
        batch = (*batch, *context.shape[:-1])
        return batch, context.expand(*batch, context.shape[-1]).reshape(-1, context.shape[-1])

    def _inverse_of_noise(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``inverse`` of noise, which needs no checks."""
        replaced = type(self).inverse is not Flow.inverse or "inverse" in vars(self)
        if not replaced:
            return self._unchecked_inverse(z, context)
        return self.inverse(z) if context is None else self.inverse(z, context)

    @outside_autocast
    def _unchecked_inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._runs.inverse(self._transforms(), z, context)

    def _base_sample(
        self, shape: Shape, generator: Generator | None, seed: int | None, start: int
    ) -> tuple[tuple[int, ...], Tensor]:
        """Returns the batch shape of the samples and z ``[N, D]`` of all of them, drawn from the base."""
        batch, like, base = as_sizes("shape", shape), self._like(), self.base
        if torch.is_grad_enabled() and not base.has_rsample:
            raise NotImplementedError(
                f"samples of a {type(base).__name__} are not differentiable with respect to all of its parameters: use "
                "sample or sample_and_log_prob, or another base"
            )
        n, columns = math.prod(batch), base.noise_features
        if seed is None:
            if start:
                raise ValueError(f"start numbers the rows of a seed's noise; found start = {start} without a seed")
            noise = torch.randn(n, columns, generator=generator, device=like.device, dtype=like.dtype)
            return batch, base.from_noise(noise)
        if generator is not None:
            raise ValueError("expected a generator or a seed as the source of the noise; found both")
        return batch, base.from_noise(normal_rows(n, columns, seed, start, like))

    def _like(self) -> Tensor:
        """Returns a tensor of the flow's dtype and device, not a weight that ``to_inference`` stored in fewer bits."""
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
        *,
        card: str | os.PathLike[str] | ModelCard | None = None,
    ) -> None:
        """Writes the flow to a safetensors file; ``fastmaf.load`` reads it.

        The file is replaced atomically: a crash leaves either the old file or the new one. Blocks, layers and
        parameters that are used in several places are shared again after loading.

        Args:
            path: the file, usually named ``*.safetensors``.
            metadata: further strings; ``fastmaf.load_with_extras`` returns them.
            extras: further tensors; ``fastmaf.load_with_extras`` returns them.
            card: a file for a model card in Markdown, in which architecture, size and versions are filled in and the
                rest is left to you; a ``fastmaf.io.model_card.ModelCard`` fills in more.

        Raises:
            OutputError: the card would replace a card that was edited, or another file; nothing was written.
            ValueError: ``metadata`` contains the reserved key ``"fastmaf"``, a tensor of the flow is not finite or
                on the device ``meta``, or two tensors of the flow overlap in memory without being the same tensor.
            TypeError: the class of a transform is not in ``fastmaf.transforms.TRANSFORMS``, that of the base not in
                ``fastmaf.bases.BASES``, or a module is pruned, parametrised or of another class.
            OSError: the file cannot be written; an earlier file stays intact.

        Example:
            >>> import pathlib, tempfile
            >>> flow = fastmaf.MAF(features=3, blocks=1, hidden_features=16)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     flow.save(pathlib.Path(folder, "flow.safetensors"), metadata={"unit": "mm"})

            With a model card:

            >>> with tempfile.TemporaryDirectory() as folder:
            ...     card = pathlib.Path(folder, "MODEL_CARD.md")
            ...     flow.save(pathlib.Path(folder, "flow.safetensors"), card=card)
            ...     "| Hidden units of a block | (16) |" in card.read_text("utf-8")
            True
        """
        config = self.config()
        if card is not None:
            card = card if isinstance(card, ModelCard) else ModelCard(card)
            card.check(path)
        write_flow(self, config, path, metadata, extras)
        if card is not None:
            card.write(self, config, path)

    def config(self) -> dict[str, Any]:
        """Returns the configuration of the flow as it is saved: class, features, transforms and, unless it is the
        standard normal one, base, in plain JSON types.

        Raises:
            TypeError: the class of a transform is not in ``fastmaf.transforms.TRANSFORMS``, that of the base not in
                ``fastmaf.bases.BASES``, or a module is pruned, parametrised or of another class.
        """
        check_parts(self)
        transforms = [transform_config(transform) for transform in self.transforms]
        base = {} if type(self.base) is StandardNormal else {"base": base_config(self.base)}
        return {"class": self._class_in_files, "features": self.features, "transforms": transforms, **base}

    def to_inference(self, dtype: torch.dtype = torch.bfloat16) -> Flow:
        """Returns a frozen copy for scoring and sampling, with weights stored in ``dtype``.

        The weights take half the memory as bfloat16 and a quarter as float8: 67 MB, not 268, of seven blocks of 12,288
        features and (512, 512) hidden units. Activations, biases and sums keep the dtype of the flow (float32). The
        copy is an exact flow: ``inverse`` inverts ``forward``. Its densities differ from the original's by the rounding
        of the weights, a relative 2⁻⁸ each at most with bfloat16 and 2⁻⁴ with float8: compare both on data before
        float8 is relied upon. In three trained models z changed by 0.3 to 0.8 % with bfloat16 and by 5 to 15 % with
        float8, norm-wise. Its parameters require no gradients.

        Only the Triton kernels read float8 weights. The native ones take bfloat16 weights, which are made of them at
        the first call and kept, so that on a CPU float8 saves space in files alone; the torch backend converts them in
        every call.

        Args:
            dtype: ``torch.bfloat16`` or ``torch.float8_e4m3fn`` for a float32 flow, or the dtype of the flow for a
                plain frozen copy.

        Raises:
            ValueError: another ``dtype``, or a weight that is to be float8 is not finite.

        Example:
            >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16)
            >>> flow.to_inference().sample(4).shape
            torch.Size([4, 3])
        """
        dtype_of_flow = self._like().dtype
        rounds = dtype in (torch.bfloat16, FLOAT8)
        if not (dtype_of_flow == torch.float32 if rounds else dtype == dtype_of_flow):
            raise ValueError(
                f"weights for inference are stored as torch.bfloat16 or {FLOAT8} beside float32, or in the flow's "
                f"dtype {dtype_of_flow}; found {dtype}"
            )
        # Given to deepcopy as its memo, so that the weights are not copied in full first.
        rounded: dict[int, Any] = {}
        scale_of: dict[int, float] = {}
        layers = self._layers()
        for layer in layers:
            if id(layer.weight) not in rounded:
                weight, scale = layer.stored_as(dtype)
                rounded[id(layer.weight)] = nn.Parameter(weight, requires_grad=False)
                scale_of[id(layer.weight)] = scale
        flow = copy.deepcopy(self, rounded)
        for layer, original in zip(flow._layers(), layers, strict=True):
            layer.weight_scale = scale_of[id(original.weight)]
        return flow.requires_grad_(False).eval()

    def to_naive(self) -> NaiveMAF:
        """Returns a copy as a dense model, which multiplies masks and weights and inverts with one pass per dimension.

        It has no dropout.

        Raises:
            TypeError: the flow has transforms other than permutations and affine autoregressive blocks, or another base
                than the standard normal distribution.

        Example:
            >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16)
            >>> x = torch.randn(5, 3)
            >>> torch.allclose(flow.to_naive().log_prob(x), flow.log_prob(x), atol=1e-4)
            True
        """
        if not self.has_standard_base:
            raise TypeError(f"a naive MAF has a standard normal base; found {type(self.base).__name__}")
        return NaiveMAF.from_transforms(self.features, self._transforms())

    @property
    def visible_weights(self) -> int:
        """Number of weights that the masks let through."""
        return sum(layer.layout.visible for layer in self._layers())

    @property
    def stored_weights(self) -> int:
        """Number of stored weights: the visible ones and padding."""
        return sum(layer.layout.numel for layer in self._layers())

    def zero_padding_(self) -> None:
        """Sets the padding of all packed weights to zero.

        Ops do so before they read a weight, and ``state_dict`` does before it returns one. Call it after writing to
        parameters where other code reads ``weight``, such as a CUDA graph.
        """
        zero_padding_(self._layers())

    def _layers(self) -> list[MaskedLinear]:
        return [layer for made in self._mades() for layer in made.layers]

    def _is_one_op(self) -> bool:
        return self._fuses_base and self._runs.single(self._transforms()) is not None

    def _saved_numel(self, n: int) -> int:
        return self._runs.saved_numel(self._transforms(), n)

    def _mades(self) -> list[MADE]:
        return [module for module in self.modules() if isinstance(module, MADE)]


def _parameters(module: nn.Module) -> Iterator[Tensor]:
    """Yields the parameters of a module, shared ones repeatedly; far faster to its first item than ``parameters()``."""
    modules = [module]
    while modules:
        one = modules.pop()
        for parameter in one._parameters.values():
            if parameter is not None:
                yield parameter
        modules += [child for child in reversed(one._modules.values()) if child is not None]
