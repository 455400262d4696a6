"""The base class of invertible transforms, of which a flow is a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastmaf.kernels.autocast import outside_autocast
from fastmaf.validation import check_context


class NotInvertibleError(RuntimeError):
    """The model has no inverse, such as one with the leaky output mask of the published notebook.

    Example:
        >>> flow = fastmaf.MAF(features=3, blocks=1, hidden_features=16, strict=False)
        >>> try:
        ...     flow.sample()
        ... except fastmaf.NotInvertibleError:
        ...     print("no inverse")
        no inverse
    """


class Transform(nn.Module):
    """An invertible map f from ``x`` ``[N, D]`` to ``z`` ``[N, D]``, row by row.

    ``forward`` maps data towards the base (x to z) and ``inverse`` maps it back. Both return the log-determinant of
    their own Jacobian in nats. A ``Flow`` of transforms also accepts other batch shapes.

    A subclass implements ``forward`` and ``inverse``; ``forward_per_dim`` for ``Flow.nll_per_dim``; and ``config`` and
    ``from_config``, with an entry in ``fastmaf.transforms.TRANSFORMS``, for ``Flow.save``.

    A subclass that depends on a context sets ``context_features`` to its size C, as an attribute or a property. A flow
    then calls ``forward(x, context)``, ``inverse(z, context)`` and ``forward_per_dim(x, terms, context)`` with a
    context ``[N, C]``. Others are called without one.

    ``forward``, ``inverse`` and ``forward_per_dim`` of subclasses run outside of ambient ``torch.autocast``; bfloat16
    and float16 inputs from an autocast region are converted to the dtype of the transform. A transform that computes in
    half precision enters ``torch.autocast`` itself.

    Attributes:
        features: D.
        context_features: C; 0 for a transform that takes no context.

    Example:
        >>> import math
        >>> class Scale(fastmaf.Transform):
        ...     def __init__(self, features, factor):
        ...         super().__init__()
        ...         self.features, self.log_factor = features, math.log(factor)
        ...
        ...     def forward(self, x):
        ...         return x * math.exp(self.log_factor), x.new_full(x.shape[:1], self.features * self.log_factor)
        ...
        ...     def inverse(self, z):
        ...         return z * math.exp(-self.log_factor), z.new_full(z.shape[:1], -self.features * self.log_factor)
        >>> block = fastmaf.AffineAutoregressive(fastmaf.MADE(features=3, hidden_features=16))
        >>> flow = fastmaf.Flow(3, [Scale(3, 0.5), block])
        >>> flow.log_prob(torch.randn(5, 3)).shape
        torch.Size([5])

        A transform with a context:

        >>> class Shift(fastmaf.Transform):
        ...     def __init__(self, features):
        ...         super().__init__()
        ...         self.features = self.context_features = features
        ...
        ...     def forward(self, x, context):
        ...         return x - context, x.new_zeros(len(x))
        ...
        ...     def inverse(self, z, context):
        ...         return z + context, z.new_zeros(len(z))
        >>> flow = fastmaf.Flow(3, [Shift(3), block])
        >>> flow.log_prob(torch.randn(5, 3), torch.ones(3)).shape
        torch.Size([5])
    """

    features: int
    context_features: int = 0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("forward", "inverse", "forward_per_dim"):
            if name in vars(cls):
                setattr(cls, name, outside_autocast(vars(cls)[name]))

    @property
    def needs_eager(self) -> bool:
        """Whether the next pass forward changes the transform, and must not be recorded as a CUDA graph."""
        return False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``z`` ``[N, D]`` and ``ladj`` ``[N]``, ``log |det dz/dx|`` in nats, for ``x`` ``[N, D]``."""
        raise NotImplementedError

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]``, ``log |det dx/dz|`` in nats, for ``z`` ``[N, D]``."""
        raise NotImplementedError

    def forward_per_dim(self, x: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        """Maps x to z, and adds the contribution of each dimension to −ladj to ``terms``.

        Args:
            x: ``[N, D]``.
            terms: the contributions of the preceding transforms ``[N, D]``, in the order of the dimensions of ``x``.

        Returns:
            ``z`` and ``terms``, ``[N, D]``, in the order of the dimensions of ``z``.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not define how its log-determinant is shared among the dimensions"
        )

    def config(self) -> dict[str, Any]:
        """Returns the arguments of ``from_config`` other than the ``state_dict``, in plain JSON types."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Transform:
        """Builds a transform from its ``config()``; ``tensors``, its ``state_dict``, are loaded into it afterwards."""
        raise NotImplementedError


def given(transform: Transform, context: Tensor | None) -> tuple[Any, ...]:
    """Returns what a transform is called with after its other arguments: the context, if it takes one.

    Raises:
        ValueError: it takes one, and there is none.
    """
    if not transform.context_features:
        return ()
    check_context(context, transform.context_features)
    return (context,)
