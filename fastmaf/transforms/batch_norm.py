"""Batch normalisation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmaf.transforms.base import NotInvertibleError, Transform


class BatchNorm(Transform):
    """Batch normalisation as a transform::

        z[d] = (x[d] − mean[d]) / √(variance[d] + eps) · exp(log_scale[d]) + shift[d]
        ladj = Σ_d (log_scale[d] − ½ log(variance[d] + eps))

    In training, mean and variance are those of the batch, through which gradients pass, and the running ones move
    towards them, ``running ← (1 − momentum) running + momentum batch`` (the variance with divisor N − 1 there, N
    elsewhere), except where a batch is not finite. In evaluation they are the running ones.

    In training the log-density of a row depends on its batch, and is none that integrates to 1. There is no inverse
    then. Evaluate and sample after ``flow.eval()``: every module is in training mode at first, a flow from
    ``fastmaf.load``, too. Training steps are not replayed as CUDA graphs, as the running statistics change in each.
    Under ``DistributedDataParallel`` each process normalises its own batch, and the running statistics are those of the
    first process, as with ``torch.nn.BatchNorm1d``.

    Args:
        features: D.
        eps: is added to the variance.
        momentum: the weight of a batch in the running statistics, within 0..1.
        device: the device of parameters and buffers.
        dtype: the dtype of parameters and buffers.

    Attributes:
        shift, log_scale: parameters ``[D]``, zero at the start.
        running_mean, running_var: buffers ``[D]``, 0 and 1 at the start.

    Raises:
        ValueError: an argument is out of range, or, by ``forward`` in training, the batch has less than two rows.
        NotInvertibleError: by ``inverse`` in training.

    References:
        Papamakarios, Pavlakou and Murray 2017, Masked Autoregressive Flow for Density Estimation. Dinh, Sohl-Dickstein
        and Bengio 2017, Density estimation using Real NVP, section 3.7.

    Example:
        >>> norm = fastmaf.BatchNorm(2)
        >>> z, ladj = norm(5 + 3 * torch.randn(200, 2))
        >>> torch.allclose(z.mean(dim=0), torch.zeros(2), atol=1e-4)
        True
        >>> x = torch.randn(4, 2)
        >>> torch.allclose(norm.eval().inverse(norm(x)[0])[0], x, atol=1e-4)
        True
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features must be at least 1; found {features}")
        if not 0 < eps < math.inf:
            raise ValueError(f"eps must be positive; found {eps}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1]; found {momentum}")
        self.features, self.eps, self.momentum = features, float(eps), float(momentum)
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        self.shift = nn.Parameter(torch.zeros(features, **make))
        self.log_scale = nn.Parameter(torch.zeros(features, **make))
        self.register_buffer("running_mean", torch.zeros(features, **make))
        self.register_buffer("running_var", torch.ones(features, **make))

    @property
    def needs_eager(self) -> bool:
        return self.training

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and variance ``[D]`` for a batch; in training they are its own, and the running ones follow."""
        if not self.training:
            return self.running_mean, self.running_var
        if (n := len(x)) < 2:
            raise ValueError(
                f"BatchNorm needs a batch of at least 2 rows in training, whose mean and variance it takes; found {n}. "
                "Call eval() to use the running statistics"
            )
        variance, mean = torch.var_mean(x, dim=0, correction=0)
        with torch.no_grad():
            for running, batch in ((self.running_mean, mean), (self.running_var, variance * (n / (n - 1)))):
                running.lerp_(torch.where(batch.isfinite(), batch, running).to(running), self.momentum)
        return mean, variance

    def _log_slope(self, variance: Tensor) -> Tensor:
        """Returns log |dz/dx| ``[D]``."""
        return self.log_scale - 0.5 * (variance + self.eps).log()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = self._statistics(x)
        log_slope = self._log_slope(variance)
        return torch.addcmul(self.shift, x - mean, log_slope.exp()), log_slope.sum().expand(len(x))

    def forward_per_dim(self, x: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = self._statistics(x)
        log_slope = self._log_slope(variance)
        return torch.addcmul(self.shift, x - mean, log_slope.exp()), terms - log_slope

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            raise NotInvertibleError(
                "BatchNorm has no inverse in training, where it takes the mean and variance of a batch of x: call "
                "eval() on the flow before inverse and sample, or use ActNorm to train by samples"
            )
        log_slope = self._log_slope(self.running_var)
        return torch.addcmul(self.running_mean, z - self.shift, (-log_slope).exp()), (-log_slope.sum()).expand(len(z))

    def config(self) -> dict[str, Any]:
        return {"features": self.features, "eps": self.eps, "momentum": self.momentum}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BatchNorm:
        options = {name: config[name] for name in ("eps", "momentum")}
        return cls(config["features"], **options, dtype=tensors["shift"].dtype)

    def extra_repr(self) -> str:
        return f"features={self.features}, eps={self.eps:g}, momentum={self.momentum:g}"
