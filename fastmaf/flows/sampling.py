"""Samples: the inverse of a composition of transforms, applied to samples of the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Generator, Tensor

from fastmaf.flows.completion import complete
from fastmaf.flows.density import Density
from fastmaf.flows.rows import rows_of
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.noise import normal_noise
from fastmaf.validation import as_sizes, check_samples, validates

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Shape: TypeAlias = int | Sequence[int]


class Sampler(Density):
    """A density with exact samples: x = f⁻¹(z) of z from the base.

    The part of a ``Flow`` that draws samples, with its arguments and errors.
    """

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

    @outside_autocast
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
            As ``sample``.

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

    @outside_autocast
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
                a normalisation is in training mode; the base is not standard normal; ``known`` is no mask of D; or as
                ``forward`` and ``sample``.
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
        return batch, rows_of(context, batch)

    def _base_sample(
        self, shape: Shape, generator: Generator | None, seed: int | None, start: int
    ) -> tuple[tuple[int, ...], Tensor]:
        """Returns the batch shape of the samples and z ``[N, D]`` of all of them, drawn from the base."""
        batch, base = as_sizes("shape", shape), self.base
        if torch.is_grad_enabled() and not base.has_rsample:
            raise NotImplementedError(
                f"samples of a {type(base).__name__} are not differentiable with respect to all of its parameters: use "
                "sample or sample_and_log_prob, or another base"
            )
        noise = normal_noise(math.prod(batch), base.noise_features, self._like(), generator, seed, start)
        return batch, base.from_noise(noise)
