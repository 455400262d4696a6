"""Inverse autoregressive flows (IAF)."""

from __future__ import annotations

from fastmaf.flows.maf import MAF
from fastmaf.transforms import AffineAutoregressive, Inverted, Transform


class IAF(MAF):
    """An inverse autoregressive flow: the blocks of a MAF turned round, so that sampling is the direct pass::

        x[d] = (z[d] − shift[d]) exp(−log_scale[d]),    shift[d], log_scale[d] = MADE(z[0..d−1])

    in the order of each block. All samples, with their log-densities by ``sample_and_log_prob``, cost one pass of the
    networks, and ``rsample`` is differentiable at the cost of a training step of a MAF: for variational inference. The
    density of given data takes one step per level, as sampling of a MAF does; for maximum likelihood a ``MAF`` is
    faster.

    The arguments are those of ``MAF``, except that masks are strict. Normalisations are those of x, as in a MAF: a
    ``BatchNorm`` has no samples in training, and an ``ActNorm`` starts by the first data in training, not by samples.
    Dropout in training acts on samples, which are the direct pass, and not on densities of given data.

    Raises:
        TypeError, ValueError: as ``MAF``.
        NotInvertibleError: ``strict`` is False.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling 2016, Improving Variational Inference with Inverse
        Autoregressive Flow.

    Example:
        >>> flow = fastmaf.IAF(features=2, blocks=2, hidden_features=16, seed=0)
        >>> target = torch.distributions.Normal(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.5]))
        >>> optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
        >>> for _ in range(20):
        ...     x, log_prob = flow.rsample_and_log_prob(64)
        ...     loss = (log_prob - target.log_prob(x).sum(dim=1)).mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> flow.log_prob(x).shape
        torch.Size([64])
    """

    _class_in_files = "IAF"

    @staticmethod
    def _turned(block: AffineAutoregressive) -> Transform:
        block.check_invertible()
        return Inverted(block)
