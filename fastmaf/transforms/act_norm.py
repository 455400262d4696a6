"""An affine map of each dimension that the first batch standardises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from fastmaf.training.failures import agree, connected
from fastmaf.transforms.elementwise import ElementwiseAffine
from fastmaf.validation import as_tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class ActNorm(ElementwiseAffine):
    """An affine map of each dimension with a data-dependent start::

        z[d] = exp(log_scale[d]) x[d] + shift[d],    ladj = Σ_d log_scale[d]

    The first batch that passes forward in training mode, or the data given to ``fit_``, sets both parameters such that
    z has mean 0 and standard deviation 1 in each dimension; dimensions that are constant are only centred. From then on
    they are trained as any others. Before, and in evaluation mode, the map is what its parameters say: the identity at
    first.

    A batch that is not finite does not start it. Where several processes train together, the start is that of all of
    their batches, for which each process has to pass one forward. The start can be neither compiled nor recorded as a
    CUDA graph: pass a batch eagerly before. ``TrainingStep`` and ``ReplayedLogProb`` do so.

    Args:
        features: D.
        device: the device of the parameters.
        dtype: the dtype of the parameters.

    Attributes:
        initialized: whether the start is over, bool ``[]``, a buffer.

    Raises:
        ValueError: ``features`` is less than 1, or, by ``forward`` in training, the first batch has less than two rows.

    References:
        Kingma and Dhariwal 2018, Glow: Generative Flow with Invertible 1x1 Convolutions, section 3.1.

    Example:
        >>> x = 5 + 3 * torch.randn(200, 2)
        >>> norm = fastmaf.ActNorm(2)
        >>> z, ladj = norm(x)
        >>> torch.allclose(z.mean(dim=0), torch.zeros(2), atol=1e-4)
        True
        >>> torch.allclose(norm.inverse(z)[0], x, atol=1e-4)
        True
    """

    initialized: Tensor

    def __init__(
        self, features: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        if features < 1:
            raise ValueError(f"features must be at least 1; found {features}")
        start = torch.zeros(features, device=device, dtype=dtype)
        super().__init__(start, start)
        self.register_buffer("initialized", torch.zeros((), device=device, dtype=torch.bool))
        self._started = False  # once it has been seen true, the buffer is not read again: a GPU would be waited for

    @property
    def needs_eager(self) -> bool:
        return self.training and not self._started

    @torch.no_grad()
    def fit_(self, x: Tensor | ArrayLike) -> ActNorm:
        """Sets both parameters by data as they arrive at this transform.

        Args:
            x: ``[n, D]``, n >= 2, finite; a tensor, a NumPy array or a nested list.

        Returns:
            The transform itself.

        Raises:
            TypeError: ``x`` is neither a tensor nor an array of numbers.
            ValueError: ``x`` has another shape or is not finite.
        """
        x = as_tensor("x", x, self.shift)
        if x.dim() != 2 or x.shape[1] != self.features or len(x) < 2:
            raise ValueError(f"x must have shape [n, {self.features}] with n >= 2; found {list(x.shape)}")
        mean, variance = _moments(x.double())
        if not self._start(mean, variance):
            raise ValueError("x must be finite; found NaN or infinite values")
        return self

    def _start(self, mean: Tensor, variance: Tensor) -> bool:
        """Sets both parameters by float64 moments; returns whether these are finite."""
        if not bool((mean.isfinite() & variance.isfinite()).all()):
            return False
        deviation = variance.sqrt()
        # A deviation that rounding alone explains is that of a constant.
        constant = deviation <= torch.finfo(self.shift.dtype).eps * mean.abs()
        log_scale = -torch.where(constant, 1.0, deviation).log()
        self.log_scale.copy_(log_scale)
        self.shift.copy_(-mean * log_scale.exp())
        self.initialized.fill_(True)
        self._started = True
        return True

    @torch.no_grad()
    def _start_by(self, x: Tensor) -> None:
        """Starts by the first batch in training."""
        if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            raise RuntimeError(
                "ActNorm starts by its first batch in training, which can be neither compiled nor recorded as a CUDA "
                "graph: call fit_, or pass one batch forward eagerly before"
            )
        if self.initialized:
            self._started = True
            return
        if len(x) < 2:
            raise ValueError(
                f"ActNorm starts by the mean and standard deviation of its first batch in training, which needs at "
                f"least 2 rows; found {len(x)}"
            )
        self._start(*_moments(x.detach().double(), together=True))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.needs_eager:
            self._start_by(x)
        return super().forward(x)

    def forward_per_dim(self, x: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        if self.needs_eager:
            self._start_by(x)
        return super().forward_per_dim(x, terms)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._started = not self.initialized.is_meta and bool(self.initialized)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ActNorm:
        return cls(config["features"], dtype=tensors["shift"].dtype)


def _moments(x: Tensor, *, together: bool = False) -> tuple[Tensor, Tensor]:
    """Returns mean and variance ``[D]`` of the rows of ``x``, with ``together`` those of all processes."""
    together = together and distributed.is_available() and distributed.is_initialized()
    if together:
        agree(distributed.group.WORLD, x.device)  # none of them may wait for one that has failed

    def summed(part: Tensor) -> Tensor:
        if together:
            with connected():
                distributed.all_reduce(part)
        return part

    n = summed(x.new_tensor(float(len(x))))
    mean = summed(x.sum(dim=0)) / n
    return mean, summed((x - mean).square().sum(dim=0)) / n
