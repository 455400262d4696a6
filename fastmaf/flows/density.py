"""Densities: a base distribution seen through a composition of transforms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmaf import hooks
from fastmaf.bases import Base, StandardNormal
from fastmaf.flows.composition import Composition
from fastmaf.flows.rows import are_rows
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.transforms import Transform
from fastmaf.transforms.base import given
from fastmaf.validation import check_density, validates

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class Density(Composition):
    """The density of x of which z = f(x) has a base distribution q: log p(x) = log q(f(x)) + log |det df/dx|.

    The part of a ``Flow`` that evaluates densities, with its arguments and errors.
    """

    def __init__(
        self,
        features: int,
        transforms: Iterable[Transform],
        base: Base | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(features, transforms, validate_args=validate_args)
        self.base = StandardNormal(features) if base is None else base
        if not isinstance(self.base, Base):
            raise TypeError(f"base must be a fastmaf.Base; found {type(base).__name__}")
        if self.base.features != features:
            raise ValueError(f"base ({type(base).__name__}) has {self.base.features} features, the flow {features}")
        dtype = self._like().dtype
        for name, tensor in self.base.state_dict().items():
            if tensor.is_floating_point() and tensor.dtype != dtype:
                raise ValueError(f"base ({type(base).__name__}): {name} is {tensor.dtype}, the transforms {dtype}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "base" not in self._modules:  # of flows that were pickled without it
            self.base = StandardNormal(self.features)

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
        if not are_rows(x, context):
            return self._by_rows(Density.log_prob, "x", x, context)
        called = type(self).forward is not Composition.forward or hooks.is_called(self) or hooks.any_global()
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
        return type(self._modules["base"]) is StandardNormal and type(self)._base_log_prob is Density._base_log_prob

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
        if not are_rows(x, context):
            return self._by_rows(Density.nll_per_dim, "x", x, context)
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

    def _is_one_op(self) -> bool:
        return self._fuses_base and self._runs.single(self._transforms()) is not None
