"""A converted flow with the methods of ``nflows.flows.Flow``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmaf.convert.converted import ConditionalBlock, ConvertedFlow
from fastmaf.convert.evaluation import copied
from fastmaf.nn import MADE
from fastmaf.transforms import ElementwiseAffine, Transform


class NflowsFlow(ConvertedFlow):
    """A converted flow with the methods of ``nflows.flows.Flow``, and the same numbers for a seed.

    Made by ``from_nflows``; see there for an example.
    """

    def __init__(
        self, features: int, parts: list[Transform | ConditionalBlock], base: ElementwiseAffine | None, source: Any
    ) -> None:
        super().__init__(features, parts, base, source)
        self._log_z = float(source._distribution._log_z)  # as it is rounded there
        self._ignores_context = not any(isinstance(module, MADE) for module in self.modules())  # as nflows does
        self.embedding_net = copied(source._embedding_net)

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the log-density ``[N]`` of ``inputs`` ``[N, D]`` given ``context`` ``[N, C]``."""
        inputs = torch.as_tensor(inputs)
        if context is not None and len(inputs) != len(context):
            raise ValueError(f"expected a context for each of {len(inputs)} inputs; found {len(context)}")
        return self.log_density(inputs, self._embedded(context))

    def transform_to_noise(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the noise ``[N, D]`` of ``inputs``."""
        return self.to_latent(inputs, self._embedded(context))[0]

    def sample(self, num_samples: int, context: Tensor | None = None, batch_size: int | None = None) -> Tensor:
        """Draws ``[num_samples, D]``, or ``[C, num_samples, D]`` with a context of C rows; differentiable."""
        if batch_size is None:
            return self.sample_and_log_prob(num_samples, context)[0]
        _check_count("batch_size", batch_size)
        _check_count("num_samples", num_samples)
        sizes = [min(batch_size, num_samples - start) for start in range(0, num_samples, batch_size)]
        return torch.cat([self.sample_and_log_prob(size, context)[0] for size in sizes], 0)

    def sample_and_log_prob(self, num_samples: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws samples as ``sample``, and returns their log-densities beside them."""
        _check_count("num_samples", num_samples)
        if context is None:
            return self.draw(num_samples)
        embedded = self._embedded(context)
        assert embedded is not None
        x, log_prob = self.draw(len(embedded) * num_samples, embedded.repeat_interleave(num_samples, 0))
        shape = (len(embedded), num_samples)
        return x.unflatten(0, shape), log_prob.unflatten(0, shape)

    def _embedded(self, context: Tensor | None) -> Tensor | None:
        return None if context is None else self.embedding_net(torch.as_tensor(context))  # type: ignore[no-any-return]

    def _source_log_prob(self, source: Any, x: Tensor, context: Tensor | None) -> Tensor:
        return source.log_prob(x, context)  # type: ignore[no-any-return]

    def _source_to_latent(self, source: Any, x: Tensor, context: Tensor | None) -> Tensor:
        return source.transform_to_noise(x, context)  # type: ignore[no-any-return]

    def _source_from_latent(self, source: Any, z: Tensor, context: Tensor | None) -> Tensor:
        return source._transform.inverse(z, source._embedding_net(context))[0]  # type: ignore[no-any-return]


def _check_count(name: str, count: Any) -> None:
    if not isinstance(count, int) or count < 1:
        raise TypeError(f"{name} must be a positive integer; found {count!r}")
