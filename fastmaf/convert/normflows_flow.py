"""A converted flow with the methods of ``normflows.NormalizingFlow``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastmaf.convert.converted import ConditionalBlock, ConvertedFlow
from fastmaf.io.tensor_file import read_tensors, write_tensors
from fastmaf.transforms import ElementwiseAffine, Transform


class NormflowsFlow(ConvertedFlow):
    """A converted flow with the methods of ``normflows.NormalizingFlow``, and the same numbers for a seed.

    Made by ``from_normflows``; see there for an example.

    Attributes:
        p: the target of the source, itself, or None.
    """

    def __init__(
        self,
        features: int,
        parts: list[Transform | ConditionalBlock],
        base: ElementwiseAffine | None,
        source: Any,
    ) -> None:
        super().__init__(features, parts, base, source)
        self.p = source.p

    def forward(self, z: Tensor) -> Tensor:
        """Maps the base to data: ``x`` ``[N, D]`` of ``z`` ``[N, D]``."""
        return self.from_latent(z)[0]

    def forward_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``x`` and ``log |det dx/dz|`` ``[N]``."""
        return self.from_latent(z)

    def inverse(self, x: Tensor) -> Tensor:
        """Maps data to the base: ``z`` ``[N, D]`` of ``x`` ``[N, D]``."""
        return self.to_latent(x)[0]

    def inverse_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``z`` and ``log |det dz/dx|`` ``[N]``."""
        return self.to_latent(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """Returns the log-density ``[N]`` of ``x`` ``[N, D]``."""
        return self.log_density(x)

    def sample(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Draws ``[num_samples, D]``, and returns the log-densities beside the samples; differentiable."""
        return self.draw(num_samples)

    def forward_kld(self, x: Tensor) -> Tensor:
        """Returns the mean of the negative log-density of ``x``: the loss of maximum likelihood."""
        return -self.log_prob(x).mean()

    def reverse_kld(self, num_samples: int = 1, beta: float = 1.0, score_fn: bool = True) -> Tensor:
        """Returns an estimate of the reverse Kullback-Leibler divergence, E[log q(x) − beta log p(x)].

        Args:
            num_samples: number of samples of the flow q.
            beta: the weight of the target's log-density.
            score_fn: whether the gradient contains that of log q(x) for fixed x, whose mean is zero.
        """
        x, log_q = self.draw(num_samples)
        if not score_fn:
            with self._without_gradients():
                log_q = self.log_prob(x)
        return log_q.mean() - beta * self._target(x).mean()

    def reverse_alpha_div(self, num_samples: int = 1, alpha: float = 1, dreg: bool = False) -> Tensor:
        """Returns an estimate of the alpha divergence with samples of the flow.

        Args:
            num_samples: number of samples of the flow q.
            alpha: of the divergence.
            dreg: whether to use the doubly reparametrised estimate of the gradient.
        """
        x, log_q = self.draw(num_samples)
        log_p = self._target(x)
        if not dreg:
            sign = (alpha > 1) - (alpha < 1)
            return sign * torch.logsumexp(alpha * (log_p - log_q), 0)
        fixed = (log_p - log_q).detach().exp() ** alpha
        with self._without_gradients():
            log_q = self.log_prob(x)
        fixed = fixed / fixed.mean()
        weights = (1 - alpha) * fixed + alpha * fixed**2
        return -alpha * (weights * (log_p - log_q).exp().log()).mean()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state dict of this flow as safetensors; normflows pickles it."""
        write_tensors({name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}, path, {})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Loads a file of ``save``; nothing is unpickled.

        Raises:
            fastmaf.CheckpointError: it is no safetensors file, such as one that normflows wrote.
        """
        self.load_state_dict(read_tensors(path)[0])

    def _target(self, x: Tensor) -> Tensor:
        if self.p is None:
            raise ValueError("this loss needs a target; the flow was made without p")
        return self.p.log_prob(x)  # type: ignore[no-any-return]

    @contextmanager
    def _without_gradients(self) -> Iterator[None]:
        trainable = [parameter for parameter in self.parts.parameters() if parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def _source_log_prob(self, source: Any, x: Tensor, context: Tensor | None) -> Tensor:
        return source.log_prob(x)  # type: ignore[no-any-return]

    def _source_to_latent(self, source: Any, x: Tensor, context: Tensor | None) -> Tensor:
        return source.inverse(x)  # type: ignore[no-any-return]

    def _source_from_latent(self, source: Any, z: Tensor, context: Tensor | None) -> Tensor:
        return source.forward(z)  # type: ignore[no-any-return]
